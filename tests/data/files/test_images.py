import re
import struct
import sys
import types
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.data.trees import pixels
from vit_efficient.data import read_image, to_array
from vit_efficient.data.files import images

pytestmark = pytest.mark.once


def load(path, in_chans):
    return to_array(read_image(path), in_chans)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK'])
@pytest.mark.parametrize(('in_chans', 'target'), [(1, 'L'), (3, 'RGB')])
def test_8_bit_images_are_converted_as_by_pil(tmp_path, mode, in_chans, target):
    image = Image.fromarray(pixels(0, (7, 9, 3))).convert(mode)
    path = tmp_path / ('image.tif' if mode == 'CMYK' else 'image.png')
    image.save(path)
    expected = np.asarray(image.convert(target)).reshape(7, 9, in_chans)
    assert np.array_equal(load(path, in_chans), expected)


def test_rgba_keeps_its_fourth_channel_for_a_model_of_four(tmp_path):
    image = pixels(0, (7, 9, 4))
    Image.fromarray(image).save(tmp_path / 'image.png')
    assert np.array_equal(load(tmp_path / 'image.png', 4), image)


def write_deep_png(path, image, colour_type):
    """As neither PIL nor OpenCV can: big-endian samples, none of which is filtered."""

    def chunk(name, content):
        return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))

    header = struct.pack('>IIBBBBB', image.shape[1], image.shape[0], 16, colour_type, 0, 0, 0)
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in image)
    content = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + content)


@pytest.mark.parametrize(('channels', 'colour_type'), [(2, 4), (3, 2), (4, 6)])
@pytest.mark.parametrize('in_chans', [1, 2, 3, 4, 5])
def test_a_16_bit_png_has_the_channels_of_an_8_bit_one(tmp_path, channels, colour_type, in_chans):
    image = pixels(0, (7, 9, channels))
    Image.fromarray(image).save(tmp_path / 'shallow.png')
    write_deep_png(tmp_path / 'deep.png', image.astype(np.uint16) * 257, colour_type)
    try:
        expected = load(tmp_path / 'shallow.png', in_chans) / 255
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            load(tmp_path / 'deep.png', in_chans)
    else:
        found = load(tmp_path / 'deep.png', in_chans)
        assert found.dtype == np.float32 and type(found) is np.ndarray
        assert np.abs(found - expected).max() <= (0.5 / 255 + 1e-3 if in_chans == 1 else 1e-6)


def test_inks_are_no_channels(tmp_path):
    Image.fromarray(pixels(0, (7, 9, 3))).convert('CMYK').save(tmp_path / 'image.jpg')
    with pytest.raises(ValueError, match=r'it is CMYK, the model takes 4 channels; set model\.args\.in_chans=3'):
        load(tmp_path / 'image.jpg', 4)


@pytest.mark.parametrize('suffix', ['png', 'tif'])
@pytest.mark.parametrize('channels', [1, 3])
def test_16_bit_images_keep_their_depth(tmp_path, suffix, channels):
    image = pixels(0, (7, 9, channels), 'uint16')
    path = tmp_path / f'image.{suffix}'
    assert cv2.imwrite(str(path), image[..., ::-1])
    found = load(path, channels)
    assert found.dtype == np.float32
    assert np.array_equal(found, image.astype(np.float32) / 65535)


def test_16_bit_grey_written_by_pil(tmp_path):
    image = pixels(0, (7, 9), 'uint16')
    Image.fromarray(image).save(tmp_path / 'image.png')
    assert np.array_equal(load(tmp_path / 'image.png', 1)[..., 0], image.astype(np.float32) / 65535)


@pytest.mark.parametrize('maximum', [100, 255, 256, 4095, 65535])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('plain', [False, True])
def test_pgm_and_ppm_keep_their_depth(tmp_path, maximum, channels, plain):
    image = pixels(0, (7, 9, channels), 'uint16').astype(int) % (maximum + 1)
    deep = maximum > 255
    magic = {(1, False): 'P5', (3, False): 'P6', (1, True): 'P2', (3, True): 'P3'}[channels, plain]
    samples = ' '.join(map(str, image.ravel())).encode() if plain else image.astype('>u2' if deep else 'u1').tobytes()
    path = tmp_path / ('image.pgm' if channels == 1 else 'image.ppm')
    path.write_bytes(f'{magic}\n# made by a camera\n9 7\n{maximum}\n'.encode() + samples)
    found = load(path, channels)
    assert found.dtype == (np.float32 if deep else np.uint8)
    expected = (image / maximum * (65535 if deep else 255)).round()
    assert np.abs(found * (65535 if deep else 1) - expected).max() <= (0.01 if deep else 1)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r'image\.p.m: not a readable image'):
        load(path, channels)


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'float16', 'float64'])
def test_arrays_of_many_channels(tmp_path, dtype):
    image = pixels(0, (7, 9, 5), dtype)
    np.save(tmp_path / 'image.npy', image)
    found = load(tmp_path / 'image.npy', 5)
    assert found.shape == (7, 9, 5)
    assert found.dtype == (np.uint8 if dtype == 'uint8' else np.float32)
    assert np.allclose(found, image / 65535 if dtype == 'uint16' else image, atol=1e-6)


