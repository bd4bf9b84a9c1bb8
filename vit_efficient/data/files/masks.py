"""Masks: files that say the class of each pixel, and what the values in them stand for."""

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from vit_efficient.data.files import tiff
from vit_efficient.data.files.images import name_of, read_bytes, read_image
from vit_efficient.data.files.pixels import UnfitImage, WithAlpha
from vit_efficient.utils.checks import is_integer
from vit_efficient.utils.compat import pil_decoder_arguments
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.packages import import_optional

IGNORED = -1  # the class of pixels that do not count, in training and evaluation
MAX_CLASSES = np.iinfo(np.int16).max
_UNKNOWN = -2
_MOST = 2**62  # of a value, in size
_LOSSY = ('JPEG', 'WEBP')  # formats of Pillow that blur classes into each other
# What Pillow makes of the samples of a grey PNG of 2 and of 4 bits, by the depth in its header: 1 becomes that.
_WIDENED = {2: 85, 4: 17}


@dataclass(frozen=True)
class MaskValues:
    """What the values in masks stand for: grey levels, indices of a palette, or colours.

    Attributes:
        num_classes: Values are classes, from 0 up to below it, unless `classes_of` says otherwise.
        ignored: Values of pixels that do not count; colours, as of `classes_of`.
        classes_of: The class of each value: of an integer, or of a colour (red, green, blue). All of one kind.
        told_by: What has told them, for messages.
    """

    num_classes: int
    ignored: frozenset[int | tuple[int, int, int]] = frozenset()
    classes_of: Mapping[int | tuple[int, int, int], int] | None = None
    told_by: str = 'values'
    _table: tuple[np.ndarray, np.ndarray] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        pairs = dict(self.classes_of) if self.classes_of is not None else {i: i for i in range(self.num_classes)}
        pairs |= dict.fromkeys(self.ignored, IGNORED)
        codes = sorted((_code(value), label) for value, label in pairs.items())
        # Frozen, but for what follows from the rest.
        object.__setattr__(self, '_table', tuple(np.array(column, np.int64) for column in zip(*codes, strict=True)))

    @property
    def of_colours(self) -> bool:
        return any(isinstance(value, tuple) for value in self.classes_of or ())

    def classes(self, values: np.ndarray) -> np.ndarray:
        """The class of each pixel, int16, `IGNORED` where it does not count.

        Args:
            values: (H, W), integers; or of colours (H, W, 3), uint8.

        Raises:
            UnfitImage: For a value that stands for nothing, or a mask of the other kind.
        """
        codes = self._codes(values)
        known, labels = self._table
        least, most = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
        span = most - least + 1
        if span <= 2**20:  # by a table, which takes a hundredth of the time of a search
            table = np.full(span, _UNKNOWN, np.int16)
            among = (known >= least) & (known <= most)
            table[known[among] - least] = labels[among]
            found = table[codes - least]
        else:
            places = np.searchsorted(known, codes).clip(max=len(known) - 1)
            found = np.where(known[places] == codes, labels[places], _UNKNOWN).astype(np.int16)
        if (found == _UNKNOWN).any():
            raise self._unknown(codes, found == _UNKNOWN)
        return found

    def _codes(self, values: np.ndarray) -> np.ndarray:
        if self.of_colours:
            if values.ndim != 3:
                raise UnfitImage(
                    'its mask holds numbers, and classes are told by colours (palette); leave the palette out, or '
                    'store the mask as RGB'
                )
            return values.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
        if values.ndim == 3:
            if (values == values[..., :1]).all():  # grey that was stored as RGB
                return values[..., 0].astype(np.int64)
            raise UnfitImage(
                'its mask is of colours, which stand for nothing known; say which class each colour is with palette, '
                'or store the number of the class of each pixel'
            )
        return values.astype(np.int64)

    def _unknown(self, codes: np.ndarray, where: np.ndarray) -> UnfitImage:
        values = np.unique(codes)
        if not self.of_colours and values.tolist() == [0, 255] and self.classes_of is None:
            return UnfitImage(
                'its mask holds 0 and 255 only; if 255 is the second class, set values={0: 0, 255: 1}; if pixels of '
                '255 do not count, set ignore_index=255'
            )
        unknown = [_value(code, self.of_colours) for code in np.unique(codes[where]).tolist()]
        listed = f'{", ".join(map(str, unknown[:5]))}{", …" * (len(unknown) > 5)}'
        if self.of_colours:
            return UnfitImage(f'its mask holds colours that are not in the palette: {listed}')
        if self.classes_of is not None:
            return UnfitImage(f'its mask holds {listed}, of which {self.told_by} has no class')
        return UnfitImage(
            f'its mask holds {listed}, its classes are 0 to {self.num_classes - 1}; pixels that do not count are told '
            'by ignore_index, other numbers than those of classes by values'
        )


