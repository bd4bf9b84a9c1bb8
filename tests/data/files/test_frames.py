"""What files say of images besides pixels, parts of images, and masks that lie as their image does."""

import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.data.trees import pixels
from vit_efficient.data.files import frames
from vit_efficient.data.files.frames import Frame, Windows, open_windows, read_frame
from vit_efficient.data.files.images import read_image
from vit_efficient.data.files.mask_files import write_mask
from vit_efficient.data.files.masks import read_mask

SIZE = 61, 90
PARTS = [(0, 0, 61, 90), (60, 89, 1, 1), (10, 20, 30, 40), (60, 0, 1, 90), (31, 47, 2, 2), (0, 89, 61, 1)]
GEO = (
    (33550, 12, 3, (0.5, 0.5, 0.0)),
    (33922, 12, 6, (0.0, 0.0, 0.0, 440720.0, 3751320.0, 0.0)),
    (34735, 3, 8, (1, 1, 0, 1, 1024, 0, 1, 1)),
    (34737, 2, 8, 'WGS 84|'),
)


def assert_parts(path, channels=3, parts=True):
    whole, windows = read_image(path), open_windows(path, channels)
    assert (windows is not None) == parts
    windows = windows or Windows.whole(path, channels)
    expected = np.asarray(whole)
    if expected.ndim == 3 and expected.shape[:2] != SIZE:
        expected = expected.transpose(1, 2, 0)
    assert (windows.height, windows.width) == read_frame(path, channels).size == SIZE
    for top, left, height, width in PARTS:
        part = windows(top, left, height, width)
        assert isinstance(part, Image.Image) == isinstance(whole, Image.Image)
        if isinstance(part, Image.Image):
            assert part.mode == whole.mode
        assert np.array_equal(np.asarray(part), expected[top : top + height, left : left + width])


LAYOUTS = {
    'tiles': dict(tile=(16, 32)),
    'strips': dict(rowsperstrip=8),
    'deflated': dict(tile=(32, 32), compression='zlib', predictor=True),
    'lzw': dict(rowsperstrip=7, compression='lzw'),
    'jpeg': dict(tile=(32, 32), compression='jpeg'),
}


SAMPLES = [(1, 'uint8'), (3, 'uint8'), (4, 'uint8'), (5, 'uint16'), (1, 'uint16'), (2, 'float32')]


@pytest.mark.parametrize(
    ('layout', 'channels', 'dtype'),
    [(layout, *each) for layout in LAYOUTS for each in (SAMPLES[:2] if layout == 'jpeg' else SAMPLES)],
)
def test_parts_of_tiffs(tmp_path, layout, channels, dtype):
    if layout in ('lzw', 'jpeg'):
        pytest.importorskip('imagecodecs')
    image = pixels(0, (*SIZE, channels) if channels > 1 else SIZE, dtype)
    kind = 'rgb' if channels in (3, 4) else 'minisblack'
    options = dict(planarconfig='contig') if channels > 1 else {}
    tifffile.imwrite(tmp_path / 'a.tif', image, photometric=kind, **options, **LAYOUTS[layout])
    assert_parts(tmp_path / 'a.tif')


def test_tiffs_that_are_read_whole(tmp_path):
    """Turned, of planes, of bits, in one piece, of a palette."""
    image = pixels(0, (*SIZE, 3), 'uint8')
    for number, (array, options) in enumerate(
        [
            (image, dict(photometric='rgb', tile=(16, 16), extratags=[(274, 3, 1, 3, True)])),
            (image.transpose(2, 0, 1), dict(photometric='rgb', planarconfig='separate', rowsperstrip=8)),
            (image[..., 0] > 99, dict(photometric='minisblack', rowsperstrip=8)),
            (image, dict(photometric='rgb', rowsperstrip=SIZE[0])),
            (
                image[..., 0],
                dict(photometric='palette', rowsperstrip=8, colormap=np.arange(768).reshape(3, 256).astype('u2')),
            ),
        ]
    ):
        tifffile.imwrite(tmp_path / f'{number}.tif', array, **options)
        assert_parts(tmp_path / f'{number}.tif', parts=False)


def test_colours_that_are_multiplied_by_alpha(tmp_path):
    """Pillow divides them again, and so is the image of 8 bits read whole; of 16 bits both ways are ours."""
    for dtype, parts in (('uint8', False), ('uint16', True)):
        options = dict(photometric='rgb', extrasamples=['assocalpha'], tile=(16, 16))
        tifffile.imwrite(tmp_path / f'{dtype}.tif', pixels(0, (*SIZE, 4), dtype), **options)
        assert_parts(tmp_path / f'{dtype}.tif', 4, parts)


