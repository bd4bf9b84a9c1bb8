"""JPEG files read for less than a full decode: at a reduced size, or as their quantised DCT coefficients.

The format: ITU-T T.81 (1992); its colours: JFIF, ITU-T T.871 (2011). Both readers take what `read_image` takes, a file
or an open stream, and leave EXIF orientation alone as it does.
"""

import contextlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from vit_efficient.data.files.images import name_of, read_bytes, read_image
from vit_efficient.data.files.pixels import check_size
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.packages import import_optional

BLOCK = 8  # side of JPEG's blocks, in samples
WAY_OUT = 'data.decode=pixels or scaled reads it, or write it anew as a baseline JPEG'
_START, _END, _SCAN, _TABLES = b'\xff\xd8', b'\xff\xd9', b'\xda', b'\xdb'
_FRAMES = (b'\xc0', b'\xc1', b'\xc2')  # baseline, extended, progressive: say how large the image is
_SPACES = {1: 'grey', 2: 'RGB', 3: 'YCbCr'}  # libjpeg's J_COLOR_SPACE
_COLOURS = {'Gray': 'GRAY', 'RGB': 'RGB', 'YCbCr': 'RGB'}  # what simplejpeg decodes them to, in its names
# By how much chroma is coarser along one axis than along the other: libjpeg reduces both axes by the same.
_UNEVEN = {'422': 2, '440': 2, '411': 4, '441': 4}
_import_simplejpeg = partial(import_optional, 'simplejpeg', 'JPEGs are decoded at a reduced size by', 'jpeg')
_import_jpegio = partial(import_optional, 'jpegio', 'coefficients of JPEGs are read by', 'jpeg', 'pyjpegio')


