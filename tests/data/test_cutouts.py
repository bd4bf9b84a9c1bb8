"""recipes/cutouts: images of cut-outs with exact masks, and what is measured on them."""

import csv
import io
import json
import re
import runpy
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from vit_efficient import save_model
from vit_efficient.data import MaskedImages
from vit_efficient.models import load_model
from vit_efficient.report.masks import mean_share, shares

pytestmark = pytest.mark.once

FOLDER = Path(__file__).parents[2] / 'recipes/cutouts'
prepare = runpy.run_path(str(FOLDER / 'prepare.py'))
measure = runpy.run_path(str(FOLDER / 'measure.py'))
CLASSES = list(prepare['CLASSES'])


def stamp(number, height, width):
    """An ellipse of one colour, with transparent margins."""
    rows, columns = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    image = np.zeros((height + 6, width + 4, 4), np.uint8)
    image[3:-3, 2:-2, :3] = np.random.default_rng(number).integers(0, 256, 3)
    image[3:-3, 2:-2, 3] = 255 * (rows**2 + columns**2 <= 1)
    return Image.fromarray(image)


def stamps():
    names = [name for text in prepare['CUTOUTS'].values() for name in text.replace('+', ' ').split()]
    sides = np.random.default_rng(0).integers(120, 300, (len(names), 2)).tolist()
    return {f'some/{name}': stamp(i, *side) for i, (name, side) in enumerate(zip(names, sides, strict=True))}


def photograph(number):
    content = io.BytesIO()
    Image.fromarray(np.full((160, 240, 3), number, np.uint8)).save(content, 'JPEG')
    return content.getvalue()


@pytest.fixture(scope='module')
def material():
    return prepare['Material'](stamps(), {f'{i}.jpg': photograph(i) for i in range(40)})


def test_splits_share_nothing(material):
    names = {split: {n for of in material.cutouts[split].values() for n, _ in of} for split in ('train', 'val')}
    assert not names['train'] & names['val'] and len(names['train'] | names['val']) > 180
    assert min(len(of_class) for of_class in material.cutouts['val'].values()) >= 5
    assert min(len(of_class) for of_class in material.cutouts['train'].values()) >= 5
    for text in prepare['CUTOUTS'].values():
        for group in text.split():
            together = {Path(name).name for name in group.split('+')}
            assert together <= names['train'] or together <= names['val']
    assert [len(material.photographs[split]) for split in ('train', 'val')] == [32, 8]
    assert not set(material.photographs['train']) & set(material.photographs['val'])


def test_an_image_follows_from_seed_split_and_index(material):
    def drawn(*key):
        image, mask, objects = prepare['draw'](material, *key)
        return np.asarray(image).tobytes(), np.asarray(mask).tobytes(), objects

    first = drawn(0, 'train', 3, 200)
    assert drawn(0, 'train', 3, 200) == first
    others = [(1, 'train', 3, 200), (0, 'val', 3, 200), (0, 'train', 4, 200), (0, 'train', 3, 216)]
    assert all(drawn(*key)[0] != first[0] for key in others)


@pytest.mark.parametrize('size', [200, 504, 600])
def test_objects_are_where_it_is_said(material, size):
    natural = {name: cutout.size for of in material.cutouts['val'].values() for name, cutout in of}
    lengths = []
    for index in range(12):
        image, mask, objects = prepare['draw'](material, 0, 'val', index, size)
        mask = np.asarray(mask)
        assert image.size == (size, size) and mask.shape == (size, size)
        assert 1 <= len(objects) <= round(9 * (size / 504) ** 2)
        seen = np.zeros_like(mask)
        for each in objects:
            box = slice(each.top, each.top + each.height), slice(each.left, each.left + each.width)
            assert each.label in CLASSES[1:] and each.image == f'{index:05d}'
            assert each.pixels == (mask[box] == CLASSES.index(each.label)).sum()
            seen[box] = 1
            width, height = natural[each.cutout]
            length, whole = max(each.height, each.width), max(width, height)
            assert 16 <= length <= min(whole, 400) and each.width <= width and each.height <= height
            assert each.width / each.height == pytest.approx(width / height, rel=2 / min(each.width, each.height))
            lengths.append(length)
        assert not mask[seen == 0].any()
        for a, b in combinations(objects, 2):
            apart = a.left > b.left + b.width or b.left > a.left + a.width
            assert apart or a.top > b.top + b.height or b.top > a.top + a.height
    assert min(lengths) < 40 and max(lengths) > 100


