"""The options of data loading and augmentation, typed: the `data:` section of a recipe."""

from dataclasses import dataclass, field
from typing import Any

ON_ERROR = ('error', 'skip')
DECODE = (
    'pixels',  # all files that can be read, at full size
    'scaled',  # JPEGs at 1/2, 1/4 or 1/8 where crop and resize leave no more of them
    'coefficients',  # of JPEGs, undecoded, for a patch embedding that takes them; patches are cropped at random
)


@dataclass
class AffineConfig:
    """Random affine maps of the whole image, for images in which position and slant mean little, such as digits."""

    rotate: float = 0.0  # degrees, drawn from ± rotate
    translate: float = 0.0  # share of the image's side, drawn from ± translate on each axis
    scale: float = 0.0  # share of the size: the factor is drawn from 1 ± scale
    shear: float = 0.0  # degrees, drawn from ± shear on each axis


@dataclass
class AugmentConfig:
    """Training augmentation. The defaults are those of a light ImageNet recipe; 0 switches an operation off."""

    crop_scale: list[float] | None = field(default_factory=lambda: [0.08, 1.0])  # share of the area; null: no crop
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])  # width to height of the crop
    hflip: float = 0.5  # probability
    vflip: float = 0.0  # probability
    # One of grey, solarised and blurred, at even odds (the "3-Augment" of DeiT III). All but 8-bit grey and RGB stay as
    # they are where what is drawn is not defined for them: solarised, and grey of other than 3 channels.
    three: bool = False
    color_jitter: float = 0.3  # brightness, contrast and saturation factors are drawn from 1 ± color_jitter
    hue: float = 0.0  # share of the colour circle, drawn from ± hue
    rand_ops: int = 2  # operations of the RandAugment-like policy per image
    rand_magnitude: float = 9.0  # their strength, 0 to 10
    dct_truncate: float = 0.0  # probability that DCT coefficients of high frequency are dropped
    dct_truncate_ratio: list[float] = field(default_factory=lambda: [1 / 16, 1 / 2])  # share of them kept: the range
    erasing: float = 0.25  # probability that a random rectangle is replaced by noise
    affine: AffineConfig = field(default_factory=AffineConfig)


@dataclass
class SizeConfig:
    """The size of training images from an epoch on."""

    epoch: int = 0  # the first one with it, counted from 0
    img_size: list[int] = field(default_factory=list)  # height, width


@dataclass
class DataConfig:
    """Where the images come from, and how they reach the model."""

    # Folder of class folders; or WebDataset's shards, such as train-{000..009}.tar; with `dataset`, name of the split.
    train: str = ''
    val: str = ''
    # megapixel_mnist; `hfds/NAME` or `hfds/FOLDER` of Hugging Face; tar, of class folders; or what else timm knows by
    # name and can read by index, such as `torch/cifar10`.
    dataset: str = ''
    root: str = ''  # with `dataset`: the folder that holds it; of hfds/…, that of the library's cache
    args: dict[str, Any] = field(default_factory=dict)  # further arguments, of shards or with `dataset`
    val_args: dict[str, Any] = field(default_factory=dict)  # what replaces some of them for validation
    decode: str = 'pixels'  # one of DECODE
    batch_size: int = 128  # images per process and micro-batch
    eval_batch_size: int | None = None  # null: batch_size
    workers: int = 4  # loader processes; 0 loads in the training process
    cache: bool = False  # keep decoded images in memory (each worker its own)
    # What a file does that cannot be read. error: it ends the run. skip: it is named, counted and done without; in
    # training another image of its batch takes its place. What can be read and does not fit ends the run either way.
    on_error: str = 'error'
    repeats: int = 1  # how often an image comes in a row, each time augmented anew; an epoch is as long as without
    # With shards: only so many of them are shuffled together, where random access to all of them is slow. null: all.
    mixed_shards: int | None = None
    img_size: list[int] | None = None  # height, width; null: the model's own
    # Training images of other sizes than img_size, from epochs on; evaluation is at img_size throughout. The model has
    # to take them all, a vision transformer by model.args.dynamic_img_size.
    schedule: list[SizeConfig] = field(default_factory=list)
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]; null: the model's own
    std: list[float] | None = None
    interpolation: str | None = None  # bilinear, bicubic, …; null: the model's own
    crop_pct: float | None = None  # evaluation: side of the centre crop over the resized side; null: the model's own
    crop_mode: str | None = None  # evaluation: center, squash or border; null: the model's own
    augment: AugmentConfig = field(default_factory=AugmentConfig)
