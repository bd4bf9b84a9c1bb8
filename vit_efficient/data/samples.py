"""The samples of a data set, checked against the model, cached, and transformed."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from vit_efficient.data.config import ON_ERROR
from vit_efficient.data.files.images import EXHAUSTED, UnfitImage, to_array
from vit_efficient.data.files.jpeg import QuantizedJpeg
from vit_efficient.data.files.masks import IGNORED
from vit_efficient.data.preprocessing import PixelTransform
from vit_efficient.utils.checks import check_choice
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.packages import MissingPackage

logger = logging.getLogger(__name__)
# What data sets raise where a file is damaged or gone; PIL has the last two as well.
_READ_ERRORS = (OSError, ValueError, EOFError, SyntaxError)
# And what of it is not the file's fault.
_NO_DAMAGE = (UnfitImage, MissingPackage)


def class_names(dataset: Dataset) -> list[str] | None:
    """The names of the classes in the order of their labels, where the data set knows them (`classes`)."""
    names = getattr(dataset, 'classes', None)
    return [str(name) for name in names] if names else None


def check_same_classes(ours: list[str] | None, theirs: list[str] | None, our_name: str, their_name: str) -> None:
    """Raises a UserError that names the first difference if both lists are known and differ."""
    if ours is None or theirs is None or ours == theirs:
        return
    missing = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    detail = f'missing {missing[:5]}, unexpected {extra[:5]}' if missing or extra else 'their order differs'
    names = f'the classes of {their_name} ({len(theirs)}) differ from those of {our_name} ({len(ours)})'
    raise UserError(f'{names}: {detail}')


def labels_among(ours: list[str] | None, theirs: list[str] | None, our_name: str, their_name: str) -> list[int] | None:
    """What the labels of a data set that lacks some of our classes are among ours; None where they are the same.

    A log line names what it lacks. Anything else is refused as by `check_same_classes`.
    """
    lacking = [name for name in ours or [] if theirs is not None and name not in theirs]
    if not lacking or [name for name in ours if name in theirs] != theirs:
        check_same_classes(ours, theirs, our_name, their_name)
        return None
    names = f'{", ".join(lacking[:5])}{", …" * (len(lacking) > 5)}'
    logger.info(
        '%s has no image of %d of the %d classes of %s: %s', their_name, len(lacking), len(ours), our_name, names
    )
    return [ours.index(name) for name in theirs]


def has_masks(*datasets: Dataset) -> bool:
    """Whether the targets of data sets are of pixels, and move with them.

    Raises:
        UserError: If those of one do and those of another do not.
    """
    masks = {bool(getattr(dataset, 'moves_with_pixels', False)) for dataset in datasets}
    if len(masks) > 1:
        with_masks, without = ('data.train', 'data.val')[
            :: 1 if getattr(datasets[0], 'moves_with_pixels', False) else -1
        ]
        raise UserError(
            f'{with_masks} has masks and {without} has none; give both the same kind (data.dataset, data.args)'
        )
    return masks == {True}


class Unreadable(NamedTuple):
    """Stands for a sample that cannot be read. `reason` names it."""

    index: int
    reason: str


class Samples(Dataset):
    """What the loader reads: (tensor (C, H, W), label, index) for a key (epoch, index) or (epoch, index, repeat).

    Images of 8 bits are uint8, a quarter of what they are once they are normalised (`normalize`), which is done on the
    device that computes with them. With `check_target` it is (tensor, label, target, index), the target (rows, columns)
    being the class of each patch; or, of a data set that says so (`moves_with_pixels`), of each pixel, int16, which the
    transform moves with them, -1 where it does not count.
    With `on_error` skip it is Unreadable if the data set cannot read the sample. One that is read and does not fit the
    model (label, channels, type, range, target), or is whole and refused (its size, a missing package), and what the
    system has run out of, is an error all the same.

    Args:
        dataset: Any map-style data set of (image, label), the image being a PIL image or an array (`to_array`), or a
            QuantizedJpeg; with `check_target`, of (image, label, array of integers).
        transform: (array or QuantizedJpeg, *key) -> tensor; or a `PixelTransform`.
        in_chans, num_classes: Channels and classes of the model; None: labels are not read, and are 0.
        cache: Keep decoded images in memory. Every loader process holds its own.
        check_target: Raises UserError if a target does not fit its image: ((height, width), (rows, columns)) -> None.
        on_error: error or skip, see `DataConfig`.
        labels: The class of the model for each label of the data set, where these differ (`labels_among`).
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[..., torch.Tensor],
        in_chans: int,
        num_classes: int | None,
        cache: bool = False,
        check_target: Callable[[tuple[int, int], tuple[int, int]], None] | None = None,
        on_error: str = 'error',
        labels: Sequence[int] | None = None,
    ):
        check_choice('on_error', on_error, ON_ERROR)
        self.dataset, self.transform = dataset, transform
        self.in_chans, self.num_classes = in_chans, num_classes
        self.check_target, self.on_error = check_target, on_error
        self.of_pixels = check_target is not None and getattr(dataset, 'moves_with_pixels', False)
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self._known, self._knows = (num_classes, 'model') if labels is None else (len(labels), 'data set')
        self.cached: dict[int, tuple[Any, ...] | Unreadable] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.dataset)

    def filename(self, index: int) -> str:
        """The file of a sample; its index where the data set has no files."""
        name = getattr(self.dataset, 'filename', None)
        return name(index) if name else str(index)

    def decode(self, index: int) -> tuple[Any, ...] | Unreadable:
        """The image as an array (H, W, C), its label and, where it is read, its target: an int64 tensor, or of pixels
        an int16 array.

        Raises:
            UserError: If one does not fit the model, or cannot be read and is not skipped; it names the sample.
        """
        if self.cached is None:
            return self._read(index)
        if index not in self.cached:
            self.cached[index] = self._read(index)
        return self.cached[index]

    def _read(self, index: int) -> tuple[Any, ...] | Unreadable:
        try:
            image, label, *rest = self.dataset[index]
            if isinstance(image, Image.Image):
                image.load()  # PIL decodes some images only now
        except _READ_ERRORS as error:
            where = self._where(index)
            what = ' '.join(str(error).removeprefix(f'{where}: ').split()) or type(error).__name__
            damaged = not isinstance(error, _NO_DAMAGE) and getattr(error, 'errno', None) not in EXHAUSTED
            if self.on_error == 'skip' and damaged:
                return Unreadable(index, f'{where}: {what}')
            way_out = '; data.on_error=skip goes on without it' if damaged else ''
            raise UserError(f'{where}: {what}{way_out}') from error
        try:
            truth = [self._label(label)]
            if not isinstance(image, QuantizedJpeg):
                image = to_array(image, self.in_chans)
            if self.check_target:
                target = self._target(rest)
                self.check_target(image.shape[:2], target.shape)
                truth.append(target if self.of_pixels else torch.from_numpy(target))
        except UserError as error:
            raise UserError(f'{self._where(index)}: {error}') from error
        return image, *truth

    def _label(self, label: Any) -> int:
        if self._known is None:
            return 0
        # Numbers of NumPy and PyTorch have no axes; int() would cut 0.7 off, and read '1'.
        number = label.item() if getattr(label, 'ndim', None) == 0 else label
        if not isinstance(number, int):  # True is 1, as a column of booleans has it
            raise UserError(f'its label must be an integer, got {" ".join(repr(label).split())[:100]}')
        if not 0 <= number < self._known:
            raise UserError(f'its label {number} is not among the {self._known} classes of the {self._knows}')
        return int(number if self.labels is None else self.labels[number])

    def _target(self, rest: list[Any]) -> np.ndarray:
        if not rest:
            raise UserError('it has no target of patches or pixels; task=classification needs none')
        try:
            target = np.asarray(rest[0])
        except ValueError as error:  # lists of unequal length
            raise UserError(f'its target is no array: {error}') from error
        if target.ndim != 2 or target.dtype.kind not in 'iu' or not target.size:
            raise UserError(f'its target must be integers (rows, columns), got {target.dtype} {target.shape}')
        low, high = int(target.min()), int(target.max())
        if low < (IGNORED if self.of_pixels else 0) or high >= self._known:
            raise UserError(
                f'its target has {low} to {high}, the {self._known} classes of the {self._knows} begin at 0'
            )
        target = target.astype(np.int16 if self.of_pixels else np.int64)
        if self.labels is None:
            return target
        # What does not count is -1, the last entry.
        return np.append(self.labels, IGNORED).astype(target.dtype)[target]

    def _where(self, index: int) -> str:
        name, root = self.filename(index), getattr(self.dataset, 'root', None)
        return f'sample {name}' if name == str(index) else str(Path(root or '') / name)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Any, ...] | Unreadable:
        item = self.decode(key[1])
        if isinstance(item, Unreadable):
            return item
        image, *truth = item
        if self.of_pixels:
            label, mask = truth
            image, mask = self.transform.pixels_and_mask(image, mask, *key)
            return image, label, mask, key[1]
        transform = self.transform.pixels if self._normalizes_later else self.transform
        return transform(image, *key), *truth, key[1]

    @property
    def _normalizes_later(self) -> bool:
        """Whether the transform is of ours, whose last step can be apart."""
        return isinstance(self.transform, PixelTransform) and type(self.transform).__call__ is PixelTransform.__call__

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Images (…, C, H, W) as the model takes them: normalised, where they are uint8."""
        return self.transform.normalize(images) if self._normalizes_later else images

    def readable(self, count: int, epoch: int = 0, skipped: dict[int, str] | None = None) -> Iterator[tuple[Any, ...]]:
        """So many samples (at most all), normalised and evenly spread over the set, as in an epoch, less skipped ones,
        whose reasons are added to `skipped` by their index.

        Raises:
            UserError: If a sample does not fit, or all would be skipped.
        """
        count, reasons = min(count, len(self)), {}
        for i in range(count):
            item = self[epoch, i * len(self) // count]
            if isinstance(item, Unreadable):
                reasons[item.index] = item.reason
                if skipped is not None:
                    skipped[item.index] = item.reason
            else:
                yield self.normalize(item[0]), *item[1:]
        if reasons and len(reasons) == count:
            raise UserError(f'none of {count} samples can be read; the first one: {next(iter(reasons.values()))}')

    def spread(self, count: int) -> torch.Tensor:
        """The images of `readable(count)`: (count, C, H, W), or fewer."""
        return torch.stack([image for image, *_ in self.readable(count)])
