"""Data sets: folders of class folders, what is known by name, and any torch data set of images and labels."""

import hashlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data import create_dataset as create_timm_dataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from torchvision.datasets import DatasetFolder

from vit_efficient.data.config import ON_ERROR
from vit_efficient.data.files.images import EXTENSIONS, ImageTooLarge, read_image, to_array
from vit_efficient.data.files.jpeg import QuantizedJpeg
from vit_efficient.data.megapixel_mnist import SPLITS, MegapixelMnist
from vit_efficient.data.sampler import EpochSampler
from vit_efficient.data.sources.hugging_face import HuggingFaceReader
from vit_efficient.data.sources.shards import ShardReader
from vit_efficient.utils.errors import UserError

# What data sets raise where a file is damaged or gone; PIL has the last two as well.
_READ_ERRORS = (OSError, ValueError, EOFError, SyntaxError)
# What lies beside images and is none.
_OTHER_FILES = ('.csv', '.db', '.html', '.ini', '.json', '.log', '.md', '.tsv', '.txt', '.xml', '.yaml', '.yml')


class ImageTree(DatasetFolder):
    """A folder that holds one folder of images per class, numbered in natural order (2 before 10), as in timm.

    Items are (image, label), the image as `read_image` gives it. Hidden files and folders are skipped, and so are
    files of other types, of which a line on stderr tells unless they are text or tables.

    Args:
        root: The folder.

    Raises:
        UserError: If the folder is missing or empty, holds no class folders, or a class folder holds no images.
    """

    def __init__(self, root: str | Path):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f'{root}: no such data folder')
        if not any(root.iterdir()):
            raise UserError(f'{root}: the data folder is empty')
        others: list[str] = []

        def is_image(path: str) -> bool:
            if f'{os.sep}.' in path[len(str(root)) :]:
                return False
            known = path.lower().endswith(EXTENSIONS)
            if not known and not path.lower().endswith(_OTHER_FILES):
                others.append(path)
            return known

        read = f'(files that are read end in {", ".join(EXTENSIONS)})'
        try:
            super().__init__(root, loader=read_image, is_valid_file=is_image)
        except FileNotFoundError as error:
            names = sorted(path.name for path in root.iterdir() if path.is_dir())
            if names:
                raise UserError(f'{root}: {str(error).rstrip(". ")} {read}') from error
            raise UserError(f'{root}: holds no class folders (expected {root}/CLASS/IMAGE)') from error
        if others and os.environ.get('RANK', '0') == '0':  # under torchrun, all have them
            print(f'{root}: left out {len(others):,} of its files, the first one {others[0]} {read}', file=sys.stderr)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = (path.name for path in Path(directory).iterdir() if path.is_dir() and not path.name.startswith('.'))
        # Names that tie, such as 1 and 01, would come as the file system lists them.
        classes = sorted(names, key=lambda name: (natural_key(name), name))
        if not classes:
            raise FileNotFoundError('no class folders')
        return classes, {name: label for label, name in enumerate(classes)}

    def filename(self, index: int) -> str:
        return Path(self.samples[index][0]).relative_to(self.root).as_posix()

    def digest(self) -> str:
        """A hash of the names and the order of the files, as they are below `root`."""
        below = len(str(self.root))
        return hashlib.sha256(
            '\n'.join(path[below:] for path, _ in self.samples).encode(errors='surrogateescape')
        ).hexdigest()


