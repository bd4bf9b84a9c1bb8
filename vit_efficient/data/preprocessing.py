"""What a model takes, and how the files of a data set become that: reader and transform, by `data.decode`."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.layers import PatchEmbed
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import Normalize

from vit_efficient.data.config import DataConfig, SizeConfig
from vit_efficient.data.files.coefficients import TO_CHANNELS, PatchCoefficients, Window, regroup
from vit_efficient.data.files.jpeg import QuantizedJpeg, QuantizedReader, ReducedReader
from vit_efficient.data.sampler import sample_seed
from vit_efficient.data.sources import reads_files
from vit_efficient.models.inputs import image_size, input_size, takes_coefficients
from vit_efficient.utils.checks import check_choice
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.packages import MissingPackage

logger = logging.getLogger(__name__)

_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'lanczos')
_CROP_MODES = ('center', 'squash', 'border')


@dataclass(frozen=True)
class Preprocessing:
    """The input (C, H, W) of a model, the statistics of its pixels, and how evaluation crops: of every transform."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @classmethod
    def of(cls, model: nn.Module, config: DataConfig | None = None) -> 'Preprocessing':
        """Reads it off a timm model; what `config` sets goes first.

        The size is that of `models.inputs.image_size`. A model of another number of channels than its statistics takes
        their mean for every channel.

        Raises:
            UserError: If the statistics in `config` do not have one value per channel, or a name is unknown.
        """
        config = config or DataConfig()
        in_chans = getattr(model, 'in_chans', None) or model.pretrained_cfg['input_size'][0]
        base = resolve_data_config(pretrained_cfg=dict(model.pretrained_cfg))
        size = tuple(config.img_size or image_size(model) or base['input_size'][-2:])
        if len(size) != 2 or min(size) < 1:
            raise UserError(f'data.img_size must be height and width in pixels, got {list(size)}')
        statistics = {}
        for name in ('mean', 'std'):
            values, given = getattr(config, name), base[name]
            if values is None:
                values = given if len(given) == in_chans else [sum(given) / len(given)] * in_chans
            if len(values) != in_chans:
                raise UserError(f'data.{name} must have one value per channel of the model ({in_chans}), got {values}')
            statistics[name] = tuple(float(value) for value in values)
        if min(statistics['std']) <= 0:
            raise UserError(f'data.std must be above 0, got {list(statistics["std"])}')
        crop = {name: getattr(config, name) or base[name] for name in ('interpolation', 'crop_pct', 'crop_mode')}
        check_choice('data.interpolation', crop['interpolation'], _INTERPOLATIONS)
        check_choice('data.crop_mode', crop['crop_mode'], _CROP_MODES)
        embedding = getattr(model, 'patch_embed', None)
        if isinstance(embedding, PatchEmbed) and embedding.strict_img_size:  # others refuse such images, or pad them
            _say_unseen(size, embedding.patch_size)
        return cls((in_chans, *size), **statistics, **crop)

    def scheduled(self, schedule: Sequence[SizeConfig]) -> dict[int, 'Preprocessing']:
        """The same at the sizes of a schedule, by the first epoch that has each."""
        others = {part.epoch: replace(self, input_size=(self.input_size[0], *part.img_size)) for part in schedule}
        return {0: self, **others}

    def as_dict(self) -> dict[str, Any]:
        """The entries of timm's `pretrained_cfg`."""
        return dict(vars(self))


