import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vit_efficient.cli import main
from vit_efficient.flops import count_flops

RECIPE = """
model:
  name: {name}
  args: {{img_size: 16, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2}}
data: {{train: {data}/train, val: {data}/val, batch_size: 8, workers: 0}}
sched: {{epochs: 1, warmup_epochs: 0}}
threads: {threads}
"""


def test_flops_prints_what_count_flops_counts(capsys):
    models = ['vit_full_tiny', 'vit_dct_tiny', 'resnet18']
    options = ['--attention-kwargs', 'keep_ratio=1/16', 'domain=frequency']
    command = ['table', 'flops', '--models', *models, '--img-sizes', '64', '128', *options, '--format', 'json']
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row['img_size'], row['model']) for row in rows] == [(size, m) for size in (64, 128) for m in models]
    model = timm.create_model(
        'vit_dct_tiny', img_size=128, attention_kwargs={'keep_ratio': 1 / 16, 'domain': 'frequency'}
    )
    count = count_flops(model, (3, 128, 128))
    row = rows[4]
    assert row['gmacs'] == count.total / 1e9
    assert row['ratio'] == pytest.approx(row['gmacs'] / rows[3]['gmacs'])
    roles = ('attention_products', 'attention_projections', 'transform')
    assert row['attention_gmacs'] == pytest.approx(sum(row[f'{role}_gmacs'] for role in roles))
    assert row['tokens'] == 65 and rows[5]['tokens'] is None
    assert row['parameters_m'] == sum(p.numel() for p in model.parameters()) / 1e6


def test_flops_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / 'new' / 'table.csv'
    assert main(['table', 'flops', '--models', 'vit_full_tiny', '--format', 'csv', '--out', str(out)]) == 0
    assert out.read_text() == capsys.readouterr().out
    assert [row['img_size'] for row in csv.DictReader(out.open())] == ['224']


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        (['--models', 'vit_dct_tinny'], 'vit_dct_tiny'),
        (['--models', 'vit_dct_tiny', '--img-sizes', '225'], '225'),
        (['--models', 'vit_tiny_patch16_224', '--img-sizes', '225'], '225'),
        (['--models', 'vit_dct_tiny', '--img-sizes', '0'], '--img-sizes'),
        (['--models', 'vit_dct_tiny', '--attention-kwargs', 'keep_ratio'], 'keep_ratio'),
        (['--models', 'vit_dct_tiny', '--attention-kwargs', 'keep_ratio=2'], 'keep_ratio'),
    ],
)
def test_flops_names_bad_arguments_in_one_line(options, named, capsys):
    assert main(['table', 'flops', *options]) == 2
    out, err = capsys.readouterr()
    assert not out and named in err and err.count('\n') == 1


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
    with Image.open(trained / 'results.png') as plot:
        assert plot.format == 'PNG'


def test_accuracy_reuses_finished_runs(trained, recipes, tmp_path):
    before = [(trained / f'{name}-s0/result.json').stat().st_mtime_ns for name in ('full', 'dct')]
    assert main(command(recipes, trained, '--out', str(tmp_path), 'log_every=7')) == 0
    assert before == [(trained / f'{name}-s0/result.json').stat().st_mtime_ns for name in ('full', 'dct')]
    assert {path.name for path in tmp_path.iterdir()} == {'results.md', 'results.csv', 'results.png'}


@pytest.mark.parametrize('override', ['optim.lr=0.5', 'model.args.depth=2', 'data.val=elsewhere'])
def test_accuracy_does_not_reuse_runs_of_another_recipe(override, trained, recipes, capsys):
    assert main(command(recipes, trained, override)) == 2
    err = capsys.readouterr().err
    assert override.split('=')[0].removesuffix('.depth') in err and '--runs' in err and err.count('\n') == 1


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
