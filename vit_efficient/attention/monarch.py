"""Monarch attention: the softmax matrix as a product of two block-diagonal ones, found without training.

Source: Yaras, Xu, Abillama, Lee and Balzano, "MonarchAttention: Zero-Shot Conversion to Fast, Hardware-Aware Structured
Attention", NeurIPS 2025, arXiv 2505.18698. Each row of softmax(s q kᵀ) is the a that maximises s a · k q + entropy(a).
Of all matrices with M[(l, j), (k, i)] = L[j, l, k] R[k, j, i], where token (l, j) is number j of block l and rows of L
and R sum to 1, they look for the one that maximises that, in turn over R and over L, from L[j, l, k] = 1 if l = k:

    R[k, j, ·] = softmax_i(s q̄[k, j] · k[k, i])                    q̄[k, j] = Σ_l L[j, l, k] q[l, j] / Σ_l L[j, l, k]
    L[j, l, ·] = softmax_k(s q[l, j] · k̄[k, j] + entropy(R[k, j, ·]))      k̄[k, j] = Σ_i R[k, j, i] k[k, i]

The entropy is log Σ_i exp(s q̄ · k[k, i]) − s q̄ · k̄, so that keys of blocks are the tangents of their log-sum-exp at q̄.
What a query reads is Σ_k L[j, l, k] Σ_i R[k, j, i] v[k, i]: no step has an N × N matrix.

The equations and the start are the paper's, and that places of a block that have no token are neither keys nor queries.
Ours: in the first step such a place has the q̄ of the block before (in the paper's code it is 0); blocks are parts of
rows of the patch grid, or whole rows, so that places of blocks are columns of the grid; prefix tokens are further
columns of L, keys by themselves, and as queries attend to all tokens exactly, outside of the blocks; weights of q̄ are
normalised in the exponent, since sums over l may vanish.

It is exact where there is one block, where blocks have one token, where the keys of each block are equal, and where the
queries at the same place of all blocks are.

Letters: B batch, N tokens, P prefix, m blocks of b patches, H heads, D channels of q and k, E of v.
"""

from typing import Any, NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.attention.base import GridAttention
from vit_efficient.attention.functional import attend, bias_as_channel
from vit_efficient.attention.registry import register_attention
from vit_efficient.dct.bases import basis
from vit_efficient.grid import PatchGrid, floor_sqrt, larger, plain_sizes, smaller
from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.compat import are_numbers
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import without_autocast


