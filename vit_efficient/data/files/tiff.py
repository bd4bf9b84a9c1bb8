"""TIFF files, of any depth: which of their pages is the image, what its samples mean, which way up it is.

The format: Adobe, "TIFF Revision 6.0" (1992); BigTIFF. Photographs of 8 bits are decoded by Pillow, which has the
compressions of libtiff; all others are by tifffile, which has many of them by imagecodecs only. Whatever decodes it,
the image is the first page that is no thumbnail or mask, and lies as its orientation says.
"""

import io
import struct
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from vit_efficient.data.files.pixels import UnfitImage, WithAlpha, WithExtra, check_size
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.packages import MissingPackage, import_optional

MAGIC = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # of either byte order; + is BigTIFF
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _INKS, _YCBCR = 0, 1, 2, 3, 5, 6  # PhotometricInterpretation
_UNTOLD, _MULTIPLIED, _ALPHA = 0, 1, 2  # ExtraSamples: anything, alpha by which colours are multiplied, alpha
# Photometric interpretation and extra samples of pages of 8 bits that Pillow converts right, with nothing left out.
_PILLOWS = {
    *((kind, ()) for kind in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _INKS, _YCBCR)),
    *((kind, (_ALPHA,)) for kind in (_BLACK_IS_ZERO, _RGB)),
    (_RGB, (_MULTIPLIED,)),
}
_SAMPLES = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _INKS: 4, _YCBCR: 3}
_JPEGS = (6, 7)  # Compression
# What libtiff, within Pillow, decodes: none, fax, LZW, JPEG, Deflate, PackBits, LZMA, ZSTD, WebP.
_LIBTIFFS = (1, 2, 3, 4, 5, *_JPEGS, 8, 32771, 32773, 32946, 34925, 50000, 50001)
_PREDICTED = (5, 8, 32946, 34925, 50000)  # those that have a predictor: LZW, Deflate, LZMA, ZSTD
_KEPT = 2**26  # bytes of tiles or strips that stay decoded
_FULL_RANGE = (0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1)  # ReferenceBlackWhite, in fractions, as in JFIF


