"""Pixels to model input: random for training (albumentations), fixed for evaluation (timm's own transform)."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import albumentations as A
import cv2
import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.layers import to_2tuple
from timm.models import get_model_input_config
from torch import nn
from torchvision.transforms import Normalize

from vit_efficient.data.config import AugmentConfig, DataConfig, SizeConfig
from vit_efficient.data.sampler import sample_seed
from vit_efficient.data.truncation import DctTruncate
from vit_efficient.utils.errors import UserError

_CV2_INTERPOLATION = {
    'nearest': cv2.INTER_NEAREST,
    'bilinear': cv2.INTER_LINEAR,
    'bicubic': cv2.INTER_CUBIC,
    'lanczos': cv2.INTER_LANCZOS4,
}
_CROP_MODES = ('center', 'squash', 'border')


@dataclass(frozen=True)
class Preprocessing:
    """What both transforms share: the input (C, H, W) of the model and the statistics of its pixels."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @classmethod
    def of(cls, model: nn.Module, config: DataConfig | None = None) -> 'Preprocessing':
        """Reads it off a timm model; what `config` sets goes first.

        The size is the one that the model is built for, or, of a model that takes any (`dynamic_img_size`) and is as it
        was saved, the one that it was saved with. A model of another number of channels than its statistics takes their
        mean for every channel.

        Raises:
            UserError: If the statistics in `config` do not have one value per channel, or a name is unknown.
        """
        config = config or DataConfig()
        in_chans = getattr(model, 'in_chans', None) or model.pretrained_cfg['input_size'][0]
        base = resolve_data_config(pretrained_cfg=dict(model.pretrained_cfg))
        size = tuple(config.img_size or _size_built(model) or base['input_size'][-2:])
        if len(size) != 2 or min(size) < 1:
            raise UserError(f'data.img_size must be height and width in pixels, got {list(size)}')
        statistics = {}
        for name in ('mean', 'std'):
            values, given = getattr(config, name), base[name]
            if values is not None and len(values) != in_chans:
                raise UserError(f'data.{name} must have one value per channel of the model ({in_chans}), got {values}')
            if values is None:
                values = given if len(given) == in_chans else [sum(given) / len(given)] * in_chans
            statistics[name] = tuple(float(value) for value in values)
        if min(statistics['std']) <= 0:
            raise UserError(f'data.std must be above 0, got {list(statistics["std"])}')
        interpolation = config.interpolation or base['interpolation']
        if interpolation not in _CV2_INTERPOLATION:
            raise UserError(f'data.interpolation must be one of {", ".join(_CV2_INTERPOLATION)}, got {interpolation}')
        crop_mode = config.crop_mode or base['crop_mode']
        if crop_mode not in _CROP_MODES:
            raise UserError(f'data.crop_mode must be one of {", ".join(_CROP_MODES)}, got {crop_mode}')
        return cls(
            input_size=(in_chans, *size),
            interpolation=interpolation,
            crop_pct=config.crop_pct or base['crop_pct'],
            crop_mode=crop_mode,
            **statistics,
        )

    def scheduled(self, schedule: Sequence[SizeConfig]) -> dict[int, 'Preprocessing']:
        """By the first epoch that has it: the same at the sizes of a schedule."""
        others = {part.epoch: replace(self, input_size=(self.input_size[0], *part.img_size)) for part in schedule}
        return {0: self, **others}

    def as_dict(self) -> dict[str, Any]:
        """The same as entries of timm's `pretrained_cfg`."""
        return dict(vars(self))


def _size_built(model: nn.Module) -> tuple[int, int] | None:
    """The size that a model is built for; None where it has none, or where what it was saved with goes before it."""
    built = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    saved, config = getattr(model, 'pretrained_model_args', None), model.pretrained_cfg
    if not saved or get_model_input_config(model)['fixed_input_size']:
        return built
    if to_2tuple(saved.get('img_size')) != to_2tuple(model._model_args.get('img_size')):
        return built  # it was given another size when it was read, or since
    # That of the architecture is what every model says that nothing else was said of, whatever it is built for.
    default = timm.get_pretrained_cfg(saved.get('base', config['architecture']))
    unsaid = default is not None and tuple(default.input_size[-2:]) == tuple(config['input_size'][-2:])
    return built if unsaid else None