@cache
def _say_unseen(size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Logs, once for each case, that timm's models leave out what is less than a patch at two edges of an image."""
    below, right = (side % patch for side, patch in zip(size, patch_size, strict=True))
    if below or right:
        logger.warning(
            'images of %d × %d pixels are no whole patches of %d × %d: %d rows at the lower edge and %d columns at the '
            'right are not seen',
            *(*size, *patch_size, below, right),
        )


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


@dataclass(frozen=True)
class Normalization:
    """Normalises images (…, C, H, W) that are uint8, on whatever device they are; others are normalised already.

    It computes (x / 255 - mean) / std in the order of torchvision, or with `by_factor` that of albumentations, x less
    255 mean, times 1 / (255 std): they differ in the last bit.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    by_factor: bool = False

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8:
            return images
        mean, std = (_per_channel(values, images.device) for values in (self.mean, self.std))
        if self.by_factor:
            return images.float().sub_(mean * 255).mul_((std * 255).reciprocal())
        return images.float().div_(255).sub_(mean).div_(std)


class PixelTransform:
    """A transform of pixels, whose last step can be left to the device: images of 8 bits are normalised there."""

    normalize: Normalization

    def pixels(self, image: np.ndarray, epoch: int = 0, index: int = 0, repeat: int = 0) -> torch.Tensor:
        """(H, W, C), uint8 or float32 in [0, 1] -> (C, H', W'), uint8, or float32 and normalised."""
        raise NotImplementedError

    def pixels_and_mask(
        self, image: np.ndarray, mask: np.ndarray, epoch: int = 0, index: int = 0, repeat: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`pixels`, and the mask (H, W), int16, moved with them: (H', W')."""
        raise NotImplementedError

    def __call__(self, image: np.ndarray, epoch: int = 0, index: int = 0, repeat: int = 0) -> torch.Tensor:
        """(H, W, C), uint8 or float32 in [0, 1] -> (C, H', W'), float32, normalised."""
        return self.normalize(self.pixels(image, epoch, index, repeat))


class EvalTransform(PixelTransform):
    """timm's evaluation transform, the same for every epoch.

    8-bit images of 1 or 3 channels go through it as PIL images, exactly as in timm. Others (16-bit, floating point,
    many-channel) go through its resize and crop as float32, with the same target sizes, the same interpolation and
    antialiasing, as tensors, or for Lanczos, which those lack, each channel as a PIL image; then they are clipped to
    [0, 1], as 8-bit images are by their type, and normalised. With `crop_mode` border they are a UserError: its padding
    is a colour.
    """

    def __init__(self, preprocessing: Preprocessing):
        self.crop_mode, self.interpolation = preprocessing.crop_mode, preprocessing.interpolation
        self.geometry = create_transform(is_training=False, normalize=False, **preprocessing.as_dict())
        self.normalize = Normalization(preprocessing.mean, preprocessing.std)
        self.normalize_measured = Normalize(preprocessing.mean, preprocessing.std)

    def pixels(self, image: np.ndarray, epoch: int = 0, index: int = 0, repeat: int = 0) -> torch.Tensor:
        if image.dtype == np.uint8 and image.shape[2] in (1, 3):
            return self.geometry(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image))
        if self.crop_mode == 'border':
            raise UserError('data.crop_mode=border works for 8-bit grey and RGB images only; use center or squash')
        if image.dtype == np.uint8:
            image = image.astype(np.float32) / 255
        if self.interpolation == 'lanczos':
            planes = (np.ascontiguousarray(image[..., channel]) for channel in range(image.shape[2]))
            tensor = torch.cat([self.geometry(Image.fromarray(plane)) for plane in planes])
        else:
            tensor = self.geometry(torch.from_numpy(image).permute(2, 0, 1).contiguous())
        return self.normalize_measured(tensor.clamp_(0, 1))


