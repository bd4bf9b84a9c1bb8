"""TF-Attention of Treeformer: softmax attention among the tokens that a tree brings together.

Source: Madaan et al., "Treeformer: Dense Gradient Trees for Efficient Attention Computation", ICLR 2023, arXiv
2208.09015, which has no public code. A query attends, by softmax, to the keys in its own leaf of the tree of its head
(`trees.py`); in the k-ary form, to those of its best several leaves.

On images: prefix tokens are in every leaf, as keys; as queries they attend to all N tokens. A query that finds no key
at all reads the parents of its leaves instead, or theirs, up to the first level where there is one.

Gradients of queries, keys and values are those of softmax attention inside the leaves as they are. For the predicates,
the softmax is taken to weigh each key that a query reads by m(q) · m(k), the memberships of both in the leaf of the
key, whose value is 1 and whose gradient the straight-through one of `trees.py`. Leaves that a query does not read would
take N² scores, and say nothing: that is why TF needs trees that TC has trained.

Tokens are sorted by leaf, and queries that read the same leaves attend together. Small groups of them are padded to a
batch, with groups of about their size; on the CPU large ones come one after the other. How many there are, the data
say, so that there is no single graph to compile or to export.

Letters: B batch, N tokens, P prefix, C channels, H heads, D = C / H, h height, L = 2^h leaves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.attention.functional import attend
from vit_efficient.attention.registry import register_attention
from vit_efficient.attention.treeformer.tc import TreeAttention
from vit_efficient.attention.treeformer.trees import CHUNK, best_leaves, leaves_of, membership, products, route
from vit_efficient.flops.formulas import register_flops
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.checks import is_integer
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import without_autocast

# Queries × keys of the largest group that the CPU pads: what is saved by one call for many pays for the padding.
PADDED = 64 * 64

NO_GRAPH = (
    "attention 'treeformer_tf' reads the sizes of its leaves from the data and cannot be compiled as one graph, traced "
    "or exported; use torch.compile without fullgraph, or 'treeformer_tc'"
)


@register_attention('treeformer_tf')
class LeafAttention(TreeAttention):
    """TF-Attention: a patch attends to the prefix tokens and to the patches in its leaf, a prefix token to all.

    With `tree_height=0` this is exact attention.

    Args:
        dim, num_heads, **kwargs: As timm's `Attention`.
        tree_height: h. There are 2^h leaves.
        num_leaves: How many leaves a query reads: its own, and the others of largest product of path probabilities
            (ties as `torch.topk` has them). From 2 on nearly every query has a set of leaves of its own, whose keys are
            gathered for it: that takes more time and memory than exact attention does, and is there to be compared.

    Raises:
        UserError: If an option is unknown or out of range; in `forward`, under `torch.jit.trace` and `torch.export`.
    """

    pad_groups = True
    cost_depends_on_data = True

    def configure(self, *, tree_height: int = 4, num_leaves: int = 1) -> None:
        self.add_trees(tree_height)
        if not (is_integer(num_leaves, 1) and num_leaves <= 2**self.tree.height):
            raise UserError(f'num_leaves must be from 1 to 2^tree_height, got {num_leaves=}, {tree_height=}')
        self.num_leaves = int(num_leaves)

    @property
    def options(self) -> dict[str, Any]:
        return dict(tree_height=self.tree.height, num_leaves=self.num_leaves)

    def forward(self, x: Tensor, grid: PatchGrid, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        self.check_call(x, grid, attn_mask, is_causal)
        trees = (self.tree.weight, self.tree.bias, self.num_leaves)
        how = (self.scale, self.fused_attn, self.drop_rate)
        y_BNC = attend_in_leaves(*self.project(x), *trees, grid.prefix, grid.num_patches, how, self.pad_groups)
        return self.finish(y_BNC, x)

    def export_error(self, suffix: str) -> str | None:
        return NO_GRAPH

    def prepare_counting(self) -> None:
        self.pad_groups = False

    def num_attended(self, grid: PatchGrid) -> int:
        """The keys of a patch in expectation, under uniform leaves, rounded up. A prefix token attends to all."""
        return grid.prefix - (-grid.num_patches * self.num_leaves // 2**self.tree.height)


# A leaf for FX, because what it does depends on the data.
@torch.fx.wrap
@register_notrace_function
def attend_in_leaves(
    q: Tensor, k: Tensor, v: Tensor, weight, bias, num_leaves: int, prefix: int, num_patches: int, how: tuple, pad: bool
) -> Tensor:
    """Softmax attention of the patches inside their leaves, and of the prefix tokens among all.

    Args:
        q, k, v: (B, H, N, D)
        weight, bias: The predicates, (H, J, D) and (H, J).
        num_leaves: How many leaves a query reads.
        prefix, num_patches: How many of the N tokens are prefix tokens, and patches.
        how: What `functional.attend` takes: scale, fused, dropout.
        pad: Whether small groups of queries may be padded to a batch.

    Returns:
        (B, N, C), of the dtype of v.

    Raises:
        UserError: Under `torch.jit.trace` and `torch.export`.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise UserError(NO_GRAPH)
    y = [attend(q[:, :, :prefix], k, v, *how)] if prefix else []
    y.append(_attend_patches(q, k, v, weight, bias, num_leaves, prefix, num_patches, how, pad))
    return torch.cat(y, dim=2).to(v.dtype).transpose(1, 2).flatten(2)


