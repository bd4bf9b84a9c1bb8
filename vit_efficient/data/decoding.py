"""How the files of a data set become the tensors that a model takes: reader and transform, by `data.decode`."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from vit_efficient.data.config import DataConfig
from vit_efficient.data.files.coefficients import TO_CHANNELS, PatchCoefficients, Window, regroup
from vit_efficient.data.files.jpeg import QuantizedJpeg, QuantizedReader, ReducedReader
from vit_efficient.data.preprocessing import EvalTransform, Preprocessing
from vit_efficient.data.sampler import sample_seed
from vit_efficient.data.sources import reads_files
from vit_efficient.models.inputs import input_size, takes_coefficients
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.packages import MissingPackage


class CoefficientTransform:
    """Quantised JPEG to coefficient image: a window of the size of the model's input, and flips. Nothing is resized.

    The draws for a sample are a function of (seed, epoch, index, repeat). Without a seed nothing is drawn: the window
    is the one nearest to the centre.

    Args:
        layout: Patches and frequencies.
        input_size: Channels (1 or 3), height and width of the pixels that the window covers; patches divide it.
        mean, std: Per channel, of pixels in [0, 1].
        seed: The run's seed; None for evaluation.
        hflip, vflip: Probabilities, for training.
    """

    def __init__(
        self,
        layout: PatchCoefficients,
        input_size: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int | None = None,
        hflip: float = 0.0,
        vflip: float = 0.0,
    ):
        channels, *size = input_size
        if channels not in TO_CHANNELS:
            raise UserError(f'data.decode=coefficients reads images of 1 or 3 channels, the model takes {channels}')
        if any(side % patch for side, patch in zip(size, layout.patch_size, strict=True)):
            raise UserError(f'data.img_size={size} must be multiples of the patches, {list(layout.patch_size)}')
        self.layout = layout
        self.rows, self.columns = layout.grid(*size)
        self.mean, self.std, self.seed, self.flips = mean, std, seed, (hflip, vflip)

    def __call__(self, image: QuantizedJpeg, epoch: int = 0, index: int = 0, repeat: int = 0) -> Tensor:
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
    _check_takes_pixels(model, config.decode)
    from vit_efficient.data.transforms import TrainTransform  # imports albumentations

    transform = TrainTransform(preprocessing, augment, seed, config.schedule)
    if config.decode == 'scaled':
        sizes = [scheduled.input_size[1:] for scheduled in preprocessing.scheduled(config.schedule).values()]
        largest = (max(sides) for sides in zip(*sizes, strict=True))
        crop = augment.crop_scale and augment.crop_scale[0], augment.crop_ratio
        dataset = _read_by(dataset, ReducedReader, *largest, *crop)
    return dataset, transform


def eval_input(
    dataset: Dataset, model: nn.Module, preprocessing: Preprocessing, decode: str
) -> tuple[Dataset, Callable[..., Any]]:
    """`train_input` for evaluation: nothing is drawn. `decode` is what `data.decode` may be."""
    if decode == 'coefficients':
        return _coefficient_input(dataset, model, preprocessing)
    _check_takes_pixels(model, decode)
    if decode == 'scaled':
        resized = (math.ceil(side / preprocessing.crop_pct) for side in preprocessing.input_size[1:])
        dataset = _read_by(dataset, ReducedReader, *resized)
    return dataset, EvalTransform(preprocessing)


def input_shape(model: nn.Module, preprocessing: Preprocessing) -> tuple[int, int, int]:
    """The shape (C, H, W) of the tensor that the model takes: pixels or coefficients."""
    channels, *sides = preprocessing.input_size
    return channels, *input_size(model, tuple(sides))[1:]


def _check_takes_pixels(model: nn.Module, decode: str) -> None:
    if takes_coefficients(model):
        raise UserError(
            f'data.decode={decode} gives pixels, the patch embedding of the model takes DCT coefficients; set '
            'data.decode=coefficients, or the input of the embedding to pixels'
        )


def _coefficient_input(
    dataset: Dataset, model: nn.Module, preprocessing: Preprocessing, **draws: Any
) -> tuple[Dataset, CoefficientTransform]:
    size, statistics = preprocessing.input_size, (preprocessing.mean, preprocessing.std)
    transform = CoefficientTransform(PatchCoefficients.of(model), size, *statistics, **draws)
    return _read_by(dataset, QuantizedReader, *size[1:]), transform


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
