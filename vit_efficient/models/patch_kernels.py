"""Linear maps of the pixels of a patch, and the same maps of its DCT coefficients.

Letters: E output channels, C channels, p × q pixels of a patch, f × g coefficients of a channel, K of all channels, one
channel after the other, each row by row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vit_efficient import dct

#: Red, green, blue to luma and the two chroma differences: JFIF 1.02, without its offset of 128.
YCBCR = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))

# f and g of each channel.
Truncation = Sequence[tuple[int, int]]


def split_channels(weight: Tensor, truncation: Truncation) -> list[Tensor]:
    """Weights of coefficients (…, K) → of those of each channel, (…, f, g)."""
    parts = weight.split([f * g for f, g in truncation], dim=-1)
    return [part.unflatten(-1, size) for part, size in zip(parts, truncation, strict=True)]


def truncated(channels: Sequence[Tensor], truncation: Truncation) -> Tensor:
    """Weights of the coefficients of each channel, (…, p, q), some of them cut → (…, K)"""
    return torch.cat([y[..., :f, :g].flatten(-2) for y, (f, g) in zip(channels, truncation, strict=True)], dim=-1)


def kernel_to_weight(kernel: Tensor, truncation: Truncation, color: str) -> Tensor:
    """The kernel of a convolution (E, C, p, q) → the weights (E, K) of the coefficients; computed in float64."""
    y_ECpq = dct.dct2(kernel.detach().double())
    if color == 'ycbcr':
        y_ECpq = torch.einsum('ic,eipq->ecpq', torch.linalg.inv(_ycbcr(y_ECpq)), y_ECpq)
    return truncated(y_ECpq.unbind(1), truncation)


def weight_to_kernel(weight: Tensor, truncation: Truncation, patch_size: tuple[int, int], color: str) -> Tensor:
    """The other way round: (E, K) → (E, C, p, q), in float64."""
    y_ECpq = weight.new_zeros(len(weight), len(truncation), *patch_size, dtype=torch.float64)
    parts = split_channels(weight.detach().double(), truncation)
    for c, (part, (f, g)) in enumerate(zip(parts, truncation, strict=True)):
        y_ECpq[:, c, :f, :g] = part
    if color == 'ycbcr':
        y_ECpq = torch.einsum('ci,ecpq->eipq', _ycbcr(y_ECpq), y_ECpq)
    return dct.idct2(y_ECpq)


def _ycbcr(like: Tensor) -> Tensor:
    return torch.tensor(YCBCR, dtype=like.dtype, device=like.device)
