"""Images with a mask each, which says the class of every pixel: in two folders, in a list, or as COCO has them."""

import csv
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vit_efficient.data.files.images import read_image
from vit_efficient.data.files.masks import MaskValues, mask_values, read_mask, read_palette
from vit_efficient.data.sources.archives import read_names
from vit_efficient.data.sources.folders import is_hidden, is_image, natural_order
from vit_efficient.utils.checks import is_integer
from vit_efficient.utils.errors import UserError, first_line

_LISTS = {'.csv': ',', '.tsv': '\t'}  # and what separates their columns
_HEADER = ['image', 'mask']
_READ = 'files of images end in .png, .tif, .npy, …'


class MaskedImages(Dataset):
    """Images and the classes of their pixels.

    Items are (image, 0, classes): the image as `read_image` gives it, no label, and the class of each pixel (H, W),
    int16, -1 where it does not count.

    Args:
        path: A folder that holds two, of images and of masks, whose files have the same names up to the ending, also in
            folders within; a list, `.csv` or `.tsv`, of an image and its mask in each line, as paths from its own
            folder; or, with `annotations`, a folder as the former.
        classes: The names of the classes, a list or a text file with one in each line; or their number. By default
            they are those of the `palette` or of the `annotations`.
        images, masks: The names of the two folders.
        mask_suffix: What the name of a mask has before its ending, and that of its image has not, such as `_mask`.
        ignore_index, values, palette: What the values in masks stand for, see `mask_values`.
        annotations: A JSON file of COCO's panoptic format: masks have the number of a segment in each pixel, as red +
            256 green + 65,536 blue, and the file says the category of each. Pixels of no segment do not count.

    Raises:
        UserError: If a folder or file is missing or of another form, an image has no mask or a mask no image, two
            images have one name, or what says the classes does not fit.
    """

    moves_with_pixels = True  # the target of each image: whatever moves its pixels moves those of its mask

    def __init__(
        self,
        path: str | Path,
        classes: Sequence[str] | str | int | None = None,
        images: str = 'images',
        masks: str = 'masks',
        mask_suffix: str = '',
        ignore_index: int | Sequence[int] | None = None,
        values: Mapping[int, int] | None = None,
        palette: str | Sequence[Sequence[int]] | None = None,
        annotations: str | None = None,
    ):
        self.loader = read_image
        for name, text in (('images', images), ('masks', masks), ('mask_suffix', mask_suffix)):
            if not isinstance(text, str):
                raise UserError(f'{name} must be a text, got {text!r}')
        path = Path(path)
        if path.is_file():
            self.root = path.parent
            self.pairs = _read_list(path)
        else:
            self.root = path
            self.pairs = _pair(path, images, masks, mask_suffix)
        if annotations is not None:
            if ignore_index is not None or values is not None or palette is not None:
                raise UserError('annotations say what masks hold; leave ignore_index, values and palette out')
            names, self._read, self._told = _panoptic(annotations, self.root, self.pairs)
            self.classes = _names(classes, names)
        else:
            self.classes, stands_for = classes_of_masks(classes, ignore_index, values, palette)
            self._read = partial(_read_classes, stands_for)
            self._told = repr(stands_for).encode()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image | np.ndarray, int, np.ndarray]:
        image, mask = self.pairs[index]
        classes = self._read(self.root / mask)
        return self.loader(self.root / image), 0, classes

    def filename(self, index: int) -> str:
        return self.pairs[index][0]

    def digest(self) -> str:
        """A hash of the names and the order of the files, and of what masks stand for."""
        names = '\n'.join(f'{image}\t{mask}' for image, mask in self.pairs)
        return hashlib.sha256(names.encode(errors='surrogateescape') + self._told).hexdigest()


def classes_of_masks(
    classes: Any = None, ignore_index: Any = None, values: Any = None, palette: Any = None
) -> tuple[list[str], MaskValues]:
    """The names of the classes, and what the values in masks stand for: arguments as of `MaskedImages`."""
    colours, names = read_palette(palette) if isinstance(palette, str) else (palette, None)
    names = _names(classes, names, None if colours is None else len(colours))
    return names, mask_values(len(names), ignore_index, values, colours)


def _read_classes(stands_for: MaskValues, path: Path) -> np.ndarray:
    return _classes(stands_for, read_mask(path), path)


def _classes(stands_for: MaskValues, values: np.ndarray, path: Path) -> np.ndarray:
    try:
        return stands_for.classes(values)
    except UserError as error:
        raise type(error)(f'{path}: {error}') from error


def _pair(root: Path, images: str, masks: str, suffix: str) -> list[tuple[str, str]]:
    if not root.is_dir():
        raise UserError(f'{root}: no such folder, nor a list (.csv, .tsv) of images and masks')
    found, of_masks = _files(root, images), _files(root, masks)
    for name, file in of_masks.items():
        if not name.endswith(suffix):
            raise UserError(f'{root / file}: its name does not end in mask_suffix={suffix!r}, as those of masks do')
    by_name = {name.removesuffix(suffix) if suffix else name: file for name, file in of_masks.items()}
    for ours, theirs, what, folder in ((found, by_name, 'mask', masks), (by_name, found, 'image', images)):
        alone = [name for name in ours if name not in theirs]
        if alone:
            instead = f'{folder}/{alone[0]}{suffix if what == "mask" else ""}.…'
            raise UserError(
                f'{root / ours[alone[0]]} has no {what} ({instead}), as {len(alone)} of {len(ours)}; add what is '
                'missing, remove what is alone, or name the pairs in a list (.csv: image, mask)'
            )
    return [(found[name], by_name[name]) for name in natural_order(found)]


