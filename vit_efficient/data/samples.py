"""The samples of a data set, checked against the model, cached, transformed; and the loader of their batches."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from vit_efficient.data.config import ON_ERROR
from vit_efficient.data.files.images import ImageTooLarge, to_array
from vit_efficient.data.files.jpeg import QuantizedJpeg
from vit_efficient.utils.checks import check_choice
from vit_efficient.utils.errors import UserError

# What data sets raise where a file is damaged or gone; PIL has the last two as well.
_READ_ERRORS = (OSError, ValueError, EOFError, SyntaxError)


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


class Unreadable(NamedTuple):
    """Stands for a sample that cannot be read. `reason` names it."""

    index: int
    reason: str


class Samples(Dataset):
    """What the loader reads: (tensor (C, H, W), label, index) for a key (epoch, index) or (epoch, index, repeat).

    With `check_target` it is (tensor, label, target, index), the target (rows, columns) being the class of each patch.
    With `on_error` skip it is Unreadable if the data set cannot read the sample. One that is read and does not fit the
    model (label, channels, type, range, target), or that PIL refuses for its size, is an error all the same.

    Args:
        dataset: Any map-style data set of (image, label), the image being a PIL image or an array (`to_array`), or a
            QuantizedJpeg; with `check_target`, of (image, label, array of integers).
        transform: (array or QuantizedJpeg, *key) -> tensor.
        in_chans, num_classes: Channels and classes of the model.
        cache: Keep decoded images in memory. Every loader process holds its own.
        check_target: Raises UserError if a target does not fit its image: ((height, width), (rows, columns)) -> None.
        on_error: error or skip, see `DataConfig`.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[..., torch.Tensor],
        in_chans: int,
        num_classes: int,
        cache: bool = False,
        check_target: Callable[[tuple[int, int], tuple[int, int]], None] | None = None,
        on_error: str = 'error',
    ):
        check_choice('on_error', on_error, ON_ERROR)
        self.dataset, self.transform = dataset, transform
        self.in_chans, self.num_classes = in_chans, num_classes
        self.check_target, self.on_error = check_target, on_error
        self.cached: dict[int, tuple[Any, ...] | Unreadable] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.dataset)

    def filename(self, index: int) -> str:
        """The file of a sample; its index where the data set has no files."""
        name = getattr(self.dataset, 'filename', None)
        return name(index) if name else str(index)

    def decode(self, index: int) -> tuple[Any, ...] | Unreadable:
        """The image as an array (H, W, C), its label and, where it is read, its target as an int64 tensor.

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
            if self.on_error == 'skip' and not isinstance(error, ImageTooLarge):
                return Unreadable(index, f'{where}: {what}')
            way_out = '' if isinstance(error, ImageTooLarge) else '; on_error=skip goes on without it'
            raise UserError(f'{where}: {what}{way_out}') from error
        try:
            truth = [self._label(label)]
            if not isinstance(image, QuantizedJpeg):
                image = to_array(image, self.in_chans)
            if self.check_target:
                truth.append(self._target(rest))
                self.check_target(image.shape[:2], tuple(truth[1].shape))
        except UserError as error:
            raise UserError(f'{self._where(index)}: {error}') from error
        return image, *truth

    def _label(self, label: Any) -> int:
        try:
            number = int(label)
        except (TypeError, ValueError) as error:  # a name, or None
            raise UserError(f'its label must be an integer, got {label!r}') from error
        if not 0 <= number < self.num_classes:
            raise UserError(f'its label {number} is not among the {self.num_classes} classes of the model')
        return number

    def _target(self, rest: list[Any]) -> torch.Tensor:
        if not rest:
            raise UserError('it has no target of patches; task=classification needs none')
        try:
            target = np.asarray(rest[0])
        except ValueError as error:  # lists of unequal length
            raise UserError(f'its target is no array: {error}') from error
        if target.ndim != 2 or target.dtype.kind not in 'iu' or not target.size:
            raise UserError(f'its target must be integers (rows, columns), got {target.dtype} {target.shape}')
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= self.num_classes:
            raise UserError(f'its target has {low} to {high}, the {self.num_classes} classes of the model begin at 0')
        return torch.from_numpy(target.astype(np.int64))

    def _where(self, index: int) -> str:
        name, root = self.filename(index), getattr(self.dataset, 'root', None)
        return f'sample {name}' if name == str(index) else str(Path(root or '') / name)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Any, ...] | Unreadable:
        item = self.decode(key[1])
        if isinstance(item, Unreadable):
            return item
        image, *truth = item
        return self.transform(image, *key), *truth, key[1]

    def readable(self, count: int) -> Iterator[tuple[Any, ...]]:
        """So many samples (at most all), evenly spread over the set, as in epoch 0, less those that are skipped.

        Raises:
            UserError: If a sample does not fit, or all would be skipped.
        """
        count = min(count, len(self))
        skipped = []
        for i in range(count):
            item = self[0, i * len(self) // count]
            if isinstance(item, Unreadable):
                skipped.append(item.reason)
            else:
                yield item
        if skipped and len(skipped) == count:
            raise UserError(f'none of {count} samples can be read; the first one: {skipped[0]}')

    def spread(self, count: int) -> torch.Tensor:
        """The images of `readable(count)`: (count, C, H, W), or fewer."""
        return torch.stack([image for image, *_ in self.readable(count)])


class _Batch(NamedTuple):
    """What loader processes send where samples may be skipped; no tensors if nothing can be read."""

    tensors: list[torch.Tensor] | None
    unreadable: dict[int, str]


def _collate(items: Sequence[tuple[Any, ...] | Unreadable], full: bool) -> _Batch:
    """Leaves out what cannot be read; in a full batch the others take its places, in turn."""
    unreadable = {item.index: item.reason for item in items if isinstance(item, Unreadable)}
    readable = [item for item in items if not isinstance(item, Unreadable)]
    if full and not readable:
        raise UserError(f'nothing in a batch of {len(items)} can be read; the first one: {items[0].reason}')
    if full:
        others = cycle(readable)
        readable = [next(others) if isinstance(item, Unreadable) else item for item in items]
    return _Batch(default_collate(readable) if readable else None, unreadable)


def create_loader(
    samples: Samples, sampler: Sampler, batch_size: int, workers: int = 0, drop_last: bool = False, pin: bool = False
) -> DataLoader:
    """A loader of batches (images (B, C, H, W), labels (B,), indices (B,)), with targets before the indices if any.

    `iterate` gives these batches. If samples are skipped, what the loader itself gives holds them.

    Args:
        samples, sampler: The data and their order. Training sets the sampler's epoch before each pass.
        workers: Loader processes. Those of training, and those that cache images, live as long as the loader.
        drop_last: Full batches only (training): a last batch that is not full is left out, and a copy of another sample
            of the batch takes the place of one that is skipped. Evaluation keeps the former and leaves out the latter.
        pin: Page-locked memory, for a GPU.
    """
    return DataLoader(
        samples,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=drop_last,
        collate_fn=partial(_collate, full=drop_last) if samples.on_error == 'skip' else None,
        pin_memory=pin,
        # Those of an evaluation would idle, beside the others, for an epoch.
        persistent_workers=workers > 0 and (drop_last or samples.cached is not None),
        worker_init_fn=_start_worker,
    )


def _start_worker(_worker: int) -> None:
    # Loader processes are the parallelism; OpenCV's own threads would compete with them.
    with suppress(ImportError):
        import cv2

        cv2.setNumThreads(0)
    # Schedulers send SIGTERM to every process of a job. The one that trains saves a checkpoint first, and would fail
    # where its loader is gone.
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def iterate(loader: Iterable[Any], unreadable: dict[int, str] | None = None) -> Iterator[Any]:
    """Iterates a loader, and gives errors of loader processes the message they have without processes.

    The samples that are skipped go to `unreadable`, by index, each with a line that names it and tells why.

    Raises:
        UserError: What the data set raised, as one line; for training, also if nothing in a batch can be read.
    """
    try:
        for batch in loader:
            if isinstance(batch, _Batch):
                if unreadable is not None:
                    unreadable.update(batch.unreadable)
                batch = batch.tensors
            if batch is not None:
                yield batch
    except UserError as error:
        if 'DataLoader worker process' not in str(error):
            raise
        # Its traceback is a reference cycle, and the garbage collector would shut the loader down in 5 s per process.
        error.__traceback__ = None
        raise UserError(str(error).splitlines()[-1].partition(': ')[2]) from None
