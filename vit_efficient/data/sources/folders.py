"""Folders of class folders; and which files are images, and in which order classes are, whatever the source."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from vit_efficient.data.files.images import EXTENSIONS, read_image
from vit_efficient.utils.errors import UserError

_logger = logging.getLogger(__name__)
# What lies beside images and is none.
_OTHER_FILES = ('.csv', '.db', '.html', '.ini', '.json', '.log', '.md', '.tsv', '.txt', '.xml', '.yaml', '.yml')
READ = f'(files that are read end in {", ".join(EXTENSIONS)}, and lie in the folder of a class)'


def natural_order(names: Iterable[str]) -> list[str]:
    """Names in the order of the numbers in them, and those that tie, such as 1 and 01, in a fixed one."""
    return sorted(names, key=lambda name: (_natural_key(name), name))


def _natural_key(name: str) -> list[int | str]:
    """As timm's, which takes ² for a number and fails."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r'(\d+)', name.lower()))]


def is_hidden(path: str) -> bool:
    """Whether a path in a source is hidden, or in a hidden folder: .git, and what macOS adds (._0.png, __MACOSX)."""
    if path[:1] != '.' and '/.' not in path and '__MACOSX' not in path:
        return False
    return any(part == '__MACOSX' or (part[:1] == '.' and part.strip('.') != '') for part in path.split('/'))


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(EXTENSIONS)


def warn_of_others(root: str | Path, others: list[str]) -> None:
    """Tells of the files in a source that are not read, unless they are text or tables."""
    others = [path for path in others if not path.lower().endswith(_OTHER_FILES)]
    if others:
        _logger.warning(f'{root}: left out {len(others):,} of its files, the first one {min(others)} {READ}')


def check_empty(root: str | Path, empty: list[str], classes: list[str], allow_empty: bool) -> None:
    """Raises a UserError if there are classes without an image, or tells of them where some are allowed."""
    if empty and not allow_empty:
        raise UserError(f'{root}: Found no valid file for the classes {", ".join(empty)} {READ}')
    if len(empty) == len(classes):
        raise UserError(f'{root}: no class folder holds an image {READ}')
    if empty:
        _logger.info(f'{root}: no image of {len(empty)} of its {len(classes)} classes, the first one {empty[0]}')


class ImageTree(Dataset):
    """A folder that holds one folder of images per class, numbered in natural order (2 before 10), as in timm.

    Items are (image, label), the image as `read_image` gives it. Hidden files and folders are skipped, and so are
    files of other types, of which a warning tells unless they are text or tables. Links to folders are followed, but
    not to those they lie in; a folder that a class has by two names counts once.

    Args:
        root: The folder.
        allow_empty: Whether class folders without an image are but told of, as long as there is one.

    Raises:
        UserError: If the folder is missing or empty, holds no class folders, a class folder holds no images, or a
            folder is in two classes.
    """

    def __init__(self, root: str | Path, allow_empty: bool = False):
        self.root, self.loader = Path(root), read_image
        if not self.root.is_dir():
            what = 'is a file, and no folder of class folders' if self.root.is_file() else 'no such data folder'
            raise UserError(f'{root}: {what}')
        folders, others = _list(str(self.root))
        if not folders and not any(self.root.iterdir()):
            raise UserError(f'{root}: the data folder is empty')
        if not folders:
            raise UserError(f'{root}: holds no class folders (expected {root}/CLASS/IMAGE)')
        others = [os.path.join(root, name) for name in others]
        self.classes = natural_order(folders)
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.samples: list[tuple[str, int]] = []
        real_root, classes_of = os.path.realpath(root), {}
        for name in sorted(folders):
            found = _walk(os.path.join(root, name), folders[name], real_root, name, classes_of)
            for folder, files in sorted(found):
                for file in sorted(files):
                    path = os.path.join(folder, file)
                    if is_image(file):
                        self.samples.append((path, self.class_to_idx[name]))
                    else:
                        others.append(path)
        self.targets = [label for _, label in self.samples]  # as torchvision's folders have
        labels = set(self.targets)
        empty = [name for name, label in self.class_to_idx.items() if label not in labels]
        check_empty(root, empty, self.classes, allow_empty)
        warn_of_others(root, others)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.loader(path), label

    def filename(self, index: int) -> str:
        return Path(self.samples[index][0]).relative_to(self.root).as_posix()

    def digest(self) -> str:
        """A hash of the names and the order of the files, as they are below `root`."""
        names = '\n'.join(path[len(str(self.root)) :] for path, _ in self.samples)
        return hashlib.sha256(names.encode(errors='surrogateescape')).hexdigest()


def _list(folder: str) -> tuple[dict[str, bool], list[str]]:
    """The folders in a folder, and whether each is a link; and its files. None of them is hidden."""
    folders, files = {}, []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not is_hidden(entry.name):
                    if _is_folder(entry):
                        folders[entry.name] = entry.is_symlink()
                    else:
                        files.append(entry.name)
    except OSError as error:
        raise UserError(f'{folder}: cannot list it ({error.strerror or error})') from error
    return folders, files


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _walk(
    folder: str, is_link: bool, real_parent: str, name: str, classes_of: dict[str, str]
) -> Iterator[tuple[str, list[str]]]:
    """Each folder of a class, and its files.

    Args:
        folder: Where to begin.
        is_link: Whether that is a link.
        real_parent: The folder it lies in, without links.
        name: The class.
        classes_of: The class of each folder, without links, that has been listed. Filled here.
    """
    real = os.path.realpath(folder) if is_link else os.path.join(real_parent, os.path.basename(folder))
    if is_link and Path(real_parent).is_relative_to(real):
        return
    if real in classes_of:
        if classes_of[real] == name:
            return
        raise UserError(
            f'{folder}: {real} is in two classes, {classes_of[real]} and {name}, by a link; remove the link, or one of '
            'the classes'
        )
    classes_of[real] = name
    folders, files = _list(folder)
    yield folder, files
    for inner in sorted(folders, key=lambda inner: (folders[inner], inner)):  # links last
        yield from _walk(os.path.join(folder, inner), folders[inner], real, name, classes_of)
