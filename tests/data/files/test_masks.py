"""Masks of each kind of file, and what their values stand for."""

import io
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.data.trees import pixels
from vit_efficient.data.files.masks import IGNORED, MaskValues, mask_values, read_mask, read_palette
from vit_efficient.data.files.pixels import UnfitImage

CLASSES = np.random.default_rng(0).integers(0, 3, (7, 13)).astype(np.uint8)
COLOURS = [[0, 0, 0], [255, 0, 0], [0, 128, 255]]


def png(image, **options):
    image.save(stream := io.BytesIO(), 'png', **options)
    stream.seek(0)
    return stream


def indexed():
    image = Image.new('P', (13, 7))
    image.putdata(CLASSES.flatten().tolist())
    image.putpalette([100, 100, 100, 7, 8, 9, 200, 0, 0])
    return image


def deep_tiff(compression=None):
    tifffile.imwrite(stream := io.BytesIO(), CLASSES.astype(np.uint16), compression=compression)
    stream.seek(0)
    return stream


def array(values):
    np.save(stream := io.BytesIO(), values)
    stream.seek(0)
    return stream


@pytest.mark.parametrize(
    'make',
    [
        lambda: png(Image.fromarray(CLASSES)),
        lambda: png(indexed()),
        lambda: png(indexed(), bits=2),
        lambda: png(Image.fromarray(CLASSES.astype(np.uint16))),
        lambda: png(Image.merge('LA', [Image.fromarray(CLASSES), Image.new('L', (13, 7), 255)])),
        deep_tiff,
        lambda: deep_tiff('zlib'),
        lambda: array(CLASSES.astype(np.int64)),
        lambda: array(CLASSES[..., None]),
    ],
)
def test_files_of_numbers(make):
    values = read_mask(make())
    assert np.array_equal(values, CLASSES) and values.dtype.kind in 'iu'
    assert np.array_equal(MaskValues(3).classes(values), CLASSES)


def test_a_tiff_with_a_palette(tmp_path):
    indexed().save(tmp_path / 'mask.tif')
    assert np.array_equal(read_mask(tmp_path / 'mask.tif'), CLASSES)


@pytest.mark.parametrize('depth', [1, 2, 4])
def test_grey_of_few_bits_is_not_widened(tmp_path, depth):
    """Written by hand: Pillow writes grey of 8 bits."""
    values = (CLASSES % 2**depth).astype(np.uint8)
    bits = np.unpackbits(values[..., None], axis=2)[..., -depth:].reshape(7, -1)
    rows = np.concatenate([np.zeros((7, 1), np.uint8), np.packbits(bits, axis=1)], axis=1).tobytes()

    def chunk(kind, data):
        return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')

    header = (13).to_bytes(4, 'big') + (7).to_bytes(4, 'big') + bytes([depth, 0, 0, 0, 0])
    data = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    (tmp_path / 'mask.png').write_bytes(data)
    assert np.array_equal(read_mask(tmp_path / 'mask.png'), values)


def test_black_and_white():
    assert np.array_equal(read_mask(png(Image.fromarray(CLASSES > 0))), CLASSES > 0)


@pytest.mark.parametrize('alpha', [False, True])
def test_colours(alpha):
    colours = np.array(COLOURS, np.uint8)[CLASSES]
    image = Image.fromarray(np.dstack([colours, CLASSES]) if alpha else colours)
    assert np.array_equal(mask_values(3, palette=COLOURS).classes(read_mask(png(image))), CLASSES)
    two = mask_values(2, ignore_index=COLOURS[2], palette=COLOURS[:2])
    assert np.array_equal(two.classes(colours), np.where(CLASSES == 2, IGNORED, CLASSES.astype(int)))
    with pytest.raises(ValueError, match=r'colours that are not in the palette: \(0, 128, 255\)$'):
        mask_values(2, palette=COLOURS[:2]).classes(colours)
    with pytest.raises(ValueError, match='its mask is of colours, which stand for nothing known; say .* with palette'):
        MaskValues(3).classes(colours)
    with pytest.raises(ValueError, match='its mask holds numbers, and classes are told by colours'):
        mask_values(3, palette=COLOURS).classes(CLASSES)