class ReaderImages(Dataset):
    """What a reader of timm's kind reads; timm's ImageDataset hands out the next image in the place of a corrupt one.

    Items are (image, label), the image as `read_image` gives it.

    Args:
        reader: By index, an open file and a label. It may know the names of its classes, and its groups of samples
            that lie together.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        self.loader = read_image
        labels = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}
        self.classes = getattr(reader, 'classes', None) or sorted(labels, key=labels.get)
        self.groups = getattr(reader, 'groups', None)
        self.root = getattr(reader, 'root', None) or ''

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image | np.ndarray, int]:
        try:
            file, label = self.reader[index][:2]
            with file:
                return self.loader(file), label
        except ValueError as error:
            kind = ImageTooLarge if isinstance(error, ImageTooLarge) else UserError
            raise kind(f'{Path(self.root, self.filename(index))}: {error}') from error

    def filename(self, index: int) -> str:
        return str(self.reader.filename(index))

    def digest(self) -> str | None:
        """A hash of the names and the order of the samples, where the reader has one."""
        digest = getattr(self.reader, 'digest', None)
        return digest() if digest else None


def create_dataset(
    path: str,
    dataset: str = '',
    root: str = '',
    key: str = 'data.train',
    args: Mapping[str, Any] | None = None,
) -> Dataset:
    """Opens a data set of (image, label), or of (image, label, target) where it has targets for patches.

    Args:
        path: A folder of class folders, or WebDataset's shards, such as `train-{000..009}.tar`; with `dataset`, the
            name of the split.
        dataset: One of

            - megapixel_mnist;
            - `hfds/NAME` or `hfds/FOLDER`, see `HuggingFaceReader`;
            - tar: `path` is a tar file in `root` that holds class folders or a tar file for each class, or a folder of
              such files (timm's ReaderImageInTar);
            - a name that timm.data.create_dataset knows, such as `torch/cifar10`.
        root: With `dataset`, the folder that holds it; with `hfds/`, where the library keeps what it has prepared.
        key: The recipe's key for `path`, for messages.
        args: Further arguments, of `MegapixelMnist`, `ShardReader`, `HuggingFaceReader` or timm's reader.

    Raises:
        UserError: If there are no images there, the data set is a stream, or it does not take the arguments.
    """
    args = dict(args or {})
    args_key = 'data.val_args' if key == 'data.val' else 'data.args'
    if not path:
        raise UserError(f'{key} is not set: it names a folder of class folders')
    if not dataset and path.endswith('.tar'):
        return ReaderImages(_create(ShardReader, path, args, args_key, key, key))
    if not dataset:
        if args:
            raise UserError(f'{args_key}={args} are for a data set with a name, or shards; set data.dataset')
        return ImageTree(path)
    if dataset == 'megapixel_mnist':
        if path not in SPLITS:
            raise UserError(f'{key} must be a split of megapixel_mnist ({" or ".join(SPLITS)}), got {path!r}')
        return _create(MegapixelMnist, path, args, args_key, args_key, f'data.dataset={dataset}')
    try:
        prefix, _, name = dataset.partition('/')
        if prefix == 'hfds':
            return ReaderImages(HuggingFaceReader(name, path, root or None, **args))
        if dataset == 'tar':
            # It would share the position in a file that is open with the loader processes.
            return ReaderImages(ReaderImageInTar(str(Path(root, path)), cache_tarfiles=False, **args))
        opened = create_timm_dataset(dataset, root=root or None, split=path, input_img_mode=None, **args)
    # Readers raise whatever their libraries do; those that need a root trip over None.
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        hint = '' if root else ' (data.root is not set: it names the folder that holds the data set)'
        raise UserError(f'data.dataset={dataset}, split {path}: {reason}{hint}') from error
    if isinstance(opened, IterableDataset):
        raise UserError(
            f'data.dataset={dataset} is a stream, its samples have no index, without which a run cannot go on where it '
            "stopped; use one with random access: hfds/… for hfids/…, shards' paths as data.train for wds/…"
        )
    return ReaderImages(opened.reader) if isinstance(opened, ImageDataset) else opened


def _create(make: Callable[..., Any], path: str, args: dict[str, Any], args_key: str, key: str, name: str) -> Any:
    """Calls `make` with arguments (`args_key`) that are its own. Errors begin with `key`, that a package is
    missing with `name`."""
    known = list(inspect.signature(make).parameters)[1:]
    for argument in args:
        if argument not in known:
            raise UserError(f'{args_key}.{argument}: {make.__name__} has no such argument; it has {", ".join(known)}')
    try:
        return make(path, **args)
    except ValueError as error:
        raise UserError(f'{key}: {error}') from error
    except ImportError as error:
        raise UserError(f'{name}: {error}') from error


def shard_order(dataset: Dataset, mixed: int | None) -> dict[str, Any]:
    """The arguments of `EpochSampler` by which only `mixed` shards at a time are shuffled; none, if it is None.

    Raises:
        UserError: If the data set has no shards.
    """
    if mixed is None:
        return {}
    groups = getattr(dataset, 'groups', None)
    if groups is None:
        raise UserError(f'data.mixed_shards={mixed} is for shards, {type(dataset).__name__} has none; leave it out')
    return {'groups': groups, 'mixed': mixed}


def reads_files(dataset: Dataset) -> bool:
    """Whether it reads image files with its `loader`: (file or stream) -> image. That of others may do anything."""
    return isinstance(dataset, ImageTree | ReaderImages)


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
    raise UserError(
        f'the classes of {their_name} ({len(theirs)}) differ from those of {our_name} ({len(ours)}): {detail}'
    )


@dataclass(frozen=True)
class Unreadable:
    """Stands for a sample that cannot be read. `reason` names it."""

    index: int
    reason: str


class Samples(Dataset):
    """What the loader reads: (tensor (C, H, W), label, index) for a key (epoch, index) or (epoch, index, repeat).

    With `check_target` it is (tensor, label, target, index), the target (rows, columns) being the class of each patch.
    With `on_error` skip it is Unreadable if the data set cannot read the sample. A sample that is read and does not fit
    the model (its label, channels, type or range, its target), or that PIL refuses for its size, is an error all the
    same.

    Args:
        dataset: Any map-style data set of (image, label), the image being a PIL image or an array (`to_array`), or a
            QuantizedJpeg; with `check_target`, of (image, label, array of integers).
        transform: (array or QuantizedJpeg, *key) -> tensor.
        in_chans: Channels of the model.
        num_classes: Classes of the model.
        cache: Keep decoded images in memory. Every loader process holds its own.
        check_target: Raises UserError if a target does not fit its image: ((height, width), (rows, columns)) -> None.
        on_error: error or skip, see `DataConfig`.

    Raises:
        UserError: For any other `on_error`.
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
        if on_error not in ON_ERROR:
            raise UserError(f'on_error must be {" or ".join(ON_ERROR)}, got {on_error!r}')
        self.dataset = dataset
        self.transform = transform
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.check_target = check_target
        self.on_error = on_error
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
            UserError: If one of them does not fit the model, or the image is corrupt and `on_error` is not skip. The
                message names the sample.
        """
        if self.cached is not None and index in self.cached:
            return self.cached[index]
        item = self._read(index)
        if self.cached is not None:
            self.cached[index] = item
        return item

    def _read(self, index: int) -> tuple[Any, ...] | Unreadable:
        try:
            image, label, *rest = self.dataset[index]
            if isinstance(image, Image.Image):
                image.load()  # PIL decodes some images only now
        except _READ_ERRORS as error:
            where = self._where(index)
            what = ' '.join(str(error).removeprefix(f'{where}: ').split()) or type(error).__name__
            if isinstance(error, ImageTooLarge):
                raise UserError(f'{where}: {what}') from error
            if self.on_error == 'skip':
                return Unreadable(index, f'{where}: {what}')
            raise UserError(f'{where}: {what}; on_error=skip goes on without it') from error
        try:
            if not 0 <= int(label) < self.num_classes:
                raise UserError(f'its label {int(label)} is not among the {self.num_classes} classes of the model')
            if not isinstance(image, QuantizedJpeg):
                image = to_array(image, self.in_chans)
            item: tuple[Any, ...] = (image, int(label))
            if self.check_target:
                target = self._target(rest)
                self.check_target(item[0].shape[:2], tuple(target.shape))
                item += (target,)
        except ValueError as error:
            raise UserError(f'{self._where(index)}: {error}') from error
        return item

    def _target(self, rest: list[Any]) -> torch.Tensor:
        if not rest:
            raise UserError('it has no target of patches; task=classification needs none')
        target = np.asarray(rest[0])
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
        index = key[1]
        item = self.decode(index)
        if isinstance(item, Unreadable):
            return item
        image, *truth = item
        return self.transform(image, *key), *truth, index

    def readable(self, count: int) -> Iterator[tuple[Any, ...]]:
        """That many samples (at most all), evenly spread over the set, as in epoch 0, less those that are skipped.

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
    """What loader processes send where samples may be skipped."""

    tensors: list[torch.Tensor] | None  # None: nothing of it can be read
    unreadable: dict[int, str]


def _collate(items: Sequence[tuple[Any, ...] | Unreadable], full: bool) -> _Batch:
    """Leaves out what cannot be read; in a full batch the others take its places, in turn."""
    unreadable = {item.index: item.reason for item in items if isinstance(item, Unreadable)}
    readable = [item for item in items if not isinstance(item, Unreadable)]
    if not readable:
        if full:
            raise UserError(f'nothing in a batch of {len(items)} can be read; the first one: {items[0].reason}')
        return _Batch(None, unreadable)
    if full:
        others = cycle(readable)
        readable = [next(others) if isinstance(item, Unreadable) else item for item in items]
    return _Batch(default_collate(readable), unreadable)


def create_loader(
    samples: Samples,
    sampler: EpochSampler,
    batch_size: int,
    workers: int = 0,
    drop_last: bool = False,
    pin: bool = False,
) -> DataLoader:
    """A loader of batches (images (B, C, H, W), labels (B,), indices (B,)), with targets before the indices if any.

    `iterate` gives these batches. If samples are skipped, what the loader itself gives holds them.

    Args:
        samples: The data.
        sampler: Their order. Training sets its epoch before each pass.
        batch_size: Images per batch.
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

    Args:
        loader: From `create_loader`, or any other.
        unreadable: Is given the samples that are skipped, by index, each with a line that names it and tells why.

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
    except ValueError as error:
        lines = str(error).strip().splitlines()
        if 'DataLoader worker process' not in lines[0]:
            raise
        # Its traceback is a reference cycle, and the garbage collector would shut the loader down in 5 s per process.
        error.__traceback__ = None
        raise UserError(lines[-1].removeprefix('ValueError: ')) from None
