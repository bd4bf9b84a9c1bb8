"""Combiner's pattern of windows and cells: the patches of a window, and summaries of the cells of all others.

Letters: B batch, N tokens, P prefix, w windows, L patches of a window, n cells, m of them in a window, A patches of a
cell, H heads, of D channels of queries and keys and E of values.
"""

from itertools import accumulate, chain, pairwise, product
from typing import NamedTuple

import numpy as np
import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.attention.combiner.chunks import CHUNK_OF_HOST, attend_windows
from vit_efficient.attention.combiner.summaries import Summaries, joined, summarise
from vit_efficient.attention.functional import attend
from vit_efficient.attention.windows import padding, permuted, runs
from vit_efficient.dct.bases import basis, is_eager
from vit_efficient.grid import smaller
from vit_efficient.utils.compat import are_numbers
from vit_efficient.utils.device import on_gpu


class Cut(NamedTuple):
    """A grid cut into windows and cells.

    Args:
        height, width: Of the grid; they may be symbols.
        window, cell: Their sides, (rows, columns) each.
        shift, reach: The options of the mechanism.
    """

    height: int
    width: int
    window: tuple[int, int]
    cell: tuple[int, int]
    shift: bool
    reach: int | None


def count_seen(cut: Cut):
    """The patches and summaries that a patch attends to, in a whole window that no border is near."""
    near, own, cells, close, windows = 1, 1, 1, 1, 1
    for length, side, of_cell in zip(cut[:2], cut.window, cut.cell, strict=True):
        of_window, number = smaller(side, length), padding(length, side, cut.shift)[1]
        of_own, of_axis = _ceil(of_window, of_cell), _count_cells(length, side, of_cell, cut.shift)
        reached = number
        if cut.reach is not None:  # at the borders windows have fewer cells
            reached = smaller(number, 2 * cut.reach + 1)
            of_axis = smaller(of_axis - (number - reached), reached * of_own)
        near, own, cells = near * of_window, own * of_own, cells * of_axis
        windows, close = windows * number, close * reached
    return near + cells - own + windows - close


# Leaves for FX, because what they do depends on the sizes; called in this module, where FX finds them.


def reorder(x: Tensor, prefix: int, cut: Cut, back: bool = False) -> Tensor:
    """(…, N, C) → (…, N, C): prefix tokens, then window after window, in each cell after cell; and `back`.

    Windows of one shape are together. Where sizes are symbols the order stays that of the grid.
    """
    return _reorder(x, prefix, cut, back)


@torch.fx.wrap
@register_notrace_function
def _reorder(x: Tensor, prefix: int, cut: Cut, back: bool) -> Tensor:
    if not are_numbers(cut.height, cut.width):
        return x
    order, places = (basis(build, (prefix, *_plain(cut)[:-1]), x, torch.int64) for build in (_order, _places))
    return permuted(x, places, order) if back else permuted(x, order, places)


def attend_near_and_far(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, cut: Cut, summary: str, count: bool, how: tuple
) -> Tensor:
    """Attention of patches to their windows and to summaries of the others, and of prefix tokens to all.

    Args:
        q, k, v: (B, H, N, D or E), in the order of `reorder`.
        prefix, cut: The grid.
        summary, count: The options of the mechanism, `count` for `count_bias`.
        how: What `functional.attend` takes: scale, fused, dropout.

    Returns:
        (B, H, N, E), in the same order.
    """
    return _attend_near_and_far(q, k, v, prefix, cut, (how[0], summary, count), how)


@torch.fx.wrap
@register_notrace_function
def _attend_near_and_far(q: Tensor, k: Tensor, v: Tensor, prefix: int, cut: Cut, far: tuple, how: tuple) -> Tensor:
    first, patches = zip(*(_split(t, [prefix, t.shape[2] - prefix]) for t in (q, k, v)), strict=True)
    y = [attend(first[0], k, v, *how).transpose(1, 2)] if prefix else []
    attend_patches = _attend_patches if are_numbers(cut.height, cut.width) else _attend_padded
    y += attend_patches(*patches, first[1:], cut, far, how)
    y = y[0] if len(y) == 1 else torch.cat(y, dim=1)
    return y.transpose(1, 2)  # the heads of a token beside each other, where they are merged