def stored(image):
    """Pixels as `to_array` gives them: bytes as they are, the rest in [0, 1]."""
    return image.astype(np.float32) / 65535 if image.dtype == np.uint16 else image


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'float32'])
@pytest.mark.parametrize('channels', [2, 3, 4, 5])
@pytest.mark.parametrize('layout', ['samples', 'planes', 'pages', 'big-endian'])
def test_channels_of_a_tiff_lie_anywhere(tmp_path, dtype, channels, layout):
    image = pixels(0, (20, 24, channels), dtype)
    photometric = 'rgb' if channels in (3, 4) and layout != 'pages' else 'minisblack'
    planar = {'samples': 'contig', 'planes': 'separate', 'big-endian': 'contig'}.get(layout)
    tifffile.imwrite(
        tmp_path / 'image.tif',
        image if planar == 'contig' else np.ascontiguousarray(image.transpose(2, 0, 1)),
        photometric=photometric,
        planarconfig=planar,
        byteorder='>' if layout == 'big-endian' else '<',
        compression='zlib',
    )
    assert np.array_equal(load(tmp_path / 'image.tif', channels), stored(image))


@pytest.mark.parametrize('channels', [2, 4])
@pytest.mark.parametrize('planar', ['contig', 'separate'])
def test_the_alpha_of_a_16_bit_tiff_is_dropped_as_that_of_an_8_bit_one(tmp_path, channels, planar):
    image = pixels(0, (20, 24, channels), 'uint16')
    tifffile.imwrite(
        tmp_path / 'image.tif',
        image if planar == 'contig' else np.ascontiguousarray(image.transpose(2, 0, 1)),
        photometric='rgb' if channels == 4 else 'minisblack',
        planarconfig=planar,
        extrasamples=['unassalpha'],
    )
    assert np.array_equal(load(tmp_path / 'image.tif', channels), stored(image))
    colour = stored(image[..., :-1])
    assert np.array_equal(load(tmp_path / 'image.tif', 3), colour if channels == 4 else colour.repeat(3, axis=2))
    with pytest.raises(ValueError, match=f'it has {channels} channels, the model takes 5'):
        load(tmp_path / 'image.tif', 5)


def test_a_thumbnail_is_no_channel(tmp_path):
    image = pixels(0, (20, 24))
    with tifffile.TiffWriter(tmp_path / 'image.tif') as file:
        file.write(image)
        file.write(image[::4, ::4])
    assert np.array_equal(load(tmp_path / 'image.tif', 1)[..., 0], image)


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_compressions_that_only_opencv_knows(tmp_path, channels):
    image = pixels(0, (20, 24, channels), 'uint16')
    bgr = image if channels == 1 else image[..., [2, 1, 0, 3][:channels]]
    assert cv2.imwrite(str(tmp_path / 'image.tif'), bgr, [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    assert np.array_equal(load(tmp_path / 'image.tif', channels), stored(image))


@pytest.mark.parametrize('share', [0.1, 0.5, 0.9])
def test_pages_that_are_cut_off_are_missed(tmp_path, share):
    tifffile.imwrite(tmp_path / 'image.tif', pixels(0, (5, 20, 24), 'uint16'), photometric='minisblack', metadata=None)
    data = (tmp_path / 'image.tif').read_bytes()
    (tmp_path / 'image.tif').write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r'image\.tif: not a readable image'):
        load(tmp_path / 'image.tif', 5)


@pytest.mark.parametrize(('photometric', 'channels'), [('minisblack', 2), ('minisblack', 5), ('rgb', 4), ('rgb', 6)])
def test_a_tiff_that_does_not_say_what_its_samples_are_has_channels(tmp_path, photometric, channels):
    image, path = pixels(0, (20, 24, channels)), tmp_path / 'image.tif'
    tifffile.imwrite(path, image, photometric=photometric, planarconfig='contig', metadata=None)
    with tifffile.TiffFile(path, mode='r+b') as file:  # the tag becomes a private one, of which nobody knows
        tag = file.pages.first.tags['ExtraSamples']
        file.filehandle.seek(tag.offset)
        file.filehandle.write((65000).to_bytes(2, 'little'))
    with tifffile.TiffFile(path) as file:
        assert file.pages.first.extrasamples == ()
    assert np.array_equal(load(path, channels), image)


def test_slips_of_ours_are_not_damage(tmp_path, monkeypatch):
    def slip(data):
        return ()[0]

    Image.fromarray(pixels(0, (20, 24))).save(tmp_path / 'image.tif')
    slip = types.FunctionType(slip.__code__, vars(images))  # as if it stood in that module
    monkeypatch.setattr(images.tiff, 'read_tiff', slip)
    with pytest.raises(IndexError):
        images.read_image(tmp_path / 'image.tif')


@pytest.mark.parametrize('package', ['tifffile', 'imagecodecs'])
def test_packages_that_are_missing_are_no_damage(tmp_path, monkeypatch, package):
    path = tmp_path / 'image.tif'
    tifffile.imwrite(path, pixels(0, (20, 24, 5)), photometric='minisblack', planarconfig='contig')
    if package == 'tifffile':
        monkeypatch.setitem(sys.modules, 'tifffile', None)
        expected = rf'{path}: TIFFs are read by the tifffile package, .* pip install .vit-efficient\[train\]'
    else:

        def asarray(self):
            raise ValueError("<COMPRESSION.LZMA: 34925> requires the 'imagecodecs' package")

        monkeypatch.setattr(tifffile.TiffPageSeries, 'asarray', asarray)
        expected = rf'{path}: its samples \(NONE, 8 bits\) are read by the imagecodecs package.*pip install .*\[tiff\]'
    with pytest.raises(ValueError, match=expected):
        images.read_image(path)


def test_a_tiff_of_volumes_is_named(tmp_path):
    tifffile.imwrite(tmp_path / 'image.tif', pixels(0, (2, 4, 20, 24), 'uint16'), photometric='minisblack')
    with pytest.raises(ValueError, match=r'image\.tif: .*shape \(2, 4, 20, 24\); store it as \.npy'):
        load(tmp_path / 'image.tif', 4)


@pytest.mark.parametrize('channels', [1, 3, 5])
@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'float32'])
def test_arrays_with_channels_first_or_last(channels, dtype):
    image = pixels(0, (20, 24, channels), dtype)
    assert np.array_equal(to_array(image, channels), stored(image))
    assert np.array_equal(to_array(image.transpose(2, 0, 1), channels), stored(image))
    assert np.array_equal(to_array(image.astype(image.dtype.newbyteorder('>')), channels), stored(image))


