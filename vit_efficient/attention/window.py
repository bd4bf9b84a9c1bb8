"""Window attention: patches attend inside windows of the patch grid, prefix tokens everywhere.

Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021, arXiv
2103.14030, section 3.2: windows of w × w patches, shifted by ⌊w/2⌋ rows and columns in every second layer, so that
neighbours exchange what they know. Without the hierarchy of resolutions of Swin, and with a relative position bias only
where a model has one.

Swin keeps windows equal by cyclic shifts, padding and masks. Here the windows at the border are smaller, which is what
its masks amount to: tokens are brought into window order once, windows of equal area attend together, and nothing is
padded or masked. Where sizes are symbols (`torch.export` with an open height or width), how many windows are smaller is
not known; there the grid is padded, and the padding is masked as keys.

Letters: B batch, N tokens, P prefix, n windows, L patches of a window, S = P + L, C channels, H heads, of D
channels of queries and keys and E of values.
"""

from collections import defaultdict
from itertools import chain, product
from typing import Any

import torch
from timm.layers import register_notrace_function, to_2tuple
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.attention.base import GridAttention
from vit_efficient.attention.decomposed import DecomposedBias, decomposed_of_windows
from vit_efficient.attention.functional import attend
from vit_efficient.attention.registry import register_attention
from vit_efficient.attention.relative import (
    Bias,
    RelativeBias,
    bias_of_attention,
    check_grid,
    grid_of_bias,
    prefix_bias,
    window_bias,
)
from vit_efficient.attention.rotary import table_of
from vit_efficient.attention.windows import padding, permuted, runs
from vit_efficient.dct.bases import basis
from vit_efficient.grid import PatchGrid, smaller
from vit_efficient.utils.checks import as_sides, check_flag
from vit_efficient.utils.compat import are_numbers
from vit_efficient.utils.errors import UserError


@register_attention('window')
class WindowAttention(GridAttention):
    """Attention inside windows of the patch grid.

    A patch attends to the prefix tokens and to the patches of its window; a prefix token attends to all N tokens. With
    one window over the whole grid this is exact attention. In a model the windows of odd layers are shifted, unless
    `shift` is given.

    Args:
        dim, num_heads, **kwargs: As timm's `Attention`.
        window_size: Side of the windows in patches, or the pair (rows, columns). A side that is not smaller than the
            grid's is taken to be the grid's, and is not shifted. GPUs are fastest with 8 or 16 where that divides the
            grid: its windows are all of one area then, unless they are shifted.
        shift: Whether windows are shifted: the first one along an axis has half the side, rounded down, and the next
            begin from there.
    """

    can_be_differential = True

    def configure(self, *, window_size: int | tuple[int, int] = 7, shift: bool = False) -> None:
        check_flag('shift', shift)
        # timm's attentions have a `window_size` of their own, that of their biases.
        self.window = as_sides('window_size', window_size, '(rows, columns)')
        self.shift = shift

    @classmethod
    def at_layer(cls, options: dict[str, Any], layer: int, depth: int, grid_size: tuple[int, int]) -> dict[str, Any]:
        return {'shift': layer % 2 == 1, **options}

    @property
    def options(self) -> dict[str, Any]:
        pair = isinstance(self.window, tuple)
        return dict(window_size=list(self.window) if pair else self.window, shift=self.shift)

    def forward(
        self,
        x: Tensor,
        grid: PatchGrid,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_bias: RelativeBias | None = None,
    ) -> Tensor:
        self.check_call(x, grid, attn_mask, is_causal)
        bias = bias_of_attention(self, shared_bias)
        height, width = grid.height, grid.width
        if bias is not None:
            check_grid(self.title, grid_of_bias(bias), height, width)
            height, width = grid_of_bias(bias) or (height, width)  # numbers, where those of the input are symbols
        windows = (height, width, grid.prefix, to_2tuple(self.window), self.shift)
        x = reorder(x, *windows)
        q, k, v = self.project(x)
        if rope is not None:
            rope = reorder(table_of(rope), height, width, 0, *windows[3:])
            q, k = self.rotate(q, k, rope, grid.prefix)
        q, k, v = (t.transpose(1, 2) for t in (q, k, self.values_of_maps(v)))
        y_BNHE = attend_in_windows(q, k, v, *windows, (self.scale, self.fused_attn, self.drop_rate), bias)
        y_BNC = self.norm_and_gate(self.merge_heads(y_BNHE.transpose(1, 2)), x)
        return self.proj_drop(reorder(self.proj(y_BNC), *windows, back=True))

    def check_relative_bias(self) -> None:
        """The biases of a window are those of its patches."""

    def num_attended(self, grid: PatchGrid) -> int:
        """The keys of a patch in a whole window; at the border there may be fewer. A prefix token attends to all."""
        rows, columns = to_2tuple(self.window)
        return grid.prefix + smaller(rows, grid.height) * smaller(columns, grid.width)