def _split(t: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """(B, H, N, D) → the same, of so many tokens each.

    Not slices, for the gradient of a slice is as large as the whole; and as they lie in memory, the heads of a token
    beside each other, for so gradients are put together again.
    """
    if len(sizes) == 1:
        return (t,)
    return tuple(part.transpose(1, 2) for part in t.transpose(1, 2).split_with_sizes(sizes, dim=1))


def _attend_patches(
    q: Tensor, k: Tensor, v: Tensor, kv_prefix: tuple, cut: Cut, far: tuple, how: tuple
) -> list[Tensor]:
    """(B, H, H · W, D or E) each, in the order of `reorder` → (B, …, H, E), some patches after others

    Args:
        kv_prefix: Keys and values that all see, (B, H, P, D or E).
        cut: Of numbers.
        far: Of `summarise`, scale, summary and count.
        how: Scale, fused, dropout.
    """
    blocks, (by_cells, whole) = _blocks(cut), _kinds(cut)
    sizes = [block.windows * _num_patches(block) for block in blocks]
    of_blocks = [
        [t.unflatten(2, (block.windows, _num_patches(block))) for t in of_block]
        for block, *of_block in zip(blocks, *(_split(t, sizes) for t in (q, k, v)), strict=True)
    ]
    summaries = _summaries(*_in_cells(q, k, v, blocks, cut), far) if by_cells else []
    summaries += [each for windows in of_blocks for each in _summaries(*windows, None, far)] if whole else []
    summaries = joined(summaries)
    y = []
    for i, windows in enumerate(of_blocks):
        seen = None if summaries is None else basis(_seen, (*_plain(cut), i), q, torch.int32)
        y += attend_windows(*(t.transpose(1, 2) for t in windows), kv_prefix, summaries, seen, how)
    return y


def _summaries(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, far: tuple) -> list[Summaries]:
    """As `summarise`, of some sets after others: on a CPU copies stay in the cache. With gradients it saves nothing."""
    number, most = k.shape[2], k.shape[2]
    if is_eager(q) and not on_gpu(q) and not torch.is_grad_enabled():
        most = max(1, CHUNK_OF_HOST * number // max(1, 3 * k.numel() * k.element_size()))
    parts = [t.split(most, dim=2) for t in (q, k, v)]
    parts.append([None] * len(parts[0]) if valid is None else valid.split(most))
    return [summarise(*of_some, *far) for of_some in zip(*parts, strict=True)]


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, kv_prefix: tuple, cut: Cut, far: tuple, how: tuple) -> list[Tensor]:
    """As `_attend_patches`, of a grid whose sides may be symbols, in its own order."""
    height, width, (h, w), (y, x), shift, reach = cut
    rows, columns = _ceil(h, y), _ceil(w, x)  # of cells in a window
    cells, area = rows * columns, y * x
    top, down = padding(height, h, shift)
    left, across = padding(width, w, shift)

    # One axis throughout: torch.export would compare symbolic sizes of several. And the first window once more at the
    # end: it would take a number of one for fixed.
    windows = down * across
    slot = torch.arange((windows + 1) * cells * area, device=q.device)
    window, cell, inside = slot // (cells * area) % windows, slot // area % cells, slot % area
    row, column = cell // columns * y + inside // x, cell % columns * x + inside % x
    is_patch = (row < h) & (column < w)
    row, column = row + window // across * h - top, column + window % across * w - left
    is_patch = is_patch & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    patch = row.remainder(height) * width + column.remainder(width)  # any will do where it is masked
    q, k, v = (t.index_select(2, patch) for t in (q, k, v))

    number = torch.arange(windows + 1, device=q.device)
    own = (number % windows)[:, None]
    in_cells, in_windows = is_patch.unflatten(0, (-1, area)), is_patch.unflatten(0, (-1, cells * area))
    of_cell = torch.arange((windows + 1) * cells, device=q.device) // cells
    by_cells = in_cells.any(dim=1) & (of_cell < windows) & (of_cell != own)  # (w, n)
    # A cell beyond the border is summarised too, by any patch.
    in_cells = in_cells | (~in_cells.any(dim=1, keepdim=True) & (torch.arange(area, device=q.device) == 0))
    summaries = [summarise(*(t.unflatten(2, (-1, area)) for t in (q, k, v)), in_cells, *far)]
    if reach is not None:
        apart = torch.maximum((own // across - number // across).abs(), (own % across - number % across).abs())
        by_cells = by_cells & (apart <= reach).index_select(1, of_cell)
        whole = (apart > reach) & (number < windows)
        summaries.append(summarise(*(t.unflatten(2, (-1, cells * area)) for t in (q, k, v)), in_windows, *far))
    sees = torch.cat([in_windows, by_cells, *([] if reach is None else [whole])], dim=1)
    sees = F.pad(sees, (kv_prefix[0].shape[2], 0), value=1)
    summaries = joined(summaries)
    mask = torch.zeros_like(sees, dtype=q.dtype).masked_fill(~sees, -torch.inf)[None, :, None, None]
    if summaries.bias is not None:
        mask = mask + F.pad(summaries.bias, (kv_prefix[0].shape[2] + cells * area, 0))[:, None, :, None]
    mask = mask.expand(q.shape[0], -1, -1, -1, -1).flatten(0, 1)

    def seen(first: Tensor, near: Tensor, of_sets: Tensor) -> Tensor:
        first, of_sets = (t.unsqueeze(1).expand(-1, near.shape[1], -1, -1, -1) for t in (first, of_sets))
        return torch.cat([first, near, of_sets], dim=3).flatten(0, 1)

    q, k, v = (t.unflatten(2, (-1, cells * area)).transpose(1, 2) for t in (q, k, v))
    keys, values = seen(kv_prefix[0], k, summaries.key), seen(kv_prefix[1], v, summaries.value)
    of_slots = attend(q.flatten(0, 1), keys, values, *how, mask)
    of_slots = of_slots.transpose(1, 2).unflatten(0, (q.shape[0], -1)).flatten(1, 2)

    patch = torch.arange(height * width, device=q.device)
    row, column = patch // width + top, patch % width + left
    window, row, column = row // h * across + column // w, row % h, column % w
    cell, inside = row // y * columns + column // x, row % y * x + column % x
    return [of_slots.index_select(1, (window * cells + cell) * area + inside)]


class _Block(NamedTuple):
    """Windows of one shape: how many they are, and the sides of the cells of each, along rows and columns."""

    windows: int
    along_rows: list[int]
    along_columns: list[int]


# No properties of these: Dynamo of torch 2.10 does not trace those of named tuples.


def _num_patches(block: _Block) -> int:
    """Those of a window."""
    return sum(block.along_rows) * sum(block.along_columns)


def _num_cells(block: _Block) -> int:
    """Those of a window."""
    return len(block.along_rows) * len(block.along_columns)


def _axis(length: int, side: int, cell: int, shift: bool) -> list[tuple[int, list[int]]]:
    """The windows along an axis, as runs of equal ones: their number, and the sides of the cells of each."""
    found = []
    for run in runs(length, side, shift):
        # Cells are cut from whole windows: of a window that is cut off by the border, what lies on the grid.
        start = side - run.side if shift and run.start == 0 and side < length else 0
        edges = [start, *range(start // cell * cell + cell, start + run.side, cell), start + run.side]
        found.append((run.number, [b - a for a, b in pairwise(edges)]))
    return found


def _window_numbers(length: int, side: int, shift: bool) -> list[range]:
    """The numbers of the windows of each run along an axis."""
    ends = list(accumulate((run.number for run in runs(length, side, shift)), initial=0))
    return [range(*run) for run in pairwise(ends)]


def _blocks(cut: Cut) -> list[_Block]:
    """The windows of a grid in the order of `reorder`, those of one shape together."""
    axes = (_axis(*sides, cut.shift) for sides in zip(cut[:2], cut.window, cut.cell, strict=True))
    return [_Block(down * across, rows, columns) for (down, rows), (across, columns) in product(*axes)]


def _in_cells(
    q: Tensor, k: Tensor, v: Tensor, blocks: list[_Block], cut: Cut
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The patches of each cell, and which of them there are: (B, H, H · W, D or E) each → (B, H, n, A, D or E), (n, A)

    The last is None if all cells are of one size.
    """
    rows, columns = (set(chain(*sides)) for sides in zip(*(block[1:] for block in blocks), strict=True))
    area = max(rows) * max(columns)
    if len(rows) == len(columns) == 1:
        return *(t.unflatten(2, (-1, area)) for t in (q, k, v)), None
    counts = basis(_counts, _plain(cut)[:-1], q, torch.int64)
    inside = torch.arange(area, device=q.device)
    valid = inside < counts[:, None]
    patch = (counts.cumsum(0) - counts)[:, None] + torch.where(valid, inside, 0)
    return *(t.index_select(2, patch.flatten()).unflatten(2, patch.shape) for t in (q, k, v)), valid


def _plain(cut: Cut) -> tuple[int, ...]:
    """All of it as integers, −1 for a reach that is None; without symbols."""
    return cut.height, cut.width, *cut.window, *cut.cell, int(cut.shift), -1 if cut.reach is None else cut.reach


def _kinds(cut: Cut) -> tuple[bool, bool]:
    """Whether there are windows that others see by their cells, and such that they see whole."""
    most = max(padding(*of_axis, cut.shift)[1] for of_axis in zip(cut[:2], cut.window, strict=True))
    return most > 1 and cut.reach != 0, cut.reach is not None and most > cut.reach + 1


def _seen(
    height: int, width: int, h: int, w: int, y: int, x: int, shift: int, reach: int, block: int, device: torch.device
) -> Tensor:
    """(w, seen): which of all summaries the windows of a block see, and −1 where one sees fewer than another.

    Those of cells, if there are any, come before those of windows, each in the order of `reorder`.
    """
    cut = Cut(height, width, (h, w), (y, x), bool(shift), None if reach < 0 else reach)
    blocks = _blocks(cut)
    ends = np.cumsum([0, *(of_block.windows for of_block in blocks)])
    at = np.empty((ends[-1], 2), dtype=np.int64)  # row and column of each window
    numbers = (_window_numbers(height, h, bool(shift)), _window_numbers(width, w, bool(shift)))
    for i, axes in enumerate(product(*numbers)):
        at[ends[i] : ends[i + 1]] = list(product(*axes))
    apart = np.abs(at[ends[block] : ends[block + 1], None] - at).max(axis=-1)  # (windows of the block, all)
    by_cells, whole = _kinds(cut)
    sees = []
    if by_cells:
        near = (apart > 0) & ((apart <= reach) | (reach < 0))
        cells = np.repeat([_num_cells(of_block) for of_block in blocks], np.diff(ends))
        sees.append(np.repeat(near, cells, axis=1))
    if whole:
        sees.append(apart > reach)
    sees = np.concatenate(sees, axis=1)
    counts = sees.sum(axis=1, keepdims=True)
    order = np.argsort(~sees, axis=1, kind='stable')[:, : counts.max()]
    return torch.tensor(np.where(np.arange(order.shape[1]) < counts, order, -1), device=device)


def _counts(height: int, width: int, h: int, w: int, y: int, x: int, shift: int, device: torch.device) -> Tensor:
    """(n,): the patches of each cell, in the order of `reorder`."""
    blocks = _blocks(Cut(height, width, (h, w), (y, x), bool(shift), None))
    counts = [[row * column for row, column in product(*block[1:])] * block.windows for block in blocks]
    return torch.tensor(list(chain(*counts)), device=device)


def _order(
    prefix: int, height: int, width: int, h: int, w: int, y: int, x: int, shift: int, device: torch.device
) -> Tensor:
    """(N,): the tokens of the grid in the order of `reorder`."""
    numbers = [  # along each axis the run, the window in it and the cell in this, of each patch
        [
            (run, window, cell)
            for run, (number, sides) in enumerate(_axis(*of_axis, bool(shift)))
            for window in range(number)
            for cell, side in enumerate(sides)
            for _ in range(side)
        ]
        for of_axis in ((height, h, y), (width, w, x))
    ]
    rows, columns = (np.array(of_axis).T for of_axis in numbers)
    keys = [
        np.broadcast_to(key, (height, width)) for pair in zip(rows[:, :, None], columns, strict=True) for key in pair
    ]
    order = np.lexsort([key.ravel() for key in reversed(keys)])  # the last key counts first
    return torch.tensor(np.concatenate([np.arange(prefix), prefix + order]), device=device)


def _places(*sizes) -> Tensor:
    """(N,): where each token of the grid is in that order; of the arguments of `_order`."""
    return _order(*sizes).argsort()


def _ceil(a, b: int):
    return (a + b - 1) // b


def _count_cells(length, side: int, cell: int, shift: bool):
    """The cells along an axis, whose length may be a symbol."""
    before, number = padding(length, side, shift)
    of_last = length + before - (number - 1) * side
    return (number - 1) * _ceil(side, cell) + _ceil(of_last, cell) - before // cell
