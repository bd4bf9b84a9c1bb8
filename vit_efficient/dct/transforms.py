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
On a GPU the crossover has not been measured.
"""

import math

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from vit_efficient.dct.bases import along, basis
from vit_efficient.grid import plain_sizes, smaller
from vit_efficient.utils.checks import is_integer, is_pair
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import product_dtype, real_dtype, without_autocast

# See the module's docstring for where these were measured.
FFT_FROM = {torch.float64: 1024, torch.float32: 1024, torch.bfloat16: 8192, torch.float16: 8192}
LARGEST_BASIS = 2**26  # entries


def _cosines(m, n, device: torch.device) -> Tensor:
    """The first m rows of the orthonormal n × n DCT-II matrix."""
    k = torch.arange(m, device=device)[:, None]
    i = torch.arange(n, device=device)[None, :]
    # The phase is reduced in integers, so that the cosine is exact to the last bits at any n.
    phase = (k * (2 * i + 1)) % (4 * n)
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
        numerator = torch.sin(((2 * kept - 1) * phase % (4 * unit)).to(real_dtype(device)) * (math.pi / 2 / unit))
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
    cos, sin = basis(_twiddle, half, n, x, x.dtype)[..., None]
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
    cos, sin = basis(_twiddle, half, n, x, x.dtype)[..., None]
    spectrum = torch.complex(x * cos + mirrored * sin, x * sin - mirrored * cos)
    v = torch.fft.irfft(spectrum, n=n, dim=1)
    y = torch.empty_like(v)
    front = (n + 1) // 2
    y[:, ::2] = v[:, :front]
    y[:, 1::2] = v[:, front:].flip(1)
    return y


# One leaf for FX: the choice between product and FFT depends on the sizes.
@torch.fx.wrap
@register_notrace_function
def _along(x: Tensor, dim: int, kind: str, size) -> Tensor:
    """Transform one axis of x to `size` entries; `kind` is 'dct', 'idct' or 'resample'."""
    if not x.is_floating_point():
        raise UserError(f'{kind}: x must have a floating-point dtype, got x.dtype={x.dtype}')
    if not -x.ndim <= dim < x.ndim:
        raise UserError(f'{kind}: {dim=} is not an axis of a tensor of {x.ndim} axes')
    n, size = plain_sizes((x.shape[dim], size))
    if size is None:
        size = n
    elif type(size) is not int and is_integer(size):  # of NumPy; a symbol is no integer
        size = int(size)
    if type(size) is int and type(n) is int:
        low, high = {'dct': (1, n), 'idct': (n, math.inf), 'resample': (1, math.inf)}[kind]
        if not low <= size <= high:
            raise UserError(f'{kind}: size must lie in {low} … {high} for an axis of {n}, got {size=}')
    elif isinstance(size, (float, str, bool)):
        raise UserError(f'{kind}: size must be an integer, got {size=!r}')

    if kind == 'resample' and type(n) is int and type(size) is int and size == n:
        return x
    dtype, kept = product_dtype(x), smaller(n, size)
    if type(kept) is int and (kept >= FFT_FROM.get(dtype, 1024) or n * size > LARGEST_BASIS):
        return _by_fft(x, dim % x.ndim, n, kind, kept, size, dtype)
    if kind == 'idct':
        return along(x, dim, basis(_cosines, n, size, x, dtype).mT)
    return along(x, dim, basis(_cosines if kind == 'dct' else _band_limited, size, n, x, dtype))


def _by_fft(x: Tensor, dim: int, n: int, kind: str, kept: int, size: int, dtype: torch.dtype) -> Tensor:
    """`_along` where the basis would be too large, in `dtype`."""
    outer, inner = x.shape[:dim], x.shape[dim + 1 :]
    y = x.reshape(math.prod(outer), n, math.prod(inner)).to(torch.promote_types(dtype, torch.float32))
    with without_autocast(x):
        if kind != 'idct':
            y = _fft_dct(y, kept)
        if kind != 'dct':
            y = _fft_idct(y, size)
        if kind == 'resample':
            y = y * (size / n) ** 0.5
    return y.to(dtype).reshape(*outer, size, *inner)


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
    return _along(x, dim, 'dct', m)


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
    return _along(x, dim, 'idct', n)


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
        return _along(x, dims, 'resample', size)
    (h, w), (rows, columns) = as_pair(size, 'size'), as_pair(dims, 'dims')
    return _along(_along(x, rows, 'resample', h), columns, 'resample', w)


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
    return _along(_along(x, rows, 'dct', h), columns, 'dct', w)


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
    return _along(_along(x, columns, 'idct', width), rows, 'idct', height)
