"""TC-Attention of Treeformer: means of the values that a tree brings together, a level at a time.

Source: Madaan et al., "Treeformer: Dense Gradient Trees for Efficient Attention Computation", ICLR 2023, arXiv
2208.09015, which has no public code. A query's way down the tree of its head (`trees.py`) passes one node per level:

    out(q) = Σ_l α_l · mean of v over the keys in the node of level l on the way of q,   l = 0 … h

The weights α are learned, per head and level. There is no softmax and no score of a pair. Sums go up the tree, weighted
means come down it, and then each query reads one row of a table with as many rows as leaves: O(N · 2^h) in all.

On a GPU the same input gives the same output and gradients, bit for bit, but for the gradient of what prefix tokens
attend to: it is that of fused attention, which is the same every time under `torch.use_deterministic_algorithms`.

On images: prefix tokens are in every node, as keys; as queries they attend to all N tokens, by the softmax of exact
attention. Of a node that holds no key at all, the mean is that of its parent.

Letters: B batch, N tokens, P prefix, C channels, H heads, D = C / H, h height, L = 2^h leaves.
"""

from typing import Any

import torch
from timm.layers import register_notrace_function
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.attention.base import GridAttention
from vit_efficient.attention.functional import attend, attention_weights
from vit_efficient.attention.projections import is_fused, projections
from vit_efficient.attention.registry import register_attention
from vit_efficient.attention.treeformer.trees import (
    LeafReads,
    LeafSums,
    Trees,
    count_tokens,
    leaves_of,
    read_and_sum,
    read_leaves,
    route_both,
    sum_by_leaf,
    sum_tokens_by_leaf,
)
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.checks import is_integer
from vit_efficient.utils.compat import are_numbers
from vit_efficient.utils.device import on_gpu
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import without_autocast
from vit_efficient.utils.projections import is_plain

# There are 2^h leaves, and as many weights for each channel of a head.
MAX_HEIGHT = 16