def test_large_images_have_several_photographs(material):
    """At their own resolution: these are even, so that where an image changes there is another one, or an object."""
    image, mask, _ = prepare['draw'](material, 0, 'train', 0, 600)
    background = np.asarray(image)[..., 0][np.asarray(mask) == 0]
    levels, counts = np.unique(background, return_counts=True)
    assert (counts > 5000).sum() >= 4 and set(levels[counts > 5000]) <= set(range(40))


def write_packages(root):
    for name, image in stamps().items():
        path = root / 'stamps' / f'{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (root / 'photographs').mkdir()
    for number in range(10):
        (root / f'photographs/{number}.jpg').write_bytes(photograph(number))


def test_the_tree_is_written_once(tmp_path, capsys):
    write_packages(tmp_path)
    root, main = tmp_path / 'made/cutouts', prepare['main']
    options = ['--stamps', str(tmp_path / 'stamps'), '--photographs', str(tmp_path / 'photographs')]
    options += ['--size', '96', '--train', '3', '--val', '2']
    assert main([str(root), *options]) == main([str(root), *options]) == 0
    assert capsys.readouterr().out.splitlines() == [f'{root}: written', f'{root}: complete']
    dataset = MaskedImages(root / 'train', classes=CLASSES)
    assert len(dataset) == 3 and dataset[0][0].size == (96, 96)
    rows = list(csv.DictReader((root / 'train/objects.csv').open()))
    assert {row['image'] for row in rows} <= {'00000', '00001', '00002'}
    covered = sum(int((dataset[i][2] > 0).sum()) for i in range(3))
    assert covered == sum(int(row['pixels']) for row in rows) > 0
    assert json.loads((root / 'settings.json').read_text())['size'] == 96
    assert main([str(root), *options, '--seed', '1']) == 2
    assert f'{root}: holds something else; name another folder' in capsys.readouterr().err
    assert [path.name for path in (tmp_path / 'made').iterdir()] == ['cutouts']
    (tmp_path / 'stamps/some/chimp.png').unlink()
    assert main([str(tmp_path / 'again'), *options]) == 2
    assert 'has 0 stamps chimp.png, where one is meant' in capsys.readouterr().err
    assert not (tmp_path / 'again').exists()
    with pytest.raises(SystemExit):
        main([str(root), '--size', '10'])
    with pytest.raises(SystemExit):
        main([str(root), '--stamps', str(tmp_path / 'nowhere')])


