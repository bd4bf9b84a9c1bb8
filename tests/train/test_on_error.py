"""Runs over folders with odd files (see tests.data.trees), under each value of `data.on_error`."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.trees import READABLE, UNREADABLE, pixels, write_odd_files, write_tree
from tests.train.recipes import tiny_recipe, train_on_one_and_two_processes
from tests.train.test_trainer import assert_same_run, fail, same
from vit_efficient.data import EpochSampler, ImageTree
from vit_efficient.train import train
from vit_efficient.train.checkpoint import load_checkpoint
from vit_efficient.train.recipe import to_yaml
from vit_efficient.train.rules import validate
from vit_efficient.train.trainer import Trainer
from vit_efficient_cli import main


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """31 images to train on and 13 to validate, four each of which cannot be read."""
    root = write_tree(tmp_path_factory.mktemp('data'))
    for split in ('train', 'val'):
        write_odd_files(root / split / 'c1')
    return root


def recipe(data, output, **options):
    config = tiny_recipe(data, output, **options)
    config.data.on_error = 'skip'
    return config


def met(data, size=28):
    """The unreadable files among the first `size` images of both epochs."""
    dataset, sampler, found = ImageTree(data / 'train'), EpochSampler(31), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        names = [dataset.filename(index) for _, index in list(sampler)[:size]]
        found.append({name for name in names if Path(name).name in UNREADABLE})
    return found


def lines_of(folder, kind):
    lines = map(json.loads, (Path(folder) / 'metrics.jsonl').open())
    return [line for line in lines if line['kind'] == kind]


def test_a_run_ends_at_such_a_file_unless_the_recipe_says_otherwise(data, tmp_path, capsys):
    config = tiny_recipe(data, tmp_path / 'run')
    path = tmp_path / 'recipe.yaml'
    path.write_text(to_yaml(config))
    assert main(['train', str(path), 'checkpoint_steps=1']) == 2
    output = capsys.readouterr()
    assert output.out == ''
    last = output.err.splitlines()[-1]
    assert f'{data}/train/c1/' in last and 'not a readable image' in last
    assert last.endswith('; data.on_error=skip goes on without it')
    # The same run may go on without it.
    assert main(['train', str(path), 'resume=auto', 'data.on_error=skip']) == 0
    train(recipe(data, tmp_path / 'whole'))
    assert same(*(load_checkpoint(tmp_path / name / 'checkpoint.pt')['model'] for name in ('run', 'whole')))


def test_skipped_files_are_named_once_and_counted(data, tmp_path, capsys):
    path = tmp_path / 'recipe.yaml'
    path.write_text(to_yaml(recipe(data, tmp_path / 'run')))
    assert main(['train', str(path)]) == 0
    output = capsys.readouterr()
    first, second = met(data)
    total = len(first | second)
    assert total > len(second) > 0
    assert output.out.endswith(f'; skipped {total} training and 4 validation images that cannot be read\n')
    assert 'of 9 images after' in output.out

    folder = tmp_path / 'run'
    result = json.loads((folder / 'result.json').read_text())
    assert (result['train_images'], result['train_skipped']) == (31, total)
    assert (result['val_images'], result['val_skipped']) == (9, 4)
    assert [line['images'] for line in lines_of(folder, 'skipped')] == [len(first), len(second)]
    assert [line['skipped'] for line in lines_of(folder, 'val')] == [4, 4]
    assert f'; skipped {len(second)} training and 4 validation images' in output.err.splitlines()[-1]

    expected = {f'train/{name}' for name in first | second} | {f'val/c1/{name}' for name in UNREADABLE}
    named = [line for line in output.err.replace('\r', '\n').splitlines() if line.startswith('skipped, ')]
    for lines in (named, (folder / 'skipped.txt').read_text().splitlines()):
        assert sorted(line.split(': ')[1] for line in lines) == sorted(f'{data}/{name}' for name in expected)
    assert all('not a readable image' in line for line in named)

    rows = list(csv.DictReader((folder / 'predictions.csv').open()))
    files = {row['file'] for row in rows}
    assert len(files) == 9 and {f'c1/{name}' for name in READABLE} < files
    assert result['top1'] == pytest.approx(100 * sum(row['label'] == row['predicted'] for row in rows) / 9)

    arguments = ['evaluate', str(folder), '--data', f'{data}/val', '--device', 'cpu']
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert 'on 9 images' in output.out and output.out.endswith('; skipped 4 images that cannot be read\n')
    assert float(output.out.split()[1]) == pytest.approx(result['top1'], abs=0.005)
    assert sorted(line.split(': ')[1] for line in output.err.splitlines()) == [
        f'{data}/val/c1/{name}' for name in UNREADABLE
    ]
    assert main([*arguments, '--on-error', 'error']) == 2
    assert f'{data}/val/c1/corrupt.png: not a readable image' in capsys.readouterr().err

    assert main(['train', str(path), 'resume=restart', f'data.train={data}/val', f'data.val={data}/val']) == 0
    assert 'skipped 4 training and 4' in capsys.readouterr().out


def test_the_count_is_printed_where_nothing_is_skipped_too(tmp_path, capsys):
    data = write_tree(tmp_path / 'data')
    path = tmp_path / 'recipe.yaml'
    path.write_text(to_yaml(recipe(data, tmp_path / 'run')))
    assert main(['train', str(path), 'sched.epochs=1']) == 0
    assert '; skipped 0 training and 0 validation images' in capsys.readouterr().out
    assert not (tmp_path / 'run/skipped.txt').exists()


@pytest.mark.parametrize('stop', [3, 9])
@pytest.mark.parametrize('cache', [False, True])
def test_going_on_mid_epoch_makes_no_difference(data, tmp_path, monkeypatch, stop, cache):
    train(recipe(data, tmp_path / 'whole'))
    config = recipe(data, tmp_path / 'parts', checkpoint_steps=1)
    update = Trainer.update

    def stopping(self, chunk):
        return update(self, chunk) if self.state.progress.updates < stop else fail()

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        patch.setattr(Trainer, 'update', stopping)
        train(config)
    assert load_checkpoint(tmp_path / 'parts/checkpoint.pt')['progress']['updates'] == stop
    config.resume, config.data.workers, config.data.cache = 'auto', 2, cache
    train(config)
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')
    whole, parts = (json.loads((tmp_path / name / 'result.json').read_text()) for name in ('whole', 'parts'))
    assert all(whole[key] == parts[key] for key in ('train_skipped', 'val_skipped', 'top1'))
    texts = [(tmp_path / name / 'skipped.txt').read_text() for name in ('whole', 'parts')]
    assert texts[0] == texts[1]


@pytest.mark.distributed
def test_two_processes_count_together(data, tmp_path):
    train_on_one_and_two_processes(lambda output: recipe(data, output), tmp_path, batch_size=10)
    first, second = met(data, size=30)
    for count in '12':
        folder = tmp_path / count
        result = json.loads((folder / 'result.json').read_text())
        assert (result['train_skipped'], result['val_skipped']) == (len(first | second), 4)
        assert [line['images'] for line in lines_of(folder, 'skipped')] == [len(first), len(second)]
    texts = [(tmp_path / count / 'skipped.txt').read_text() for count in '12']
    assert texts[0] == texts[1]


def test_a_set_of_which_nothing_can_be_read_is_an_error(data, tmp_path):
    for split in ('train', 'val'):
        for label in range(3):
            folder = tmp_path / split / f'c{label}'
            folder.mkdir(parents=True)
            for number in range(8):
                (folder / f'{number}.png').touch()
    for key in ('train', 'val'):
        config = recipe(data, tmp_path / 'run')
        setattr(config.data, key, str(tmp_path / key))
        with pytest.raises(ValueError, match=rf'none of 24 samples can be read; the first one: \S*{key}/c0/0\.png'):
            train(config)
        assert not (tmp_path / 'run').exists()


def test_what_does_not_fit_ends_a_run_that_skips(tmp_path):
    data = write_tree(tmp_path / 'data')
    np.save(data / 'train/c1/five.npy', pixels(0, (9, 9, 5)))
    with pytest.raises(ValueError, match=r'c1/five\.npy: it has 5 channels, the model takes 3'):
        train(recipe(data, tmp_path / 'run'))
    images = [(Image.fromarray(pixels(i, (9, 9, 3))), i) for i in range(4)]
    config = recipe(data, tmp_path / 'labels')
    config.model.args['num_classes'] = 3
    with pytest.raises(ValueError, match='sample 3: its label 3 is not among the 3 classes'):
        train(config, images, images)


def test_the_recipe_is_checked(data):
    config = tiny_recipe(data, 'unused')
    config.data.on_error = 'ignore'
    with pytest.raises(ValueError, match=r"data\.on_error must be error or skip, got 'ignore'"):
        validate(config)
    config.data.on_error, config.data.batch_size, config.loss.mixup, config.loss.cutmix = 'skip', 1, 0.0, 0.0
    with pytest.raises(ValueError, match=r'data\.batch_size must be at least 2 for data\.on_error=skip, got 1'):
        validate(config)
    config.data.on_error = 'error'
    validate(config)
