"""Orthonormal discrete cosine transforms, inverted, and used to resize.

The DCT-II of a signal of n samples is X = D x with the orthonormal matrix

    D[k, i] = sqrt((1 if k == 0 else 2) / n) · cos(π k (2 i + 1) / (2 n)),        D Dᵀ = I

(Ahmed, Natarajan, Rao, "Discrete Cosine Transform", IEEE Trans. Comput. 1974; scipy's `dct(norm='ortho')`). Keeping its
first m rows gives the m lowest frequencies; Dᵀ of those is the best approximation of x from them. In two dimensions the
transform is separable: D_H x D_Wᵀ.

Every function is differentiable and follows autocast as a matrix product does. A transform along one axis is a matrix
product with a small basis, or an FFT (Makhoul, "A fast cosine transform in one and two dimensions", 1980) where that is
faster. Measured on 2 CPU cores (script: `recipes/benchmarks/README.md`), 768 channels, n = 16,384 samples, time
of the product to that of the FFT: in float32 21 to 81 ms for m = 256 coefficients, 76 to 82 for 1,024, 309 to 88 for
4,096; in bfloat16, where the FFT is computed in float32, 51 to 92 ms for 4,096. So the FFT begins at 1,024 coefficients
in float32; at 8,192 in half precision, by extrapolation; and always where the basis would have more than 2²⁶ entries.
On GPUs it
begins where the arithmetic of an H100 says (`FFT_FROM_ON_GPU`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from vit_efficient.dct.bases import basis, is_capturing, is_eager, is_lasting, memo, product_step
from vit_efficient.grid import SYMBOLS, plain_sizes, smaller
from vit_efficient.utils.checks import is_integer, is_pair
from vit_efficient.utils.device import on_gpu
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import product_dtype, real_dtype, without_autocast

# See the module's docstring for where these were measured.
FFT_FROM = {torch.float64: 1024, torch.float32: 1024, torch.bfloat16: 8192, torch.float16: 8192}
# On an H100, by its rates of products and of memory: in bfloat16 a product with 4,096 of 16,384 frequencies should take
# 0.16 ms and the FFT, in float32 and with copies of x before and after it, 0.5 to 1 ms; in float32 they meet as on the
# CPU.
FFT_FROM_ON_GPU = FFT_FROM | {torch.bfloat16: 16384, torch.float16: 16384}
LARGEST_BASIS = 2**26  # entries


def _remainder(x: Tensor, divisor) -> Tensor:
    """x % divisor; ONNX has no remainder by a symbol."""
    return x - x // divisor * divisor


def _cosines(m, n, device: torch.device) -> Tensor:
    """The first m rows of the orthonormal n × n DCT-II matrix."""
    k = torch.arange(m, device=device)[:, None]
    i = torch.arange(n, device=device)[None, :]
    # The phase is reduced in integers, so that the cosine is exact to the last bits at any n.
    phase = _remainder(k * (2 * i + 1), 4 * n)
    rows = torch.cos(phase.to(real_dtype(device)) * (math.pi / 2 / n)) * (2 / n) ** 0.5
    return torch.where(k == 0, (1 / n) ** 0.5, rows)


def _band_limited(rows, columns, device: torch.device) -> Tensor:
    """The rows × columns matrix sqrt(rows / columns) · D_rowsᵀ D_columns over their min(rows, columns) frequencies.

    Its sum over frequencies has a closed form: with a, b the phases of output i and input j, entry (i, j) is
    (S(a − b) + S(a + b)) / columns, where S(θ) = 1/2 + Σ_{0<k<K} cos kθ = sin((K − 1/2) θ) / (2 sin(θ / 2)).
    """
    kept = smaller(rows, columns)
    # Phases in units of π / (2 · rows · columns): integers.
    a = (2 * torch.arange(rows, device=device)[:, None] + 1) * columns
    b = (2 * torch.arange(columns, device=device)[None, :] + 1) * rows
    unit = 2 * rows * columns
    total = 0.0
    for phase in (a - b, a + b):
        reduced = _remainder((2 * kept - 1) * phase, 4 * unit)
        numerator = torch.sin(reduced.to(real_dtype(device)) * (math.pi / 2 / unit))
        denominator = 2 * torch.sin(phase.to(real_dtype(device)) * (math.pi / 2 / unit))
        zero = phase == 0
        total = total + torch.where(zero, kept - 0.5, numerator / torch.where(zero, 1.0, denominator))
    return total / columns


def _twiddle(rows, columns, device: torch.device) -> Tensor:
    """cos and sin of π k / (2 n) for the n/2 + 1 frequencies of a real FFT of n = columns samples: (2, rows)."""
    angle = torch.arange(rows, device=device, dtype=real_dtype(device)) * (math.pi / 2 / columns)
    return torch.stack([torch.cos(angle), torch.sin(angle)])


def _fft_dct(x: Tensor, m: int) -> Tensor:
    """The m lowest DCT-II coefficients of x (P, n, C) along its middle axis, by one real FFT."""
    n = x.shape[1]
    half = n // 2 + 1
    spectrum = torch.fft.rfft(torch.cat([x[:, ::2], x[:, 1::2].flip(1)], dim=1), dim=1)
    cos, sin = basis(_twiddle, (half, n), x, x.dtype)[..., None]
    low = min(m, half)
    real, imag = spectrum.real, spectrum.imag
    y = real[:, :low] * cos[:low] + imag[:, :low] * sin[:low]
    if m > half:  # coefficient n − k is the imaginary part of the turned frequency k
        k = slice(n - m + 1, n - half + 1)
        y = torch.cat([y, (real[:, k] * sin[k] - imag[:, k] * cos[k]).flip(1)], dim=1)
    scale = (2 / n) ** 0.5
    return torch.cat([y[:, :1] * (1 / n) ** 0.5, y[:, 1:] * scale], dim=1)


def _fft_idct(x: Tensor, n: int) -> Tensor:
    """The n samples whose lowest DCT-II coefficients are x (P, m, C) and whose others are zero, by one real FFT."""
    m = x.shape[1]
    half = n // 2 + 1
    scale = (n / 2) ** 0.5
    x = torch.cat([x[:, :1] * n**0.5, x[:, 1:] * scale, x.new_zeros(x.shape[0], n - m, x.shape[2])], dim=1)
    mirrored = torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:].flip(1)], dim=1)[:, :half]
    x = x[:, :half]
    cos, sin = basis(_twiddle, (half, n), x, x.dtype)[..., None]
    spectrum = torch.complex(x * cos + mirrored * sin, x * sin - mirrored * cos)
    v = torch.fft.irfft(spectrum, n=n, dim=1)
    y = torch.empty_like(v)
    front = (n + 1) // 2
    y[:, ::2] = v[:, :front]
    y[:, 1::2] = v[:, front:].flip(1)
    return y


class _Plan(NamedTuple):
    """Operators in order, each with its matrix and the shape of its input; and the shape of the result."""

    steps: list[tuple[tuple, Callable[[Any, Tensor], Tensor], Any]]
    shape: tuple


# One leaf for FX: the choice between product and FFT depends on the sizes.
@torch.fx.wrap
@register_notrace_function
def transform(x: Tensor, kind: str, axes: tuple, sizes: tuple, grid: tuple | None = None) -> Tensor:
    """Transforms axes of x to other sizes, in this order.

    Args:
        x: (…, n, …), floating-point.
        kind: 'dct', 'idct' or 'resample'.
        axes, sizes: Of each axis its number, and the entries it is to have; None as many as it has.
        grid: (H, W) of x (…, H · W, D), whose axes -3 and -2 are H and W here; the result has them in one, too.
    """
    if not is_eager(x) or is_capturing(x.device):
        return _apply(_plan(x, kind, axes, sizes, grid, product_dtype(x)), x)
    dtype = product_dtype(x)
    # The types, because 2, 2.0 and True are one key and not all sizes.
    types = (type(axes[0]), type(sizes[0]), type(sizes[-1]))
    key = (kind, axes, sizes, types, grid, x.shape, x.dtype, dtype, x.device)
    plan = memo.plans.get(key)
    if plan is None:
        plan = _plan(x, kind, axes, sizes, grid, dtype)
        if all(matrix is None or is_lasting(matrix) for *_, matrix in plan.steps):
            memo.keep_plan(key, plan)
    for shape, operator, matrix in plan[0]:  # `_apply`, without a call more
        x = operator(matrix, x.reshape(shape))
    return x.reshape(plan[1])


def _apply(plan: _Plan, x: Tensor) -> Tensor:
    for shape, operator, matrix in plan.steps:
        x = operator(matrix, x.reshape(shape))
    return x.reshape(plan.shape)


def _plan(x: Tensor, kind: str, axes: tuple, sizes: tuple, grid: tuple | None, dtype: torch.dtype) -> _Plan:
    """What `transform` is to do with an x like this one; raises its errors."""
    if not x.is_floating_point():
        raise UserError(f'{kind}: x must have a floating-point dtype, got x.dtype={x.dtype}')
    shape = list(x.shape) if grid is None else [*x.shape[:-2], *grid, x.shape[-1]]
    steps = []
    for axis, size in zip(axes, sizes, strict=True):
        if not -len(shape) <= axis < len(shape):
            raise UserError(f'{kind}: dim={axis} is not an axis of a tensor of {len(shape)} axes')
        axis = axis % len(shape)
        n, size = _checked_sizes(kind, shape[axis], size)
        if kind != 'resample' or type(n) is not int or type(size) is not int or size != n:
            outer, inner = shape[:axis], shape[axis + 1 :]
            steps.append(_step(x, kind, math.prod(outer), n, size, math.prod(inner) if inner else None, dtype))
        shape[axis] = size
    return _Plan(steps, tuple(shape) if grid is None else (*shape[:-3], shape[-3] * shape[-2], shape[-1]))


def _checked_sizes(kind: str, n, size) -> tuple:
    """The entries that an axis has and is to have; they may be symbols."""
    n, size = plain_sizes((n, size))
    if size is None:
        size = n
    elif type(size) is not int and is_integer(size):  # of NumPy; a symbol is no integer
        size = int(size)
    if type(size) is not int:
        if not isinstance(size, SYMBOLS):
            raise UserError(f'{kind}: size must be an integer, got {size=!r}')
    elif type(n) is int:
        low, high = {'dct': (1, n), 'idct': (n, math.inf), 'resample': (1, math.inf)}[kind]
        if not low <= size <= high:
            raise UserError(f'{kind}: size must lie in {low} … {high} for an axis of {n}, got {size=}')
    return n, size


def _step(x: Tensor, kind: str, outer, n, size, inner, dtype: torch.dtype) -> tuple:
    """One step of a plan, from n to `size` entries; `inner` is None where nothing follows the axis."""
    kept = smaller(n, size)
    fft_from = (FFT_FROM_ON_GPU if on_gpu(x) else FFT_FROM).get(dtype, 1024)
    if type(kept) is int and (kept >= fft_from or n * size > LARGEST_BASIS):
        return (outer, n, 1 if inner is None else inner), partial(_by_fft, kind, kept, size, dtype), None
    if kind == 'idct':
        matrix = basis(_cosines, (n, size), x, dtype).mT
    else:
        matrix = basis(_cosines if kind == 'dct' else _band_limited, (size, n), x, dtype)
    return product_step(outer, n, inner, matrix)


def _by_fft(kind: str, kept: int, size: int, dtype: torch.dtype, _, x: Tensor) -> Tensor:
    """A step where the basis would be too large, in `dtype`: x (P, n, C) → (P, size, C)"""
    n = x.shape[1]
    y = x.to(torch.promote_types(dtype, torch.float32))
    with without_autocast(x):
        if kind != 'idct':
            y = _fft_dct(y, kept)
        if kind != 'dct':
            y = _fft_idct(y, size)
        if kind == 'resample':
            y = y * (size / n) ** 0.5
    return y.to(dtype)


def as_pair(value, name: str) -> tuple:
    """The pair that an argument is to be; a UserError if it is none."""
    if not is_pair(value):
        raise UserError(f'{name} must be a pair, got {name}={value!r}')
    return tuple(value)


def dct_matrix(
    n: int,
    m: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The first m rows of the orthonormal n × n DCT-II matrix.

    Args:
        n: Samples.
        m: Frequencies kept, the lowest; all n by default.
        dtype: The dtype of the result, torch's default one by default; entries are rounded once, from float64.
        device: The device of the result.

    Returns:
        (m, n), its rows orthonormal. The caller owns it.

    Raises:
        UserError: If not 1 ≤ m ≤ n.
    """
    m = n if m is None else m
    if not (is_integer(n) and is_integer(m) and 1 <= m <= n):
        raise UserError(f'dct_matrix: need integers 1 ≤ m ≤ n, got {m=}, {n=}')
    device = torch.empty(0, device=device).device
    return _cosines(int(m), int(n), device).to(dtype or torch.get_default_dtype())


