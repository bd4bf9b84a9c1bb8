"""Monarch attention: the softmax matrix as a product of two block-diagonal ones, found without training.

Source: Yaras, Xu, Abillama, Lee and Balzano, "MonarchAttention: Zero-Shot Conversion to Fast, Hardware-Aware Structured
Attention", NeurIPS 2025, arXiv 2505.18698. Each row of softmax(s q kᵀ) is the a that maximises s a · k q + entropy(a).
Of all matrices with M[(l, j), (k, i)] = L[j, l, k] R[k, j, i], where token (l, j) is number j of block l and rows of L
and R sum to 1, they look for the one that maximises that, in turn over R and over L, from L[j, l, k] = 1 if l = k:

    R[k, j, ·] = softmax_i(s q̄[k, j] · k[k, i])                    q̄[k, j] = Σ_l L[j, l, k] q[l, j] / Σ_l L[j, l, k]
    L[j, l, ·] = softmax_k(s q[l, j] · k̄[k, j] + entropy(R[k, j, ·]))      k̄[k, j] = Σ_i R[k, j, i] k[k, i]

The entropy is log Σ_i exp(s q̄ · k[k, i]) − s q̄ · k̄, so that keys of blocks are the tangents of their log-sum-exp at q̄.
What a query reads is Σ_k L[j, l, k] Σ_i R[k, j, i] v[k, i]: no step has an N × N matrix.

The equations and the start are the paper's, and that places of the last block that have no token are neither keys nor
queries. Ours: in the first step such a place has the q̄ of the block before (in the paper's code it is 0); a block is a
row of the patch grid; prefix tokens are further columns of L, keys by themselves, and as queries attend to all tokens
exactly, outside of the blocks; weights of q̄ are normalised in the exponent, since sums over l may vanish.

It is exact where there is one block, where blocks have one token, where the keys of each block are equal, and where the
queries at the same place of all blocks are.

Letters: B batch, N tokens, P prefix, L patches, m blocks of b patches, H heads, D channels of q and k, E of v.
"""

import math
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.attention.base import GridAttention
from vit_efficient.attention.functional import attend, bias_as_channel
from vit_efficient.attention.registry import register_attention
from vit_efficient.grid import PatchGrid, plain_sizes
from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.compat import are_numbers, assume
from vit_efficient.utils.precision import without_autocast

ASPECT = 4  # of grids whose rows are blocks, at most: N · 2.5 √N scores, where blocks of √N have N · 2 √N


@register_attention('monarch')
class MonarchAttention(GridAttention):
    """Attention by a Monarch matrix: each query weighs blocks of keys, and keys within them as a query of its place.

    In training keys are dropped (`drop_keys`), each from all queries of its head.

    Args:
        dim, num_heads, **kwargs: As timm's `Attention`.
        block_size: b, the patches of a block, which follow each other in row-major order. By default a row of the grid
            is a block; of a grid one of whose sides is more than 4 times the other, ⌈√L⌉ patches are. (Such grids are
            refused by what `torch.export` makes with open sizes.)
        steps: How often R and L are computed in turn.
    """

    can_be_differential = True

    def configure(self, *, block_size: int | None = None, steps: int = 1) -> None:
        self.block_size = None if block_size is None else as_integer('block_size', block_size)
        self.steps = as_integer('steps', steps)

    @property
    def options(self) -> dict[str, Any]:
        return dict(block_size=self.block_size, steps=self.steps)

    def forward(
        self,
        x: Tensor,
        grid: PatchGrid,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        self.check_call(x, grid, attn_mask, is_causal)
        q, k, v = self.project(x)
        q, k = self.rotate(q, k, rope, grid.prefix)
        v = self.drop_keys(self.values_of_maps(v))
        blocks = blocks_of(grid.height, grid.width, self.block_size)
        y = attend_blocks(q, k, v, grid.prefix, blocks, self.steps, self.scale, self.fused_attn)
        return self.finish(self.merge_heads(y), x)

    def num_attended(self, grid: PatchGrid) -> int:
        """N: every query sees all keys, through those of blocks."""
        return grid.num_tokens


# Leaves for FX, since what they do depends on sizes and dtypes.


@torch.fx.wrap
@register_notrace_function
def blocks_of(height, width, block_size: int | None) -> tuple:
    """m, b and how many patches the last block lacks of b."""
    height, width = plain_sizes((height, width))
    known = are_numbers(height, width)
    if block_size is None:
        if not known:
            assume(height <= ASPECT * width and width <= ASPECT * height)
        if not known or max(height, width) <= ASPECT * min(height, width):
            return height, width, 0
        block_size = math.isqrt(height * width - 1) + 1
    patches = height * width
    size = min(block_size, patches) if known else block_size
    number = (patches + size - 1) // size
    return number, size, number * size - patches


@torch.fx.wrap
@register_notrace_function
def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, blocks: tuple, steps: int, scale: float, fused: bool
) -> Tensor:
    """The equations of this module, in float32 at least: what is rounded off scores would weigh whole blocks.

    Args:
        q, k, v: (B, H, N, D), v (B, H, N, E)
        prefix: P; these tokens come first.
        blocks: What `blocks_of` returns.
        steps: At least 1.
        scale: s
        fused: Whether it may use `scaled_dot_product_attention`.

    Returns:
        (B, H, N, E), of the dtype of v.
    """
    number, size, missing = blocks
    dtype = torch.promote_types(v.dtype, torch.float32)
    patches = q.shape[2] - prefix
    # Split, not sliced: the gradient of a slice is as large as the whole.
    of_prefix, of_patches = zip(*(t.split_with_sizes([prefix, patches], dim=2) for t in (q, k, v)), strict=True)
    is_whole = are_numbers(missing) and missing == 0
    is_patch = None
    if not is_whole:
        place = torch.arange(number * size, device=q.device)
        is_patch = (place < patches).unflatten(0, (number, size))
        patch = torch.where(place < patches, place, (place - size).clamp(min=0))
        of_patches = [t.index_select(2, patch) for t in of_patches]
    with without_autocast(v):
        q_blocks, *kv_blocks = (t.to(dtype).unflatten(2, (number, size)) for t in of_patches)
        kv_prefix = [t.to(dtype).unsqueeze(2) for t in of_prefix[1:]]
        y = _attend_patches(q_blocks * scale, *kv_blocks, *kv_prefix, is_patch, steps, fused)
    y = y.to(v.dtype).flatten(2, 3)
    if not is_whole:  # of a slice, torch.export would assume that it leaves something out
        y = y.index_select(2, torch.arange(patches, device=y.device))
    return torch.cat([attend(of_prefix[0], k, v, scale, fused), y], dim=2) if prefix else y