def test_measures_against_the_whole_masks():
    """mIoU of the parts, objects and background, is that of the masks; IoU of an object is of what is around it."""
    rng = np.random.default_rng(0)
    boxes = [(2, 3, 10, 12), (20, 30, 8, 16), (40, 5, 16, 16)]
    objects, found, expected = [], {'rows': [], 'ious': [], 'background': []}, []
    for image in range(3):
        truth = np.zeros((64, 64), np.int16)
        of_image = []
        for number, (top, left, height, width) in enumerate(boxes):
            box = slice(top, top + height), slice(left, left + width)
            truth[box][rng.random((height, width)) < 0.7] = number + 1
            around = tuple(measure['_grown'](side, 64) for side in box)
            of_image.append(measure['Object'](number + 1, f'cut{number}', image, box, around, number))
        predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 4, truth.shape))
        rows, ious = measure['score'](predicted, truth, of_image, 4)
        found['rows'] += rows
        found['ious'] += ious
        found['background'].append(np.bincount(predicted[truth == 0], minlength=4))
        objects += of_image
        expected.append(
            [[(truth == k).sum(), (predicted == k).sum(), ((truth == k) & (predicted == k)).sum()] for k in range(4)]
        )
        grown = slice(0, 14), slice(0, 18)
        assert of_image[0].around == grown
        union = (truth[grown] == 1) | ((truth[grown] == 0) & (predicted[grown] == 1))
        assert ious[0] == pytest.approx(((truth == 1) & (predicted == 1)).sum() / union.sum())
    areas = np.array(expected).sum(0).T
    of_run = measure['Found'](*(np.array(found[name]) for name in ('rows', 'ious', 'background')), np.zeros(3))
    once = np.ones((1, len(objects))), np.ones((1, 3))
    confusion = measure['confusions'](of_run, objects, *once)
    assert confusion[0].sum() == 3 * 64 * 64
    assert measure['foreground_miou'](confusion)[0] == pytest.approx(mean_share(shares(areas), 0))
    assert measure['by_size'](of_run, objects, once[0])[0, 1] == pytest.approx(100 * of_run.iou[1::3].mean())
    weights, of_images = measure['draw'](objects, 3)
    assert weights.shape == (2000, 9) and of_images.sum(1).tolist() == [3] * 2000
    assert np.array_equal(weights[:, :3], of_images[:, :1].repeat(3, 1))  # one cut-out a class: it is always there
    interval = np.quantile(
        measure['foreground_miou'](measure['confusions'](of_run, objects, weights, of_images)), [0.025, 0.975]
    )
    assert interval[0] < measure['foreground_miou'](confusion)[0] < interval[1]


def test_objects_are_read(tmp_path):
    (tmp_path / 'objects.csv').write_text(
        'image,label,cutout,top,left,height,width,pixels\n00000,bird,crow,4,8,16,20,99\n00001,fruit,kiwi,0,0,100,40,9\n'
        '00002,bird,crow,0,0,16,16,0\n00009,bird,crow,4,8,16,20,99\n'
    )
    files = ['images/00000.png', 'images/00001.png', 'images/00002.png']
    objects = measure['read_objects'](tmp_path / 'objects.csv', CLASSES, files, (504, 504))
    assert [(each.label, each.cutout, each.image, each.size) for each in objects] == [
        (2, 'crow', 0, 0),
        (5, 'kiwi', 1, 2),
    ]
    assert objects[0].box == (slice(4, 20), slice(8, 28)) and objects[0].around == (slice(0, 24), slice(3, 33))


def test_an_upsampler_learns_from_images(tmp_path, capsys):
    write_packages(tmp_path)
    options = ['--stamps', str(tmp_path / 'stamps'), '--photographs', str(tmp_path / 'photographs')]
    assert prepare['main']([str(tmp_path / 'data'), *options, '--size', '96', '--train', '12', '--val', '0']) == 0
    args = dict(img_size=48, patch_size=8, depth=4, embed_dim=24, num_heads=2)
    save_model(timm.create_model('vit_tiny_patch16_224', **args), tmp_path / 'model')
    main = runpy.run_path(str(FOLDER / 'train_upsampler.py'))['main']
    options = ['--model', str(tmp_path / 'model'), '--images', str(tmp_path / 'data/train')]
    assert main([*options, '--out', str(tmp_path / 'out'), '--epochs', '3']) == 0
    errors = re.findall(r'squared error ([\d.]+),', capsys.readouterr().out)
    assert len(errors) == 3 and float(errors[2]) < float(errors[0])
    model = load_model(tmp_path / 'out')
    assert model.reduce == 2 and model.upsampler.queries.weight.abs().sum() > 0
    assert main([*options, '--out', str(tmp_path / 'out')]) == 0 and 'out: there' in capsys.readouterr().out
