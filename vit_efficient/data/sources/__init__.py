"""Where samples come from, one file per kind of source; and which source a path or a name stands for."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.data import ImageDataset
from timm.data import create_dataset as create_timm_dataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset, IterableDataset

from vit_efficient.data.files.images import read_image
from vit_efficient.data.files.masks import MaskValues, read_mask
from vit_efficient.data.sources.folders import ImageTree
from vit_efficient.data.sources.hugging_face import HuggingFaceReader
from vit_efficient.data.sources.masks import MaskedImages, classes_of_masks
from vit_efficient.data.sources.shards import ShardReader
from vit_efficient.data.sources.tars import TarReader
from vit_efficient.data.sources.unlabelled import UnlabelledImages
from vit_efficient.utils.checks import argument_names, check_options
from vit_efficient.utils.errors import UserError, one_line

_COMPRESSED = re.compile(r'\.(tar\.\w+|tgz|tbz2?|txz|tzst)$', re.IGNORECASE)
_LIBRARIES = ('torch', 'tfds', 'hfids', 'wds')  # what names begin with that timm does not take for folders


class ReaderImages(Dataset):
    """The images of a reader. (timm's ImageDataset hands out the next image in the place of a corrupt one.)

    Items are (image, label), the image as `read_image` gives it. The reader gives an open file and a label, and may
    know the names of its classes, and its groups of samples that lie together. Of a reader that gives two open files,
    an image and its mask, items are those of `MaskedImages`; `masks` tells the names of their classes, and what their
    values stand for.
    """

    def __init__(self, reader: Reader, masks: tuple[list[str], MaskValues] | None = None):
        self.reader, self.loader = reader, read_image
        self.moves_with_pixels = masks is not None
        labels = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}
        self.classes = getattr(reader, 'classes', None) or sorted(labels, key=labels.get)
        self.stands_for = None
        if masks:
            self.classes, self.stands_for = masks
        self.groups = getattr(reader, 'groups', None)
        self.root = getattr(reader, 'root', None) or ''

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        try:
            file, label = self.reader[index][:2]
            with file:
                image = self.loader(file)
            if self.stands_for is None:
                return image, label
            with label:
                return image, 0, self.stands_for.classes(read_mask(label))
        except UserError as error:
            raise type(error)(f'{Path(self.root, self.filename(index))}: {error}') from error

    def filename(self, index: int) -> str:
        return str(self.reader.filename(index))

    def digest(self) -> str | None:
        """A hash of the names and the order of the samples, and of what masks stand for, where the reader has one."""
        digest = getattr(self.reader, 'digest', None)
        found = digest() if digest else None
        if found is None or self.stands_for is None:
            return found
        return hashlib.sha256(f'{found}{self.stands_for!r}'.encode()).hexdigest()


def create_dataset(
    path: str, dataset: str = '', root: str = '', key: str = 'data.train', args: Mapping[str, Any] | None = None
) -> Dataset:
    """Opens a data set of (image, label), or of (image, label, target) where it has targets for patches or pixels.

    Args:
        path: A folder of class folders, or WebDataset's shards, such as `train-{000..009}.tar`; with `dataset`, the
            name of the split.
        dataset: megapixel_mnist; `hfds/NAME` or `hfds/FOLDER`, see `HuggingFaceReader`; tar, where `path` is a tar file
            in `root` that holds class folders or a tar file for each class, or a folder of such files, see
            `TarReader`; folder, of class folders in `root`; masks, where `path` is in `root`, see `MaskedImages`;
            images, without labels, where `path` is in `root`, see `UnlabelledImages`; or a name that
            timm.data.create_dataset knows, such as `torch/cifar10`.
        root: With `dataset`, the folder that holds it; with `hfds/`, where the library keeps what it has prepared.
        key: The recipe's key for `path`, for messages.
        args: Further arguments, of `MegapixelMnist`, `MaskedImages`, `ShardReader`, `HuggingFaceReader`, `TarReader` or
            timm's reader.

    Raises:
        UserError: If there are no images there, the data set is a stream, or it does not take the arguments.
    """
    args = dict(args or {})
    args_key = 'data.val_args' if key == 'data.val' else 'data.args'
    if not path:
        raise UserError(f'{key} is not set: it names a folder of class folders')
    if not dataset:
        is_folder = Path(path).is_dir()
        if _COMPRESSED.search(path) and not is_folder:
            raise UserError(f'{key}: {path}: a compressed tar file cannot be read at random; decompress it')
        if path.lower().endswith('.tar') and not is_folder:
            return _open_reader(ShardReader, path, args, args_key, key)
        if args:
            raise UserError(f'{args_key}={args} are for a data set with a name, or shards; set data.dataset')
        return ImageTree(path, allow_empty=key != 'data.train')
    if dataset == 'megapixel_mnist':
        from vit_efficient.data.megapixel_mnist import SPLITS, MegapixelMnist  # imports OpenCV

        if path not in SPLITS:
            raise UserError(f'{key} must be a split of megapixel_mnist ({" or ".join(SPLITS)}), got {path!r}')
        return _open(MegapixelMnist, path, args, args_key, f'data.dataset={dataset}, {args_key}')
    if dataset == 'images':
        return _open(UnlabelledImages, str(Path(root, path)), args, args_key, key)
    if dataset == 'masks':
        return _open(MaskedImages, str(Path(root, path)), args, args_key, key)
    where = f'data.dataset={dataset}, split {path}'
    prefix, _, name = dataset.partition('/')
    if prefix == 'hfds':
        options = {'split': path, 'cache_dir': root or None, **args}
        return _open_reader(HuggingFaceReader, name, options, args_key, where)
    if dataset == 'tar':
        options = {'allow_empty': key != 'data.train', **args}
        return ReaderImages(_open(TarReader, str(Path(root, path)), options, args_key, where))
    if prefix not in _LIBRARIES and not args and root and Path(root, path).is_dir():
        return ImageTree(Path(root, path), allow_empty=key != 'data.train')
    return _open_by_timm(path, dataset, root, args, where)


def _open(source: Callable[..., Any], name: str, args: dict[str, Any], args_key: str, where: str) -> Any:
    """A source of ours, with arguments (of the key `args_key`) that are its own. Other errors begin with `where`."""
    (_, *names), any_other = argument_names(source)
    if not any_other:
        check_options(f'{args_key}: {source.__name__}', args, names)
    try:
        return source(name, **args)
    except UserError as error:
        raise UserError(f'{where}: {error}') from error


def _open_reader(source: type[Reader], name: str, args: dict[str, Any], args_key: str, where: str) -> ReaderImages:
    """The images of a source that may have masks in the place of labels, which the target of its samples tells."""
    told = {key: args[key] for key in argument_names(classes_of_masks)[0] if key in args}
    own = argument_names(source)[0]
    reader = _open(source, name, {key: args[key] for key in args if key not in told or key in own}, args_key, where)
    if not reader.of_masks:
        check_options(f'{args_key}: {source.__name__} of labels', told, own)
        return ReaderImages(reader)
    try:
        return ReaderImages(reader, classes_of_masks(**told))
    except UserError as error:
        raise UserError(f'{where}: what it has for labels are images, which are read as masks: {error}') from error


def _open_by_timm(split: str, dataset: str, root: str, args: dict[str, Any], where: str) -> Dataset:
    try:
        opened = create_timm_dataset(dataset, root=root or None, split=split, input_img_mode=None, **args)
    # Readers raise whatever their libraries do; those that need a root trip over None.
    except Exception as error:
        reason, hint = one_line(error), ''
        if not root and isinstance(error, TypeError | AttributeError):
            hint = ' (data.root is not set: it names the folder that holds the data set)'
        elif root and not Path(root).exists():
            hint = f' (data.root={root}: there is no such folder)'
        raise UserError(f'{where}: {reason}{hint}') from error
    if isinstance(opened, IterableDataset):
        raise UserError(
            f'data.dataset={dataset} is a stream, its samples have no index, without which a run cannot go on where it '
            "stopped; use one with random access: hfds/… for hfids/…, shards' paths as data.train for wds/…"
        )
    if not isinstance(opened, ImageDataset):
        return opened
    # Of files, ours reads more formats, and numbers classes that tie the same in each process.
    ours = {ReaderImageFolder: ImageTree, ReaderImageInTar: lambda path: ReaderImages(TarReader(path))}
    reader = ours.get(type(opened.reader)) if 'class_map' not in args else None
    return reader(opened.reader.root) if reader else ReaderImages(opened.reader)


def reads_files(dataset: Dataset) -> bool:
    """Whether it reads image files with its `loader`: (file or stream) -> image. That of others may do anything."""
    return isinstance(dataset, ImageTree | MaskedImages | ReaderImages)