class TrainTransform:
    """The random transform of training. The draws for a sample are a function of (seed, epoch, index, repeat).

    In order: random resized crop, flips, affine map, one of grey, solarised and blurred (`three`), colour jitter,
    RandAugment-like policy (`rand_ops` operations, drawn with replacement, each with a strength drawn uniformly up to
    `rand_magnitude` / 10 of its range), truncation of the DCT, random erasing with pixel noise, normalisation. Where an
    image shrinks it is resized by area averaging: OpenCV's other interpolations do not antialias. Without a crop
    (`crop_scale` null), geometry is that of evaluation at `crop_pct` 1.

    Images of more than 8 bits, or of other than 1 or 3 channels, are measurements, which need not fill their range.
    What they go through scales with them: brightness is a factor, contrast is about the mean of each channel, and the
    noise of erasing goes up to its maximum. They skip what is defined for photographs only: saturation and hue, the
    policy's tonal operations other than brightness and contrast, and of `three`, solarising, which would need to know
    their white, and grey of other than 3 channels. An image that draws one of `three` that it skips stays as it is.

    Args:
        preprocessing: Input size and statistics.
        config: The augmentation.
        seed: The run's seed, ≥ 0.
        schedule: Other sizes than that of the input, from epochs on, which ascend.
    """

    def __init__(
        self, preprocessing: Preprocessing, config: AugmentConfig, seed: int, schedule: Sequence[SizeConfig] = ()
    ):
        self.preprocessing = preprocessing
        self._scheduled = preprocessing.scheduled(schedule)
        self.config = config
        self.seed = seed
        self._pipelines: dict[tuple[int, bool], A.Compose] = {}

    def _pipeline(self, epoch: int, photograph: bool) -> A.Compose:
        """Of the size that an epoch has."""
        since = max(start for start in self._scheduled if start <= epoch)
        key = since, photograph
        if key not in self._pipelines:
            self._pipelines[key] = _compose(self._scheduled[since], self.config, photograph)
        return self._pipelines[key]

    def __call__(self, image: np.ndarray, epoch: int, index: int, repeat: int = 0) -> torch.Tensor:
        """(H, W, C), uint8 or float32 in [0, 1] -> (C, H', W'), float32, normalised."""
        photograph = image.dtype == np.uint8 and image.shape[2] in (1, 3)
        if not photograph and image.dtype == np.uint8:
            image = image.astype(np.float32) / 255
        compose = self._pipeline(epoch, photograph)
        # One pair of generators for the whole pipeline: set_random_seed would give every operation the same draws, so
        # that, for one, each image that is flipped would be brightened too.
        draws = sample_seed(self.seed, epoch, index, repeat)
        compose.set_random_state(np.random.default_rng(draws), random.Random(int(draws.generate_state(1)[0])))
        return compose(image=image)['image']


def _compose(preprocessing: Preprocessing, config: AugmentConfig, photograph: bool) -> A.Compose:
    """The pipeline for 8-bit images of 1 or 3 channels, or for float32 images in [0, 1] of any number of channels."""
    channels, height, width = preprocessing.input_size
    resize = {'interpolation': _CV2_INTERPOLATION[preprocessing.interpolation], 'area_for_downscale': 'image'}
    steps: list[Any] = []
    if config.crop_scale is not None:
        scale, ratio = tuple(config.crop_scale), tuple(config.crop_ratio)
        steps.append(A.RandomResizedCrop((height, width), scale=scale, ratio=ratio, **resize))
    elif preprocessing.crop_mode == 'squash':
        steps.append(A.Resize(height, width, **resize))
    else:
        steps += [A.SmallestMaxSize(max_size_hw=(height, width), **resize), A.CenterCrop(height, width)]
    if config.hflip:
        steps.append((A.HorizontalFlip if photograph else _HorizontalFlip)(p=config.hflip))
    if config.vflip:
        steps.append((A.VerticalFlip if photograph else _VerticalFlip)(p=config.vflip))
    affine = config.affine
    if affine.rotate or affine.translate or affine.scale or affine.shear:
        steps.append(
            A.Affine(
                rotate=(-affine.rotate, affine.rotate),
                translate_percent=(-affine.translate, affine.translate),
                scale=(1 - affine.scale, 1 + affine.scale),
                shear=(-affine.shear, affine.shear),
                p=1,
            )
        )
    if config.three:
        steps.append(A.OneOf(_three(photograph, channels), p=1))
    if config.color_jitter or config.hue:
        steps.append(_color_jitter(config, photograph))
    if config.rand_ops:
        policy = _policy(config.rand_magnitude / 10, photograph)
        steps.append(A.RandomOrder(policy, n=config.rand_ops, replace=True, p=1))
    if config.dct_truncate:
        steps.append(DctTruncate(tuple(config.dct_truncate_ratio), p=config.dct_truncate))
    if config.erasing:
        aspect = width / height
        # Where the image is longer than 8:1, so are the rectangles: of the usual ones, the smallest would not fit.
        stretch = aspect / min(max(aspect, 1 / 8), 8)
        ratio = (0.3 * stretch, stretch / 0.3)
        erasing = A.Erasing if photograph else _Erasing
        steps.append(erasing(scale=(0.02, 1 / 3), ratio=ratio, fill='random', p=config.erasing))
    steps += [
        A.Normalize(preprocessing.mean, preprocessing.std, max_pixel_value=255.0 if photograph else 1.0),
        A.ToTensorV2(),
    ]
    return A.Compose(steps)


