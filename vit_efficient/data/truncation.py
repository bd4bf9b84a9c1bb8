"""Truncation of the DCT of pixels of any type, and as a transform of torchvision's v2."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from vit_efficient.dct.truncation import ORDERS, as_block, truncate
from vit_efficient.utils.checks import check_choice, is_pair, is_real
from vit_efficient.utils.errors import UserError

Ratio = float | tuple[float, float]
Block = int | tuple[int, int] | None
_PIL_MODES = ('L', 'RGB', 'I;16')


def repeat_edges(x: Tensor, block: Block) -> Tensor:
    """x (…, H, W) with its last row and column repeated until blocks divide it."""
    if block is None:
        return x
    for dim, side in zip((-2, -1), as_block(block), strict=True):
        n = x.shape[dim]
        if n % side:
            x = x.index_select(dim, torch.arange(n + side - n % side, device=x.device).clamp(max=n - 1))
    return x


def truncate_pixels(x: Tensor, ratio: float, block: Block = None, order: str = 'square') -> Tensor:
    """`dct.truncate` of pixels x (…, H, W): uint8, uint16, or floating point in [0, 1].

    What it gives is of the same type: computed in float32 (float64 for float64), clipped, and rounded to integers.
    Where blocks do not divide the image its edge is repeated, and what was added is cropped.
    """
    if x.dtype not in (torch.uint8, torch.uint16) and not x.is_floating_point():
        raise UserError(f'truncation needs pixels of uint8, uint16 or floating point in [0, 1], got {x.dtype}')
    height, width = x.shape[-2:]
    padded = repeat_edges(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32), block)
    y = truncate(padded, block=block, ratio=ratio, order=order)[..., :height, :width]
    if x.is_floating_point():
        return y.clamp(0, 1).to(x.dtype)
    return y.clamp(0, torch.iinfo(x.dtype).max).round().to(x.dtype)


def truncate_array(image: np.ndarray, ratio: float, block: Block = None, order: str = 'square') -> np.ndarray:
    """`truncate_pixels` of an image (H, W) or (H, W, C), of any byte order."""
    native = image.astype(image.dtype.newbyteorder('='), copy=False)
    planes_CHW = torch.from_numpy(np.atleast_3d(native).transpose(2, 0, 1).copy())
    y_CHW = truncate_pixels(planes_CHW, ratio, block, order)
    return np.ascontiguousarray(y_CHW.permute(1, 2, 0).numpy()).reshape(image.shape)


class TorchvisionDctTruncate(v2.Transform):
    """`DctTruncate` as a transform of torchvision's v2, for the images and videos of a sample; draws are PyTorch's.

    Images are tensors (…, C, H, W), plain or of `tv_tensors`: uint8, uint16 or floating point in [0, 1], so that it
    comes before normalisation; or PIL images of 8 or 16 bits, grey or RGB. Masks, boxes and keypoints pass through.
    Arguments and errors are those of `DctTruncate`; `p` is the probability of applying it to a sample.
    """

    def __init__(self, ratio: Ratio = (1 / 16, 1 / 2), block: Block = None, order: str = 'square', p: float = 0.5):
        super().__init__()
        self.ratio, self.block, self.order, self.p = check_arguments(ratio, block, order, p)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        applied, between = torch.rand(2).tolist()
        least, most = self.ratio
        return {'applied': applied < self.p, 'ratio': least + (most - least) * between}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        other = isinstance(inpt, tv_tensors.TVTensor) and not isinstance(inpt, (tv_tensors.Image, tv_tensors.Video))
        if other or not params['applied']:
            return inpt
        if not isinstance(inpt, Image.Image):
            y = truncate_pixels(inpt.as_subclass(Tensor), params['ratio'], self.block, self.order)
            return tv_tensors.wrap(y, like=inpt)
        if inpt.mode not in _PIL_MODES:
            raise UserError(f'truncation needs PIL images of mode {", ".join(_PIL_MODES)}, got {inpt.mode}; convert it')
        return Image.fromarray(truncate_array(np.asarray(inpt), params['ratio'], self.block, self.order))


def check_arguments(ratio, block, order, p) -> tuple[tuple[float, float], tuple[int, int] | None, str, float]:
    """The arguments of both transforms in one form, lists (of JSON) as tuples; a UserError if one is out of range."""
    least, most = (ratio, ratio) if is_real(ratio) else ratio if is_pair(ratio) else (None, None)
    if not (is_real(least) and is_real(most) and 0 < least <= most <= 1):
        raise UserError(f'ratio must be a share above 0 and at most 1, or a range (least, most), got {ratio=!r}')
    check_choice('order', order, ORDERS)
    if not (is_real(p) and 0 <= p <= 1):
        raise UserError(f'p must be a probability, from 0 to 1, got {p=!r}')
    return (float(least), float(most)), None if block is None else as_block(block), order, float(p)
