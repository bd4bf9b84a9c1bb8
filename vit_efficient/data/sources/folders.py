"""Folders of class folders."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from torchvision.datasets import DatasetFolder

from vit_efficient.data.files.images import EXTENSIONS, read_image
from vit_efficient.utils.errors import UserError

_logger = logging.getLogger(__name__)
# What lies beside images and is none.
_OTHER_FILES = ('.csv', '.db', '.html', '.ini', '.json', '.log', '.md', '.tsv', '.txt', '.xml', '.yaml', '.yml')


def natural_order(names: Iterable[str]) -> list[str]:
    """Names in the order of the numbers in them, and those that tie, such as 1 and 01, in a fixed one."""
    # As timm's natural_key, which takes ² and ① for numbers, and fails.
    return sorted(names, key=lambda name: ([_number(part) for part in re.split(r'(\d+)', name.lower())], name))


def _number(part: str) -> int | str:
    return int(part) if part.isdecimal() else part


class ImageTree(DatasetFolder):
    """A folder that holds one folder of images per class, numbered in natural order (2 before 10), as in timm.

    Items are (image, label), the image as `read_image` gives it. Hidden files and folders are skipped, and so are
    files of other types, of which a warning tells unless they are text or tables.

    Args:
        root: The folder.
        allow_empty: Whether class folders without an image are but told of, as long as there is one.

    Raises:
        UserError: If the folder is missing or empty, holds no class folders, or a class folder holds no images.
    """

    def __init__(self, root: str | Path, allow_empty: bool = False):
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
            super().__init__(root, loader=read_image, is_valid_file=is_image, allow_empty=allow_empty)
        except FileNotFoundError as error:
            names = sorted(path.name for path in root.iterdir() if path.is_dir())
            if names:
                raise UserError(f'{root}: {str(error).rstrip(". ")} {read}') from error
            raise UserError(f'{root}: holds no class folders (expected {root}/CLASS/IMAGE)') from error
        labels = set(self.targets)
        empty = [name for name, label in self.class_to_idx.items() if label not in labels]
        if not self.samples:
            raise UserError(f'{root}: no class folder holds an image {read}')
        if empty:
            _logger.info(
                f'{root}: no image of {len(empty)} of its {len(self.classes)} classes, the first one {empty[0]}'
            )
        if others:
            _logger.warning(f'{root}: left out {len(others):,} of its files, the first one {others[0]} {read}')

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = (path.name for path in Path(directory).iterdir() if path.is_dir() and not path.name.startswith('.'))
        classes = natural_order(names)
        if not classes:
            raise FileNotFoundError('no class folders')
        return classes, {name: label for label, name in enumerate(classes)}

    def filename(self, index: int) -> str:
        return Path(self.samples[index][0]).relative_to(self.root).as_posix()

    def digest(self) -> str:
        """A hash of the names and the order of the files, as they are below `root`."""
        names = '\n'.join(path[len(str(self.root)) :] for path, _ in self.samples)
        return hashlib.sha256(names.encode(errors='surrogateescape')).hexdigest()
