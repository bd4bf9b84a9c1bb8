import cv2
import numpy as np
import pytest
from PIL import Image

from tests.data.trees import pixels
from vit_efficient.data import read_image, to_array


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


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'float16', 'float64'])
def test_arrays_of_many_channels(tmp_path, dtype):
    image = pixels(0, (7, 9, 5), dtype)
    np.save(tmp_path / 'image.npy', image)
    found = load(tmp_path / 'image.npy', 5)
    assert found.shape == (7, 9, 5)
    assert found.dtype == (np.uint8 if dtype == 'uint8' else np.float32)
    assert np.allclose(found, image / 65535 if dtype == 'uint16' else image, atol=1e-6)


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


@pytest.mark.parametrize('name', ['image.png', 'image.jpg', 'image.npy', 'deep.png', 'image.tif'])
@pytest.mark.parametrize('damage', ['empty', 'cut', 'text'])
def test_a_corrupt_file_is_named(tmp_path, name, damage):
    path = tmp_path / name
    if name.endswith('npy'):
        np.save(path, pixels(0, (50, 50)))
    else:
        Image.fromarray(pixels(0, (50, 50), 'uint16' if name == 'deep.png' else 'uint8')).save(path)
    data = path.read_bytes()
    path.write_bytes({'empty': b'', 'cut': data[: len(data) // 2], 'text': b'not an image'}[damage])
    with pytest.raises(ValueError, match=rf'{name}: not a readable image') as error:
        load(path, 1)
    assert '\n' not in str(error.value)
