"""TC-Attention of Treeformer: means of the values that a tree brings together, a level at a time.

Source: Madaan et al., "Treeformer: Dense Gradient Trees for Efficient Attention Computation", ICLR 2023, arXiv
2208.09015, which has no public code. A query's way down the tree of its head (`trees.py`) passes one node per level:

    out(q) = Σ_l α_l · mean of v over the keys in the node of level l on the way of q,   l = 0 … h

The weights α are learned, per head and level. There is no softmax and no score of a pair. Sums go up the tree, weighted
means come down it, and then each query reads one row of a table with as many rows as leaves: O(N · 2^h) in all.

On images: prefix tokens are in every node, as keys; as queries they attend to all N tokens, by the softmax of exact
attention. Of a node that holds no key at all, the mean is that of its parent.

Letters: B batch, N tokens, P prefix, C channels, H heads, D = C / H, h height, L = 2^h leaves.
"""

from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.attention import base
from vit_efficient.attention.base import GridAttention
from vit_efficient.attention.registry import register_attention
from vit_efficient.attention.trees import LeafReads, LeafSums, Trees, read_leaves, route, sum_by_leaf
from vit_efficient.bases import without_autocast


class TreeAttention(GridAttention):
    """What both attentions of Treeformer have: a tree per head. A change from one to the other keeps the trees."""

    def add_trees(self, tree_height: int) -> None:
        if type(tree_height) is not int or tree_height < 0:
            raise ValueError(f'tree_height must be a non-negative integer, got {tree_height=}')
        like = self.qkv.weight
        self.tree = Trees(self.num_heads, self.head_dim, tree_height, device=like.device, dtype=like.dtype)

    def init_weights(self) -> None:
        """What timm's `init_weights` of a model calls, after `to_empty` too."""
        self.tree.reset_parameters()


@register_attention('treeformer_tc')
class TreeMeanAttention(TreeAttention):
    """TC-Attention: a patch takes means of values over the nodes that it passes in a tree.

    Predicates, values and α have gradients from all tokens (see `trees.py` for the surrogate). α starts at 1 / (h + 1),
    and with h = 0 the output of a patch is the mean of all values.

    There is no N × N matrix that `attn_drop` could act on. In training it drops keys instead, each from all queries of
    its head, and the values that stay are scaled up.

    Args:
        dim, num_heads, **kwargs: As timm's `Attention`.
        tree_height: h. There are 2^h leaves.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    def configure(self, *, tree_height: int = 4) -> None:
        self.add_trees(tree_height)
        like = self.qkv.weight
        self.level_weight = nn.Parameter(
            torch.full((self.num_heads, tree_height + 1), 1 / (tree_height + 1), device=like.device, dtype=like.dtype)
        )

    @property
    def options(self) -> dict[str, Any]:
        return dict(tree_height=self.tree.height)

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.constant_(self.level_weight, 1 / self.level_weight.shape[1])

    def forward(self, x: Tensor, grid, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        base.check_tokens(self.mechanism, x.shape[1], grid.height, grid.width, grid.prefix, attn_mask, is_causal)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.training and self.attn_drop.p:
            v = v * self.attn_drop(torch.ones_like(v[..., :1]))
        trees = (self.tree.weight, self.tree.bias, self.level_weight)
        y_BNC = average_over_nodes(q, k, v, *trees, grid.prefix, grid.num_patches, self.scale, self.fused_attn)
        y_BNC = self.norm(y_BNC)
        if self.gate is not None:
            y_BNC = y_BNC * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y_BNC))

    def num_attended(self, grid) -> int:
        """N: every query sees all keys, in the mean of the root."""
        return grid.num_tokens

    def extra_repr(self) -> str:
        return f'tree_height={self.tree.height}'


# A leaf for FX, where sizes and dtypes are not known.
@torch.fx.wrap
@register_notrace_function
def average_over_nodes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    level_weight: Tensor,
    prefix: int,
    num_patches: int,
    scale: float,
    fused: bool,
) -> Tensor:
    """The equation of this module, in float32 at least: a rounded score may be another leaf.

    Args:
        q, k, v: (B, H, N, D)
        weight, bias: Of the predicates, (H, J, D) and (H, J).
        level_weight: α, (H, h + 1)
        prefix, num_patches: Of the N tokens.
        scale: Of the scores of the prefix tokens.
        fused: Whether to use PyTorch's fused attention for them.

    Returns:
        (B, N, C), of the dtype of v.
    """
    y_prefix = [attend(q[:, :, :prefix], k, v, scale, 0.0, fused).transpose(1, 2).to(v.dtype)] if prefix else []
    dtype = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(v):
        # Split, not sliced: the gradient of a slice is as large as the whole.
        q, k, v = (t.split([prefix, num_patches], dim=2) for t in (q, k, v))
        v_prefix, v_patches = (t.to(dtype) for t in v)
        q, k, weight, bias, level_weight = (t.to(dtype) for t in (q[1], k[1], weight, bias, level_weight))
        if torch.is_grad_enabled() and not torch.jit.is_tracing() and not torch.compiler.is_exporting():
            sums, counts = LeafSums.apply(k, v_patches, weight, bias)
            y = LeafReads.apply(q, node_table(sums, counts, v_prefix, level_weight), weight, bias)
        else:
            leaf, num_leaves = route(k, weight, bias), weight.shape[1] + 1
            sums = sum_by_leaf(leaf, v_patches, num_leaves)
            counts = sum_by_leaf(leaf, torch.ones_like(v_patches[..., :1]), num_leaves)
            y = read_leaves(route(q, weight, bias), node_table(sums, counts, v_prefix, level_weight))
    y = y.to(v[0].dtype)
    return (torch.cat([*y_prefix, y], dim=1) if prefix else y).flatten(2)


def node_table(sums: Tensor, counts: Tensor, v_prefix: Tensor, level_weight: Tensor) -> Tensor:
    """What the queries of each leaf read: the sum of α_l · mean over its ancestors and itself.

    A node without a key takes the mean of its parent, and would go on from there: its mean is that of its keys and, as
    one of them, its parent's.

    Args:
        sums, counts: Of the patches in each leaf, (B, H, L, D) and (B, H, L, 1).
        v_prefix: Values in every node, (B, H, P, D).
        level_weight: α, (H, h + 1)

    Returns:
        (B, H, L, D)
    """
    levels = [(sums, counts)]
    for _ in range(level_weight.shape[1] - 1):
        levels.append(tuple(t.unflatten(2, (-1, 2)).sum(dim=3) for t in levels[-1]))
    common = v_prefix.sum(dim=2, keepdim=True)

    sums, counts = levels.pop()
    mean = (sums + common) / (counts + v_prefix.shape[2])
    alphas = level_weight[:, :, None, None].unbind(1)
    table = alphas[0] * mean
    for alpha in alphas[1:]:
        sums, counts = levels.pop()
        counts = counts + v_prefix.shape[2]
        empty = (counts == 0).to(counts.dtype)
        mean = (sums + common + empty * mean.repeat_interleave(2, dim=2)) / (counts + empty)
        table = table.repeat_interleave(2, dim=2) + alpha * mean
    return table


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, fused: bool) -> Tensor:
    """Softmax attention: (…, queries, D), (…, keys, D) twice → (…, queries, D)"""
    if fused:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return F.dropout(((q * scale) @ k.mT).softmax(dim=-1), dropout) @ v