def read_tiff(data: bytes) -> Image.Image | np.ndarray:
    """The image of a file: one of PIL if that is a photograph of 8 bits; else (H, W) or (H, W, C), with all channels.

    Raises:
        UnfitImage: If it is too large, a volume, or of colours that are not converted.
        MissingPackage: If a package that has its compression is not installed.
        UserError: If its directories are damaged.
    """
    tifffile = import_optional('tifffile', 'TIFFs are read by', 'train')
    _check_directories(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = series_of(file)
        page, single = series.keyframe, series.size == series.keyframe.size
        check_size(page.imagelength, page.imagewidth, -(-series.size // max(page.imagelength * page.imagewidth, 1)))
        if single and not page.is_subifd and _is_photograph(page):
            image = Image.open(io.BytesIO(data))
            image.seek(page.index)
            image.load()  # turns it, too
            return image
        if page.photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE):
            kind = 'CMYK' if page.photometric == _INKS else getattr(page.photometric, 'name', page.photometric)
            raise UnfitImage(
                f'its colours are {kind} ({page.bitspersample} bits, {page.samplesperpixel} samples), which are not '
                'converted; store it as grey or RGB, or its samples as .npy (H, W, C)'
            )
        if series.ndim > (2 if page.photometric == _PALETTE else 3) or not {'Y', 'X'} <= set(series.axes):
            raise UnfitImage(f'its pages and planes have shape {series.shape}; store it as .npy (H, W, C)')
        pixels = _decode(tifffile, data, series, single)
        pixels = np.moveaxis(pixels, (series.axes.index('Y'), series.axes.index('X')), (0, 1))
        orientation = page.tags.valueof('Orientation', 1)
        return _turned(_interpreted(pixels, page), orientation)


def series_of(file: Any) -> Any:
    """The series of a file of tifffile that is the image.

    Raises:
        UserError: If there is none.
    """
    if not file.series or not file.series[0].size:
        raise UserError('it has no pages, or no pixels')
    return next((one for one in file.series if one.size and not _is_aside(one.keyframe)), file.series[0])


def parts_of(path: Path) -> tuple[Callable[[int, int, int, int], Image.Image | np.ndarray], int] | None:
    """What reads so many pixels from some place (top, left, height, width), as `read_tiff` gives them, and the bytes
    that it holds at most: the tiles or strips that they lie in are decoded, and the last ones kept. None of a file
    whose parts cannot be had apart.

    Raises:
        MissingPackage: If a package that has its compression is not installed.
    """
    tifffile = import_optional('tifffile', 'TIFFs are read by', 'train')
    file = tifffile.TiffFile(path)  # open as long as parts are read
    series = series_of(file)
    page = series.keyframe
    apart = len(page.dataoffsets) > 1 and series.size == page.size and page.planarconfig == 1
    plain = page.photometric in (_BLACK_IS_ZERO, _RGB) or (page.photometric == _YCBCR and page.compression in _JPEGS)
    plain = plain and page.bitspersample in (8, 16, 32, 64)
    plain = plain and not (_is_photograph(page) and _MULTIPLIED in page.extrasamples)  # which Pillow takes back
    if not apart or not plain or page.tags.valueof('Orientation', 1) != 1 or page.imagedepth > 1 or page.is_subifd:
        file.close()
        return None
    sides = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    across = -(-page.imagewidth // sides[1])

    size = sides[0] * sides[1] * page.samplesperpixel * page.dtype.itemsize
    kept = max(1, min(64, _KEPT // size))

    @lru_cache(kept)
    def chunk(index: int) -> np.ndarray:
        """(rows, columns, samples)"""
        file.filehandle.seek(page.dataoffsets[index])
        data = file.filehandle.read(page.databytecounts[index]) or None
        decoded, _, shape = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        return np.full(shape[1:], page.nodata, page.dtype) if decoded is None else decoded[0]

    try:
        chunk(0)
    except Exception:  # of decoders, all kinds; reading it whole has other ways, and says what is wrong
        file.close()
        return None

    def read(top: int, left: int, height: int, width: int) -> Image.Image | np.ndarray:
        pixels = np.empty((height, width, page.samplesperpixel), page.dtype)
        for row in range(top // sides[0], -(-(top + height) // sides[0])):
            for column in range(left // sides[1], -(-(left + width) // sides[1])):
                part, y, x = chunk(row * across + column), row * sides[0] - top, column * sides[1] - left
                part = part[max(-y, 0) : height - y, max(-x, 0) : width - x]
                y, x = max(y, 0), max(x, 0)
                pixels[y : y + part.shape[0], x : x + part.shape[1]] = part
        pixels = pixels[..., 0] if page.samplesperpixel == 1 else pixels
        return Image.fromarray(pixels) if _is_photograph(page) else _interpreted(pixels, page)

    return read, (kept + 1) * size


def _check_directories(data: bytes) -> None:
    """Each page says where the next one is, and the last one 0; decoders go without those that are not there."""
    order, big = '<>'[data[0:1] == b'M'], b'+' in data[2:4]
    entry, count, offset = (20, 'Q', 'Q') if big else (12, 'H', 'I')
    seen, place = set(), 8 if big else 4
    try:
        while (at := struct.unpack_from(order + offset, data, place)[0]) != 0:
            if at in seen:
                raise UserError('its pages go round in a circle; write it anew')
            seen.add(at)
            place = at + struct.calcsize(order + count) + entry * struct.unpack_from(order + count, data, at)[0]
    except struct.error as error:
        raise UserError(f'it is cut off after {max(len(seen) - 1, 0)} pages') from error


def _is_aside(page: Any) -> bool:
    """Whether a page is a thumbnail or a mask of another one."""
    return page.is_reduced or page.is_mask


def _is_photograph(page: Any) -> bool:
    """Whether Pillow reads a page right: 8 bits or less, and colours that it converts."""
    kind, bits, extra = page.photometric, page.bitspersample, page.extrasamples
    if page.sampleformat != 1 or page.compression not in _LIBTIFFS or (kind, extra) not in _PILLOWS:
        return False
    if page.samplesperpixel != _SAMPLES[kind] + len(extra):  # samples of which nothing is told
        return False
    if 0 in page.databytecounts:  # tiles that are not there, for which Pillow takes the beginning of the file
        return False
    if bits != 8 and not (bits in (1, 2, 4) and page.samplesperpixel == 1):
        return False
    if page.predictor != 1 and page.compression not in _PREDICTED:  # which libtiff passes over
        return False
    if kind == _PALETTE:  # some writers give bytes, which Pillow takes for the lower half
        return isinstance(page.colormap, np.ndarray) and page.colormap.max() > 255
    if kind == _INKS:
        return page.tags.valueof('InkSet', 1) == 1
    if kind == _YCBCR and page.compression not in _JPEGS:
        levels = page.tags.valueof('ReferenceBlackWhite', _FULL_RANGE)
        return page.tags.valueof('YCbCrSubSampling', (2, 2)) == (1, 1) and levels == _FULL_RANGE
    return True


def _decode(tifffile: ModuleType, data: bytes, series: Any, single: bool) -> np.ndarray:
    """The samples of a series as they are stored, in its axes."""
    try:
        return series.asarray()
    except (ImportError, ValueError, NotImplementedError) as error:
        # LZW and other compressions are a large package of their own, ZSTD is one of Python 3.14.
        if not isinstance(error, ImportError) and 'imagecodecs' not in str(error):
            raise
        page = series.keyframe
        # OpenCV has LZW, for what is laid out as RGB. It turns the image by itself, and of 8 bits loses extra samples.
        plain = page.photometric in (_BLACK_IS_ZERO, _RGB) and page.tags.valueof('Orientation', 1) == 1
        plain = plain and single and page.index == 0 and page.planarconfig == 1 and page.dtype.itemsize > 1
        if plain and page.compression == 5:
            pixels = decode_by_opencv(data) if page.samplesperpixel in (1, 3, 4) else None
            if pixels is not None and pixels.shape == page.shape and pixels.dtype == page.dtype:
                return pixels
        raise MissingPackage(
            f'its samples ({getattr(page.compression, "name", page.compression)}, {page.bitspersample} bits) are read '
            "by the imagecodecs package, which is not installed: pip install 'vit-efficient[tiff]', or store it "
            'uncompressed'
        ) from error


def decode_by_opencv(data: bytes) -> np.ndarray:
    """(H, W), or (H, W, C) with colours in the order of RGB."""
    cv2 = import_optional('cv2', 'deep and compressed images are read by', 'train', 'opencv-python-headless')
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise UserError('damaged, or of a layout that OpenCV cannot read; store it as .npy')
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]] if pixels.ndim == 3 else pixels


def _interpreted(pixels: np.ndarray, page: Any) -> np.ndarray:
    """Stored samples (H, W) or (H, W, C) as grey, RGB or channels, 0 being black, in the range of their type."""
    pixels = pixels.astype(np.uint8 if pixels.dtype == bool else pixels.dtype.newbyteorder('='))
    bits = page.bitspersample
    if page.photometric == _PALETTE:
        return _coloured(pixels, page.colormap, bits)
    white = 1
    if pixels.dtype.kind == 'u':
        white = np.iinfo(pixels.dtype).max
        if bits < 8 * pixels.itemsize:  # such as 12 bits in 16
            pixels = (pixels * (white / (2**bits - 1))).round().astype(pixels.dtype)
    if page.photometric == _WHITE_IS_ZERO:
        grey = pixels[..., 0] if page.samplesperpixel > 1 else pixels
        grey[...] = white - grey
    extra = page.extrasamples or (_UNTOLD,) * (page.samplesperpixel - _SAMPLES[page.photometric])
    if extra == (_UNTOLD,) and page.photometric == _RGB:
        return pixels.view(WithExtra)
    if extra not in ((_MULTIPLIED,), (_ALPHA,)):
        return pixels
    if extra == (_MULTIPLIED,):
        colours, alpha = pixels[..., :-1].astype(np.float64), pixels[..., -1:]
        colours = np.divide(colours * white, alpha, out=colours, where=alpha > 0).clip(0, white)
        pixels[..., :-1] = colours.round() if pixels.dtype.kind == 'u' else colours
    return pixels.view(WithAlpha)


def _coloured(indices: np.ndarray, palette: Any, bits: int) -> np.ndarray:
    """The colours (3, 2 ** bits), of 16 bits, that indices stand for: (H, W, 3), of 8 bits if the indices have."""
    if not isinstance(palette, np.ndarray) or palette.shape != (3, 2**bits) or indices.dtype.kind != 'u':
        raise UserError(f'its palette does not have a colour for each of its samples of {bits} bits')
    palette = palette.astype(np.uint16)
    colours = (palette if palette.max() > 255 else palette * 257).T[indices]
    return (colours >> 8).astype(np.uint8) if bits <= 8 else colours


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The image (H, W, …) as it is looked at, by the tag that says where its first row and column are."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    pixels = pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def turned_back(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The converse of what reading does: an image (H, W, …) as it is stored with that orientation."""
    pixels = pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
    pixels = pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
    return pixels.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else pixels