@torch.compiler.disable(reason=NO_GRAPH)
def _attend_patches(
    q: Tensor, k: Tensor, v: Tensor, weight, bias, num_leaves, prefix, num_patches, how: tuple, pad: bool
) -> Tensor:
    """(B, H, N, D) three times, of all tokens → (B, H, N − P, D), of the patches"""
    # Split, not sliced: the gradient of a slice is as large as the whole.
    (_, q), (k_prefix, k), (v_prefix, v) = (t.split([prefix, num_patches], dim=2) for t in (q, k, v))
    dim, (scale, fused, _) = v.shape[-1], how
    with torch.no_grad(), without_autocast(v):
        trees = [t.to(torch.promote_types(v.dtype, torch.float32)) for t in (weight, bias)]
        to_route = [t.to(trees[0].dtype) for t in (q, k)]
        if q.is_meta:  # where there are no data
            for t in to_route:
                products(t, trees[0])
            return torch.ops.vit_efficient.attend_in_leaves(q, k, v, prefix, num_leaves, leaves_of(weight))
        leaves_q, leaf_k = best_leaves(to_route[0], *trees, num_leaves), route(to_route[1], *trees)

    learns = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    if learns:
        # Channels more, which add nothing to a score and carry the gradient of m(q) · m(k): (m(q) of each leaf, 1)
        # against (which leaf it is, m(k)).
        with without_autocast(v):
            trees = [t.to(trees[0].dtype) for t in (weight, bias)]  # with their gradient
            m_q, m_k = (
                membership(t.detach().to(trees[0].dtype), *trees, leaves).to(t.dtype) / scale
                for t, leaves in ((q, leaves_q), (k, leaf_k.unsqueeze(-1)))
            )
        q = torch.cat([q, m_q, torch.ones_like(m_k)], dim=-1)
        k = torch.cat([k, torch.zeros_like(m_q), m_k], dim=-1)
        k_prefix, v_prefix, v = (F.pad(t, (0, q.shape[-1] - t.shape[-1])) for t in (k_prefix, v_prefix, v))

    reads = Reads.of(leaves_q, leaf_k, leaves_of(weight), prefix)
    q = q.flatten(0, 2).index_select(0, reads.queries)
    k, v = (t.flatten(0, 2) for t in (k, v))
    if prefix:
        k, v = (torch.cat([t, of_prefix.flatten(0, 2)]) for t, of_prefix in ((k, k_prefix), (v, v_prefix)))
    k, v = (t.index_select(0, reads.keys) for t in (k, v))
    if learns:
        k = k + F.pad(F.one_hot(reads.pieces, num_leaves + 1)[:, 1:].to(k.dtype), (dim, 1))
    y = [v[:0]]  # of an empty batch, all
    for part in reads.split(q, k, v):
        if pad and (q.is_cuda or part.num_queries.amax() * part.num_keys.amax() <= PADDED):
            y.append(_attend_padded(part, how))
            continue
        tokens = (t.split(n.tolist()) for t, n in zip(part[:3], (part.num_queries, *[part.num_keys] * 2), strict=True))
        for q_group, k_group, v_group in zip(*tokens, strict=True):
            # In parts where scores are written out, so that a leaf with all tokens has no N × N matrix either.
            rows = (q_group,) if fused else q_group.split(CHUNK)
            y += [attend(r[None, None], k_group[None, None], v_group[None, None], *how)[0, 0] for r in rows]
    y = torch.cat(y).index_select(0, reads.queries.argsort())
    return y[..., :dim].unflatten(0, leaf_k.shape)


class Part(NamedTuple):
    """Groups of queries, one after the other, and the keys that each group reads."""

    q: Tensor  # (Σ num_queries, D)
    k: Tensor  # (Σ num_keys, D)
    v: Tensor
    num_queries: Tensor  # of each group
    num_keys: Tensor