def dct(x: Tensor, m: int | None = None, dim: int = -1) -> Tensor:
    """The m lowest orthonormal DCT-II coefficients of x along `dim`.

    Args:
        x: (…, n, …), floating-point.
        m: Coefficients kept; all n by default.
        dim: The axis.

    Returns:
        (…, m, …)

    Raises:
        UserError: If x is not floating-point, or not 1 ≤ m ≤ n.
    """
    return transform(x, 'dct', (dim,), (m,))


def idct(x: Tensor, n: int | None = None, dim: int = -1) -> Tensor:
    """The n samples whose m lowest DCT-II coefficients are x and whose others are zero: Dᵀ x.

    Args:
        x: (…, m, …), floating-point.
        n: Samples; m by default.
        dim: The axis.

    Returns:
        (…, n, …)

    Raises:
        UserError: If x is not floating-point, or n < m.
    """
    return transform(x, 'idct', (dim,), (n,))


def resample(x: Tensor, size: int | tuple[int, int], dims: int | tuple[int, int] = (-2, -1)) -> Tensor:
    """Band-limited resize: the image of the given size that has the same lowest frequencies, and no others.

    A constant stays that constant (gain 1). Down, it is the best band-limited approximation; down after up is the
    identity.

    Args:
        x: (…, H, W) or with its two axes at `dims`; floating-point.
        size: (h, w), each side larger, equal or smaller. An int with one axis in `dims`.
        dims: The axis or axes resized, in this order: it is cheaper to begin with one that shrinks.

    Returns:
        x with the axes `dims` of `size`.

    Raises:
        UserError: If x is not floating-point, or a size is below 1.
    """
    if is_integer(dims):
        return transform(x, 'resample', (dims,), (size,))
    (h, w), (rows, columns) = as_pair(size, 'size'), as_pair(dims, 'dims')
    return transform(x, 'resample', (rows, columns), (h, w))