def test_tiles_that_are_not_there(tmp_path):
    """They are 0, and not what the file begins with."""
    image = pixels(0, (64, 64, 3)) | 1
    image[:32, 32:] = 0
    tiles = [image[y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]
    tiles = (tile if tile.any() else None for tile in tiles)
    options = dict(shape=image.shape, dtype=image.dtype, photometric='rgb', tile=(32, 32))
    tifffile.imwrite(tmp_path / 'a.tif', tiles, **options)
    with tifffile.TiffFile(tmp_path / 'a.tif') as file:
        assert 0 in file.pages[0].databytecounts
    assert np.array_equal(np.asarray(read_image(tmp_path / 'a.tif')), image)
    assert np.array_equal(np.asarray(open_windows(tmp_path / 'a.tif')(0, 0, 64, 64)), image)


def test_progressive_jpegs_are_read_whole(tmp_path):
    """Their coefficients, all of them, are in memory as they are decoded."""
    Image.fromarray(pixels(0, (*SIZE, 3))).save(tmp_path / 'a.jpg', progressive=True)
    assert_parts(tmp_path / 'a.jpg', parts=False)


@pytest.mark.parametrize('shape', [SIZE, (*SIZE, 3), (*SIZE, 5), (5, *SIZE)])
def test_parts_of_arrays(tmp_path, shape):
    np.save(tmp_path / 'a.npy', pixels(0, shape, 'uint16'))
    assert_parts(tmp_path / 'a.npy', 5 if 5 in shape else 3)


@pytest.mark.parametrize(
    ('mode', 'ending', 'parts'),
    [
        *(('RGB', 'jpg', True), ('L', 'jpg', True), ('RGB', 'png', True), ('L', 'png', True)),
        *(('CMYK', 'jpg', False), ('P', 'png', False), ('RGBA', 'png', False), ('RGB', 'bmp', False)),
    ],
)
def test_parts_by_vips(tmp_path, mode, ending, parts):
    pytest.importorskip('pyvips')
    Image.fromarray(pixels(0, (*SIZE, 3))).convert(mode).save(tmp_path / f'a.{ending}')
    assert_parts(tmp_path / f'a.{ending}', parts=parts)


def test_without_vips_images_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyvips', None)
    Image.fromarray(pixels(0, (*SIZE, 3))).save(tmp_path / 'a.jpg')
    assert_parts(tmp_path / 'a.jpg', parts=False)


def test_no_limit_holds_for_parts(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / 'a.tif', pixels(0, (*SIZE, 3)), photometric='rgb', tile=(16, 16))
    Image.fromarray(pixels(0, (*SIZE, 3))).save(tmp_path / 'a.jpg')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    for name in ('a.tif', 'a.jpg'):
        assert read_frame(tmp_path / name).size == SIZE
        with pytest.raises(ValueError, match='PIL decodes at most 200 pixels'):
            read_image(tmp_path / name)
    assert open_windows(tmp_path / 'a.tif')(0, 0, 2, 3).size == (3, 2)


@pytest.mark.parametrize('content', [b'', b'no image', b'II*\0', b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', b'\x93NUMPY'])
def test_files_that_are_no_images(tmp_path, content):
    (tmp_path / 'a.x').write_bytes(content)
    with pytest.raises(ValueError, match=r'a\.x: not a readable image'):
        read_frame(tmp_path / 'a.x')


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_a_mask_lies_as_its_tiff(tmp_path, orientation, dtype):
    tags = [(274, 3, 1, orientation, True), *((*tag, True) for tag in GEO)]
    options = dict(resolution=(118, 59), resolutionunit=3, metadata=None)
    tifffile.imwrite(tmp_path / 'a.tif', pixels(0, (*SIZE, 3)), photometric='rgb', extratags=tags, **options)
    frame = read_frame(tmp_path / 'a.tif')
    assert frame.size == np.asarray(read_image(tmp_path / 'a.tif')).shape[:2]
    assert frame.geo == GEO and frame.orientation == orientation
    assert frame.resolution == pytest.approx((118 * 2.54, 59 * 2.54))
    classes = (pixels(1, frame.size, dtype) % 7).astype(dtype)
    write_mask(tmp_path / 'm.tif', classes, frame)
    assert np.array_equal(read_mask(tmp_path / 'm.tif'), classes)
    again = read_frame(tmp_path / 'm.tif')
    assert (again.geo, again.orientation, again.size) == (GEO, orientation, frame.size)
    assert again.resolution == pytest.approx(frame.resolution)
    with tifffile.TiffFile(tmp_path / 'm.tif') as file:
        assert file.pages[0].shape == SIZE  # as the image is stored
        assert file.pages[0].is_tiled


@pytest.mark.parametrize('orientation', [1, 6])
@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_a_mask_lies_as_its_jpeg(tmp_path, orientation, dtype):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels(0, (*SIZE, 3))).save(tmp_path / 'a.jpg', exif=exif, dpi=(300, 150))
    frame = read_frame(tmp_path / 'a.jpg')
    assert frame == Frame(*SIZE, 3, 1, orientation, False, (300.0, 150.0))
    classes = (pixels(1, SIZE, dtype) % 7).astype(dtype)
    for ending in ('png', 'tif'):
        write_mask(tmp_path / f'm.{ending}', classes, frame)
        assert np.array_equal(read_mask(tmp_path / f'm.{ending}'), classes)
        again = read_frame(tmp_path / f'm.{ending}')
        # A TIFF would be turned by readers, which leave a JPEG as it is.
        assert again.orientation == (orientation if ending == 'png' else 1)
        assert again.resolution == pytest.approx(frame.resolution, rel=1e-4)


def test_frames_of_odd_arrays(tmp_path):
    np.save(tmp_path / 'a.npy', np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match=r'a\.npy: an image has the shape \(H, W\), .* this array has \(5,\)'):
        frames.read_frame(tmp_path / 'a.npy')
