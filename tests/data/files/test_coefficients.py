import numpy as np
import pytest
import torch

from tests.data.jpegs import MODES, decode, jpeg, patch_dct, photograph, pil_jpeg
from vit_efficient.data import CoefficientTransform, PatchCoefficients, Preprocessing, read_coefficients, read_quantized
from vit_efficient.data.files.coefficients import Window, regroup

pytestmark = pytest.mark.once

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Coefficients reach p / std, some 140 for p = 32; the bound is that of single precision.
BOUND = 1e-4


def stored(tmp_path, data):
    path = tmp_path / 'image.jpg'
    path.write_bytes(data)
    return path


def layout(patch, keep):
    return PatchCoefficients((patch, patch), (keep, keep))


def coefficients(quantized, patch, keep, **options):
    return regroup(quantized, layout(patch, keep), MEAN, STD, **options)


def reference(quantized, patch, keep):
    pixels = decode(quantized)
    return patch_dct(pixels.repeat(3 // pixels.shape[2], 2), patch, keep, np.array(MEAN), np.array(STD))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(('name', 'quality'), [('astronaut', 30), ('coffee', 50), ('chelsea', 75), ('rocket', 95)])
def test_equal_to_a_full_decode_before_rounding(tmp_path, name, quality, mode):
    """Sizes that blocks and patches do not divide, from 131 × 203 up to the whole photograph."""
    image = photograph(name) if quality == 75 else photograph(name, 131, 203)
    path = stored(tmp_path, jpeg(image, quality, mode))
    quantized = read_quantized(path)
    assert (quantized.height, quantized.width) == image.shape[:2]
    for patch, keep in ((8, 8), (8, 3), (16, 16), (16, 8), (24, 5), (32, 16), (32, 32)):
        found = read_coefficients(path, patch, keep, 3, MEAN, STD)
        assert found.shape == (3, image.shape[0] // patch * keep, image.shape[1] // patch * keep)
        assert np.abs(found.numpy() - reference(quantized, patch, keep)).max() < BOUND


def test_patches_and_frequencies_need_not_be_square(tmp_path):
    path = stored(tmp_path, jpeg(photograph('coffee', 100, 90), 80))
    square = read_coefficients(path, 16, 16).view(3, 6, 16, 5, 16)
    assert torch.allclose(read_coefficients(path, 16, (4, 9)).view(3, 6, 4, 5, 9), square[:, :, :4, :, :9], atol=BOUND)
    assert read_coefficients(path, (8, 32), (2, 5)).shape == (3, 12 * 2, 2 * 5)


@pytest.mark.parametrize('mode', ['4:4:4', '4:2:0', 'grey'])
@pytest.mark.parametrize(('name', 'quality'), [('astronaut', 30), ('coffee', 75), ('chelsea', 95)])
def test_close_to_the_pixels_that_a_decoder_gives(tmp_path, name, quality, mode):
    """libjpeg rounds and clamps, ahead of the colour conversion and after it.

    The worst found: 1.8 % of the coefficients' root mean square, and 1.35 in one coefficient where chroma is clamped
    (4:2:0, quality 30). At quality 75 and above: 1.5 %, and 0.89.
    """
    import simplejpeg

    data = jpeg(photograph(name, 256, 320), quality, mode)
    quantized = read_quantized(stored(tmp_path, data))
    pixels = simplejpeg.decode_jpeg(data, 'GRAY' if mode == 'grey' else 'RGB', fastupsample=True).astype(float)
    assert np.abs(pixels - decode(quantized, rounded=True)).max() <= 3  # its integer transform and colour tables
    for patch, keep in ((8, 8), (16, 8), (32, 16)):
        theirs = patch_dct(pixels.repeat(3 // pixels.shape[2], 2), patch, keep, np.array(MEAN), np.array(STD))
        error = coefficients(quantized, patch, keep).numpy() - theirs
        assert np.linalg.norm(error) < 0.02 * np.linalg.norm(theirs)
        assert np.abs(error).max() < 1.5


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('patch', [8, 16, 24])
def test_a_window_is_cut_and_mirrored_exactly(tmp_path, mode, patch):
    quantized = read_quantized(stored(tmp_path, jpeg(photograph('coffee', 203, 190), 75, mode)))
    rows, columns = 203 // patch, 190 // patch
    whole = coefficients(quantized, patch, 5).view(3, rows, 5, columns, 5)
    sign = torch.tensor([1, -1, 1, -1, 1])
    for top, left, height, width in ((0, 0, 2, 3), (1, 2, 3, 3), (3, 1, rows - 3, columns - 1), (1, 1, 1, 1)):
        cut = whole[:, top : top + height, :, left : left + width]
        for hflip in (False, True):
            for vflip in (False, True):
                found = coefficients(
                    quantized, patch, 5, window=Window(top, left, height, width), hflip=hflip, vflip=vflip
                )
                expected = cut.flip(3) * sign if hflip else cut
                expected = expected.flip(1) * sign[:, None, None] if vflip else expected
                assert torch.allclose(found, expected.reshape(found.shape), atol=BOUND)


def test_a_mirrored_image_has_mirrored_coefficients(tmp_path):
    quantized = read_quantized(stored(tmp_path, jpeg(photograph('chelsea', 96, 128), 75)))
    mirrored = patch_dct(decode(quantized)[:, ::-1], 32, 16, np.array(MEAN), np.array(STD))
    assert np.abs(coefficients(quantized, 32, 16, hflip=True).numpy() - mirrored).max() < BOUND


def test_colours_fit_the_model(tmp_path):
    """A grey model of a colour image sees its luma, as by Image.convert; Adobe's RGB files are not taken for YCbCr."""
    image = photograph('coffee', 64, 96)
    for data in (jpeg(image), pil_jpeg(image, keep_rgb=True), jpeg(image, mode='grey')):
        path = stored(tmp_path, data)
        quantized = read_quantized(path)
        found = read_coefficients(path, 16, 16, channels=1).numpy()
        luma = decode(quantized) @ (np.array([0.299, 0.587, 0.114]) if len(quantized.planes) == 3 else np.ones(1))
        assert np.abs(found - patch_dct(luma[..., None], 16, 16, 0, 1)).max() < BOUND
        in_rgb = patch_dct(decode(quantized).repeat(3 // len(quantized.planes), 2), 16, 16, 0, 1)
        assert np.abs(read_coefficients(path, 16, 16).numpy() - in_rgb).max() < BOUND
    assert read_quantized(stored(tmp_path, pil_jpeg(image, keep_rgb=True))).space == 'RGB'


def test_progressive_files_and_streams_are_the_same(tmp_path):
    image = photograph('chelsea', 120, 130)
    baseline, progressive = (stored(tmp_path, pil_jpeg(image, progressive=flag)) for flag in (False, True))
    expected = read_coefficients(baseline, 8, 8)
    assert torch.equal(read_coefficients(progressive, 8, 8), expected)
    with baseline.open('rb') as stream:
        assert torch.equal(read_coefficients(stream, 8, 8), expected)


@pytest.mark.parametrize(
    ('patch', 'keep', 'channels', 'message'),
    [
        (14, 7, 3, r'patch_size=\(14, 14\) must be multiples of 8.*data.decode=pixels'),
        (16, 17, 3, r'keep=\(17, 17\) must be from 1 to patch_size=\(16, 16\)'),
        (16, 0, 3, r'keep must be a positive integer or a pair \(h, w\) of them, got keep=0'),
        (16, 8, 4, 'channels=4 must be 1 or 3'),
        (32, 8, 3, r'image.jpg: its 1×1 pixels do not hold a patch of \(32, 32\)'),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, patch, keep, channels, message):
    path = stored(tmp_path, jpeg(photograph(height=1, width=1)))
    with pytest.raises(ValueError, match=message):
        read_coefficients(path, patch, keep, channels)
    with pytest.raises(ValueError, match=r'one value per channel \(1\), got mean=\(0\.5, 0\.5\)'):
        read_coefficients(path, 8, 8, 1, mean=(0.5, 0.5))


def transform(size=(64, 96), **options):
    preprocessing = Preprocessing((3, *size), MEAN, STD, 'bicubic', 1.0, 'center')
    return CoefficientTransform(layout(16, 8), preprocessing, **options)


def test_draws_are_a_function_of_seed_epoch_and_index(tmp_path):
    quantized = read_quantized(stored(tmp_path, jpeg(photograph('coffee', 160, 200))))
    keys = [(epoch, index) for epoch in range(2) for index in range(30)]
    first = {key: transform(seed=3, hflip=0.5)(quantized, *key) for key in keys}
    again = transform(seed=3, hflip=0.5)
    assert all(torch.equal(again(quantized, *key), first[key]) for key in reversed(keys))
    assert not torch.equal(transform(seed=4, hflip=0.5)(quantized, 0, 0), first[0, 0])
    assert len({found.numpy().tobytes() for found in first.values()}) > 30


def test_windows_are_drawn_from_all_places_and_mirrored_by_chance(tmp_path):
    quantized = read_quantized(stored(tmp_path, jpeg(photograph('coffee', 96, 128))))
    whole = coefficients(quantized, 16, 8).view(3, 6, 8, 8, 8)
    windows = {(top, left): whole[:, top : top + 4, :, left : left + 6] for top in range(3) for left in range(3)}
    sign = torch.tensor([1, -1] * 4)
    draw, seen = transform(seed=0, hflip=0.5), set()
    for index in range(100):
        found = draw(quantized, 0, index).view(3, 4, 8, 6, 8)
        for place, cut in windows.items():
            seen |= {
                (place, flip)
                for flip in (0, 1)
                if torch.allclose(found, cut.flip(3) * sign if flip else cut, atol=BOUND)
            }
    assert len(seen) == 18


def test_evaluation_takes_the_centre(tmp_path):
    quantized = read_quantized(stored(tmp_path, jpeg(photograph('coffee', 96, 130))))
    whole = coefficients(quantized, 16, 8).view(3, 6, 8, 8, 8)
    centre = whole[:, 1:5, :, 1:7].reshape(3, 32, 48)
    assert torch.allclose(transform()(quantized, 5, 7), centre, atol=BOUND)


@pytest.mark.parametrize(
    ('size', 'message'),
    [
        ((5, 64, 64), 'reads images of 1 or 3 channels, the model takes 5'),
        ((3, 64, 70), r'data.img_size=\[64, 70\] must be multiples of the patches, \[16, 16\]'),
    ],
)
def test_inputs_that_coefficients_cannot_fill_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        CoefficientTransform(layout(16, 8), Preprocessing(size, MEAN, STD, 'bicubic', 1.0, 'center'))
