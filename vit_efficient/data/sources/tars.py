"""Class folders in tar files, with random access to their images."""

import hashlib
import io
import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from timm.data.readers.reader import Reader

from vit_efficient.data.sources.archives import THREADS, cached, decoded, encoded, list_files, normal, read_names
from vit_efficient.data.sources.folders import READ, check_empty, is_hidden, is_image, natural_order, warn_of_others
from vit_efficient.utils.checks import is_integer
from vit_efficient.utils.errors import UserError

_logger = logging.getLogger(__name__)


class _Image(NamedTuple):
    """`tar` is the path of its tar file in the source, with a slash, and empty where that file is the source."""

    tar: str
    name: str
    number: int
    offset: int
    size: int

    @property
    def folders(self) -> tuple[str, ...]:
        """Its folders in its tar file, or else the name of that."""
        folders = tuple(self.name.split('/')[:-1])
        return folders or ((os.path.basename(self.tar[:-1])[: -len('.tar')],) if self.tar else ())


class TarReader(Reader):
    """A reader as timm's, of (image as stored, label), by index, in the order in which `ImageTree` would have them.

    The class of an image is the first folder in its tar file, after those that are around all; where it lies in
    none, the name of its tar file, which is in a folder or another tar file. Which files are images, and the order of
    classes, are those of `ImageTree`. Where they lie is kept in the user's cache folder, as with shards.

    Args:
        path: A tar file, or a folder of tar files.
        class_map: The labels of classes by name, or a text file with a class in each line; images of other classes are
            left out, of which a warning tells. By default classes are numbered in natural order.
        allow_empty: As of `ImageTree`.

    Raises:
        UserError: If there is no such file, one is damaged, compressed or without images, has an image twice or a
            class without one.
    """

    def __init__(self, path: str | Path, class_map: Mapping[str, int] | str = '', allow_empty: bool = False):
        super().__init__()
        self.root = str(path)
        if os.path.isdir(path):
            tars = natural_order(name for name in os.listdir(path) if _is_tar(name) and not is_hidden(name))
            self.tars, prefixes = [os.path.join(path, name) for name in tars], [f'{name}/' for name in tars]
        elif os.path.isfile(path):
            self.tars, prefixes = [self.root], ['']
        else:
            raise UserError(f'{path}: there is no such file, or folder of tar files (data.root is where it lies)')
        if not self.tars:
            raise UserError(f'{path}: holds no tar files (they end in .tar)')
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(lambda tar: cached(tar, lambda: _scan(tar), 'class folders'), self.tars))
        images, others, bare = [], [], set()
        for number, (prefix, arrays) in enumerate(zip(prefixes, found, strict=True)):
            columns = (arrays[key].tolist() for key in ('tars', 'names', 'offsets', 'sizes'))
            for tar, name, offset, size in zip(*columns, strict=True):
                image = _Image(prefix + decoded(tar), decoded(name), number, offset, size)
                if image.folders:
                    images.append(image)
                else:
                    others.append(image.name)
            others += [prefix + decoded(name) for name in arrays['others'].tolist()]
            bare |= {tuple(decoded(folder).split('/')) for folder in arrays['folders'].tolist()}
        if not images:
            raise UserError(f'{path}: no class folder holds an image {READ}')
        depth = _depth_of_classes(path, {image.folders for image in images}, bare)
        names = {image.folders[depth] for image in images}
        bare = {folders[depth] for folders in bare if len(folders) > depth}
        labels = self._labels(class_map, names, names | bare)
        known = sorted(labels, key=labels.get)
        self.classes = known if [labels[name] for name in known] == list(range(len(known))) else None
        if not class_map:
            check_empty(path, [name for name in known if name not in names], known, allow_empty)
        others += [image.tar + image.name for image in images if image.folders[depth] not in labels]
        images = [image for image in images if image.folders[depth] in labels]
        images.sort(key=lambda image: (image.folders[depth], *os.path.split(image.name), image.number, image.tar))
        warn_of_others(path, others)
        # Arrays, not lists: those would be copied, page by page, into each loader process.
        self.targets = np.array([labels[image.folders[depth]] for image in images])
        self._names = _array(image.tar + image.name for image in images)
        self._places = np.array([image[2:] for image in images], dtype=np.int64)

    def _labels(self, class_map: Mapping[str, int] | str, with_images: set[str], known: set[str]) -> dict[str, int]:
        names = read_names(class_map, 'class_map') if isinstance(class_map, str) and class_map else class_map
        names = names or natural_order(known)
        if not isinstance(names, Mapping):
            unique = isinstance(names, list | tuple) and {*map(str, names)}
            if not unique or len(unique) < len(names):
                raise UserError(f'class_map must be a file, labels by name, or names that differ, got {class_map!r}')
            names = {str(name): label for label, name in enumerate(names)}
        labels = {str(name): label for name, label in names.items()}
        for name, label in labels.items():
            if not is_integer(label, 0):
                raise UserError(f'class_map: the label of {name} must be an integer from 0, got {label!r}')
        if not with_images & set(labels):
            few = ', '.join(natural_order(with_images)[:5])
            raise UserError(f'class_map={class_map}: {self.root} has images of none of its classes, but of {few}')
        return labels

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        number, offset, size = self._places[index].tolist()
        # Opened anew: a position in a file that is open is shared with the processes that are forked.
        with open(self.tars[number], 'rb') as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), int(self.targets[index])

    def digest(self) -> str:
        """A hash of the names, the labels, the sizes and the order of the images."""
        parts = self._names.tolist(), self.targets.tolist(), self._places[:, 2].tolist()
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = decoded(self._names[index])
        return os.path.basename(name) if basename else os.path.join(self.root, name) if absolute else name


