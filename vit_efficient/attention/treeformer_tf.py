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

Tokens are sorted by leaf, and queries that read the same leaves attend together, one after the other in a plain loop:
how many there are, the data say, so that there is no single graph to compile or to export.

Letters: B batch, N tokens, P prefix, C channels, H heads, D = C / H, h height, L = 2^h leaves.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.attention import base
from vit_efficient.attention.registry import register_attention
from vit_efficient.attention.treeformer_tc import TreeAttention, attend
from vit_efficient.attention.trees import CHUNK, best_leaves, leaves_of, membership, products, route
from vit_efficient.bases import without_autocast
from vit_efficient.flop_formulas import register_flops
from vit_efficient.grid import PatchGrid

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
            (ties as `torch.topk` has them).

    Raises:
        ValueError: If an option is unknown or out of range; in `forward`, under `torch.jit.trace` and `torch.export`.
    """

    def configure(self, *, tree_height: int = 4, num_leaves: int = 1) -> None:
        self.add_trees(tree_height)
        if type(num_leaves) is not int or not 1 <= num_leaves <= 2**tree_height:
            raise ValueError(f'num_leaves must be from 1 to 2^tree_height, got {num_leaves=}, {tree_height=}')
        self.num_leaves = num_leaves

    @property
    def options(self) -> dict[str, Any]:
        return dict(tree_height=self.tree.height, num_leaves=self.num_leaves)

    def forward(self, x: Tensor, grid: PatchGrid, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        base.check_tokens(self.mechanism, x.shape[1], grid.height, grid.width, grid.prefix, attn_mask, is_causal)
        q, k, v = self.project(x)
        dropout = self.attn_drop.p if self.training else 0.0
        y_BNC = attend_in_leaves(
            q,
            k,
            v,
            self.tree.weight,
            self.tree.bias,
            grid.prefix,
            grid.num_patches,
            self.num_leaves,
            self.scale,
            dropout,
            self.fused_attn,
        )
        y_BNC = self.norm(y_BNC)
        if self.gate is not None:
            y_BNC = y_BNC * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y_BNC))

    def num_attended(self, grid: PatchGrid) -> int:
        """The keys of a patch in expectation, under uniform leaves, rounded up. A prefix token attends to all."""
        return grid.prefix - (-grid.num_patches * self.num_leaves // 2**self.tree.height)

    def extra_repr(self) -> str:
        return f'tree_height={self.tree.height}, num_leaves={self.num_leaves}'


# A leaf for FX, because what it does depends on the data.
@torch.fx.wrap
@register_notrace_function
def attend_in_leaves(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    prefix: int,
    num_patches: int,
    num_leaves: int,
    scale: float,
    dropout: float,
    fused: bool,
) -> Tensor:
    """Softmax attention of the patches inside their leaves, and of the prefix tokens among all.

    Args:
        q, k, v: (B, H, N, D)
        weight, bias: Of the predicates, (H, J, D) and (H, J).
        prefix, num_patches: Of the N tokens.
        num_leaves: That a query reads.
        scale: Of the scores.
        dropout: Share of the attention weights that is dropped.
        fused: Whether to use PyTorch's fused attention.

    Returns:
        (B, N, C), of the dtype of v.

    Raises:
        ValueError: Under `torch.jit.trace` and `torch.export`.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise ValueError(NO_GRAPH)
    y = [attend(q[:, :, :prefix], k, v, scale, dropout, fused)] if prefix else []
    y.append(_attend_patches(q, k, v, weight, bias, prefix, num_patches, num_leaves, scale, dropout, fused))
    return torch.cat(y, dim=2).to(v.dtype).transpose(1, 2).flatten(2)


@torch.compiler.disable(reason=NO_GRAPH)
def _attend_patches(
    q: Tensor, k: Tensor, v: Tensor, weight, bias, prefix, num_patches, num_leaves, scale, dropout, fused
) -> Tensor:
    """(B, H, N, D) three times, of all tokens → (B, H, N − P, D), of the patches"""
    # Split, not sliced: the gradient of a slice is as large as the whole.
    (_, q), (k_prefix, k), (v_prefix, v) = (t.split([prefix, num_patches], dim=2) for t in (q, k, v))
    dim, of_leaf = v.shape[-1], None
    with torch.no_grad(), without_autocast(v):
        trees = [t.to(torch.promote_types(v.dtype, torch.float32)) for t in (weight, bias)]
        to_route = [t.to(trees[0].dtype) for t in (q, k)]
        if q.is_meta:  # where there are no data
            for t in to_route:
                products(t, trees[0])
            return torch.ops.vit_efficient.attend_in_leaves(q, k, v, prefix, num_leaves, leaves_of(weight))
        leaves_q, leaf_k = best_leaves(to_route[0], *trees, num_leaves), route(to_route[1], *trees)

    if torch.is_grad_enabled() and weight.requires_grad:
        # Channels more, which add nothing to a score and carry the gradient of m(q) · m(k): (m(q) of each leaf, 1)
        # against (which leaf it is, m(k)).
        with without_autocast(v):
            trees = [t.to(torch.promote_types(v.dtype, torch.float32)) for t in (weight, bias)]
            m_q, m_k = (
                membership(t.detach().to(trees[0].dtype), *trees, leaves).to(t.dtype) / scale
                for t, leaves in ((q, leaves_q), (k, leaf_k.unsqueeze(-1)))
            )
        q = torch.cat([q, m_q, torch.ones_like(m_k)], dim=-1)
        k = torch.cat([k, torch.zeros_like(m_q), m_k], dim=-1)
        of_leaf = slice(dim, dim + num_leaves)
        k_prefix, v_prefix, v = (F.pad(t, (0, q.shape[-1] - t.shape[-1])) for t in (k_prefix, v_prefix, v))

    key_pieces, value_pieces = _by_leaf(leaf_k, leaves_of(weight), k, v)
    k_prefix, v_prefix = (t.flatten(0, 1).unbind(0) for t in (k_prefix, v_prefix))
    groups, order, counts = _queries_together(leaves_q, leaves_of(weight))
    y = []
    for q_group, (head, leaves) in zip(q.flatten(0, 2).index_select(0, order).split(counts), groups, strict=True):
        read = list(_leaves_with_keys(leaves, key_pieces[head])) if not prefix else leaves
        keys = [key_pieces[head][leaf] for leaf in read]
        if of_leaf is not None:
            keys = [_mark(piece, of_leaf, leaves, leaf) for piece, leaf in zip(keys, read, strict=True)]
        keys = _together(k_prefix[head], keys)
        values = _together(v_prefix[head], [value_pieces[head][leaf] for leaf in read])
        # In parts where scores are written out, so that a leaf with all tokens has no N × N matrix either.
        parts = (q_group,) if fused else q_group.split(CHUNK)
        y += [attend(part[None, None], keys, values, scale, dropout, fused)[0, 0] for part in parts]
    y = torch.cat(y).index_select(0, order.argsort())
    return y[..., :dim].unflatten(0, leaf_k.shape)