# Leaves for FX, because what they do depends on the sizes.


@torch.fx.wrap
@register_notrace_function
def reorder(x: Tensor, height, width, prefix: int, window: tuple[int, int], shift: bool, back: bool = False) -> Tensor:
    """(…, N, C) → (…, N, C): prefix tokens first, then window after window, those of equal area together; and `back`.

    Where sizes are symbols the order stays that of the grid.
    """
    if not are_numbers(height, width):
        return x
    sizes = (height, width, prefix, *window, int(shift))
    order, places = (basis(build, sizes, x, torch.int64) for build in (_window_order, _window_places))
    if back:
        order, places = places, order
    return permuted(x, order, places)


@torch.fx.wrap
@register_notrace_function
def attend_in_windows(
    q, k, v, height, width, prefix: int, window, shift: bool, how: tuple, bias: Bias | None = None
) -> Tensor:
    """Softmax attention of the patches inside their windows, and of the prefix tokens among all.

    Args:
        q, k, v: (B, N, H, D or E), in window order, as of `reorder`.
        height, width, prefix: The grid.
        window, shift: The options of the mechanism, `window` as (rows, columns).
        how: What `functional.attend` takes: scale, fused, dropout.
        bias: The relative one, of this grid.

    Returns:
        (B, N, H, E), in the same order.
    """
    known = are_numbers(height, width)
    if bias is not None and not known:
        raise UserError("attention 'window' with SAM's position bias needs a fixed size: compile or export for one")
    if bias is not None:
        sides = _sides_of_windows(height, width, window, shift)
        windows = [(n, rows * columns, (rows, columns)) for n, rows, columns in sides]
    elif known:
        windows = [(n, area, None) for area, n in _count_by_area(height, width, window, shift).items()]
    else:
        windows = [(height * width, 1, None)]  # or all patches, uncut
    sizes = [prefix, *(n * area for n, area, _ in windows)]
    # Split, not sliced: the gradient of a slice is as large as the whole.
    (q_prefix, *q_patches), (k_prefix, *k_patches), (v_prefix, *v_patches) = (t.split(sizes, dim=1) for t in (q, k, v))

    mask = None if bias is None or not prefix else prefix_bias(bias, prefix)
    y = [_attend(q_prefix, k, v, *how, mask)] if prefix else []
    kv_prefix = (k_prefix, v_prefix) if prefix else None
    for (n, _, side), *patches in zip(windows, q_patches, k_patches, v_patches, strict=True):
        if side is None:
            mask = None
        elif isinstance(bias, DecomposedBias):
            mask = decomposed_of_windows(bias, patches[0], height, width, n, side)
        else:
            mask = window_bias(bias, prefix, *side)
        if known:
            y.append(_attend_windows(*patches, n, kv_prefix, how, mask))
        else:
            y.append(_attend_padded(*patches, height, width, window, shift, kv_prefix, how))
    return torch.cat(y, dim=1)