def _depth_of_classes(path: str | Path, folders: set[tuple[str, ...]], bare: set[tuple[str, ...]]) -> int:
    """How many folders are around the class folders.

    Args:
        path: For messages.
        folders: Those that images lie in.
        bare: Further ones.

    Raises:
        UserError: If it cannot be told.
    """
    depth, most = 0, min(map(len, folders)) - 1
    while depth < most and len({each[depth] for each in folders | bare if len(each) > depth}) == 1:
        depth += 1
    names = natural_order({each[depth] for each in folders})
    if len(names) == 1 and len(folders) > 1:
        raise UserError(
            f'{path}: all images are in the folder {names[0]}, some in folders of it, and which of them are classes is '
            'not known; pack class folders, with images in these alone'
        )
    if all(len(each) > depth + 1 for each in folders):
        few = ', '.join(names[:5])
        _logger.warning(f'{path}: classes are the first folders that differ ({few}), and not the folders in them')
    return depth


def _may_be_images(name: str) -> bool:
    """Whether a link of that name leads to an image, or to what may be a folder of images, since it has no suffix."""
    return is_image(name) or '.' not in os.path.basename(name)


def _is_tar(name: str) -> bool:
    return name.lower().endswith('.tar')


def _scan(path: str) -> dict[str, np.ndarray]:
    images: list[tuple[str, str, int, int]] = []
    others: list[str] = []
    folders: set[str] = set()

    def scan(tar: str, start: int = 0, size: int | None = None) -> None:
        """Appends what is in a tar file, `tar` being its name and a slash if it lies in another one."""
        before, seen = len(images), set()
        files, bare = list_files(path, _may_be_images, start, size)
        for name, extent in files:
            name = normal(name)
            if _is_tar(name):
                scan(f'{tar}{name}/', *extent)
            elif not is_image(name):
                others.append(tar + name)
                bare.append(os.path.dirname(name))
            elif name in seen:
                raise UserError(f'{path}: {tar}{name} is in it twice; unpack it, and pack one of them')
            else:
                seen.add(name)
                images.append((tar, name, *extent))
        if len(images) == before:
            where, first = f', {tar[:-1]}' if tar else '', f', only files such as {others[0]}' if others else ''
            raise UserError(f'{path}{where}: holds no images{first} {READ}')
        folders.update(folder for folder in map(normal, bare) if folder)

    scan('')
    tars, names, offsets, sizes = zip(*images, strict=True)
    return {
        **{'tars': _array(tars), 'names': _array(names), 'others': _array(others), 'folders': _array(sorted(folders))},
        **{'offsets': np.array(offsets, np.int64), 'sizes': np.array(sizes, np.int64)},
    }


def _array(names: Iterable[str]) -> np.ndarray:
    return np.array([encoded(name) for name in names], dtype=bytes)
