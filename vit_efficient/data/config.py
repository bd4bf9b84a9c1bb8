"""The options of data loading and augmentation, typed: the `data:` section of a recipe."""

from dataclasses import dataclass
from typing import Any

from vit_efficient.utils.keys import BELOW_1, Range, at_least, between, key, one_of, section

IMAGES_PER_UPDATE = 'data.batch_size × grad_accum × processes'
ON_ERROR = ('error', 'skip')
DECODE = ('pixels', 'scaled', 'coefficients')
_RATIOS = Range('two ratios, 0 < least ≤ most', lambda v: len(v) == 2 and 0 < v[0] <= v[1])
_MEANS = Range('numbers from -1e6 to 1e6', lambda v: all(-1e6 <= number <= 1e6 for number in v))
_STDS = Range('numbers from 1e-6 to 1e6', lambda v: all(1e-6 <= number <= 1e6 for number in v))
_CROP_PCT = Range('at least 0.1 and at most 1', lambda v: 0.1 <= v <= 1)


def _shares(whole: str) -> Range:
    return Range(f'two shares of {whole}, 0 < least ≤ most ≤ 1', lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1)


# What a place was before it was one, and what is meant as `memory`.
_NO_PLACES = ('true', 'false', 'yes', 'no', 'on', 'off', 'none', 'null', '0', '1')
_PLACE = Range(
    "'', memory, or a folder",
    lambda v: v == 'memory' or (v == v.strip() and v.lower() not in (*_NO_PLACES, 'memory')),
)


@dataclass
class AffineConfig:
    """Random affine maps of the whole image, for images in which position and slant mean little, such as digits."""

    rotate: float = key(0.0, 'degrees, drawn from ± rotate', at_least(0))
    translate: float = key(0.0, "share of the image's side, drawn from ± translate on each axis", BELOW_1)
    scale: float = key(0.0, 'share of the size: the factor is drawn from 1 ± scale', BELOW_1)
    shear: float = key(0.0, 'degrees, drawn from ± shear on each axis', at_least(0))


@dataclass
class AugmentConfig:
    """Training augmentation. The defaults are those of a light ImageNet recipe; 0 switches an operation off."""

    crop_scale: list[float] | None = key([0.08, 1.0], 'share of the area of a crop; null: no crop', _shares('the area'))
    crop_ratio: list[float] = key([3 / 4, 4 / 3], 'width to height of the crop', _RATIOS)
    crop_zoom: list[float] | None = key(
        None,
        'least and most factor by which an image is enlarged before a window of img_size pixels is cropped, in the '
        'place of crop_scale; what the window has beside the image is of data.mean, and does not count in a mask',
        _RATIOS,
    )
    hflip: float = key(0.5, 'probability of a horizontal flip', between(0, 1))
    vflip: float = key(0.0, 'probability of a vertical flip', between(0, 1))
    three: bool = key(
        False,
        'one of grey, solarised and blurred, at even odds ("3-Augment" of DeiT III); other images than 8-bit grey and '
        'RGB stay as they are where what is drawn is not defined for them',
    )
    color_jitter: float = key(0.3, 'brightness, contrast and saturation: factors are drawn from 1 ± it', between(0, 1))
    hue: float = key(0.0, 'share of the colour circle, drawn from ± hue', between(0, 0.5))
    rand_ops: int = key(2, 'operations of the RandAugment-like policy per image', at_least(0))
    rand_magnitude: float = key(9.0, 'their strength, 0 to 10', between(0, 10))
    dct_truncate: float = key(0.0, 'probability that DCT coefficients of high frequency are dropped', between(0, 1))
    dct_truncate_ratio: list[float] = key([1 / 16, 1 / 2], 'share of them that stays', _shares('the coefficients'))
    erasing: float = key(0.25, 'probability that a random rectangle is replaced by noise', between(0, 1))
    affine: AffineConfig = section(AffineConfig)


@dataclass
class SizeConfig:
    """The size of training images from an epoch on."""

    epoch: int = key(0, 'the first one with it, counted from 0')
    img_size: list[int] = key([], 'height, width')


@dataclass
class DataConfig:
    """Where the images come from, and how they reach the model."""

    train: str = key(
        '', 'class folders, or shards such as train-{000..009}.tar; with `dataset`, its split', resume=True
    )
    val: str = key('', 'likewise, of the validation images', resume=True)
    dataset: str = key(
        '',
        'megapixel_mnist; `hfds/NAME` or `hfds/FOLDER` of Hugging Face; tar, of class folders; or what else timm knows '
        'by name and can read by index, such as `torch/cifar10`',
    )
    root: str = key('', "with `dataset`: the folder that holds it; of hfds/…, that of the library's cache", resume=True)
    args: dict[str, Any] = key({}, 'further arguments, of shards or with `dataset`')
    val_args: dict[str, Any] = key({}, 'arguments that replace some of them for validation', resume=True)
    decode: str = key(
        'pixels',
        'pixels: all files, at full size; scaled: JPEGs at 1/2, 1/4 or 1/8 where crop and resize leave no more; '
        'coefficients: of JPEGs, undecoded, for a patch embedding that takes them; their patches are cropped at random',
        one_of(*DECODE),
    )
    batch_size: int = key(
        128, 'images per process and micro-batch', at_least(1), resume=f'while {IMAGES_PER_UPDATE} stays'
    )
    eval_batch_size: int | None = key(None, 'images per evaluation batch; null: batch_size', at_least(1), resume=True)
    workers: int = key(
        4, 'loader processes, at most one for each core; 0 loads in the training process', at_least(0), resume=True
    )
    cache: bool = key(False, 'keep decoded images in memory (each worker its own)', resume=True)
    cache_features: str = key(
        '',
        'with model.freeze, where nothing is drawn in training: each image goes through the backbone once, and what '
        'the head reads is kept, in half precision, in memory (memory); or in a folder, for other runs too, and of '
        'validation images as well. For features, the tokens of the teacher are kept',
        _PLACE,
        resume=True,
    )
    on_error: str = key(
        'error',
        'a file that cannot be read: error ends the run; skip names, counts and leaves it out, and in training another '
        'image of its batch takes its place. An image that can be read and does not fit always ends the run',
        one_of(*ON_ERROR),
        resume=True,  # where both values lead to weights, these are the same
    )
    repeats: int = key(
        1, 'how often an image comes in a row, each time augmented anew; an epoch is as long as without', at_least(1)
    )
    mixed_shards: int | None = key(
        None, 'shards that are shuffled together, where random access to all of them is slow; null: all', at_least(1)
    )
    img_size: list[int] | None = key(None, "height, width; null: the model's own")
    schedule: list[SizeConfig] = key(
        [],
        'training images of other sizes than img_size, from epochs on; evaluation is at img_size throughout. The model '
        'has to take them all, a vision transformer by model.args.dynamic_img_size',
    )
    mean: list[float] | None = key(None, "per channel, of pixels in [0, 1]; null: the model's own", _MEANS)
    std: list[float] | None = key(None, 'likewise, the standard deviation', _STDS)
    interpolation: str | None = key(None, "bilinear, bicubic, …; null: the model's own")
    crop_pct: float | None = key(None, "in evaluation, crop over resized side; null: the model's own", _CROP_PCT)
    crop_mode: str | None = key(None, "in evaluation: center, squash or border; null: the model's own")
    augment: AugmentConfig = section(AugmentConfig)