def _files(root: Path, folder: str) -> dict[str, str]:
    """Paths from the root, by what they are below a folder up to the ending."""
    if not (root / folder).is_dir():
        raise UserError(
            f'{root}: holds no folder {folder!r}; it must hold one of images and one of masks, whose names are given '
            'by data.args.images and data.args.masks'
        )
    below = sorted(path for path in (root / folder).rglob('*') if path.is_file() and is_image(path.name))
    names: dict[str, str] = {}
    for path in below:
        relative = path.relative_to(root / folder)
        if is_hidden(relative.as_posix()):
            continue
        name = relative.with_suffix('').as_posix()
        if name in names:
            raise UserError(f'{path}: {root / names[name]} has the same name up to the ending; which is meant?')
        names[name] = path.relative_to(root).as_posix()
    if not names:
        raise UserError(f'{root / folder}: no image in it ({_READ})')
    return names


def _read_list(path: Path) -> list[tuple[str, str]]:
    if path.suffix.lower() not in _LISTS:
        raise UserError(f'{path}: a list of images and masks is a .csv or .tsv file, or it is a folder')
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            rows = list(csv.reader(file, delimiter=_LISTS[path.suffix.lower()], strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path}: cannot read the list: {first_line(error)}') from error
    pairs, masks_of = [], {}
    for number, row in enumerate(rows, 1):
        if not row or (number == 1 and [cell.strip().lower() for cell in row] == _HEADER):
            continue
        cells = [cell.strip() for cell in row]
        if len(cells) != 2 or not all(cells):
            raise UserError(f'{path}: line {number} must have an image and its mask, got {row}')
        for cell in cells:
            if not (path.parent / cell).is_file():
                raise UserError(f'{path}: line {number}: {path.parent / cell}: there is no such file')
        image, mask = cells
        if image in masks_of:
            how = 'with the same mask' if masks_of[image] == mask else f'with another mask, {masks_of[image]}'
            raise UserError(f'{path}: line {number}: {image} is in it twice, further up {how}')
        masks_of[image] = mask
        pairs.append((image, mask))
    if not pairs:
        raise UserError(f'{path}: the list is empty')
    return pairs


def _names(given: Any, told: list[str] | None, count: int | None = None) -> list[str]:
    """The names of the classes: given, or told by a file; numbers, where only their count is known."""
    if isinstance(given, str):
        given = read_names(given, 'classes')
    if is_integer(given, 1):
        given = [str(number) for number in range(given)]
    if given is None:
        given = told or (count and [str(number) for number in range(count)])
    if given is None:
        raise UserError(
            'which classes there are is not known; set data.args.classes to their names, a text file of them, or '
            'their number'
        )
    if not isinstance(given, list | tuple) or not given:
        raise UserError(f'classes must be a list of names, a text file of them, or their number, got {given!r}')
    names = [str(name) for name in given]
    if len(set(names)) < len(names):
        raise UserError(f'classes has {next(name for name in names if names.count(name) > 1)!r} twice')
    if count is None and told is not None and len(names) != len(told):
        raise UserError(f'classes has {len(names)} names, annotations have {len(told)} categories')
    return names


def _panoptic(
    path: str, root: Path, pairs: list[tuple[str, str]]
) -> tuple[list[str], Callable[[Path], np.ndarray], bytes]:
    """The names of the categories of a COCO file, what reads the classes of a mask of it, and a hash of the file."""
    try:
        data = Path(path).read_bytes()
        told = json.loads(data)
        categories = {int(one['id']): str(one['name']) for one in told['categories']}
        segments = [
            (str(one['file_name']), {int(each['id']): int(each['category_id']) for each in one['segments_info']})
            for one in told['annotations']
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"annotations={path}: not a file of COCO's panoptic format (categories; annotations with file_name and "
            f'segments_info): {type(error).__name__}: {first_line(error)}'
        ) from error
    order = {key: label for label, key in enumerate(sorted(categories))}
    labels: dict[str, dict[int, int]] = {}
    for name, of_mask in segments:
        for segment, category in of_mask.items():
            if category not in order:
                raise UserError(f'annotations={path}: segment {segment} of {name} has category {category}, not listed')
        if name in labels:
            raise UserError(f'annotations={path}: {name} has two annotations')
        labels[name] = {segment: order[category] for segment, category in of_mask.items()}
    of_pairs, taken = {}, {}
    for image, mask in pairs:
        parts = Path(mask).parts  # a file_name may begin at any of its folders
        name = next((end for i in range(len(parts)) if (end := '/'.join(parts[i:])) in labels), None)
        if name is None:
            raise UserError(f'annotations={path}: there is no annotation with file_name {parts[-1]}, of {image}')
        if taken.setdefault(name, mask) != mask:
            raise UserError(f'annotations={path}: {name} may be {taken[name]} or {mask}; name them with their folders')
        of_pairs[str(root / mask)] = labels[name]
    names = [categories[key] for key in sorted(categories)]
    return names, partial(_read_segments, of_pairs), hashlib.sha256(data).digest()


def _read_segments(labels: Mapping[str, Mapping[int, int]], path: Path) -> np.ndarray:
    values = read_mask(path)
    if values.ndim == 3:
        values = values.astype(np.int64) @ np.array([1, 1 << 8, 1 << 16])
    return _classes(MaskValues(1, frozenset({0}), labels[str(path)], 'annotations'), values, path)