class WholeTransform(PixelTransform):
    """The image as it is, of any size, and its mask: what models of patches are evaluated on."""

    def __init__(self, preprocessing: Preprocessing):
        self.normalize = Normalization(preprocessing.mean, preprocessing.std)
        self.normalize_measured = Normalize(preprocessing.mean, preprocessing.std)

    def pixels(self, image: np.ndarray, epoch: int = 0, index: int = 0, repeat: int = 0) -> torch.Tensor:
        tensor = torch.tensor(image.transpose(2, 0, 1))
        return tensor if image.dtype == np.uint8 else self.normalize_measured(tensor)

    def pixels_and_mask(
        self, image: np.ndarray, mask: np.ndarray, epoch: int = 0, index: int = 0, repeat: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pixels(image), torch.tensor(mask)


class CoefficientTransform:
    """Quantised JPEG to coefficient image: a window of the size of the model's input, and flips. Nothing is resized.

    The draws for a sample are a function of (seed, epoch, index, repeat). Without a seed nothing is drawn: the window
    is the one nearest to the centre.

    Args:
        layout: Patches and frequencies.
        preprocessing: Statistics, and the pixels (1 or 3, height, width) that the window covers; patches divide them.
        seed: The run's seed; None for evaluation.
        hflip, vflip: Probabilities, for training.
    """

    def __init__(
        self,
        layout: PatchCoefficients,
        preprocessing: Preprocessing,
        seed: int | None = None,
        hflip: float = 0.0,
        vflip: float = 0.0,
    ):
        channels, *size = preprocessing.input_size
        if channels not in TO_CHANNELS:
            raise UserError(f'data.decode=coefficients reads images of 1 or 3 channels, the model takes {channels}')
        if any(side % patch for side, patch in zip(size, layout.patch_size, strict=True)):
            raise UserError(f'data.img_size={size} must be multiples of the patches, {list(layout.patch_size)}')
        self.layout, self.mean, self.std = layout, preprocessing.mean, preprocessing.std
        self.rows, self.columns = layout.grid(*size)
        self.seed, self.flips = seed, (hflip, vflip)

    def __call__(self, image: QuantizedJpeg, epoch: int = 0, index: int = 0, repeat: int = 0) -> torch.Tensor:
        """-> (C, rows · f, columns · g), float32"""
        rows, columns = self.layout.grid(image.height, image.width)
        spare = rows - self.rows, columns - self.columns
        top, left, flips = spare[0] // 2, spare[1] // 2, [False, False]
        if self.seed is not None:
            rng = np.random.default_rng(sample_seed(self.seed, epoch, index, repeat))
            top, left = (int(rng.integers(free, endpoint=True)) for free in spare)
            flips = [bool(rng.random() < probability) for probability in self.flips]
        window = Window(top, left, self.rows, self.columns)
        return regroup(image, self.layout, self.mean, self.std, window, *flips)


def train_input(
    dataset: Dataset, model: nn.Module, preprocessing: Preprocessing, config: DataConfig, seed: int
) -> tuple[Dataset, Callable[..., Any]]:
    """The data set as it is read for training (a copy where it reads otherwise), and the transform of what it reads.

    Raises:
        UserError: If `data.decode` does not fit the model or the data set, or its library is not installed.
    """
    augment = config.augment
    if config.decode == 'coefficients':
        return _coefficient_input(dataset, model, preprocessing, seed=seed, hflip=augment.hflip, vflip=augment.vflip)
    sizes = [scheduled.input_size[1:] for scheduled in preprocessing.scheduled(config.schedule).values()]
    largest = (max(sides) for sides in zip(*sizes, strict=True))
    crop = augment.crop_scale and augment.crop_scale[0], augment.crop_ratio
    dataset = _pixel_input(dataset, model, config.decode, *largest, *crop)
    from vit_efficient.data.transforms import TrainTransform  # imports albumentations

    return dataset, TrainTransform(preprocessing, augment, seed, config.schedule)


def eval_input(
    dataset: Dataset, model: nn.Module, preprocessing: Preprocessing, decode: str, whole: bool = False
) -> tuple[Dataset, Callable[..., Any]]:
    """`train_input` for evaluation: nothing is drawn. `decode` is what `data.decode` may be.

    With `whole`, images stay as large as they are.
    """
    if decode == 'coefficients':
        return _coefficient_input(dataset, model, preprocessing)
    if whole:
        return _pixel_input(dataset, model, decode), WholeTransform(preprocessing)
    resized = (math.ceil(side / preprocessing.crop_pct) for side in preprocessing.input_size[1:])
    return _pixel_input(dataset, model, decode, *resized), EvalTransform(preprocessing)


def input_shape(model: nn.Module, preprocessing: Preprocessing) -> tuple[int, int, int]:
    """The shape (C, H, W) of the tensor that the model takes: pixels or coefficients."""
    channels, *sides = preprocessing.input_size
    return channels, *input_size(model, tuple(sides))[1:]


def _pixel_input(dataset: Dataset, model: nn.Module, decode: str, *needed: Any) -> Dataset:
    if takes_coefficients(model):
        raise UserError(
            f'data.decode={decode} gives pixels, the patch embedding of the model takes DCT coefficients; set '
            'data.decode=coefficients, or the input of the embedding to pixels'
        )
    return _read_by(dataset, ReducedReader, *needed) if decode == 'scaled' else dataset


def _coefficient_input(
    dataset: Dataset, model: nn.Module, preprocessing: Preprocessing, **draws: Any
) -> tuple[Dataset, CoefficientTransform]:
    transform = CoefficientTransform(PatchCoefficients.of(model), preprocessing, **draws)
    return _read_by(dataset, QuantizedReader, *preprocessing.input_size[1:]), transform


def _read_by(dataset: Dataset, reader: Callable[..., Any], *args: Any) -> Dataset:
    if not reads_files(dataset):
        raise UserError(
            f'data.decode is for image files, {type(dataset).__name__} gives images that are decoded already; '
            'use data.decode=pixels'
        )
    dataset = copy.copy(dataset)
    try:
        dataset.loader = reader(*args)
    except MissingPackage as error:
        raise UserError(f'data.decode: {error}') from error
    return dataset