def _code(value: int | tuple[int, int, int]) -> int:
    if isinstance(value, tuple):
        red, green, blue = value
        return red << 16 | green << 8 | blue
    return value


def _value(code: int, colour: bool) -> int | tuple[int, int, int]:
    return (code >> 16, code >> 8 & 255, code & 255) if colour else code


def mask_values(
    num_classes: int,
    ignore_index: Any = None,
    values: Any = None,
    palette: Any = None,
) -> MaskValues:
    """`MaskValues` from the arguments of a recipe.

    Args:
        num_classes: How many classes there are.
        ignore_index: A value, or a list of them, whose pixels do not count; with `palette`, a colour or a list of them.
        values: The class of each value, such as {0: 0, 255: 1}, where values are no classes; null: it does not count.
        palette: The colours of the classes, in their order: a list of [red, green, blue], from 0 to 255.

    Raises:
        UserError: If one of them is none of these, or two do not go together.
    """
    if not is_integer(num_classes, 1) or num_classes > MAX_CLASSES:
        raise UserError(f'the number of classes must be from 1 to {MAX_CLASSES}, got {num_classes!r}')
    if values is not None and palette is not None:
        raise UserError('values and palette both say what classes are: give one of them')
    if palette is not None:
        colours = _colours('palette', palette)
        if len(colours) != num_classes:
            raise UserError(f'palette has {len(colours)} colours for {num_classes} classes')
        ignored = () if ignore_index is None else ignore_index
        if ignored and is_integer(ignored[0] if isinstance(ignored, Sequence) else ignored):
            ignored = [ignored]
        ignored = frozenset(_colours('ignore_index', ignored))
        if again := ignored.intersection(colours):
            raise UserError(f'ignore_index: {list(min(again))} is the colour of a class (palette)')
        return MaskValues(num_classes, ignored, {colour: label for label, colour in enumerate(colours)})
    if values is not None and (not isinstance(values, Mapping) or not values):
        raise UserError(f'values must say the class of each value, such as {{0: 0, 255: 1}}, got {values!r}')
    listed = ignore_index if isinstance(ignore_index, list | tuple) else [] if ignore_index is None else [ignore_index]
    for value in listed:
        if not is_integer(value) or abs(value) > _MOST:
            raise UserError(f'ignore_index must be an integer or a list of them, got {ignore_index!r}')
    ignored = frozenset(map(int, listed))
    twice = sorted(ignored.intersection(range(num_classes) if values is None else values))
    if twice:
        raise UserError(
            f'ignore_index={ignore_index!r}: {twice[0]} is that of a class too; say which class each value has by '
            'values, with null for those that do not count'
        )
    if values is None:
        return MaskValues(num_classes, ignored)
    for value, label in values.items():
        if (
            not is_integer(value)
            or abs(value) > _MOST
            or not (label is None or (is_integer(label, 0) and label < num_classes))
        ):
            raise UserError(
                f'values must give integers a class from 0 to {num_classes - 1}, or null, got {value!r}: {label!r}'
            )
    ignored |= {int(value) for value, label in values.items() if label is None}
    return MaskValues(
        num_classes, ignored, {int(value): int(label) for value, label in values.items() if label is not None}
    )


def _colours(name: str, given: Any) -> list[tuple[int, int, int]]:
    colours = []
    for colour in given if isinstance(given, list | tuple) else [given]:
        listed = isinstance(colour, list | tuple) and len(colour) == 3
        if not listed or not all(is_integer(part, 0) and part < 256 for part in colour):
            raise UserError(f'{name} must be of colours [red, green, blue], each from 0 to 255, got {colour!r}')
        colours.append(tuple(map(int, colour)))
    if len(set(colours)) < len(colours):
        again = next(colour for colour in colours if colours.count(colour) > 1)
        raise UserError(f'{name} has {list(again)} twice')
    return colours


