import numpy as np
import pytest
import torch

from tests.data.jpegs import MODES, decode, jpeg, patch_dct, photograph, pil_jpeg
from vit_efficient.data import CoefficientTransform, PatchCoefficients, read_coefficients, read_quantized
from vit_efficient.data.coefficients import CoefficientReader, Window, regroup

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
    """libjpeg rounds samples to integers, and clamps; coefficients are means of those errors, times p."""
    import simplejpeg

    data = jpeg(photograph(name, 256, 320), quality, mode)
    quantized = read_quantized(stored(tmp_path, data))
    space = 'GRAY' if mode == 'grey' else 'RGB'
    pixels = simplejpeg.decode_jpeg(data, space, fastupsample=True).astype(float)
    exact = decode(quantized)
    inside = ((exact > 0) & (exact < 255)).all()
    clamped = np.abs(exact.clip(0, 255) - exact).max()
    assert np.abs(pixels - exact.clip(0, 255)).max() < 2.5
    theirs = patch_dct(pixels.repeat(3 // pixels.shape[2], 2), 16, 8, np.array(MEAN), np.array(STD))
    error = np.abs(coefficients(quantized, 16, 8).numpy() - theirs)
    print(mode, name, quality, inside, clamped, error.max(), (error**2).mean() ** 0.5, np.abs(pixels - exact.clip(0, 255)).max())
