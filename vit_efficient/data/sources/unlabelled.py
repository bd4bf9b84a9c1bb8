"""Images without labels: those in a folder, deep or flat, or in a list."""

import hashlib
import os
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from vit_efficient.data.files.images import EXTENSIONS, read_image
from vit_efficient.data.sources.folders import is_hidden, is_image, natural_order
from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import read_text


class UnlabelledImages(Dataset):
    """Items are (image, 0), the image as `read_image` gives it, in the natural order of their names. Hidden files and
    folders are skipped, and so are files of other types. Links to folders are followed, each folder once.

    Args:
        root: The folder; or a text file with a path in each line, relative to its own folder.
        every: Takes every so manieth image alone, such as 10, to validate on.
        without_every: Leaves these out.

    Raises:
        UserError: If there is no such folder or file, or no image in it.
    """

    def __init__(self, root: str | Path, every: int | None = None, without_every: int | None = None):
        self.root, self.loader = Path(root), read_image
        if self.root.is_dir():
            self.names = natural_order(_walk(self.root))
        elif self.root.is_file() and self.root.suffix.lower() in ('.txt', '.lst'):
            lines = (line.strip() for line in read_text(self.root).splitlines())
            self.names = [line for line in lines if line]
            self.root = self.root.parent
            for name in self.names:
                if not (self.root / name).is_file():
                    raise UserError(
                        f'{root}: there is no file {self.root / name}, which it lists (each line is a path)'
                    )
        else:
            what = (
                'a file, and neither a folder nor a list, .txt' if self.root.is_file() else 'no such folder of images'
            )
            raise UserError(f'{root}: {what}')
        if not self.names:
            raise UserError(f'{root}: no image in it (files that are read end in {", ".join(EXTENSIONS)})')
        if every is not None and without_every is not None:
            raise UserError(f'give every={every!r} or without_every={without_every!r}, not both')
        given = every if without_every is None else without_every
        if given is not None:
            step = as_integer('every' if without_every is None else 'without_every', given, 2)
            taken = [name for i, name in enumerate(self.names, 1) if (i % step == 0) == (without_every is None)]
            if not taken:
                raise UserError(
                    f'{root}: of {len(self.names)} images, every {step}th is none; take a smaller number, as every and '
                    'without_every (data.args, data.val_args)'
                )
            self.names = taken

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.loader(self.root / self.names[index]), 0

    def filename(self, index: int) -> str:
        return self.names[index]

    def digest(self) -> str:
        """A hash of the names and the order of the files."""
        return hashlib.sha256('\n'.join(self.names).encode(errors='surrogateescape')).hexdigest()


def _walk(root: Path) -> list[str]:
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for file in files:
            name = Path(folder, file).relative_to(root).as_posix()
            if is_image(name) and not is_hidden(name):
                found.append(name)
    return found