def _attend_patches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    is_patch_mb: Tensor | None,
    steps: int,
    fused: bool,
) -> Tensor:
    """What the patches read: (B, H, m, b, E)

    Args:
        q, k, v: (B, H, m, b, D or E), the scale being in q.
        k_prefix, v_prefix: (B, H, 1, P, D or E)
        is_patch_mb: Which places of the blocks have a patch, (m, b); None if all have.
        steps, fused: As in `attend_blocks`.
    """
    lowest = torch.finfo(q.dtype).min  # not -inf: with open sizes, all blocks may lack a place
    prefix = k_prefix.shape[3]
    k_prefix, v_prefix = (t.expand(-1, -1, q.shape[3], -1, -1) for t in (k_prefix, v_prefix))

    mean_q_BHmbD, q_BHbmD = q, q.transpose(2, 3)
    for step in range(steps):
        scores_BHmbb = mean_q_BHmbD @ k.mT
        if is_patch_mb is not None:
            scores_BHmbb = scores_BHmbb.masked_fill(~is_patch_mb[:, None], lowest)
        log_r_BHmbb = scores_BHmbb.log_softmax(dim=-1)
        r_BHmbb = log_r_BHmbb.exp()
        mean_k_BHmbD = r_BHmbb @ k
        total_BHmb1 = scores_BHmbb[..., :1] - log_r_BHmbb[..., :1]  # log-sum-exp; a block has a first key
        entropy_BHmb1 = total_BHmb1 - (mean_q_BHmbD * mean_k_BHmbD).sum(dim=-1, keepdim=True)

        keys = torch.cat([k_prefix, mean_k_BHmbD.transpose(2, 3)], dim=3)
        entropies = F.pad(entropy_BHmb1.transpose(2, 3), (0, 0, prefix, 0))
        queries, keys = bias_as_channel(q_BHbmD, keys, entropies, 1.0)
        if step < steps - 1:
            log_l_BHbmm = (queries @ keys.mT).log_softmax(dim=-1)[..., prefix:]
            if is_patch_mb is not None:
                log_l_BHbmm = log_l_BHbmm.masked_fill(~is_patch_mb.mT[:, :, None], lowest)
            mean_q_BHmbD = (log_l_BHbmm.softmax(dim=-2).mT @ q_BHbmD).transpose(2, 3)

    values = torch.cat([v_prefix, (r_BHmbb @ v).transpose(2, 3)], dim=3)
    y = attend(*(t.flatten(1, 2) for t in (queries, keys, values)), 1.0, fused)
    return y.unflatten(1, (q.shape[1], -1)).transpose(2, 3)