@register_attention('monarch')
class MonarchAttention(GridAttention):
    """Attention by a Monarch matrix: each query weighs blocks of keys, and keys within them as a query of its place.

    In training keys are dropped (`drop_keys`), each from all queries of its head.

    Args:
        dim, num_heads, **kwargs: As timm's `Attention`.
        block_size: The most patches of a block, b: a row of the grid is cut into as few equal blocks as that allows, or
            as many whole rows are a block. By default half the root of the number of patches: on a square grid half a
            row. With the paper's, the whole root, a query costs little less (3 b + 2 m products of D channels, a key of
            exact attention two).
        steps: How often R and L are computed in turn. With more, M comes nearer to the best one, which is not always
            nearer to exact attention in its outputs.
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
        options = (self.block_size, self.steps, self.scale, self.fused_attn)
        y = attend_in_blocks(q, k, v, grid.height, grid.width, grid.prefix, *options)
        return self.finish(self.merge_heads(y), x)

    def num_attended(self, grid: PatchGrid) -> int:
        """N: every query sees all keys, through those of blocks."""
        return grid.num_tokens


class Blocks(NamedTuple):
    """The blocks of a grid: how many there are down and across it, and the rows and columns of each.

    Places of those at its lower or right border may have no patch.
    """

    down: int
    across: int
    rows: int
    columns: int


def blocks_of(height, width, block_size: int | None) -> Blocks:
    """Raises UserError if a size is a symbol of `torch.export`: whether blocks are full would be part of the graph."""
    if type(height) is not int or type(width) is not int:
        raise UserError("attention 'monarch' needs a fixed image size: export for one")
    if block_size is None:
        block_size = (floor_sqrt(height * width) + 1) // 2
    rows = smaller(height, larger(1, block_size // width))
    across = (width + block_size - 1) // block_size
    return Blocks((height + rows - 1) // rows, across, rows, (width + across - 1) // across)


def _patch_of_place(height, width, down, across, rows, columns, device: torch.device) -> Tensor:
    """(m, b): the patch at each place of the blocks; where there is none, that of the block before."""
    row, column = torch.arange(down * rows, device=device), torch.arange(across * columns, device=device)
    row, column = torch.where(row < height, row, row - rows), torch.where(column < width, column, column - columns)
    patch = row.unflatten(0, (down, 1, rows, 1)) * width + column.unflatten(0, (across, 1, columns))
    return patch.flatten(2).flatten(0, 1)


def _is_patch(height, width, down, across, rows, columns, device: torch.device) -> Tensor:
    """(m, b): at which places of the blocks there is a patch."""
    row, column = torch.arange(down * rows, device=device), torch.arange(across * columns, device=device)
    inside = (row < height).unflatten(0, (down, 1, rows, 1)) & (column < width).unflatten(0, (across, 1, columns))
    return inside.flatten(2).flatten(0, 1)


def _place_of_patch(height, width, across, rows, columns, device: torch.device) -> Tensor:
    """(height · width,): the number of the place of each patch, block after block."""
    row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    block, place = row // rows * across + column // columns, row % rows * columns + column % columns
    return (block * (rows * columns) + place).flatten()


# A leaf for FX, since what it does depends on sizes and dtypes.
@torch.fx.wrap
@register_notrace_function
def attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height,
    width,
    prefix: int,
    block_size: int | None,
    steps: int,
    scale: float,
    fused: bool,
) -> Tensor:
    """The equations of this module, in float32 at least: what is rounded off scores would weigh whole blocks.

    Args:
        q, k, v: (B, H, N, D), v (B, H, N, E)
        height, width, prefix: The grid.
        block_size, steps: Options of the mechanism.
        scale: s
        fused: Whether it may use `scaled_dot_product_attention`.

    Returns:
        (B, H, N, E), of the dtype of v.

    Raises:
        UserError: As `blocks_of`.
    """
    height, width = plain_sizes((height, width))
    blocks = blocks_of(height, width, block_size)
    is_whole = are_numbers(height, width) and blocks.down * blocks.rows == height
    is_whole = is_whole and blocks.across * blocks.columns == width
    # Split, not sliced: the gradient of a slice is as large as the whole.
    of_prefix, of_patches = zip(*(t.split_with_sizes([prefix, height * width], dim=2) for t in (q, k, v)), strict=True)
    is_patch = None
    if not is_whole:
        sizes = (height, width, *blocks)
        is_patch, patch = basis(_is_patch, sizes, q, torch.bool), basis(_patch_of_place, sizes, q, torch.int64)
        of_patches = [t.index_select(2, patch.flatten()) for t in of_patches]
    dtype = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(v):
        of_blocks = [t.to(dtype).unflatten(2, (-1, blocks.rows * blocks.columns)) for t in of_patches]
        kv_prefix = [t.to(dtype).unsqueeze(2) for t in of_prefix[1:]]
        y = _attend_patches(of_blocks[0] * scale, *of_blocks[1:], *kv_prefix, is_patch, steps, fused)
    y = y.to(v.dtype).flatten(2, 3)
    if not is_whole:
        y = y.index_select(2, basis(_place_of_patch, (height, width, *blocks[1:]), q, torch.int64))
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
        steps, fused: As in `attend_in_blocks`.
    """
    prefix = k_prefix.shape[3]
    k_prefix, v_prefix = (t.expand(-1, -1, q.shape[3], -1, -1) for t in (k_prefix, v_prefix))

    mean_q_BHmbD, q_BHbmD = q, q.transpose(2, 3)
    for step in range(steps):
        scores_BHmbb = mean_q_BHmbD @ k.mT
        if is_patch_mb is not None:
            scores_BHmbb = scores_BHmbb.masked_fill(~is_patch_mb[:, None], -torch.inf)
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
                log_l_BHbmm = log_l_BHbmm.masked_fill(~is_patch_mb.mT[:, :, None], -torch.inf)
            mean_q_BHmbD = (log_l_BHbmm.softmax(dim=-2).mT @ q_BHbmD).transpose(2, 3)

    values = torch.cat([v_prefix, (r_BHmbb @ v).transpose(2, 3)], dim=3)
    y = attend(*(t.flatten(1, 2) for t in (queries, keys, values)), 1.0, fused)
    return y.unflatten(1, (q.shape[1], -1)).transpose(2, 3)
