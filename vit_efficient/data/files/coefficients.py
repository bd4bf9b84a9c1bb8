"""JPEG coefficients regrouped into those of patches: what a DCT patch embedding computes from pixels, without pixels.

Of each p × p patch of the normalised image, (pixel / 255 − mean) / std, the f × f lowest orthonormal DCT-II
coefficients lie where the patch lies: a *coefficient image* (C, rows · f, columns · f). A patch of JPEG's 8 × 8 blocks
has them as

    A X Aᵀ,        A = D_p[:f] · R · blockdiag(D_8ᵀ)

with X the patch's dequantised coefficients, D_n the orthonormal DCT-II matrix, and R, for subsampled components, the
repetition of each sample (libjpeg's plain upsampling, not its "fancy" one). All is linear: colour conversion and
normalisation act on each coefficient, level shift and mean on the lowest. So the result is the DCT of the image that a
decoder computes before it rounds the samples to integers and clamps them to 0…255.

Dimensions: C channels of the model, R × S patches, f × g coefficients kept of each.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from vit_efficient.data.files.images import name_of
from vit_efficient.data.files.jpeg import BLOCK, QuantizedJpeg, read_quantized
from vit_efficient.dct import dct_matrix
from vit_efficient.models.inputs import takes_coefficients
from vit_efficient.utils.checks import as_sides
from vit_efficient.utils.errors import UserError

_RED, _GREEN, _BLUE = _LUMA = 0.299, 0.587, 0.114  # ITU-R 601
# To RGB (JFIF, ITU-T T.871, section 7: the inverse of its definition of Cb and Cr).
_YCBCR = (
    (1, 0, 2 * (1 - _RED)),
    (1, -2 * (1 - _BLUE) * _BLUE / _GREEN, -2 * (1 - _RED) * _RED / _GREEN),
    (1, 2 * (1 - _BLUE), 0),
)
TO_CHANNELS = {
    1: {'grey': torch.ones(1, 1), 'RGB': torch.tensor([_LUMA]), 'YCbCr': torch.tensor([[1.0, 0.0, 0.0]])},
    3: {'grey': torch.ones(3, 1), 'RGB': torch.eye(3), 'YCbCr': torch.tensor(_YCBCR)},
}
_STRIP = 2**18  # pixels at once, of each component: what is made of them stays within a core's cache


@dataclass(frozen=True)
class PatchCoefficients:
    """Which coefficients of which patches: p × q pixels, the lowest f × g frequencies. One number stands for both.

    Raises:
        UserError: If p and q are no multiples of 8, or f and g not from 1 to p and q.
    """

    patch_size: int | tuple[int, int]
    keep: int | tuple[int, int]

    def __post_init__(self):
        for name in ('patch_size', 'keep'):
            object.__setattr__(self, name, to_2tuple(as_sides(name, getattr(self, name))))
        if any(size < BLOCK or size % BLOCK for size in self.patch_size):
            what = f'multiples of {BLOCK}, the side of the blocks of a JPEG; data.decode=pixels takes any'
            raise UserError(f'patch_size={self.patch_size} must be {what}')
        if any(keep > size for keep, size in zip(self.keep, self.patch_size, strict=True)):
            raise UserError(f'keep={self.keep} must be from 1 to patch_size={self.patch_size}')

    @classmethod
    def of(cls, model: nn.Module) -> 'PatchCoefficients':
        """What the model's patch embedding takes; a UserError if these are pixels."""
        if not takes_coefficients(model):
            raise UserError(
                'data.decode=coefficients needs a model whose patch embedding takes DCT coefficients, this one takes '
                'pixels; use data.decode=pixels or scaled'
            )
        return cls(tuple(model.patch_embed.patch_size), tuple(model.patch_embed.keep))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of whole patches in an image of that size."""
        return height // self.patch_size[0], width // self.patch_size[1]


class Window(NamedTuple):
    """A rectangle of patches: the row and column of its first, and how many rows and columns there are."""

    top: int
    left: int
    rows: int
    columns: int


def read_coefficients(
    source: str | Path | BinaryIO,
    patch_size: int | tuple[int, int],
    keep: int | tuple[int, int],
    channels: int = 3,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Tensor:
    """The coefficient image of a JPEG, from `read_quantized` and `regroup`.

    Args:
        source: A file or an open stream.
        patch_size, keep: (p, q), in pixels, and (f, g), as of `PatchCoefficients`.
        channels: 3 (RGB) or 1 (grey).
        mean, std: Per channel, of pixels in [0, 1]; 0 and 1 by default.

    Returns:
        (C, R · f, S · g), float32.

    Raises:
        UserError: If the arguments do not fit each other, the file has no coefficients, or the image no whole patch.
        MissingPackage: If `pyjpegio` is not installed.
    """
    layout = PatchCoefficients(patch_size, keep)
    if channels not in TO_CHANNELS:
        raise UserError(f'{channels=} must be 1 or 3: the coefficients of a JPEG are of grey or RGB images')
    mean = tuple((0.0,) * channels if mean is None else mean)
    std = tuple((1.0,) * channels if std is None else std)
    if not len(mean) == len(std) == channels:
        raise UserError(f'mean and std must have one value per channel ({channels}), got {mean=}, {std=}')
    if min(std) <= 0:
        raise UserError(f'std must be above 0, got {std=}')
    image = read_quantized(source)
    if min(layout.grid(image.height, image.width)) < 1:
        size = f'{image.height}×{image.width}'
        raise UserError(f'{name_of(source)}its {size} pixels do not hold a patch of {layout.patch_size}')
    return regroup(image, layout, mean, std)


def regroup(
    image: QuantizedJpeg,
    layout: PatchCoefficients,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    window: Window | None = None,
    hflip: bool = False,
    vflip: bool = False,
) -> Tensor:
    """Coefficients of JPEG's blocks to those of the patches in a window: (C, R · f, S · g), float32.

    By default these are all that lie in the image as a whole. Mean and std are per channel of the model (1 or 3), of
    pixels in [0, 1]. A flipped window has its patches in reverse order, and odd frequencies with the opposite sign.
    """
    (p, q), (f, g) = layout.patch_size, layout.keep
    window = window or Window(0, 0, *layout.grid(image.height, image.width))
    colour = TO_CHANNELS[len(mean)][image.space] / (255 * torch.tensor(std)[:, None])
    used = [number for number in range(colour.shape[1]) if colour[:, number].any()]
    colour = colour[:, used]
    # A block of a subsampled component may cover several patches; what is computed begins and ends with a block.
    row_step = math.lcm(*(_patches_per_group(p, image.subsampling[number][0]) for number in used))
    column_step = math.lcm(*(_patches_per_group(q, image.subsampling[number][1]) for number in used))
    top, left = window.top // row_step * row_step, window.left // column_step * column_step
    rows = -(-(window.top + window.rows - top) // row_step) * row_step
    columns = -(-(window.left + window.columns - left) // column_step) * column_step
    components = []
    for number in used:
        sy, sx = image.subsampling[number]
        height, width = rows * p // sy, columns * q // sx
        quantized = torch.from_numpy(image.planes[number][top * p // sy :, left * q // sx :][:height, :width])
        missing = width - quantized.shape[1], height - quantized.shape[0]
        if any(missing):  # blocks beyond the image, which the last group reaches to and no patch in it needs
            quantized = F.pad(quantized, (0, missing[0], 0, missing[1]))
        steps = torch.from_numpy(image.tables[number]).float().repeat(1, width // BLOCK)
        components.append((quantized, steps, _basis(p, f, sy, vflip), _basis(q, g, sx, hflip).T))
    channels_CHW = torch.empty(len(mean), rows * f, columns * g)
    strip = max(row_step, _STRIP // (p * q * columns) // row_step * row_step)
    strips = torch.empty(len(used), strip * f, columns * g)
    for first in range(0, rows * f, strip * f):
        lines = slice(first, min(first + strip * f, rows * f))
        planes = strips[:, : lines.stop - first]
        for component, plane in zip(components, planes, strict=True):
            _transform(*component, lines, plane)
        torch.mm(colour, planes.flatten(1), out=channels_CHW[:, lines].flatten(1))
    patches_CRfSg = channels_CHW.view(-1, rows, f, columns, g)
    shift = (128 / 255 - torch.tensor(mean)) / torch.tensor(std)
    patches_CRfSg[:, :, 0, :, 0] += math.sqrt(p * q) * shift[:, None, None]
    patches_CRfSg = patches_CRfSg[:, window.top - top :][:, : window.rows]
    patches_CRfSg = patches_CRfSg[:, :, :, window.left - left :][:, :, :, : window.columns]
    if flipped := [1] * vflip + [3] * hflip:
        patches_CRfSg = patches_CRfSg.flip(flipped)
    return patches_CRfSg.reshape(len(mean), window.rows * f, window.columns * g)


def _patches_per_group(size: int, subsampling: int) -> int:
    """Patches in the least number of pixels that both patches and blocks divide."""
    return math.lcm(size, BLOCK * subsampling) // size


@cache
def _basis(size: int, keep: int, subsampling: int, flip: bool) -> Tensor:
    """Along one axis, for a group: coefficients of its blocks (columns) to those of its patches (rows)."""
    patches = _patches_per_group(size, subsampling)
    blocks = patches * size // (BLOCK * subsampling)
    samples = torch.block_diag(*[dct_matrix(BLOCK, dtype=torch.float64).T] * blocks)
    pixels = samples.repeat_interleave(subsampling, dim=0)
    rows = dct_matrix(size, keep, dtype=torch.float64)
    if flip:
        rows[1::2] *= -1
    return (torch.block_diag(*[rows] * patches) @ pixels).float()


def _transform(
    quantized: Tensor, steps: Tensor, vertical: Tensor, horizontal: Tensor, lines: slice, out: Tensor
) -> None:
    """Dequantises and transforms a component: fills `out`, (lines, width), with these lines, of whole groups."""
    height, samples = vertical.shape
    x = quantized[lines.start // height * samples : lines.stop // height * samples].float()
    x.view(-1, *steps.shape).mul_(steps)
    groups = len(x) // samples
    x = torch.bmm(vertical.expand(groups, -1, -1), x.view(groups, samples, -1))
    torch.mm(x.view(-1, len(horizontal)), horizontal, out=out.view(-1, horizontal.shape[1]))
