"""The table of docs/formats.md, from files of three writers: what each becomes, or the words that refuse it."""

import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from vit_efficient.data import read_image, to_array
from vit_efficient.utils.errors import UserError

pytestmark = pytest.mark.once

PAGE = Path(__file__).parents[3] / 'docs/formats.md'
HEAD = '| file | samples | 8 bits | 16 bits | float | orientation |\n| --- | --- | --- | --- | --- | --- |\n'
DEPTHS = {'8 bits': np.uint8, '16 bits': np.uint16, 'float': np.float32}
y, x = np.mgrid[0:16, 0:24]
BASE = np.stack([x * 10, y * 16, 255 - x * 10, 64 + y * 8, x * 4 + y * 6], -1).astype(np.uint8)  # (H, W, 5)
GREY, RGB, RGBA = BASE[..., 0], BASE[..., :3], BASE[..., :4]
MULTIPLIED = np.concatenate([(RGB * (RGBA[..., 3:] / 255)).round().astype(np.uint8), RGBA[..., 3:]], -1)
CMYK = np.asarray(Image.fromarray(RGB).convert('CMYK'))
COLOURS = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2])  # a palette


def deep(image, dtype):
    return {np.uint8: image, np.uint16: image.astype(np.uint16) * 257, np.float32: np.float32(image / 255)}[dtype]


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def by_pillow(kind, mode, **options):
    def write(image, dtype, orientation=None):
        if (dtype == np.uint16 and (mode != 'L' or kind not in ('PNG', 'PPM', 'TIFF'))) or dtype == np.float32:
            return None
        image = Image.fromarray(deep(image, dtype)) if mode not in ('CMYK', 'LAB', 'YCbCr') else as_mode(image, mode)
        if mode == 'P':
            image.putpalette(COLOURS.T.astype(np.uint8).tobytes())
        if orientation and kind in ('JPEG', 'PNG', 'WEBP', 'TIFF'):
            exif = Image.Exif()
            exif[274] = orientation
            return saved(image, kind, exif=exif, **options)
        return None if orientation else saved(image, kind, **options)

    return write


def as_mode(image, mode):
    return Image.frombytes(mode, (image.shape[1], image.shape[0]), image.tobytes())


def by_opencv(suffix, *options):
    def write(image, dtype, orientation=None):
        if orientation or (dtype != np.uint8 and suffix in ('jpg', 'webp', 'bmp')):
            return None
        if dtype == np.float32 and suffix != 'tif':
            return None
        order = [2, 1, 0, 3][: image.shape[-1]] if image.ndim == 3 else ...
        return cv2.imencode(f'.{suffix}', deep(image, dtype)[..., order] if image.ndim == 3 else deep(image, dtype),
                            options)[1].tobytes()  # fmt: skip

    return write


def by_tifffile(photometric, **options):
    def write(image, dtype, orientation=None):
        if photometric == 'palette':
            if dtype == np.float32:
                return None
            options['colormap'] = (COLOURS * 257).astype(np.uint16)
            if dtype == np.uint16:
                options['colormap'] = options['colormap'].repeat(256, 1)
        tags = [(274, 'H', 1, orientation, True)] if orientation else []
        stream = io.BytesIO()
        tifffile.imwrite(stream, deep(image, dtype), photometric=photometric, extratags=tags, metadata=None, **options)
        return stream.getvalue()

    return write


def in_pages(image, dtype, orientation=None):
    return by_tifffile('minisblack')(np.moveaxis(image, -1, 0), dtype, orientation)


def by_numpy(image, dtype, orientation=None):
    stream = io.BytesIO()
    np.save(stream, deep(image, dtype))
    return None if orientation else stream.getvalue()