def test_grey_that_was_stored_as_rgb():
    assert np.array_equal(MaskValues(3).classes(np.dstack([CLASSES] * 3)), CLASSES)


@pytest.mark.parametrize('step', [1, 2**22])
def test_against_a_loop(step):
    """By the table, and by the search that values take which lie far apart."""
    values = pixels(1, (5, 6), 'uint8').astype(np.int64) % 5 * step - step
    of = {-step: None, 0: 2, step: 0, 2 * step: 2, 3 * step: 1}
    found = mask_values(3, values=of).classes(values)
    assert found.dtype == np.int16
    assert found.tolist() == [[IGNORED if of[v] is None else of[v] for v in row] for row in values.tolist()]


def test_what_does_not_count():
    values = np.array([[0, 1, 255], [254, 2, 255]], np.uint8)
    assert mask_values(3, ignore_index=[254, 255]).classes(values).tolist() == [[0, 1, -1], [-1, 2, -1]]
    assert mask_values(3, ignore_index=-1).classes(np.array([[-1, 0]])).tolist() == [[-1, 0]]
    only = mask_values(3, ignore_index=255).classes(np.full((2, 2), 255))
    assert (only == IGNORED).all()


@pytest.mark.parametrize(
    ('values', 'options', 'message'),
    [
        (
            [[0, 255]],
            {},
            '0 and 255 only; if 255 is the second class, set values={0: 0, 255: 1}; if .* ignore_index=255',
        ),
        ([[0, 3, 7]], {}, 'its mask holds 3, 7, its classes are 0 to 2; pixels that do not count are told by'),
        ([list(range(20))], {}, 'its mask holds 3, 4, 5, 6, 7, …, its classes'),
        ([[0, 3]], {'values': {0: 1}}, 'its mask holds 3, of which values has no class'),
        ([[-1, 0]], {'ignore_index': 255}, 'its mask holds -1, its classes are 0 to 2'),
    ],
)
def test_values_that_stand_for_nothing(values, options, message):
    with pytest.raises(ValueError, match=message):
        mask_values(3, **options).classes(np.array(values))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'ignore_index': 'x'}, "ignore_index must be an integer or a list of them, got 'x'"),
        ({'ignore_index': [0, 1.5]}, r'ignore_index must be an integer or a list of them, got \[0, 1.5\]'),
        ({'values': {0: 3}}, 'values must give integers a class from 0 to 2, or null, got 0: 3'),
        ({'values': {'a': 0}}, "values must give integers a class from 0 to 2, or null, got 'a': 0"),
        ({'values': [0, 1]}, 'values must say the class of each value, such as'),
        ({'values': {0: 0}, 'palette': COLOURS}, 'values and palette both say what classes are'),
        ({'palette': COLOURS[:2]}, 'palette has 2 colours for 3 classes'),
        ({'palette': [[0, 0, 0], [0, 0, 0], [1, 1, 1]]}, r'palette has \[0, 0, 0\] twice'),
        ({'palette': [[0, 0, 0], [0, 0, 256], [1, 1, 1]]}, r'palette must be of colours .* got \[0, 0, 256\]'),
        ({'palette': COLOURS, 'ignore_index': COLOURS[1]}, r'ignore_index: \[255, 0, 0\] is the colour of a class'),
        ({'ignore_index': 2}, 'ignore_index=2: 2 is that of a class too; say which class each value has by values'),
        ({'ignore_index': [0], 'values': {0: 0, 255: 1}}, r'ignore_index=\[0\]: 0 is that of a class too'),
        ({'ignore_index': 2**70}, 'ignore_index must be an integer'),
        ({'values': {2**70: 0}}, 'values must give integers a class'),
        ({'palette': COLOURS, 'ignore_index': 255}, 'ignore_index must be of colours'),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        mask_values(3, **options)