def _by_leaf(leaf: Tensor, num_leaves: int, *tokens: Tensor) -> Iterator[list[tuple[Tensor, ...]]]:
    """Of (B, H, N, D) each: for each image and head, one after the other, the tokens (n, D) of each leaf."""
    heads = torch.arange(leaf.shape[0] * leaf.shape[1], device=leaf.device)
    place = (leaf.flatten(0, 1) + num_leaves * heads[:, None]).flatten()
    order = place.argsort(stable=True)
    sizes = place.bincount(minlength=num_leaves * len(heads)).tolist()
    for t in tokens:
        pieces = t.flatten(0, 2).index_select(0, order).split(sizes)
        yield [pieces[start : start + num_leaves] for start in range(0, len(pieces), num_leaves)]


def _queries_together(leaves: Tensor, num_leaves: int) -> tuple[list[tuple[int, list[int]]], Tensor, list[int]]:
    """The groups of queries that read the same leaves (B, H, N, n): image and head, and leaves, of each group; the
    order that brings the queries together; and how many there are of each group."""
    batch, heads, num_tokens = leaves.shape[:3]
    group = torch.arange(batch * heads, device=leaves.device).repeat_interleave(num_tokens)
    for column in leaves.flatten(0, 2).unbind(1):
        group = (group * num_leaves + column).unique(return_inverse=True)[1]
    order, counts = group.argsort(stable=True), group.bincount().tolist()
    first = order[torch.tensor([0, *accumulate(counts[:-1])], device=order.device)]
    groups = zip((first // num_tokens).tolist(), leaves.flatten(0, 2)[first].tolist(), strict=True)
    return list(groups), order, counts


def _leaves_with_keys(leaves: list[int], pieces: tuple[Tensor, ...]) -> list[int]:
    """These leaves, if one of them holds a key, or those below their parents, or below theirs, and so on."""
    level = 0
    while not any(len(pieces[leaf]) for leaf in leaves):
        level += 1
        nodes = sorted({leaf >> level for leaf in leaves})
        leaves = [leaf for node in nodes for leaf in range(node << level, (node + 1) << level)]
    return leaves


def _together(prefix: Tensor, pieces: list[Tensor]) -> Tensor:
    """(P, D), and (n, D) of each leaf that is read → (1, 1, P + …, D)"""
    alone = len(pieces) == 1 and not len(prefix)
    return (pieces[0] if alone else torch.cat([prefix, *pieces]))[None, None]


def _mark(k: Tensor, channels: slice, leaves: list[int], leaf: int) -> Tensor:
    """Keys (n, D + …) with a one in that of the channels which is the leaf's among those that a query reads."""
    mark = k.new_zeros(k.shape[1])
    mark[channels] = torch.tensor([float(own == leaf) for own in leaves])
    return k + mark


# On the meta device there are no leaves. One operator stands for the attention inside them, as long as it takes when
# they are of one size.
_library = torch.library.Library('vit_efficient', 'DEF')
_library.define('attend_in_leaves(Tensor q, Tensor k, Tensor v, int prefix, int num_leaves, int of_leaves) -> Tensor')


@torch.library.impl(_library, 'attend_in_leaves', 'Meta')
def _attend_on_meta(q: Tensor, k: Tensor, v: Tensor, prefix: int, num_leaves: int, of_leaves: int) -> Tensor:
    return torch.empty_like(v)


@register_flops('vit_efficient::attend_in_leaves')
def _expected(inputs: list, output: tuple[int, ...]) -> int:
    """Of N patches, each reads the prefix and, expected, N · num_leaves / L keys."""
    q, _, v, prefix, num_leaves, of_leaves = inputs
    batch, heads, n, dim = q
    return batch * heads * (n * prefix + n * n * num_leaves // of_leaves) * (dim + v[-1])
