"""The random transform of training, and truncation of the DCT in it: the one file that knows albumentations."""

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vit_efficient.data.config import AugmentConfig, SizeConfig
from vit_efficient.data.files.masks import IGNORED
from vit_efficient.data.preprocessing import Normalization, PixelTransform, Preprocessing
from vit_efficient.data.sampler import sample_seed
from vit_efficient.data.truncation import Block, Ratio, check_arguments, truncate_array
from vit_efficient.utils.packages import needing

with needing('train', 'images are augmented by'):
    import albumentations as A
    import cv2

_CV2_INTERPOLATION = dict(
    nearest=cv2.INTER_NEAREST, bilinear=cv2.INTER_LINEAR, bicubic=cv2.INTER_CUBIC, lanczos=cv2.INTER_LANCZOS4
)


class TrainTransform(PixelTransform):
    """The random transform of training. The draws for a sample are a function of (seed, epoch, index, repeat).

    In order: random resized crop, flips, affine map, one of grey, solarised and blurred (`three`), colour jitter,
    RandAugment-like policy (`rand_ops` operations, drawn with replacement, each with a strength drawn uniformly up to
    `rand_magnitude` / 10 of its range), truncation of the DCT, random erasing with pixel noise, normalisation. Where an
    image shrinks it is resized by area averaging: OpenCV's other interpolations do not antialias. Without a crop
    (`crop_scale` null), geometry is that of evaluation at `crop_pct` 1; with `crop_zoom`, the crop is of pixels as
    they are, but for that factor. With a schedule, sizes are other ones than that of `preprocessing` from epochs on,
    which ascend.

    Images of more than 8 bits, or of other than 1 or 3 channels, are measurements, which need not fill their range.
    What they go through scales with them: brightness is a factor, contrast is about the mean of each channel, and the
    noise of erasing goes up to its maximum. They skip what is defined for photographs only: saturation and hue, the
    policy's tonal operations other than brightness and contrast, and of `three`, solarising, which would need to know
    their white, and grey of other than 3 channels. An image that draws one of `three` that it skips stays as it is.

    The mask of an image (`pixels_and_mask`) is cropped, flipped and mapped with it, by the nearest pixel, and takes no
    part in anything else. What comes from outside of the image does not count.
    """

    def __init__(
        self, preprocessing: Preprocessing, config: AugmentConfig, seed: int, schedule: Sequence[SizeConfig] = ()
    ):
        self.preprocessing, self.config, self.seed = preprocessing, config, seed
        self.normalize = Normalization(preprocessing.mean, preprocessing.std, by_factor=True)
        self._scheduled = preprocessing.scheduled(schedule)
        self._pipelines: dict[tuple[int, bool], A.Compose] = {}

    def pixels(self, image: np.ndarray, epoch: int = 0, index: int = 0, repeat: int = 0) -> torch.Tensor:
        return self._transformed(image, {}, epoch, index, repeat)['image']

    def pixels_and_mask(
        self, image: np.ndarray, mask: np.ndarray, epoch: int = 0, index: int = 0, repeat: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._transformed(image, {'mask': mask}, epoch, index, repeat)
        return found['image'], found['mask']

    def _transformed(self, image: np.ndarray, others: dict[str, np.ndarray], epoch, index, repeat) -> dict[str, Any]:
        photograph = image.dtype == np.uint8 and image.shape[2] in (1, 3)
        if not photograph and image.dtype == np.uint8:
            image = image.astype(np.float32) / 255
        if not image.flags.writeable:  # the pixels of a PIL image, which a tensor would share if nothing changes them
            image = image.copy()
        since = max(start for start in self._scheduled if start <= epoch)
        if (since, photograph) not in self._pipelines:
            self._pipelines[since, photograph] = _compose(self._scheduled[since], self.config, photograph)
        compose = self._pipelines[since, photograph]
        # One pair of generators for the whole pipeline: set_random_seed would give every operation the same draws, so
        # that, for one, each image that is flipped would be brightened too.
        draws = sample_seed(self.seed, epoch, index, repeat)
        compose.set_random_state(np.random.default_rng(draws), random.Random(int(draws.generate_state(1)[0])))
        return compose(image=image, **others)


def _compose(preprocessing: Preprocessing, config: AugmentConfig, photograph: bool) -> A.Compose:
    """The pipeline for 8-bit images of 1 or 3 channels, or for float32 images in [0, 1] of any number of channels."""
    channels, height, width = preprocessing.input_size
    resize = {
        'interpolation': _CV2_INTERPOLATION[preprocessing.interpolation],
        'area_for_downscale': 'image',
        'mask_interpolation': cv2.INTER_NEAREST_EXACT,  # the other one looks to the upper left
    }
    steps: list[Any] = []
    if config.crop_zoom is not None:
        fill = tuple(mean * 255 if photograph else mean for mean in preprocessing.mean)
        steps += [_ZoomedCrop(height, width, tuple(config.crop_zoom), fill), A.Resize(height, width, **resize)]
    elif config.crop_scale is not None:
        scale, ratio = tuple(config.crop_scale), tuple(config.crop_ratio)
        steps.append(A.RandomResizedCrop((height, width), scale=scale, ratio=ratio, **resize))
    elif preprocessing.crop_mode == 'squash':
        steps.append(A.Resize(height, width, **resize))
    else:
        steps += [A.SmallestMaxSize(max_size_hw=(height, width), **resize), A.CenterCrop(height, width)]
    if not photograph:
        steps.append(_Clip())
    for axis, flip, p in ((1, A.HorizontalFlip, config.hflip), (0, A.VerticalFlip, config.vflip)):
        if p:
            steps.append(flip(p=p) if photograph else _Flip(axis, p=p))
    affine = config.affine
    if affine.rotate or affine.translate or affine.scale or affine.shear:
        rotate, translate, shear = (_around(0, spread) for spread in (affine.rotate, affine.translate, affine.shear))
        scale = _around(1, affine.scale)
        steps.append(_affine(rotate=rotate, translate_percent=translate, scale=scale, shear=shear))
    if config.three:  # Touvron, Cord, Jégou, "DeiT III: revenge of the ViT", ECCV 2022, arXiv 2204.07118
        grey = A.ToGray(p=1) if photograph or channels == 3 else A.NoOp(p=1)
        solarize = A.Solarize(threshold_range=(0.5, 0.5), p=1) if photograph else A.NoOp(p=1)
        steps.append(A.OneOf([grey, solarize, A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=1)], p=1))
    if config.color_jitter or config.hue:
        factor = _around(1, config.color_jitter)
        jitter = A.ColorJitter(factor, factor, factor, _around(0, config.hue), p=1)
        steps.append(jitter if photograph else _BrightnessContrast(factor, factor))
    if config.rand_ops:
        policy = _policy(config.rand_magnitude / 10, photograph)
        steps.append(A.RandomOrder(policy, n=config.rand_ops, replace=True, p=1))
    if config.dct_truncate:
        steps.append(DctTruncate(tuple(config.dct_truncate_ratio), p=config.dct_truncate))
    if config.erasing:
        aspect = width / height
        # Where the image is longer than 8:1, so are the rectangles: of the usual ones, the smallest would not fit.
        stretch = aspect / min(max(aspect, 1 / 8), 8)
        options = dict(scale=(0.02, 1 / 3), ratio=(0.3 * stretch, stretch / 0.3), fill='random', p=config.erasing)
        steps.append(A.Erasing(**options) if photograph else _Erasing(**options))
    if not photograph:
        steps.append(A.Normalize(preprocessing.mean, preprocessing.std, max_pixel_value=1.0))
    return A.Compose([*steps, A.ToTensorV2()])