class _HorizontalFlip(A.HorizontalFlip):
    """Of any number of channels: OpenCV 5 flips no more than 128."""

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return np.ascontiguousarray(img[:, ::-1])


class _VerticalFlip(A.VerticalFlip):
    """Of any number of channels, likewise."""

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return np.ascontiguousarray(img[::-1])


class _BrightnessContrast(A.ImageOnlyTransform):
    """By factors that are drawn from ranges, of any number of channels: contrast about the mean of each.

    RandomBrightnessContrast adds a share of white, in which an image that is far from filling its range drowns.
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
    """With noise of up to the maximum of each channel."""

    def apply(self, img: np.ndarray, holes: np.ndarray, **params: Any) -> np.ndarray:
        erased = super().apply(img, holes=holes, **params)
        for left, top, right, bottom in holes:
            erased[top:bottom, left:right] *= img.max((0, 1))
        return erased


def _color_jitter(config: AugmentConfig, photograph: bool) -> A.BasicTransform:
    strength = config.color_jitter
    factors = (1 - strength, 1 + strength)
    if photograph:
        return A.ColorJitter(factors, factors, factors, hue=(-config.hue, config.hue), p=1)
    return _BrightnessContrast(factors, factors)


def _three(photograph: bool, channels: int) -> list[A.BasicTransform]:
    """Touvron, Cord, Jégou, "DeiT III: revenge of the ViT", ECCV 2022, arXiv 2204.07118."""
    return [
        A.ToGray(p=1) if photograph or channels == 3 else A.NoOp(p=1),
        A.Solarize(threshold_range=(0.5, 0.5), p=1) if photograph else A.NoOp(p=1),
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=1),
    ]


def _policy(strength: float, photograph: bool) -> list[A.BasicTransform]:
    """The operations of RandAugment (Cubuk et al., 2020), with the ranges of timm, at a strength of 0 to 1."""
    turn, shear, shift, factor = 30 * strength, math.degrees(math.atan(0.3 * strength)), 0.45 * strength, 0.9 * strength
    around, still = (1 - factor, 1 + factor), (1, 1)
    operations = [
        A.NoOp(p=1),
        A.Affine(rotate=(-turn, turn), p=1),
        A.Affine(shear={'x': (-shear, shear), 'y': (0, 0)}, p=1),
        A.Affine(shear={'x': (0, 0), 'y': (-shear, shear)}, p=1),
        A.Affine(translate_percent={'x': (-shift, shift), 'y': (0, 0)}, p=1),
        A.Affine(translate_percent={'x': (0, 0), 'y': (-shift, shift)}, p=1),
    ]
    if not photograph:
        return [
            *operations,
            _BrightnessContrast(around, still),
            _BrightnessContrast(still, around),
        ]
    return [
        *operations,
        A.ColorJitter(around, still, still, hue=(0, 0), p=1),
        A.ColorJitter(still, around, still, hue=(0, 0), p=1),
        A.ColorJitter(still, still, around, hue=(0, 0), p=1),
        A.Sharpen(alpha=(0, factor), lightness=(1, 1), p=1),
        A.AutoContrast(p=1),
        A.Equalize(p=1),
        A.Posterize(num_bits=(8 - round(4 * strength), 8), p=1),
        A.Solarize(threshold_range=(1 - strength, 1), p=1),
    ]


class EvalTransform:
    """timm's evaluation transform.

    8-bit images of 1 or 3 channels go through it as PIL images, exactly as in timm. Others (16-bit, floating point,
    many-channel) go through its resize and crop as float32 tensors, with the same target sizes, the same interpolation
    and antialiasing; then they are clipped to [0, 1], as 8-bit images are by their type, and normalised.

    Args:
        preprocessing: Input size, statistics and crop.
    """

    def __init__(self, preprocessing: Preprocessing):
        options = preprocessing.as_dict()
        self.crop_mode = preprocessing.crop_mode
        self.photograph = create_transform(is_training=False, **options)
        self.geometry = create_transform(is_training=False, normalize=False, **options)
        self.normalize = Normalize(preprocessing.mean, preprocessing.std)

    def __call__(self, image: np.ndarray, epoch: int = 0, index: int = 0, repeat: int = 0) -> torch.Tensor:
        """(H, W, C), uint8 or float32 in [0, 1] -> (C, H', W'), float32, normalised; the same for every epoch.

        Raises:
            UserError: For `crop_mode` border and an image that is not 8-bit grey or RGB: its padding is a colour.
        """
        if image.dtype == np.uint8 and image.shape[2] in (1, 3):
            return self.photograph(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image))
        if self.crop_mode == 'border':
            raise UserError('data.crop_mode=border works for 8-bit grey and RGB images only; use center or squash')
        if image.dtype == np.uint8:
            image = image.astype(np.float32) / 255
        tensor = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        return self.normalize(self.geometry(tensor).clamp_(0, 1))
