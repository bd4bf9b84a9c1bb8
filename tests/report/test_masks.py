"""Intersections over unions by class, their intervals, the files of an evaluation, and tiles against whole images."""

import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.train.test_masks import CLASSES, head_recipe
from vit_efficient import DenseModel, save_model
from vit_efficient.data import MaskedImages
from vit_efficient.report.comparison import compare_with_first
from vit_efficient.report.masks import MaskFiles, class_table, compare_areas, interval, mean_share, resampled, shares
from vit_efficient.report.runs import Entry
from vit_efficient.report.tiles import tiles_table
from vit_efficient.train import train
from vit_efficient.train.evaluation import Evaluation
from vit_efficient.train.run_folder import RunFolder
from vit_efficient.train.tiles import seams
from vit_efficient_cli import main

pytestmark = pytest.mark.once


def some_areas(images=30, classes=4, seed=0):
    """Areas of masks that are half right; the last class is nowhere."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(images):
        truth = rng.integers(0, classes - 1, (6, 7))
        predicted = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, classes - 1, truth.shape))
        both = [
            [(truth == k).sum(), (predicted == k).sum(), ((truth == k) & (predicted == k)).sum()]
            for k in range(classes)
        ]
        found.append(np.array(both).T)
    return np.array(found)


def test_shares_against_a_loop():
    areas = some_areas()
    labelled, predicted, both = areas.sum(0).tolist()
    found = shares(areas.sum(0))
    for k in range(3):
        assert found[k] == pytest.approx(100 * both[k] / (labelled[k] + predicted[k] - both[k]))
    assert np.isnan(found[3])
    assert mean_share(found) == pytest.approx(found[:3].mean())
    assert mean_share(found, 0) == pytest.approx(found[1:3].mean())
    assert np.isnan(mean_share(found[3:]))


def test_the_bootstrap_is_over_images():
    areas = some_areas()
    draws = mean_share(shares(resampled(areas)), 0)
    rng, expected = np.random.default_rng(1), []
    for _ in range(3000):
        chosen = areas[rng.integers(0, len(areas), len(areas))].sum(0)
        expected.append(mean_share(shares(chosen), 0))
    for ours, theirs in zip(interval(draws), np.quantile(expected, [0.025, 0.975]), strict=True):
        assert ours == pytest.approx(theirs, abs=0.4)
    # Alike images leave nothing to draw.
    assert np.ptp(shares(resampled(areas[:1].repeat(5, 0)))[:, :3]) == pytest.approx(np.ptp(shares(areas[0])[:3]))
    assert interval(np.array([np.nan])) is None


def test_paired_differences():
    better, worse = some_areas(seed=0), some_areas(seed=1)
    better[:, 2, :3] += ((better[:, :2].min(1) - better[:, 2]) // 2)[:, :3]
    found = compare_areas([(worse, better), (worse, worse)], 0)
    gain = mean_share(shares(better.sum(0)), 0) - mean_share(shares(worse.sum(0)), 0)
    assert found['difference'] == pytest.approx(gain / 2) and found['pairs'] == 60
    assert found['interval'].startswith('+')
    assert compare_areas([(worse, worse)], None) == {'pairs': 30, 'difference': 0, 'interval': '+0.00 … +0.00'}


def test_the_table_of_classes():
    areas = torch.from_numpy(some_areas())
    table = class_table(Evaluation(0.0, 30, 1.0, (), [], areas=areas), ['none', 'a', 'b', 'c'], 0)
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ['none', 'a', 'b', 'c', 'mean', 'mean without none']
    labelled, predicted, both = areas.sum(0).tolist()
    assert rows[1][3:5] == [f'{100 * both[1] / labelled[1]:.2f}', f'{100 * both[1] / predicted[1]:.2f}']
    assert rows[3][1:5] == ['–'] * 4 and rows[1][6] == str(int((areas[:, 0, 1] > 0).sum()))
    low, high = (float(number) for number in rows[5][2].split(' … '))
    assert low < float(rows[5][1]) < high


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    configs = []
    for seed in (0, 1):
        config = head_recipe(folder / 'data', folder / f'run-{seed}', seed=seed)
        config.optim.lr, config.sched.epochs, config.eval_every = 1e-2, 8, 8
        config.model.name, config.model.args['img_size'] = 'vit_full_tiny', 16
        train(config)
        configs.append(config)
    return folder, configs


def test_runs_keep_their_areas(runs):
    folder, configs = runs
    areas = RunFolder(configs[0].output).areas(3)
    assert areas.shape == (5, 3, 3)
    dataset = MaskedImages(folder / 'data/val', classes=CLASSES, ignore_index=255)
    for index in range(5):
        truth = dataset[index][2]
        assert areas[index, 0].tolist() == [int((truth == k).sum()) for k in range(3)]
    assert areas[:, 1].sum() == areas[:, 0].sum()
    assert mean_share(shares(areas.sum(0)), 0) == pytest.approx(RunFolder(configs[0].output).result['foreground_miou'])


def test_runs_are_compared_by_their_areas(runs):
    folder, configs = runs
    text = compare_with_first([Entry(folder / 'a.yaml', configs[:1], 'a'), Entry(folder / 'b.yaml', configs[:1], 'b')])
    assert '| foreground mIoU, against a |' in text and '+0.00 … +0.00' in text


def test_files_of_an_evaluation(runs, tmp_path, capsys):
    folder, configs = runs
    command = ['evaluate', configs[0].output, '--data', str(folder / 'data/val'), '--device', 'cpu']
    assert main([*command, '--out', str(tmp_path / 'out')]) == 0
    said = capsys.readouterr().out
    assert '| mean without background |' in said
    assert (tmp_path / 'out/classes.md').read_text().startswith(said[:200])
    areas = RunFolder(configs[0].output).areas(3)
    for index, name in enumerate(('0', '1', '2', '10', '11')):
        mask = np.asarray(Image.open(tmp_path / f'out/predictions/images/{name}.png'))
        truth = np.asarray(Image.open(folder / f'data/val/masks/{name}.png'))
        assert [int((mask[truth != 255] == k).sum()) for k in range(3)] == areas[index, 1].tolist()
    assert Image.open(tmp_path / 'out/confusion.png').size[0] > 200
    rows = list(csv.DictReader((tmp_path / 'out/predictions.csv').open()))
    assert [row['file'] for row in rows] == [f'images/{name}.jpg' for name in (0, 1, 2, 10, 11)]


def test_files_are_of_masks_alone(tmp_path, capsys):
    model = timm.create_model('vit_tiny_patch16_224', img_size=16, depth=1, embed_dim=12, num_heads=1, num_classes=2)
    save_model(model, tmp_path / 'model')
    for label in 'ab':
        (tmp_path / 'val' / label).mkdir(parents=True)
        Image.new('RGB', (16, 16)).save(tmp_path / 'val' / label / 'a.png')
    command = ['evaluate', str(tmp_path / 'model'), '--data', str(tmp_path / 'val'), '--out', str(tmp_path / 'out')]
    assert main(command) == 2
    assert 'what is written is of images with masks' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('length', 'tile', 'overlap', 'expected'),
    [(64, 32, 0, [32]), (64, 32, 0.5, [24, 40]), (80, 64, 0.25, [40]), (16, 32, 0, [])],
)
def test_where_tiles_meet(length, tile, overlap, expected):
    lines, across = seams((length, 16), (8, 8), tile, overlap)
    assert lines == expected and across == []


def test_whole_images_against_tiles(runs, capsys):
    folder, configs = runs
    models, data = [config.output for config in configs], str(folder / 'data/val')
    command = [
        'table',
        'tiles',
        *models,
        '--data',
        data,
        '--tile',
        '8',
        '64',
        '--overlap',
        '0',
        '1/2',
        '--device',
        'cpu',
    ]
    assert main([*command, '--format', 'csv']) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 2 * 5
    for number, config in enumerate(configs):
        of_model = rows[5 * number : 5 * number + 5]
        whole, *tiles = of_model
        result = RunFolder(config.output).result
        assert whole['seen'] == 'whole' and float(whole['miou']) == pytest.approx(result['foreground_miou'])
        assert float(whole['boundary_f']) == pytest.approx(result['boundary_f'])
        assert bool(whole['difference']) == bool(number)
        assert all(float(row['peak']) > 0 and float(row['seconds']) > 0 for row in of_model)
        for row in tiles:
            if '64 px' in row['seen']:  # which hold the images: no seams
                assert row['miou'] == whole['miou'] and row['near'] == row['whole_near'] == ''
            else:
                assert float(row['near']) >= 0 and float(row['whole_near']) >= 0
    assert rows[1]['miou'] != rows[0]['miou']
    text = tiles_table(models[:1], data, [(8, 0.5)], limit=2, device='cpu')
    assert '2 images of ' in text and 'Near seams: at most 2 px' in text


def test_tiles_that_do_not_fit(runs, capsys):
    folder, configs = runs
    command = ['table', 'tiles', configs[0].output, '--data', str(folder / 'data/val'), '--tile', '7']
    assert main(command) == 2
    assert 'tile=7 must be a multiple of the patches; use 6 or 8' in capsys.readouterr().err


def test_masks_stay_within_their_folder(tmp_path):
    files = MaskFiles(tmp_path / 'out', 3)
    classes = np.zeros((4, 5), np.int16)
    for name, expected in (('/x/a.png', 'x/a.png'), ('../../b/c.jpg', 'b/c.png'), ('7', '7.png')):
        files.keep(name, classes)
        assert (tmp_path / 'out/predictions' / expected).exists()
    files.keep('7', classes)
    with pytest.raises(ValueError, match=r'7\.tif: its mask would be .*/7\.png, as that of 7; name them apart'):
        files.keep('7.tif', classes)
    with pytest.raises(ValueError, match=r'--out .*: holds something already; name a new folder'):
        MaskFiles(tmp_path / 'out', 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out']


def test_models_of_other_classes_are_not_compared(runs, tmp_path):
    folder, configs = runs
    model = DenseModel(timm.create_model('vit_tiny_patch16_224', depth=1), 'linear', 4)
    save_model(model, tmp_path / 'model')
    with pytest.raises(
        ValueError, match='model tells 4 classes, .* background, green, blue; compare models of the same'
    ):
        tiles_table([configs[0].output, str(tmp_path / 'model')], str(folder / 'data/val'), [(8, 0)], 1, device='cpu')
