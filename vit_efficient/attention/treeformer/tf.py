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

Tokens are sorted by leaf, and queries that read the same leaves attend together (`reads.py`). On a GPU all groups of
them lie one after the other in one call of a fused kernel, for which the host reads the sizes of the largest groups: it
waits once per layer. On the CPU small groups are padded to a batch, with groups of about their size, and large ones
come one after the other. How many there are, the data say, so that there is no single graph to compile or to export.

On a GPU the same input gives the same output, bit for bit. Its gradient may differ in the last bits from run to run, by
the order in which kernels add to those of queries, and of keys that several groups read; under
`torch.use_deterministic_algorithms` it does not.

Letters: B batch, N tokens, P prefix, C channels, H heads, D = C / H, h height, L = 2^h leaves.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.attention.functional import attend
from vit_efficient.attention.registry import register_attention
from vit_efficient.attention.treeformer.reads import Part, Reads
from vit_efficient.attention.treeformer.tc import TreeAttention
from vit_efficient.attention.treeformer.trees import (
    CHUNK,
    best_leaves,
    in_leaf,
    leaves_of,
    membership,
    products,
    route,
    route_both,
)
from vit_efficient.flops.formulas import register_flops
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.checks import is_integer
from vit_efficient.utils.compat import attend_varlen
from vit_efficient.utils.device import on_gpu
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import product_dtype, without_autocast

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

    def forward(
        self,
        x: Tensor,
        grid: PatchGrid,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        self.check_call(x, grid, attn_mask, is_causal)
        trees = (self.tree.weight, self.tree.bias, self.num_leaves)
        how = (self.scale, self.fused_attn, self.drop_rate)
        q, k, v = self.project(x)
        routed = q, k  # trees ask what a token is, not where
        q, k = self.rotate(q, k, rope, grid.prefix)
        y_BNC = attend_in_leaves(q, k, v, *routed, *trees, grid.prefix, grid.num_patches, how, self.pad_groups)
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed_q: Tensor,
    routed_k: Tensor,
    weight,
    bias,
    num_leaves: int,
    prefix: int,
    num_patches: int,
    how: tuple,
    pad: bool,
) -> Tensor:
    """Softmax attention of the patches inside their leaves, and of the prefix tokens among all.

    Args:
        q, k, v: (B, H, N, D)
        routed_q, routed_k: What the trees see of q and k, without rotary positions.
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
    y = _attend_patches(q, k, v, routed_q, routed_k, weight, bias, num_leaves, prefix, num_patches, how, pad)
    if prefix:
        y = torch.cat([attend(q[:, :, :prefix], k, v, *how).transpose(1, 2), y], dim=1)
    return y.to(v.dtype).flatten(2)


@torch.compiler.disable(reason=NO_GRAPH)
def _attend_patches(
    q: Tensor, k: Tensor, v: Tensor, routed_q, routed_k, weight, bias, num_leaves, prefix, num_patches, how, pad: bool
) -> Tensor:
    """(B, H, N, D) five times, of all tokens → (B, N − P, H, D), of the patches"""
    # Split, not sliced: the gradient of a slice is as large as the whole.
    (_, q), (k_prefix, k), (v_prefix, v) = (t.split([prefix, num_patches], dim=2) for t in (q, k, v))
    routed_q, routed_k = (t.detach()[:, :, prefix:] for t in (routed_q, routed_k))
    dim, (scale, fused, dropout) = v.shape[-1], how
    if not v.numel():
        return v.transpose(1, 2)
    with torch.no_grad(), without_autocast(v):
        dtype = torch.promote_types(v.dtype, torch.float32)
        trees = (weight.to(dtype), bias.to(dtype))
        if q.is_meta:  # where there are no data
            for t in (routed_q, routed_k):
                products(t.to(dtype), trees[0])
            y = torch.ops.vit_efficient.attend_in_leaves(q, k, v, prefix, num_leaves, leaves_of(weight))
            return y.transpose(1, 2)
        if num_leaves == 1:
            leaf_q, leaf_k = route_both(routed_q, routed_k, weight, bias)
            leaves_q = leaf_q.unsqueeze(-1)
        else:
            leaves_q = best_leaves(routed_q.to(dtype), *trees, num_leaves)
            leaf_k = route(routed_k.to(dtype), *trees)

    learns = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    if learns:
        # Channels more, which add nothing to a score and carry the gradient of m(q) · m(k): (m(q) of each leaf, 1)
        # against (which leaf it is, m(k)).
        with without_autocast(v):
            trees = (weight.to(dtype), bias.to(dtype))  # with their gradient
            m_q, m_k = (
                membership(t.to(dtype), *trees, leaves).to(t.dtype) / scale
                for t, leaves in ((routed_q, leaves_q), (routed_k, leaf_k.unsqueeze(-1)))
            )
        q = torch.cat([q, m_q, torch.ones_like(m_k)], dim=-1)
        k = torch.cat([k, torch.zeros_like(m_q), m_k], dim=-1)
        k_prefix, v_prefix, v = (F.pad(t, (0, q.shape[-1] - t.shape[-1])) for t in (k_prefix, v_prefix, v))

    packs = fused and on_gpu(v)
    reads = Reads.of(leaves_q, leaf_k, leaves_of(weight), prefix, by_size=not packs)
    q, k, v = (t.transpose(1, 2).flatten(0, 2) for t in (q, k, v))
    if prefix:
        k, v = (
            torch.cat([t, of_prefix.unsqueeze(2).expand(-1, -1, reads.copies, -1, -1).flatten(0, 3)])
            for t, of_prefix in ((k, k_prefix), (v, v_prefix))
        )
    q, k, v = q.index_select(0, reads.queries), k.index_select(0, reads.keys), v.index_select(0, reads.keys)
    if learns:
        k = k + F.pad(in_leaf(reads.pieces(num_leaves), num_leaves, k.dtype), (dim, 1))
    y = []
    for part in reads.split(q, k, v):
        if packs:
            y.append(attend_packed(part, scale, dropout))
        elif pad and (on_gpu(v) or part.most_queries * part.most_keys <= PADDED):
            y.append(_attend_padded(part, how))
        else:
            for q_group, k_group, v_group in _groups(part.q, part.k, part.v, part.counts):
                # In parts where scores are written out, so that a leaf with all tokens has no N × N matrix either.
                rows = (q_group,) if fused else q_group.split(CHUNK)
                y += [attend(r[None, None], k_group[None, None], v_group[None, None], *how)[0, 0] for r in rows]
    y = y[0] if len(y) == 1 else torch.cat(y)
    y = torch.empty_like(y).index_copy_(0, reads.queries, y)
    return y[..., :dim].unflatten(0, leaf_k.transpose(1, 2).shape)


def _groups(q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    of_q, of_k = counts.tolist()
    return zip(q.split(of_q), k.split(of_k), v.split(of_k), strict=True)


def attend_packed(part: Part, scale: float, dropout: float) -> Tensor:
    """All groups as they lie, one after the other, none padded, in one kernel: → (Σ num_queries, D)"""
    dtype = product_dtype(part.v)
    q, k, v = (t.to(dtype) for t in part[:3])
    ends = F.pad(part.counts.cumsum(1, dtype=torch.int32), (1, 0))
    return packed(q, k, v, ends, part.most_queries, part.most_keys, scale, dropout)


def packed(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, most_queries: int, most_keys: int, scale: float, dropout: float
) -> Tensor:
    """Softmax attention inside groups that lie one after the other, each with queries and keys or with none of both.

    Args:
        q, k, v: (queries, D), (keys, D), (keys, D)
        ends: Where the queries and keys of groups begin, and those of the last one end, (2, G + 1), int32.
        most_queries, most_keys: Of a group.

    Returns:
        (queries, D)
    """
    if q.is_cuda and q.dtype != torch.float64:
        return attend_varlen(q, k, v, *ends, most_queries, most_keys, scale, dropout)
    groups = _groups(q, k, v, ends.diff())
    y = [attend(*(t[None, None] for t in group), scale, True, dropout)[0, 0] for group in groups if len(group[0])]
    return torch.cat(y)


def _attend_padded(part: Part, how: tuple) -> Tensor:
    """All groups as one batch, with keys that are masked and queries that are dropped again: → (Σ num_queries, D)"""
    rows_q, is_query = _padding(part.counts[0], part.most_queries)
    rows_k, is_key = _padding(part.counts[1], part.most_keys)
    q = part.q.index_select(0, rows_q.flatten()).unflatten(0, rows_q.shape)[:, None]
    k, v = (t.index_select(0, rows_k.flatten()).unflatten(0, rows_k.shape)[:, None] for t in (part.k, part.v))
    y = attend(q, k, v, *how, is_key[:, None, None])
    return y.flatten(0, 2).index_select(0, is_query.flatten().nonzero()[:, 0])


def _padding(counts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Of groups of rows, one after the other: rows (G, longest), padded with some row of another group, and which of
    them are the group's own."""
    column = torch.arange(longest, device=counts.device)
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