def read_palette(path: str | Path) -> tuple[list[tuple[int, int, int]], list[str] | None]:
    """The colours in a text file, a line each, and their names, where all lines have one.

    A line is three numbers from 0 to 255, separated by blanks or commas, and after them a name.

    Raises:
        UserError: If the file cannot be read, or a line is none of these.
    """
    where = f'palette={path}'
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{where}: cannot read it: {getattr(error, "strerror", None) or error}') from error
    colours, names = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        parts = line.replace(',', ' ').split(maxsplit=3)
        if len(parts) < 3 or not all(part.isdecimal() and int(part) < 256 for part in parts[:3]):
            raise UserError(f'{where}: line {number} must begin with three numbers from 0 to 255, got {line[:60]!r}')
        colours.append(tuple(map(int, parts[:3])))
        names += parts[3:]
    if not colours:
        raise UserError(f'{where}: it is empty')
    return _colours(where, colours), names if len(names) == len(colours) else None


def read_mask(source: str | Path | BinaryIO) -> np.ndarray:
    """The values in a mask: (H, W), of any type of integers; or of colours (H, W, 3), uint8.

    A PNG or TIFF with a palette gives the indices, not the colours; a grey one its levels, of 1 to 16 bits in a PNG, of
    1, 8, 16 or 32 in a TIFF; a PGM those of 8 or 16 bits; `.npy` holds integers (H, W). An alpha is left out.

    Raises:
        UserError: If the file cannot be read.
        UnfitImage: If it holds none of these, or levels that readers of images would widen, or is stored with a loss.
    """
    data, prefix = read_bytes(source), name_of(source)
    try:
        if widened := _widens(data):
            raise UnfitImage(f'a mask must hold numbers as they are, {widened}; store it as PNG, of 8 or 16 bits')
        image = read_image(io.BytesIO(data))
        if isinstance(image, Image.Image):
            return _values(image, data)
        return _integers(np.asarray(image[..., :-1] if isinstance(image, WithAlpha) else image))
    except UserError as error:
        raise type(error)(f'{prefix}{error}') from error


def _widens(data: bytes) -> str:
    """Why numbers in a file would come out as others: '' if they do not."""
    if data.startswith(tiff.MAGIC):
        tifffile = import_optional('tifffile', 'TIFFs are read by', 'train')
        with suppress(Exception), tifffile.TiffFile(io.BytesIO(data)) as file:  # the reader says what is wrong with it
            page = file.pages[0]
            if page.photometric == 0:
                return 'and 0 is white in this TIFF'
            if page.photometric == 1 and page.bitspersample not in (1, 8, 16, 32):
                return f'and this TIFF has {page.bitspersample} bits'
        return ''
    with suppress(Exception), Image.open(io.BytesIO(data)) as image:
        if image.format in _LOSSY and not (image.format == 'WEBP' and data[12:16] == b'VP8L'):
            return f'and a {image.format} blurs them'
        if image.format == 'PPM' and image.mode in ('L', 'I', 'I;16'):
            most = pil_decoder_arguments(image)[1]
            if most not in (255, 65535):
                return f'and this PGM is of levels from 0 to {most}'
    return ''


def _values(image: Image.Image, data: bytes) -> np.ndarray:
    if image.mode in ('1', 'L', 'P'):
        values = np.asarray(image)
        values = values.astype(np.uint8) if values.dtype == bool else values
        depth = data[24] if image.format == 'PNG' and image.mode == 'L' else 8
        return values // _WIDENED[depth] if depth in _WIDENED else values
    if image.mode in ('LA', 'PA'):
        return np.asarray(image.getchannel(0))
    if image.mode in ('RGB', 'RGBA'):
        return np.asarray(image)[..., :3]
    raise UnfitImage(f'a mask must be grey, of a palette or RGB, it is {image.mode}')


def _integers(values: np.ndarray) -> np.ndarray:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    colours = values.ndim == 3 and values.shape[2] == 3 and values.dtype == np.uint8
    if not (values.ndim == 2 or colours) or values.dtype.kind not in 'iub' or not values.size:
        raise UnfitImage(
            f'a mask must be integers (height, width), or uint8 (height, width, 3), got {values.dtype} {values.shape}'
        )
    if values.dtype == np.uint64 and values.max() > _MOST:
        raise UnfitImage(f'a mask must hold integers of up to {_MOST}, this one has {values.max()}')
    return values.astype(np.uint8) if values.dtype == bool else values