@pytest.mark.parametrize('count', [0, 40_000, 2.5])
def test_numbers_of_classes(count):
    with pytest.raises(ValueError, match='the number of classes must be from 1 to 32767'):
        mask_values(count)


def test_palettes_in_files(tmp_path):
    path = tmp_path / 'palette.txt'
    path.write_text('0 0 0 ground\n\n255,0,0 a roof\n0, 128, 255 water\n')
    assert read_palette(path) == ([tuple(colour) for colour in COLOURS], ['ground', 'a roof', 'water'])
    path.write_text('0 0 0 ground\n255 0 0\n')
    assert read_palette(path)[1] is None
    for text, message in (('0 0\n', "line 1 must begin with three numbers .* got '0 0'"), ('', 'it is empty')):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_palette(path)
    with pytest.raises(ValueError, match=r'none\.txt: cannot read it: No such file'):
        read_palette(tmp_path / 'none.txt')


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: array(CLASSES.astype(float)), r'a mask must be integers .* got float64 \(7, 13\)'),
        (lambda: array(CLASSES[None, None]), r'got uint8 \(1, 1, 7, 13\)'),
        (lambda: png(Image.new('RGB', (3, 3))).getbuffer()[:20], 'not a readable image'),
        (lambda: io.BytesIO(b'text'), 'unknown format'),
    ],
)
def test_files_that_are_no_masks(make, message):
    made = make()
    with pytest.raises(ValueError, match=message):
        read_mask(io.BytesIO(bytes(made)) if isinstance(made, memoryview) else made)


def test_levels_that_readers_would_change(tmp_path):
    levels = bytes([0, 1, 2, 3, 0, 1])
    (tmp_path / 'few.pgm').write_bytes(b'P5\n3 2\n3\n' + levels)
    (tmp_path / 'many.pgm').write_bytes(b'P5\n3 2\n1000\n' + 2 * levels)
    Image.fromarray(CLASSES).save(tmp_path / 'lossy.jpg')
    Image.fromarray(np.dstack([CLASSES] * 3)).save(tmp_path / 'lossy.webp')
    tifffile.imwrite(tmp_path / 'white.tif', CLASSES, photometric='miniswhite')
    tifffile.imwrite(tmp_path / 'few.tif', CLASSES, photometric='minisblack')
    data = bytearray((tmp_path / 'few.tif').read_bytes())
    entry = data.index((258).to_bytes(2, 'little') + (3).to_bytes(2, 'little'))  # BitsPerSample
    data[entry + 8] = 4
    (tmp_path / 'few.tif').write_bytes(data)
    for name, why in (
        ('few.pgm', 'this PGM is of levels from 0 to 3'),
        ('many.pgm', 'this PGM is of levels from 0 to 1000'),
        ('lossy.jpg', 'a JPEG blurs them'),
        ('lossy.webp', 'a WEBP blurs them'),
        ('white.tif', '0 is white in this TIFF'),
        ('few.tif', 'this TIFF has 4 bits'),
    ):
        with pytest.raises(UnfitImage, match=rf'{name}: a mask must hold numbers as they are, and {why}; store it as'):
            read_mask(tmp_path / name)
    Image.fromarray(np.dstack([CLASSES] * 3)).save(tmp_path / 'exact.webp', lossless=True)
    Image.fromarray(CLASSES).save(tmp_path / 'all.pgm')
    for name in ('exact.webp', 'all.pgm'):
        assert np.array_equal(MaskValues(3).classes(read_mask(tmp_path / name)), CLASSES)


def test_numbers_beyond_integers():
    with pytest.raises(UnfitImage, match='a mask must hold integers of up to'):
        read_mask(array(np.full((2, 2), 2**64 - 1, np.uint64)))


def test_cmyk(tmp_path):
    Image.new('CMYK', (3, 3)).save(tmp_path / 'mask.tif')
    with pytest.raises(ValueError, match=r'mask\.tif: a mask must be grey, of a palette or RGB, it is CMYK'):
        read_mask(tmp_path / 'mask.tif')