class ReducedReader:
    """Reads images as `read_image` does, but JPEGs by simplejpeg, at 1/2, 1/4 or 1/8 of their size where that will do.

    The reduction is the largest at which the smallest crop that may be drawn still has as many pixels as the model's
    input on both sides: no crop is enlarged that would not be in a full decode. It depends on the image's size alone,
    so that decoded images can be cached. Chroma that is subsampled along one axis only (4:2:2, 4:4:0, 4:1:1) keeps what
    the reduced size can show of it: the image is decoded larger, and averaged. At full size the pixels are those of
    PIL, up to the version of libjpeg-turbo. Files that are not 8-bit grey, RGB or YCbCr JPEGs go to `read_image`, and
    so do damaged ones, for its message.

    Args:
        height, width: Pixels that the smallest crop needs.
        crop_scale: Least share of the area that is cropped; None if the whole image is resized.
        crop_ratio: Least and largest width to height of the crop.

    Raises:
        MissingPackage: If `simplejpeg` is not installed.
    """

    def __init__(
        self, height: int, width: int, crop_scale: float | None = None, crop_ratio: Sequence[float] = (3 / 4, 4 / 3)
    ):
        _import_simplejpeg()
        self.height, self.width = height, width
        self.crop_scale, self.crop_ratio = crop_scale, crop_ratio

    def reduction(self, height: int, width: int) -> int:
        """1, 2, 4 or 8, for an image of that size."""
        for reduction in (8, 4, 2):  # at which libjpeg decodes by a smaller inverse transform
            crop = self._smallest_crop(-(-height // reduction), -(-width // reduction))
            if crop[0] >= self.height and crop[1] >= self.width:
                return reduction
        return 1

    def _smallest_crop(self, height: int, width: int) -> tuple[float, float]:
        if self.crop_scale is None:
            return height, width
        (narrow, wide), area = self.crop_ratio, self.crop_scale * height * width
        # An image that is too long for every crop drawn is cropped to the nearest ratio at its full short side.
        return min((area / wide) ** 0.5, height, width / narrow), min((area * narrow) ** 0.5, width, height * wide)

    def __call__(self, source: str | Path | BinaryIO) -> Image.Image | np.ndarray:
        """The image, as `read_image` gives it; of a JPEG, an array (H, W, 1 or 3), uint8. Errors are those of it."""
        simplejpeg = _import_simplejpeg()
        data = read_bytes(source)
        if data.startswith(_START):
            with contextlib.suppress(ValueError):  # `read_image` says what is wrong
                height, width, space, chroma = simplejpeg.decode_jpeg_header(data)
                if space in _COLOURS:
                    reduction = self.reduction(height, width)
                    averaged = min(reduction, _UNEVEN.get(chroma, 1))
                    # It takes the smallest size that is not below these.
                    least = [-(-side // (reduction // averaged)) for side in (height, width)]
                    check_size(*least)
                    # Chroma that is repeated, not interpolated, is itself again once averaged.
                    options = dict(min_height=least[0], min_width=least[1], fastupsample=averaged > 1)
                    pixels = simplejpeg.decode_jpeg(data, _COLOURS[space], **options)
                    return pixels if averaged == 1 else np.asarray(Image.fromarray(pixels).reduce(averaged))
        return read_image(source if isinstance(source, str | Path) else io.BytesIO(data))


class QuantizedReader:
    """`read_quantized`, of images that are large enough, in pixels, not to be resized."""

    def __init__(self, height: int, width: int):
        _import_jpegio()
        self.height, self.width = height, width

    def __call__(self, source: str | Path | BinaryIO) -> 'QuantizedJpeg':
        image = read_quantized(source)
        if image.height < self.height or image.width < self.width:
            raise UserError(
                f'{name_of(source)}its {image.height}×{image.width} pixels are fewer than the {self.height}×'
                f'{self.width} of the input, and coefficients are not resized; set data.img_size, or store it larger'
            )
        return image


@dataclass(frozen=True)
class QuantizedJpeg:
    """A JPEG after entropy decoding, before anything else.

    Each component has a plane, int32 (8 · block rows, 8 · block columns): its 8 × 8 blocks of quantised coefficients
    where their samples would lie, vertical frequencies downwards. The last blocks may reach beyond the image.
    """

    height: int  # of the image, in pixels
    width: int
    space: str  # grey, RGB or YCbCr
    planes: tuple[np.ndarray, ...]
    tables: tuple[np.ndarray, ...]  # (8, 8): what a coefficient is multiplied by
    subsampling: tuple[tuple[int, int], ...]  # height and width in pixels of a sample


def read_quantized(source: str | Path | BinaryIO) -> QuantizedJpeg:
    """Reads the quantised coefficients of an 8-bit grey, RGB or YCbCr JPEG, baseline or progressive.

    pyjpegio allocates some 6 bytes per coefficient for every image. Where glibc gives these back to the system, and
    asks for fresh, zeroed pages the next time, that takes more than half of the time. Only the process itself can have
    it do otherwise: MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=268435456 in its environment.

    Raises:
        UserError: If it is not such a JPEG, or is truncated. The message names the file, if the source is one. Damage
            within a scan is not noticed, as it is not by decoders.
        MissingPackage: If `pyjpegio` is not installed.
    """
    jpegio = _import_jpegio()
    data, prefix = read_bytes(source), name_of(source)
    try:
        slots = _quantisation_tables(data)
        if isinstance(source, str | Path):
            return _quantized(jpegio.read(str(source)), slots)
        with tempfile.NamedTemporaryFile(suffix='.jpg') as file:  # jpegio reads files only
            file.write(data)
            file.flush()
            return _quantized(jpegio.read(file.name), slots)
    except UserError as error:
        raise type(error)(f'{prefix}{error}') from error
    except (RuntimeError, ValueError) as error:  # libjpeg's
        raise UserError(f'{prefix}no coefficients can be read from it ({error}); {WAY_OUT}') from error


def _quantisation_tables(data: bytes) -> list[int]:
    """The numbers of the tables that a file defines before its first scan, ascending.

    A file that is truncated is an error: libjpeg fills in what is not there, with grey, and says nothing that could be
    caught.
    """
    if not data:
        raise UserError('the file is empty')
    if not data.startswith(_START):
        raise UserError(f'not a JPEG, so it has no coefficients to read; {WAY_OUT}')
    at, numbers = len(_START), set()
    while data[at : at + 1] == b'\xff' and (marker := data[at + 1 : at + 2]) != _SCAN:
        if marker == b'\xff':  # of which any number may come before a marker
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], 'big')
        if marker in _FRAMES:
            check_size(*(int.from_bytes(data[place : place + 2], 'big') for place in (at + 5, at + 7)))
        if marker == _TABLES:
            at += 4
            while at < end and at < len(data):
                precision, number = divmod(data[at], 16)
                numbers.add(number)
                at += 1 + BLOCK * BLOCK * (1 + (precision > 0))
        at = end
    # Within a scan, 0xFF is never followed by the byte that would make it the end.
    if data.find(_END, at) < 0:
        raise UserError('the JPEG is truncated: it has no end; copy it anew, or leave it out')
    return sorted(numbers)


def _quantized(jpeg, slots: list[int]) -> QuantizedJpeg:
    space = _SPACES.get(jpeg.jpeg_color_space)
    if space is None:
        raise UserError(f'a JPEG of {jpeg.num_components} components (CMYK?), not grey, RGB or YCbCr; {WAY_OUT}')
    if jpeg.data_precision != 8:
        raise UserError(f'a JPEG of {jpeg.data_precision} bits per sample, not 8; store it with 8')
    infos = jpeg.comp_info
    # The list of tables leaves out the numbers that the file leaves out.
    if len(slots) != len(jpeg.quant_tables) or any(info.quant_tbl_no not in slots for info in infos):
        raise UserError(f'a JPEG whose quantisation tables come late or are missing; {WAY_OUT}')
    highest = jpeg.max_v_samp_factor, jpeg.max_h_samp_factor
    subsampling = []
    for info in infos:
        factors = info.v_samp_factor, info.h_samp_factor
        if any(most % own for most, own in zip(highest, factors, strict=True)):
            raise UserError(f'a JPEG with sampling factors {factors} of {highest}, not their divisors; {WAY_OUT}')
        subsampling.append((highest[0] // factors[0], highest[1] // factors[1]))
    planes, tables = tuple(jpeg.coef_arrays), tuple(jpeg.quant_tables[slots.index(info.quant_tbl_no)] for info in infos)
    return QuantizedJpeg(jpeg.image_height, jpeg.image_width, space, planes, tables, tuple(subsampling))
