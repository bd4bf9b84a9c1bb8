"""Photographs in folders, as square images of a size: resized by their shorter side, and cropped."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vit_efficient.data.files.images import EXTENSIONS, read_bytes, read_image, to_array
from vit_efficient.data.preprocessing import EvalTransform, Preprocessing
from vit_efficient.data.sources.folders import is_hidden, is_image, natural_order
from vit_efficient.utils.errors import UserError


@dataclass(frozen=True)
class Photograph:
    """A file of an image.

    Attributes:
        shorter_side: In pixels.
        digest: Of what the file holds.
    """

    path: Path
    shorter_side: int
    digest: str

    def square(self, preprocessing: Preprocessing) -> Tensor:
        """(C, height, width) as a model takes it: the middle of the image, its shorter side resized to the model's."""
        whole = EvalTransform(replace(preprocessing, crop_pct=1.0, crop_mode='center'))
        try:
            return whole(to_array(read_image(self.path), preprocessing.input_size[0]))
        except UserError as error:
            raise UserError(f'{self.path}: {str(error).removeprefix(f"{self.path}: ")}') from error


def find_photographs(folders: Sequence[str | Path]) -> list[Photograph]:
    """The images in folders, and in folders therein, in the natural order of their paths; of equal ones the first.

    Raises:
        UserError: If a folder is none, or has no image.
    """
    found = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f'{folder}: no such folder of images')
        names = [path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()]
        names = natural_order(name for name in names if is_image(name) and not is_hidden(name))
        if not names:
            raise UserError(f'{folder}: no image in it (files that are read end in {", ".join(EXTENSIONS)})')
        for path in (folder / name for name in names):
            found.setdefault(digest := _digest(path), Photograph(path, _shorter_side(path), digest))
    return list(found.values())


def large_enough(photographs: Sequence[Photograph], img_size: int, enlarge: bool) -> list[Photograph]:
    """Those whose shorter side has as many pixels; all of them, if smaller ones may be enlarged.

    Raises:
        UserError: If there is none.
    """
    found = [each for each in photographs if enlarge or each.shorter_side >= img_size]
    if not found:
        raise UserError(
            f'--images: none of {len(photographs)} has {img_size} pixels on each side; take larger ones, a smaller '
            '--img-size, or --enlarge, which flatters every attention'
        )
    return found


def _shorter_side(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return min(image.size)
    except (UnidentifiedImageError, Image.DecompressionBombError):  # arrays, and what the reader will say
        return min(to_array(read_image(path), 3).shape[:2])


def _digest(path: Path) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()[:16]