def dct2(x: Tensor, size: tuple[int, int] | None = None, dims: tuple[int, int] = (-2, -1)) -> Tensor:
    """The h × w lowest coefficients of the separable orthonormal 2-D DCT-II.

    Args:
        x: (…, H, W) or with its two axes at `dims`; floating-point.
        size: (h, w), coefficients kept along each axis; all by default.
        dims: The two axes.

    Returns:
        (…, h, w)

    Raises:
        UserError: If x is not floating-point, or not 1 ≤ h ≤ H and 1 ≤ w ≤ W.
    """
    (h, w), (rows, columns) = as_pair(size or (None, None), 'size'), as_pair(dims, 'dims')
    return transform(x, 'dct', (rows, columns), (h, w))


def idct2(x: Tensor, size: tuple[int, int] | None = None, dims: tuple[int, int] = (-2, -1)) -> Tensor:
    """The H × W image whose lowest 2-D DCT-II coefficients are x and whose others are zero.

    Args:
        x: (…, h, w) or with its two axes at `dims`; floating-point.
        size: (H, W); (h, w) by default.
        dims: The two axes.

    Returns:
        (…, H, W)

    Raises:
        UserError: If x is not floating-point, or H < h or W < w.
    """
    (height, width), (rows, columns) = as_pair(size or (None, None), 'size'), as_pair(dims, 'dims')
    return transform(x, 'idct', (columns, rows), (width, height))