@dataclass(frozen=True)
class Reads:
    """Who reads what: queries of one head that read the same leaves are a group.

    Groups are in the order of the powers of two up to which they can be padded, so that those of one size are together.
    """

    queries: Tensor  # rows of (B · H · N) queries, group by group
    keys: Tensor  # rows of (B · H · N) patches and, after them, (B · H · P) prefix tokens, that each group reads
    pieces: Tensor  # of each key, which of the leaves of its group it is in, from 1; 0 if it is in none
    num_queries: Tensor  # of each group
    num_keys: Tensor
    groups: list[int]  # how many of them are of each size

    @classmethod
    def of(cls, leaves_q: Tensor, leaf_k: Tensor, num_leaves: int, prefix: int) -> 'Reads':
        """From the leaves that queries read, (B, H, N, n), ascending, and those that keys are in, (B, H, N)."""
        batch, heads, n = leaf_k.shape
        trees = torch.arange(batch * heads, device=leaf_k.device)
        row = (leaf_k.flatten(0, 1) + num_leaves * trees[:, None]).flatten()  # in a table of all leaves
        sizes = row.bincount(minlength=num_leaves * len(trees))
        ends, patches = sizes.cumsum(0), row.argsort(stable=True)

        group = trees.repeat_interleave(n)
        for column in leaves_q.flatten(0, 2).unbind(1):
            group = (group * num_leaves + column).unique(return_inverse=True)[1]
        queries, num_queries = group.argsort(stable=True), group.bincount()
        first = queries[num_queries.cumsum(0) - num_queries]
        tree, leaves = first // n, leaves_q.flatten(0, 2)[first]

        # A group reads n ranges of the sorted patches; without any key in them, those of the nodes above.
        low = leaves + num_leaves * tree[:, None]
        size, start, level = sizes[low], ends[low] - sizes[low], 0
        piece = torch.arange(1, leaves.shape[1] + 1, device=leaf_k.device).expand_as(leaves)
        while not prefix and (empty := (size.sum(1) == 0).nonzero()[:, 0]).numel():
            level += 1
            node = leaves[empty] >> level
            low = (node << level) + num_leaves * tree[empty, None]
            start[empty] = ends[low] - sizes[low]
            repeated = F.pad(node[:, 1:] == node[:, :-1], (1, 0))
            size[empty] = torch.where(repeated, 0, ends[low + 2**level - 1] - start[empty])
            piece = piece.index_fill(0, empty, 0)

        start = torch.cat([len(patches) + prefix * tree[:, None], start], dim=1)
        size = torch.cat([torch.full_like(tree[:, None], prefix), size], dim=1)
        num_keys, piece = size.sum(1), F.pad(piece, (1, 0))
        powers = [torch.log2(count.double()).ceil().long() for count in (num_keys, num_queries)]
        sizes, in_order = (64 * powers[0] + powers[1]).sort(stable=True)
        groups = sizes.unique_consecutive(return_counts=True)[1].tolist()
        rows = torch.cat([patches, torch.arange(len(trees) * prefix, device=leaf_k.device) + len(patches)])
        size_in_order = size[in_order].flatten()
        return cls(
            queries[_ranges((num_queries.cumsum(0) - num_queries)[in_order], num_queries[in_order])],
            rows[_ranges(start[in_order].flatten(), size_in_order)],
            piece[in_order].flatten().repeat_interleave(size_in_order),
            num_queries[in_order],
            num_keys[in_order],
            groups,
        )

    def split(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Part]:
        """Groups of one size at a time."""
        num_queries, num_keys = self.num_queries.split(self.groups), self.num_keys.split(self.groups)
        of_q, of_k = ([count.sum().item() for count in counts] for counts in (num_queries, num_keys))
        tokens = (q.split(of_q), k.split(of_k), v.split(of_k))
        return (Part(*part) for part in zip(*tokens, num_queries, num_keys, strict=True))


def _ranges(starts: Tensor, sizes: Tensor) -> Tensor:
    """start, start + 1, … of each range, one after the other."""
    shift = (starts - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes)
    return shift + torch.arange(len(shift), device=shift.device)


def _attend_padded(part: Part, how: tuple) -> Tensor:
    """All groups as one batch, with keys that are masked and queries that are dropped again: → (Σ num_queries, D)"""
    (rows_q, is_query), (rows_k, is_key) = _padding(part.num_queries), _padding(part.num_keys)
    q = part.q.index_select(0, rows_q.flatten()).unflatten(0, rows_q.shape)[:, None]
    k, v = (t.index_select(0, rows_k.flatten()).unflatten(0, rows_k.shape)[:, None] for t in (part.k, part.v))
    y = attend(q, k, v, *how, is_key[:, None, None])
    return y.flatten(0, 2).index_select(0, is_query.flatten().nonzero()[:, 0])


def _padding(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of groups of rows, one after the other: rows (G, longest), padded with some row of another group, and which of
    them are the group's own."""
    column = torch.arange(counts.amax(), device=counts.device)
    starts = counts.cumsum(0) - counts
    own = column < counts[:, None]
    return torch.where(own, starts[:, None] + column, 0), own


# On the meta device there are no leaves. One operator stands for the attention inside them, as long as it takes when
# they are of one size.
_library = torch.library.Library('vit_efficient', 'DEF')
_library.define('attend_in_leaves(Tensor q, Tensor k, Tensor v, int prefix, int num_leaves, int of_leaves) -> Tensor')


@torch.library.impl(_library, 'attend_in_leaves', 'Meta')
def _attend_on_meta(q: Tensor, k: Tensor, v: Tensor, prefix: int, num_leaves: int, of_leaves: int) -> Tensor:
    return torch.empty_like(v)


@register_flops('vit_efficient::attend_in_leaves', batched=True)
def _expected(inputs: list, output: tuple[int, ...]) -> int:
    """Of N patches, each reads the prefix and, expected, N · num_leaves / L keys."""
    q, _, v, prefix, num_leaves, of_leaves = inputs
    batch, heads, n, dim = q
    return batch * heads * (n * prefix + n * n * num_leaves // of_leaves) * (dim + v[-1])