def _attend_windows(q, k, v, n: int, kv_prefix: tuple | None, how: tuple, mask: Tensor | None = None) -> Tensor:
    """The patches of n windows one after the other, (B, n · L, H, D or E) each → (B, n · L, H, E)

    `kv_prefix` are keys and values that every window sees, (B, P, H, D); `mask` is (1 or B · n, 1 or H, 1 or L, S).
    """
    q, k, v = (t.unflatten(1, (n, -1)) for t in (q, k, v))
    if kv_prefix is not None:
        k, v = (
            torch.cat([seen.unsqueeze(1).expand(-1, n, -1, -1, -1), patches], dim=2)
            for seen, patches in zip(kv_prefix, (k, v), strict=True)
        )
    y = _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *how, mask)
    return y.unflatten(0, (-1, n)).flatten(1, 2)


def _attend_padded(q, k, v, height, width, window, shift, kv_prefix, how) -> Tensor:
    """The patches of a grid whose sides may be symbols, (B, H · W, H, D or E) each → (B, H · W, H, E)"""
    (h, w), area = window, window[0] * window[1]
    top, rows = padding(height, h, shift)
    left, columns = padding(width, w, shift)

    # One axis throughout: torch.export would compare symbolic sizes of several. And the first window once more at the
    # end: it would take a number of one for fixed.
    n = rows * columns + 1
    slot = torch.arange(n * area, device=q.device)
    number, inside = slot // area % (rows * columns), slot % area
    row, column = number // columns * h + inside // w - top, number % columns * w + inside % w - left
    is_patch = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    patch = row.remainder(height) * width + column.remainder(width)  # any will do where it is masked
    q, k, v = (t.index_select(1, patch) for t in (q, k, v))
    seen_nS = F.pad(
        is_patch.unflatten(0, (n, area)), (0 if kv_prefix is None else kv_prefix[0].shape[1], 0), value=True
    )
    mask = seen_nS.expand(q.shape[0], -1, -1).flatten(0, 1)[:, None, None]
    y = _attend_windows(q, k, v, n, kv_prefix, how, mask)

    patch = torch.arange(height * width, device=q.device)
    row, column = patch // width + top, patch % width + left
    slot = (row // h * columns + column // w) * area + row % h * w + column % w
    return y.index_select(1, slot)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool, dropout: float, mask: Tensor | None) -> Tensor:
    """`attend`, of (B, tokens, H, D or E) each → (B, tokens, H, E)"""
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    return attend(*(t.transpose(1, 2) for t in (q, k, v)), scale, fused, dropout, mask).transpose(1, 2)


def _blocks_by_area(height: int, width: int, window: tuple[int, int], shift: bool) -> dict[int, list]:
    """The windows of a grid, as blocks (rows, columns) of equal ones, under the area of each window."""
    by_area = defaultdict(list)
    for rows, columns in product(runs(height, window[0], shift), runs(width, window[1], shift)):
        by_area[rows.side * columns.side].append((rows, columns))
    return by_area


def _count_by_area(height: int, width: int, window: tuple[int, int], shift: bool) -> dict[int, int]:
    """The number of windows of each area, in window order."""
    by_area = _blocks_by_area(height, width, window, shift)
    return {area: sum(rows.number * columns.number for rows, columns in blocks) for area, blocks in by_area.items()}


def _sides_of_windows(height: int, width: int, window: tuple[int, int], shift: bool) -> list[tuple[int, int, int]]:
    """The number of windows, their rows and columns, of each block in window order."""
    blocks = chain(*_blocks_by_area(height, width, window, shift).values())
    return [(rows.number * columns.number, rows.side, columns.side) for rows, columns in blocks]


def _window_order(height: int, width: int, prefix: int, rows: int, columns: int, shift: int, device) -> Tensor:
    """(N,): the tokens of the grid in window order."""
    patches = torch.arange(prefix, prefix + height * width, device=device).unflatten(0, (height, width))
    order = [torch.arange(prefix, device=device)]
    for along_rows, along_columns in chain(*_blocks_by_area(height, width, (rows, columns), bool(shift)).values()):
        block = patches[along_rows.span, along_columns.span].unflatten(0, (along_rows.number, along_rows.side))
        block = block.unflatten(2, (along_columns.number, along_columns.side))
        order.append(block.transpose(1, 2).flatten())
    return torch.cat(order)


def _window_places(*sizes) -> Tensor:
    """(N,): where each token of the grid is in window order; of the arguments of `_window_order`."""
    return _window_order(*sizes).argsort()