class _Clip(A.ImageOnlyTransform):
    """Takes back what resizing overshoots at edges, as the type of 8-bit images does. It draws nothing."""

    def should_apply(self, force_apply: bool = False) -> bool:
        return True

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return img.clip(0, 1)


class _ZoomedCrop(A.DualTransform):
    """A window at random, of the pixels that an image of `height` × `width` shows where it is enlarged by a factor.

    The factor is drawn from a range, evenly in its logarithm. Along an axis on which the image is smaller than the
    window, all of it is in it, at a random place: what is beside it is `fill`, and does not count in a mask.
    """

    def __init__(self, height: int, width: int, zoom: tuple[float, float], fill: tuple[float, ...]):
        super().__init__(p=1)
        self.height, self.width, self.zoom, self.fill = height, width, zoom, fill

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        zoom = math.exp(self.py_random.uniform(*map(math.log, self.zoom)))
        sides = [max(1, round(side / zoom)) for side in (self.height, self.width)]
        spare = [whole - side for whole, side in zip(params['shape'], sides, strict=False)]
        corner = [self.py_random.randint(min(0, free), max(0, free)) for free in spare]
        return {'window': (*corner, *sides)}

    def apply(self, img: np.ndarray, window: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        fill = np.array(self.fill)
        return _cut_out(img, window, fill.round() if img.dtype == np.uint8 else fill)

    def apply_to_mask(self, mask: np.ndarray, window: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        return _cut_out(mask, window, IGNORED)


def _cut_out(pixels: np.ndarray, window: tuple[int, int, int, int], fill: Any) -> np.ndarray:
    """The window (top, left, rows, columns) of (H, W, …), filled where it lies beyond."""
    top, left, rows, columns = window
    inside = pixels[max(top, 0) : top + rows, max(left, 0) : left + columns]
    if inside.shape[:2] == (rows, columns):
        return np.ascontiguousarray(inside)
    found = np.empty((rows, columns, *pixels.shape[2:]), pixels.dtype)
    found[...] = fill
    top, left = max(-top, 0), max(-left, 0)
    found[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return found


def _affine(**options: Any) -> A.Affine:
    return A.Affine(**options, fill_mask=IGNORED, p=1)


class _Flip(A.DualTransform):
    """A flip along one axis, of any number of channels: OpenCV 5 flips no more than 128."""

    def __init__(self, axis: int, p: float):
        super().__init__(p=p)
        self.axis = axis

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return np.ascontiguousarray(np.flip(img, self.axis))


class _BrightnessContrast(A.ImageOnlyTransform):
    """Factors that are drawn from ranges, for any number of channels: contrast is about the mean of each.

    RandomBrightnessContrast adds a part of white, in which an image that is far from filling its range drowns.
    """

    def __init__(self, brightness: tuple[float, float], contrast: tuple[float, float]):
        super().__init__(p=1)
        self.brightness, self.contrast = brightness, contrast

    def get_params(self) -> dict[str, Any]:
        return {name: self.py_random.uniform(*getattr(self, name)) for name in ('brightness', 'contrast')}

    def apply(self, img: np.ndarray, brightness: float, contrast: float, **params: Any) -> np.ndarray:
        mean = img.mean((0, 1), np.float64).astype(np.float32)
        return (img * (brightness * contrast) + mean * (brightness * (1 - contrast))).clip(0, 1)


class _Erasing(A.Erasing):
    """Erasing with noise of up to the maximum of each channel."""

    def apply(self, img: np.ndarray, holes: np.ndarray, **params: Any) -> np.ndarray:
        erased = super().apply(img, holes=holes, **params)
        for left, top, right, bottom in holes:
            erased[top:bottom, left:right] *= img.max((0, 1))
        return erased


def _around(middle: float, spread: float) -> tuple[float, float]:
    return middle - spread, middle + spread


def _policy(strength: float, photograph: bool) -> list[A.BasicTransform]:
    """The operations of RandAugment (Cubuk et al., 2020), with the ranges of timm, at a strength of 0 to 1."""
    shear, shift = _around(0, math.degrees(math.atan(0.3 * strength))), _around(0, 0.45 * strength)
    factor, one, none = _around(1, 0.9 * strength), (1, 1), (0, 0)
    geometric = [
        A.NoOp(p=1),
        _affine(rotate=_around(0, 30 * strength)),
        _affine(shear={'x': shear, 'y': none}),
        _affine(shear={'x': none, 'y': shear}),
        _affine(translate_percent={'x': shift, 'y': none}),
        _affine(translate_percent={'x': none, 'y': shift}),
    ]
    if not photograph:
        return [*geometric, _BrightnessContrast(factor, one), _BrightnessContrast(one, factor)]
    return [
        *geometric,
        A.ColorJitter(factor, one, one, hue=none, p=1),
        A.ColorJitter(one, factor, one, hue=none, p=1),
        A.ColorJitter(one, one, factor, hue=none, p=1),
        A.Sharpen(alpha=(0, 0.9 * strength), lightness=(1, 1), p=1),
        A.AutoContrast(p=1),
        A.Equalize(p=1),
        A.Posterize(num_bits=(8 - round(4 * strength), 8), p=1),
        A.Solarize(threshold_range=(1 - strength, 1), p=1),
    ]


class DctTruncate(A.ImageOnlyTransform):
    """Drops high frequencies of an image, of the whole or in blocks, as a transform of albumentations.

    It leaves edges softened and with ripples beside them (whole image), or blocks and their steps, as strong JPEG
    compression does. Images are (H, W) or (H, W, C), with any number of channels, or volumes of them: uint8, uint16 or
    floating point in [0, 1], of any byte order; what comes out is of the machine's. Integers are rounded; values are
    clipped to the range of their type. Masks, boxes and keypoints stay as they are.

    Args:
        ratio: The share of the coefficients that stays, 0 < ratio ≤ 1, or the range (least, most) from which it is
            drawn, evenly, for each image.
        block: Sides of the blocks, p or (p_h, p_w); None is the whole image. The edge of an image that they do not
            divide is repeated, and what was added is cropped.
        order: `square` or `zigzag`, as of `dct.truncate`.
        p: Probability of applying it.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(self, ratio: Ratio = (1 / 16, 1 / 2), block: Block = None, order: str = 'square', p: float = 0.5):
        self.ratio, self.block, self.order, p = check_arguments(ratio, block, order, p)
        super().__init__(p=p)

    def get_params(self) -> dict[str, Any]:
        return {'ratio': self.py_random.uniform(*self.ratio)}

    def apply(self, img: np.ndarray, ratio: float, **params: Any) -> np.ndarray:
        return truncate_array(img, ratio, self.block, self.order)