FINE = dict(quality=100)
contiguous = dict(planarconfig='contig')
YCBCR = np.asarray(Image.fromarray(RGB).convert('YCbCr'))
# File, samples: what is stored, what it stands for, and its writers.
ROWS = {
    ('JPEG', 'grey'): (GREY, GREY, by_pillow('JPEG', 'L', **FINE), by_opencv('jpg', cv2.IMWRITE_JPEG_QUALITY, 100)),
    ('JPEG', 'RGB'): (RGB, RGB, by_pillow('JPEG', 'RGB', subsampling=0, **FINE)),
    ('JPEG', 'CMYK'): (CMYK, RGB, by_pillow('JPEG', 'CMYK', **FINE)),
    ('PNG', 'grey'): (GREY, GREY, by_pillow('PNG', 'L'), by_opencv('png')),
    ('PNG', 'RGB'): (RGB, RGB, by_pillow('PNG', 'RGB'), by_opencv('png')),
    ('PNG', 'RGB, alpha'): (RGBA, RGBA, by_pillow('PNG', 'RGBA'), by_opencv('png')),
    ('PNG', 'palette'): (GREY, COLOURS.T[GREY], by_pillow('PNG', 'P')),
    ('WebP', 'RGB'): (RGB, RGB, by_pillow('WEBP', 'RGB', lossless=True), by_opencv('webp', 64, 101)),
    ('BMP', 'RGB'): (RGB, RGB, by_pillow('BMP', 'RGB'), by_opencv('bmp')),
    ('PGM', 'grey'): (GREY, GREY, by_pillow('PPM', 'L'), by_opencv('pgm')),
    ('PPM', 'RGB'): (RGB, RGB, by_pillow('PPM', 'RGB'), by_opencv('ppm')),
    ('TIFF', 'grey'): (GREY, GREY, by_tifffile('minisblack'), by_pillow('TIFF', 'L'), by_opencv('tif', 259, 1)),
    ('TIFF', 'grey, white is 0'): (255 - GREY, GREY, by_tifffile('miniswhite')),
    ('TIFF', 'grey, alpha'): (
        BASE[..., [0, 3]], BASE[..., [0, 3]], by_tifffile('minisblack', extrasamples=['unassalpha'], **contiguous)
    ),
    ('TIFF', 'palette'): (GREY, COLOURS.T[GREY], by_tifffile('palette'), by_pillow('TIFF', 'P')),
    ('TIFF', 'RGB'): (RGB, RGB, by_tifffile('rgb'), by_pillow('TIFF', 'RGB'), by_opencv('tif', 259, 1)),
    ('TIFF', 'RGB, alpha'): (
        RGBA, RGBA, by_tifffile('rgb', extrasamples=['unassalpha']), by_pillow('TIFF', 'RGBA')
    ),
    ('TIFF', 'RGB times alpha'): (MULTIPLIED, RGBA, by_tifffile('rgb', extrasamples=['assocalpha'])),
    ('TIFF', 'RGB, another'): (RGBA, RGBA, by_tifffile('rgb', extrasamples=['unspecified'])),
    ('TIFF', '5 in samples'): (BASE, BASE, by_tifffile('minisblack', **contiguous)),
    ('TIFF', '5 in pages'): (BASE, BASE, in_pages),
    ('TIFF', 'CMYK'): (CMYK, RGB, by_tifffile('separated'), by_pillow('TIFF', 'CMYK')),
    ('TIFF', 'Lab'): (RGB, RGB, by_tifffile('cielab'), by_pillow('TIFF', 'LAB')),
    ('TIFF', 'YCbCr'): (YCBCR, RGB, by_pillow('TIFF', 'YCbCr')),
    ('NumPy', 'any number'): (BASE, BASE, by_numpy),
}  # fmt: skip


def found(data, expected):
    """`read`, `read, turned` if it lies as orientation 6 says, or the beginning of what refuses it."""
    expected = np.atleast_3d(expected) / 255
    try:
        pixels = to_array(read_image(io.BytesIO(data)), expected.shape[2])
    except UserError as error:
        return 'refused: ' + re.split(r' \(|[,;:]', str(error))[0]
    pixels = pixels / (255 if pixels.dtype == np.uint8 else 1)
    # JPEG and YCbCr round colours; those that alpha multiplied are as coarse as it is dark.
    for words, image in (('read', expected), ('read, turned', np.rot90(expected, -1))):
        if pixels.shape == image.shape and abs(pixels - image).max() < 0.02:
            return words
    return 'WRONG'


def outcome(row, dtype, orientation=None):
    """What becomes of a row's files of one depth: the same whoever has written them."""
    image, expected, *writers = ROWS[row]
    files = [data for write in writers if (data := write(image, dtype, orientation)) is not None]
    results = {found(data, expected) for data in files}
    assert len(results) <= 1, (row, dtype, results)
    return next(iter(results), '–')


def test_the_table_of_formats_says_what_is_found():
    lines = []
    for row in ROWS:
        cells = [outcome(row, dtype) for dtype in DEPTHS.values()]
        turned = {outcome(row, dtype, orientation=6) for dtype in DEPTHS.values()}
        told = 'applied' if 'read, turned' in turned else 'left' if 'read' in turned else '–'
        assert not {'read', 'read, turned'} <= turned, 'one depth is turned, another is not'
        lines.append(f'| {" | ".join([*row, *cells, told])} |\n')
    table = HEAD + ''.join(lines)
    assert 'WRONG' not in table
    assert table in PAGE.read_text(encoding='utf-8'), f'docs/formats.md should have:\n{table}'
