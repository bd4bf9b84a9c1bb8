"""Images without their high frequencies: truncation of the 2-D DCT, of the whole image or of each of its blocks.

Which coefficients of a block of H × W are kept is an `order` and a budget. `square` keeps a rectangle of the lowest
h × w; for a budget, the largest of the block's aspect. `zigzag` keeps the first of JPEG's order: whole antidiagonals,
but for the last one. The basis is orthonormal, so that energies of coefficients are energies of pixels (Parseval), and
a truncated image is the best approximation in the coefficients that it keeps.
"""

import numpy as np
import torch
from timm.layers import register_notrace_function, to_2tuple
from torch import Tensor

from vit_efficient.dct.transforms import as_pair, dct2, idct2
from vit_efficient.grid import floor_sqrt, fraction_of, larger, plain_sizes, scaled_grid, smaller
from vit_efficient.utils.checks import as_integer, as_share, as_sides, check_choice, is_integer
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import real_dtype, without_autocast

ORDERS = ('square', 'zigzag')


def zigzag(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """The zigzag order of the coefficients of a block, from low frequencies to high.

    That of JPEG (ITU-T T.81, Figure 5) for 8 × 8. For other shapes it is the same walk along the antidiagonals, from
    the upper right to the lower left and back.

    Args:
        height, width: The sides of the block.
        device: The device of the result.

    Returns:
        (height · width,), int64: `coefficients.flatten(-2)[..., zigzag(height, width)]` has them in order.

    Raises:
        UserError: If a side is below 1.
    """
    height, width = as_integer('height', height), as_integer('width', width)
    return _rank(height, width, height, width, torch.empty(0, device=device).device).flatten().argsort()


def _rank(height, width, rows, columns, device: torch.device) -> Tensor:
    """The places in the zigzag order of the first rows × columns coefficients of a block of height × width."""
    i = torch.arange(rows, device=device)[:, None]
    j = torch.arange(columns, device=device)[None, :]
    diagonal = i + j

    def triangle(n: Tensor) -> Tensor:
        n = n.clamp(min=0)
        return n * (n + 1) // 2

    before = triangle(diagonal) - triangle(diagonal - height) - triangle(diagonal - width)
    down = i - (diagonal - width + 1).clamp(min=0)
    up = j - (diagonal - height + 1).clamp(min=0)
    return before + torch.where(diagonal % 2 == 1, down, up)


def kept_coefficients(
    height: int,
    width: int,
    size: tuple[int, int] | None = None,
    *,
    count: int | None = None,
    ratio: float | None = None,
    order: str = 'square',
) -> tuple[int, int, int]:
    """Which coefficients `truncate` keeps of a block of height × width.

    Args:
        height, width: The sides of the block.
        size, count, ratio, order: As of `truncate`.

    Returns:
        (h, w, count): those kept lie among the lowest h × w; `count` of them, which are all of the rectangle for
        `square`, and the first in zigzag order for `zigzag`.

    Raises:
        UserError: As of `truncate`.
    """
    given = {name: value for name, value in (('size', size), ('count', count), ('ratio', ratio)) if value is not None}
    if len(given) != 1:
        raise UserError(f'give one of size, count and ratio, got {given or "none"}')
    check_choice('order', order, ORDERS)
    # Sizes that are symbols are taken as they are: comparing them would fix their value.
    plain = type(height) is int and type(width) is int
    if plain and min(height, width) < 1:
        raise UserError(f'an image or block must have at least 1 × 1 pixels, got {height} × {width}')
    whole = f'the {height} × {width} of the image or block'
    if size is not None:
        if order != 'square':
            raise UserError(f'size={size} is a rectangle; with {order=} give count or ratio')
        h, w = as_pair(size, 'size')
        if plain:
            if not (is_integer(h, 1) and is_integer(w, 1) and h <= height and w <= width):
                raise UserError(f'size must be integers (h, w) from 1 to {whole}, got {size=}')
            h, w = int(h), int(w)
        return h, w, h * w
    if count is None:
        ratio = as_share('ratio', ratio)
    else:
        count = as_integer('count', count, what=f'an integer from 1 to {whole}')
        if plain and count > height * width:
            raise UserError(f'count must be an integer from 1 to {whole}, got {count=}')
    if order == 'square':
        h, w = scaled_grid(height, width, count=count, ratio=ratio)
        return h, w, h * w
    if count is None:
        count = larger(1, fraction_of(height * width, ratio))
    # The antidiagonals that hold them: first ever longer, then all as long as the short side.
    short = smaller(height, width)
    if 2 * count <= short * (short + 1):
        diagonals = (floor_sqrt(8 * count - 7) + 1) // 2
    else:
        diagonals = short + -(-(2 * count - short * (short + 1)) // (2 * short))
    return smaller(diagonals, height), smaller(diagonals, width), count


def truncate(
    x: Tensor | np.ndarray,
    size: tuple[int, int] | None = None,
    dims: tuple[int, int] = (-2, -1),
    *,
    block: int | tuple[int, int] | None = None,
    count: int | None = None,
    ratio: float | None = None,
    order: str = 'square',
) -> Tensor | np.ndarray:
    """The image x with all but some of its lowest 2-D DCT coefficients set to zero.

    Args:
        x: (…, H, W) or with its two axes at `dims`; floating-point. A tensor, or an array of NumPy.
        size: (h, w), the coefficients kept along each axis. One of size, count and ratio.
        dims: The two axes.
        block: p or (p_h, p_w): each block of these sides is transformed and truncated on its own, as in JPEG. None is
            the whole image.
        count: Coefficients kept of each block.
        ratio: The fraction of them, 0 < ratio ≤ 1; of its coefficients, rounded down, a block keeps at least one.
        order: `square`: the rectangle of `size`, or the largest of the block's aspect (h = ⌊s · H⌋, w = ⌊s · W⌋)
            within the budget. `zigzag`: as many as the budget says, in the order of `zigzag`. It counts half waves
            along each side, so on a block that is not square an antidiagonal is not of one frequency per pixel.

    Returns:
        The image, of the shape and type of x.

    Raises:
        UserError: If x is not floating-point, blocks do not divide it, or the budget exceeds the image or block.
    """
    return _truncate(x, dims, block, size, count, ratio, order)


def kept_energy(
    x: Tensor | np.ndarray,
    size: tuple[int, int] | None = None,
    dims: tuple[int, int] = (-2, -1),
    *,
    block: int | tuple[int, int] | None = None,
    count: int | None = None,
    ratio: float | None = None,
    order: str = 'square',
) -> Tensor | np.ndarray:
    """The fraction of the energy of an image, its sum of squares, that is in the coefficients that `truncate` keeps.

    By Parseval, `truncate(x, …).square().sum() / x.square().sum()`, for each image; no image is reconstructed. Most of
    the energy of a photograph is in its mean, which is always kept: see x - x.mean(dims, keepdim=True) for the rest.

    Args:
        x: (…, H, W) or with its two axes at `dims`; floating-point or integer. A tensor, or an array of NumPy.
        size, dims, block, count, ratio, order: As of `truncate`.

    Returns:
        (…), in [0, 1], float64 (float32 where the device has no float64). 1 for an image of zeros.

    Raises:
        UserError: If x is complex or boolean, blocks do not divide it, or the budget exceeds the image or block.
    """
    return _kept_energy(x, dims, block, size, count, ratio, order)


# Both are leaves for FX: which coefficients are kept depends on the sizes.
@torch.fx.wrap
@register_notrace_function
def _truncate(x, dims, block, size, count, ratio, order):
    if isinstance(x, np.ndarray):
        y = _truncate(_to_tensor(x, 'f'), dims, block, size, count, ratio, order).numpy()
        return y.astype(x.dtype, copy=False)
    _check_tensor(x)
    if not x.is_floating_point():
        raise UserError(f'truncate: x must have a floating-point dtype, got x.dtype={x.dtype}; convert it')
    x_blocks, axes, sides = _in_blocks(x, dims, block)
    kept = kept_coefficients(*sides, size, count=count, ratio=ratio, order=order)
    return idct2(_low(x_blocks, axes, sides, kept), sides, axes).reshape(x.shape)


@torch.fx.wrap
@register_notrace_function
def _kept_energy(x, dims, block, size, count, ratio, order):
    if isinstance(x, np.ndarray):
        return _kept_energy(_to_tensor(x, 'fiu'), dims, block, size, count, ratio, order).numpy()
    _check_tensor(x)
    if x.is_complex() or x.dtype == torch.bool:
        raise UserError(f'kept_energy: x must be floating-point or integer, got x.dtype={x.dtype}')
    x_blocks, axes, sides = _in_blocks(x.to(real_dtype(x.device)), dims, block)
    kept = kept_coefficients(*sides, size, count=count, ratio=ratio, order=order)
    # The axes of blocks, just before those of their samples, are summed over as well.
    summed = axes if block is None else (*axes, *(axis - 1 for axis in axes))
    with without_autocast(x):
        low = _low(x_blocks, axes, sides, kept).square().sum(summed)
        total = x_blocks.square().sum(summed)
    nothing = (total == 0).to(total.dtype)
    return ((low + nothing) / (total + nothing)).clamp(max=1)


def _check_tensor(x) -> None:
    if not isinstance(x, Tensor):
        raise UserError(f'x must be a tensor, or an array of NumPy, got {type(x).__name__}')


def _to_tensor(x: np.ndarray, kinds: str) -> Tensor:
    if x.dtype.kind not in kinds or x.dtype.itemsize > 8:
        raise UserError(f'x must have a real {"floating-point " if kinds == "f" else ""}dtype, got x.dtype={x.dtype}')
    # A copy, since PyTorch takes neither foreign byte orders nor, without a warning, read-only memory.
    return torch.from_numpy(x.astype(x.dtype.newbyteorder('='), order='C'))


def _in_blocks(x: Tensor, dims: tuple[int, int], block: int | tuple[int, int] | None) -> tuple[Tensor, tuple, tuple]:
    """x with each of its two axes as two, blocks and samples of a block; the axes of samples, and their sizes."""
    rows, columns = as_pair(dims, 'dims')
    for dim in (rows, columns):
        if not is_integer(dim) or not -x.ndim <= dim < x.ndim:
            raise UserError(f'dims must be axes of a tensor of {x.ndim} axes, got {dims=}')
    rows, columns = rows % x.ndim, columns % x.ndim
    if rows == columns:
        raise UserError(f'dims must be two axes, got {dims=}')
    sides = plain_sizes((x.shape[rows], x.shape[columns]))
    if block is None:
        return x, (rows, columns), sides
    height, width = as_block(block)
    if all(type(side) is int for side in sides) and (sides[0] % height or sides[1] % width or 0 in sides):
        raise UserError(
            f'blocks of {height} × {width} do not divide an image of {sides[0]} × {sides[1]}; pad it, by repeating its '
            'edge, and crop the result, as the transforms of vit_efficient.data do'
        )
    for dim, side in sorted(((rows, height), (columns, width)), reverse=True):
        x = x.unflatten(dim, (-1, side))
    return x, (rows + 1 + (rows > columns), columns + 1 + (columns > rows)), (height, width)


def as_block(block: int | tuple[int, int]) -> tuple[int, int]:
    """The sides of a block.

    Raises:
        UserError: If it is neither a positive integer nor a pair of them.
    """
    return to_2tuple(as_sides('block', block, '(height, width)'))


def _low(x: Tensor, axes: tuple[int, int], sides: tuple[int, int], kept: tuple[int, int, int]) -> Tensor:
    """The coefficients of x that are kept, zeros between them."""
    h, w, count = kept
    y = dct2(x, (h, w), axes)
    if count < h * w:
        dropped = _rank(*sides, h, w, x.device) >= count
        shape = [1] * x.ndim
        shape[axes[0]], shape[axes[1]] = h, w
        y = y.masked_fill((dropped if axes[0] < axes[1] else dropped.mT).reshape(shape), 0)
    return y