def test_an_image_as_high_as_the_model_has_channels_is_not_turned():
    image = pixels(0, (3, 24, 3))
    assert np.array_equal(to_array(image, 3), image)
    with pytest.raises(ValueError, match='it has 5 channels, the model takes 1'):
        to_array(pixels(0, (1, 1, 5)), 1)


def test_grey_is_repeated_and_rgb_weighed():
    grey, colour = pixels(0, (7, 9), 'float32'), pixels(1, (7, 9, 3))
    assert np.array_equal(to_array(grey, 3), np.stack([grey] * 3, 2))
    luma = np.asarray(Image.fromarray(colour).convert('L'))[..., None]
    assert np.abs(to_array(colour, 1).astype(int) - luma).max() <= 1


@pytest.mark.parametrize(
    ('image', 'message'),
    [
        (np.zeros((7, 9, 5), np.uint8), r'it has 5 channels, the model takes 3; set model.args.in_chans=5'),
        (np.zeros((7, 9, 3), np.int32), r'samples must be uint8'),
        (np.zeros((2, 7, 9, 3), np.uint8), r'an image must be .* got \(2, 7, 9, 3\)'),
        (np.full((7, 9, 3), np.nan), r'it holds values that are not finite'),
        (np.full((7, 9, 3), 255.0), r'must lie in \[0, 1\], these lie in \[255, 255\]; scale them'),
        (np.linspace(-1, 1, 189).reshape(7, 9, 3), r'these lie in \[-1, 1\]'),
        ('text', r'an image must be .* got str'),
    ],
)
def test_what_does_not_fit_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        to_array(image, 3)


def test_what_bicubic_resampling_overshoots_is_clipped():
    corner = np.zeros((8, 8), np.float32)
    corner[4:, 4:] = 1
    image = cv2.resize(corner, (24, 24), interpolation=cv2.INTER_CUBIC)
    assert image.max() > 1.1
    assert np.array_equal(to_array(image, 1)[..., 0], image.clip(0, 1))


@pytest.mark.parametrize('name', ['image.png', 'image.jpg', 'image.npy', 'deep.png', 'image.tif', 'deep.tif'])
@pytest.mark.parametrize('damage', ['empty', 'cut', 'text'])
def test_a_corrupt_file_is_named(tmp_path, name, damage):
    path = tmp_path / name
    if name.endswith('npy'):
        np.save(path, pixels(0, (50, 50)))
    else:
        Image.fromarray(pixels(0, (50, 50), 'uint16' if name.startswith('deep') else 'uint8')).save(path)
    data = path.read_bytes()
    path.write_bytes({'empty': b'', 'cut': data[: len(data) // 2], 'text': b'not an image'}[damage])
    with pytest.raises(ValueError, match=rf'{name}: not a readable image') as error:
        load(path, 1)
    assert '\n' not in str(error.value)
