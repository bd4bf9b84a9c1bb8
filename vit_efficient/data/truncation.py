"""Truncation of an image's DCT as augmentation: for albumentations, and for torchvision's transforms v2."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import albumentations as A
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from vit_efficient.dct.truncation import ORDERS, as_block, truncate
from vit_efficient.utils.errors import UserError

_PIL_MODES = ('L', 'RGB', 'I;16')


def repeat_edges(x: Tensor, block: int | tuple[int, int] | None) -> Tensor:
    """x (…, H, W) with its last row and column repeated until blocks divide it."""
    if block is None:
        return x
    for dim, side in zip((-2, -1), as_block(block), strict=True):
        n = x.shape[dim]
        if n % side:
            x = x.index_select(dim, torch.arange(n + side - n % side, device=x.device).clamp(max=n - 1))
    return x


def truncate_pixels(
    x: Tensor, ratio: float, block: int | tuple[int, int] | None = None, order: str = 'square'
) -> Tensor:
    """`dct.truncate` of pixels of any size and type, which stay in their range.

    Args:
        x: (…, H, W): uint8, uint16, or floating point in [0, 1].
        ratio, block, order: As of `dct.truncate`. Where blocks do not divide the image its edge is repeated, and what
            was added is cropped.

    Returns:
        Of the shape and type of x: computed in float32 (in float64 for float64), clipped, and rounded to integers.

    Raises:
        UserError: If x is of another type.
    """
    if x.dtype not in (torch.uint8, torch.uint16) and not x.is_floating_point():
        raise UserError(f'truncation needs pixels of uint8, uint16 or floating point in [0, 1], got {x.dtype}')
    height, width = x.shape[-2:]
    padded = repeat_edges(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32), block)
    y = truncate(padded, block=block, ratio=ratio, order=order)[..., :height, :width]
    if x.is_floating_point():
        return y.clamp(0, 1).to(x.dtype)
    return y.clamp(0, torch.iinfo(x.dtype).max).round().to(x.dtype)


class DctTruncate(A.ImageOnlyTransform):
    """Drops high frequencies of an image, of the whole or in blocks, as a transform of albumentations.

    It leaves edges softened and with ripples beside them (whole image), or blocks and their steps, as strong JPEG
    compression does. Masks, boxes and keypoints stay as they are.

    Args:
        ratio: The share of the coefficients that is kept, 0 < ratio ≤ 1, or the range (least, most) from which it is
            drawn, evenly, for each image.
        block: Sides of the blocks, p or (p_h, p_w); None is the whole image. The edge of an image that they do not
            divide is repeated, and what was added is cropped.
        order: `square` or `zigzag`, as of `dct.truncate`.
        p: Probability of applying it.

    Targets:
        image, volume

    Image types:
        uint8, uint16 and floating point in [0, 1], with any number of channels. Integers are rounded; values are
        clipped to the range of their type.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self,
        ratio: float | tuple[float, float] = (1 / 16, 1 / 2),
        block: int | tuple[int, int] | None = None,
        order: str = 'square',
        p: float = 0.5,
    ):
        self.ratio, self.block, self.order, p = _checked(ratio, block, order, p)
        super().__init__(p=p)

    def get_params(self) -> dict[str, Any]:
        return {'ratio': self.py_random.uniform(*self.ratio)}

    def apply(self, img: np.ndarray, ratio: float, **params: Any) -> np.ndarray:
        """(H, W) or (H, W, C) -> the same."""
        planes = np.atleast_3d(img).transpose(2, 0, 1).copy()
        y = truncate_pixels(torch.from_numpy(planes), ratio, self.block, self.order)
        return np.ascontiguousarray(y.permute(1, 2, 0).numpy()).reshape(img.shape)


class TorchvisionDctTruncate(v2.Transform):
    """`DctTruncate` as a transform of torchvision's v2, for the images and videos of a sample; draws are PyTorch's.

    Images are tensors (…, C, H, W), plain or of `tv_tensors`: uint8, uint16 or floating point in [0, 1], so that it
    comes before normalisation; or PIL images of 8 or 16 bits, grey or RGB. Masks, boxes and keypoints pass through.

    Args:
        ratio, block, order: As of `DctTruncate`.
        p: Probability of applying it to a sample.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self,
        ratio: float | Sequence[float] = (1 / 16, 1 / 2),
        block: int | Sequence[int] | None = None,
        order: str = 'square',
        p: float = 0.5,
    ):
        super().__init__()
        self.ratio, self.block, self.order, self.p = _checked(ratio, block, order, p)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        applied, place = torch.rand(2).tolist()
        least, most = self.ratio
        return {'applied': applied < self.p, 'ratio': least + (most - least) * place}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        other = isinstance(inpt, tv_tensors.TVTensor) and not isinstance(inpt, (tv_tensors.Image, tv_tensors.Video))
        if other or not params['applied']:
            return inpt
        if not isinstance(inpt, Image.Image):
            y = truncate_pixels(inpt.as_subclass(Tensor), params['ratio'], self.block, self.order)
            return tv_tensors.wrap(y, like=inpt)
        if inpt.mode not in _PIL_MODES:
            raise UserError(f'truncation needs PIL images of mode {", ".join(_PIL_MODES)}, got {inpt.mode}; convert it')
        planes = np.atleast_3d(np.asarray(inpt)).transpose(2, 0, 1).copy()
        y = truncate_pixels(torch.from_numpy(planes), params['ratio'], self.block, self.order)
        return Image.fromarray(y.permute(1, 2, 0).squeeze(2).contiguous().numpy())


def _checked(ratio, block, order, p) -> tuple[tuple[float, float], tuple[int, int] | None, str, float]:
    """The arguments of both transforms in one form, which JSON's lists take too."""
    ends = (ratio, ratio) if isinstance(ratio, Real) else tuple(ratio) if isinstance(ratio, Sequence) else ()
    if len(ends) != 2 or not all(isinstance(end, Real) for end in ends) or not 0 < ends[0] <= ends[1] <= 1:
        raise UserError(
            f'ratio must be a share above 0 and at most 1, or a range (least, most) of them, got {ratio=!r}'
        )
    if order not in ORDERS:
        raise UserError(f'order must be one of {", ".join(ORDERS)}, got {order=}')
    if not (isinstance(p, Real) and 0 <= p <= 1):
        raise UserError(f'p must be a probability, from 0 to 1, got {p=!r}')
    return (float(ends[0]), float(ends[1])), None if block is None else as_block(block), order, float(p)