class TreeAttention(GridAttention):
    """What both attentions of Treeformer have: a tree per head. A change from one to the other keeps the trees."""

    def add_trees(self, tree_height: int) -> None:
        if not (is_integer(tree_height, 0) and tree_height <= MAX_HEIGHT):
            raise UserError(f'tree_height must be an integer from 0 to {MAX_HEIGHT}, got {tree_height=}')
        self.tree = Trees(self.num_heads, self.head_dim, int(tree_height), **self.kind_of_weights())

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.tree.reset_parameters()

    def leaves(self, x: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
        """The leaves of the patches as queries and as keys: (B, N, C) → (B, H, N − P), int64, twice. No gradient."""
        q, k, _ = self.project(x)
        with without_autocast(x):
            return route_both(
                *(z[:, :, grid.prefix :].detach() for z in (q, k)), self.tree.weight.detach(), self.tree.bias.detach()
            )


# A leaf for FX as a whole: which products are taken through the tree is known when the graph runs.
@register_notrace_module
@register_attention('treeformer_tc')
class TreeMeanAttention(TreeAttention):
    """TC-Attention: a patch takes means of values over the nodes that it passes in a tree.

    Predicates, values and α have gradients from all tokens (see `trees.py` for the surrogate). α starts at 1 / (h + 1),
    and with h = 0 the output of a patch is the mean of all values.

    Rotary positions reach only what prefix tokens attend to: trees ask what a token is, not where.

    In training keys are dropped (`drop_keys`), each from the sums of all nodes of its head's tree.

    In evaluation, where no gradient is wanted and neither gate nor norm stands between, the projections of values and
    output are taken through the tree: they act on one row for each leaf instead of N tokens. This is exact; hooks on
    `qkv` and `proj` are not called.

    Args:
        dim, num_heads, **kwargs: As timm's `Attention`.
        tree_height: h. There are 2^h leaves.
    """

    places_patches = False

    def configure(self, *, tree_height: int = 4) -> None:
        self.add_trees(tree_height)
        levels = self.tree.height + 1
        alphas = torch.full((self.num_heads, levels), 1 / levels, **self.kind_of_weights())
        self.level_weight = nn.Parameter(alphas)

    @property
    def options(self) -> dict[str, Any]:
        return dict(tree_height=self.tree.height)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.level_weight, 1 / self.level_weight.shape[1])

    def forward(
        self,
        x: Tensor,
        grid: PatchGrid,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        self.check_call(x, grid, attn_mask, is_causal)
        rope = rope if grid.prefix else None  # trees ask what a token is, not where; prefix tokens attend to all
        if self._folds(x, grid):
            return self._folded(x, grid, rope)
        q, k, v = self.project(x)
        v = self.drop_keys(v)
        trees = (self.tree.weight, self.tree.bias, self.level_weight)
        seen_k = self.rotate(q, k, rope, grid.prefix)[1]
        y_BNC = average_over_nodes(q, k, v, seen_k, *trees, grid.prefix, grid.num_patches, self.scale, self.fused_attn)
        return self.finish(y_BNC, x)

    def _folds(self, x: Tensor, grid: PatchGrid) -> bool:
        return (
            not self.training  # checkpointing trains without gradients, at first
            and not torch.is_grad_enabled()
            and isinstance(x, Tensor)  # and not a proxy, whose graph may be trained
            and self.gate is None
            and isinstance(self.norm, nn.Identity)
            and is_fused(self)
            and is_plain(self.proj)
            and are_numbers(grid.num_patches)
            and 2**self.tree.height < grid.num_patches
        )

    def _folded(self, x: Tensor, grid: PatchGrid, rope: Tensor | None) -> Tensor:
        """The same with L tokens to project instead of N: x is summed by leaf, and then projected to values; what the
        leaves answer goes through the output projection, and is then read."""
        heads, num_leaves = (self.num_heads, self.head_dim), 2**self.tree.height
        q, k = self.project_heads(x, 0, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        ((of_values, _),) = projections(self, 2, 3)
        w_v, b_v = of_values.weight, of_values.bias
        b_v = torch.zeros_like(w_v[:, 0]) if b_v is None else b_v
        w_v_HDC, b_v_HD = w_v.unflatten(0, heads), b_v.unflatten(0, heads)

        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            of_patches = (t[:, :, grid.prefix :] for t in (q, k))
            leaf_q, leaf_k = route_both(*of_patches, self.tree.weight, self.tree.bias)
            counts = count_tokens(leaf_k, num_leaves, dtype)
            # As they are if a GPU sums them in float32 and the range is that of float32.
            summed = x if on_gpu(x) and x.dtype == torch.bfloat16 else x.to(dtype)
            x_BHLC = sum_tokens_by_leaf(leaf_k, counts, summed, grid.prefix)
        # Means are projected, since sums may be too large for half precision.
        means = (x_BHLC / counts.clamp(min=1)).to(w_v.dtype)
        sums = linear_by_head(means, w_v_HDC).to(dtype)
        sums_BHLD = sums * counts + counts * b_v_HD[:, None].to(dtype)
        v_prefix = F.linear(x[:, : grid.prefix], w_v, b_v).unflatten(-1, heads).transpose(1, 2).to(dtype)
        with without_autocast(x):
            table = node_table(sums_BHLD, counts, v_prefix, self.level_weight.to(dtype))
        w_proj_HCD = self.proj.weight.unflatten(1, heads).transpose(0, 1)
        answers = linear_by_head(table.to(w_v.dtype), w_proj_HCD)
        answers_BHLC = answers if on_gpu(x) else answers.to(dtype)  # products are summed in float32
        if self.proj.bias is not None:  # a patch reads one row of each head
            answers_BHLC[:, 0] += self.proj.bias
        y = read_and_sum(leaf_q, answers_BHLC).to(answers.dtype)
        if not grid.prefix:
            return y
        seen_k = self.rotate(q, k, rope, grid.prefix)[1]
        weights_BHPN = attention_weights(q[:, :, : grid.prefix], seen_k, self.scale)
        x_BHPC = weights_BHPN.to(x.dtype) @ x[:, None]
        y_prefix = linear_by_head(x_BHPC, w_v_HDC, b_v_HD)
        return torch.cat([self.proj(y_prefix.transpose(1, 2).flatten(2)), y], dim=1)

    def num_attended(self, grid: PatchGrid) -> int:
        """N: every query sees all keys, in the mean of the root."""
        return grid.num_tokens


# A leaf for FX, where sizes and dtypes are not known.
@torch.fx.wrap
@register_notrace_function
def average_over_nodes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen_k: Tensor,
    weight,
    bias,
    level_weight,
    prefix: int,
    num_patches: int,
    scale: float,
    fused,
) -> Tensor:
    """The equation of this module, in float32 at least: a rounded score may be another leaf.

    Args:
        q, k, v: (B, H, N, D)
        seen_k: Keys as prefix tokens see them, with rotary positions.
        weight, bias: The predicates, (H, J, D) and (H, J).
        level_weight: α, (H, h + 1)
        prefix, num_patches: How many of the N tokens are prefix tokens, and patches.
        scale, fused: As of `functional.attend`, for the prefix tokens.

    Returns:
        (B, N, C), of the dtype of v.
    """
    y_prefix = [attend(q[:, :, :prefix], seen_k, v, scale, fused).transpose(1, 2).to(v.dtype)] if prefix else []
    dtype = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(v):
        # Split, not sliced: the gradient of a slice is as large as the whole.
        q, k, v = (t.split([prefix, num_patches], dim=2) for t in (q, k, v))
        v_prefix, v_patches = (t.to(dtype) for t in v)
        q, k, level_weight = q[1], k[1], level_weight.to(dtype)
        if torch.is_grad_enabled() and not torch.jit.is_tracing():
            q, k, weight, bias = (t.to(dtype) for t in (q, k, weight, bias))
            sums, counts = LeafSums.apply(k, v_patches, weight, bias)
            y = LeafReads.apply(q, node_table(sums, counts, v_prefix, level_weight), weight, bias)
        else:
            leaf_q, leaf_k = route_both(q, k, weight, bias)
            sums = sum_by_leaf(leaf_k, v_patches, leaves_of(weight))
            counts = count_tokens(leaf_k, leaves_of(weight), dtype)
            y = read_leaves(leaf_q, node_table(sums, counts, v_prefix, level_weight))
    y = y.to(v[0].dtype)
    return (torch.cat([*y_prefix, y], dim=1) if prefix else y).flatten(2)


def linear_by_head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear layer of each head: (B, H, L, in), (H, out, in), (H, out) → (B, H, L, out); on a GPU at once."""
    if on_gpu(x):
        y = torch.matmul(x, weight.mT)
        return y if bias is None else y + bias[:, None]
    biases = [None] * len(weight) if bias is None else bias
    return torch.stack([F.linear(*of_head) for of_head in zip(x.unbind(1), weight, biases, strict=True)], dim=1)


def node_table(sums: Tensor, counts: Tensor, v_prefix: Tensor, level_weight: Tensor) -> Tensor:
    """What the queries of each leaf read: the sum of α_l · mean over its ancestors and itself.

    A node without a key takes the mean of its parent, and would go on from there: its mean is that of its keys and, as
    one of them, its parent's.

    Args:
        sums, counts: Of each leaf, the sum of its patches' values and their number, (B, H, L, D) and (B, H, L, 1).
        v_prefix: Values in every node, (B, H, P, D).
        level_weight: α, (H, h + 1)

    Returns:
        (B, H, L, D)
    """
    alphas = level_weight[:, :, None, None].unbind(1)
    levels = [(sums, counts)]
    for _ in alphas[1:]:
        levels.append(tuple(t.unflatten(2, (-1, 2)).sum(dim=3) for t in levels[-1]))
    common = v_prefix.sum(dim=2, keepdim=True)

    sums, counts = levels.pop()
    mean = (sums + common) / (counts + v_prefix.shape[2])
    table = alphas[0] * mean
    for alpha in alphas[1:]:
        sums, counts = levels.pop()
        counts = counts + v_prefix.shape[2]
        empty = (counts == 0).to(counts.dtype)
        mean = (sums + common + empty * mean.repeat_interleave(2, dim=2)) / (counts + empty)
        table = table.repeat_interleave(2, dim=2) + alpha * mean
    return table
