"""Crops of photographs in any folders."""

import numpy as np
import pytest
from PIL import Image

from tests.data.trees import pixels
from vit_efficient.data import EvalTransform, Preprocessing
from vit_efficient.data.crops import read_crops
from vit_efficient.utils.errors import UserError

PREPROCESSING = Preprocessing((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 'bicubic', 0.875, 'squash')


@pytest.fixture
def folder(tmp_path):
    """Ten images of 20 × 24, two larger ones below them, a small one, and what is none."""
    for i in range(10):
        Image.fromarray(pixels(i, (20, 24, 3))).save(tmp_path / f'{i}.png')
    (tmp_path / 'more' / '.hidden').mkdir(parents=True)
    Image.fromarray(pixels(10, (40, 60, 3))).save(tmp_path / 'more' / 'a.jpg')
    np.save(tmp_path / 'more' / 'b.npy', pixels(11, (40, 60), 'float32'))
    Image.fromarray(pixels(12, (15, 60, 3))).save(tmp_path / 'more' / 'c.png')
    Image.fromarray(pixels(13, (40, 60, 3))).save(tmp_path / 'more' / '.hidden' / 'd.png')
    (tmp_path / 'notes.txt').touch()
    return tmp_path


def test_the_shorter_side_becomes_the_crop_and_nothing_is_squashed(folder):
    crops, too_small = read_crops([folder], PREPROCESSING, 16, limit=100)
    assert len(crops) == 12 and too_small == 1 and all(crop.shape == (3, 16, 16) for crop in crops)
    resized = Preprocessing((3, 16, 16), *[*vars(PREPROCESSING).values()][1:4], crop_pct=1, crop_mode='center')
    assert np.array_equal(crops[3], EvalTransform(resized)(pixels(3, (20, 24, 3))))
    [whole], _ = read_crops([folder / '4.png'], PREPROCESSING, 20, limit=1)
    expected = (pixels(4, (20, 24, 3))[:, 2:22] / 255 - PREPROCESSING.mean) / PREPROCESSING.std
    assert np.allclose(whole.permute(1, 2, 0), expected, atol=1e-5)


def test_a_few_are_taken_evenly_from_those_that_are_large_enough(folder):
    every, _ = read_crops([folder], PREPROCESSING, 16, limit=100)
    some, _ = read_crops([folder], PREPROCESSING, 16, limit=3)
    assert [next(i for i, each in enumerate(every) if each.equal(crop)) for crop in some] == [0, 5, 10]
    larger, too_small = read_crops([folder], PREPROCESSING, 32, limit=2)
    assert len(larger) == 2 and too_small == 8  # seen in steps of seven


def test_smaller_ones_are_enlarged_where_that_is_asked_for(folder):
    crops, too_small = read_crops([folder / 'more'], PREPROCESSING, 64, limit=9, enlarge=True)
    assert [crop.shape for crop in crops] == [(3, 64, 64)] * 3 and too_small == 0


@pytest.mark.parametrize(
    ('name', 'img_size', 'message'),
    [
        ('.', 100, 'none of 13 images has 100 pixels on each side'),
        ('more/.hidden/none', 16, 'none: not a readable image'),
        ('empty', 16, 'empty: no image'),
        ('notes.txt', 16, r'notes\.txt: not a readable image'),
        ('.', 0, 'img_size must be a positive integer'),
    ],
)
def test_errors(folder, name, img_size, message):
    (folder / 'empty').mkdir()
    with pytest.raises(UserError, match=message):
        read_crops([folder / name], PREPROCESSING, img_size, limit=16)
