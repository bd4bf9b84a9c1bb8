import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from vit_efficient.train import config, load_recipe
from vit_efficient_cli import main

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    rows = [
        dict(key='optim.lr', type='float', default=1e-3, range='above 0', resume=False, help='Learning rate.'),
        dict(key='data.workers', type='int', default=4, range='at least 0', resume=True, help='Loader processes.'),
        dict(
            key='clip_grad', type='float?', default=None, range='above 0', resume=False, help='Largest norm | or none'
        ),
    ]
    monkeypatch.setattr(config, 'describe_keys', lambda: rows, raising=False)


def test_keys_as_a_table(capsys):
    assert main(['recipe', 'keys']) == 0
    head, rule, lr, workers, clip = capsys.readouterr().out.splitlines()
    assert ':' not in rule
    cells = [
        [cell.strip() for cell in line.replace(r'\|', 'or').split('|')[1:-1]] for line in (head, lr, workers, clip)
    ]
    assert cells == [
        ['key', 'type', 'default', 'range', 'may change on resumption', 'meaning'],
        ['optim.lr', 'float', '0.001', 'above 0', 'no', 'Learning rate.'],
        ['data.workers', 'int', '4', 'at least 0', 'yes', 'Loader processes.'],
        ['clip_grad', 'float?', 'null', 'above 0', 'no', 'Largest norm or or none'],
    ]


def test_keys_for_programs(capsys):
    assert main(['recipe', 'keys', '--format', 'json']) == 0
    assert json.loads(capsys.readouterr().out) == config.describe_keys()
    assert main(['recipe', 'keys', '--format', 'csv']) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row['key'] for row in rows] == ['optim.lr', 'data.workers', 'clip_grad'] and rows[2]['default'] == 'null'


@pytest.mark.parametrize(('word', 'found'), [('LR', ['optim.lr']), ('processes', ['data.workers'])])
def test_keys_by_a_word_in_their_name_or_meaning(word, found, capsys):
    assert main(['recipe', 'keys', '--like', word, '--format', 'json']) == 0
    assert [row['key'] for row in json.loads(capsys.readouterr().out)] == found


def test_a_word_that_no_key_has(capsys):
    assert main(['recipe', 'keys', '--like', 'clip_gard']) == 2
    assert "no key has 'clip_gard' in its name or meaning; did you mean clip_grad?" in capsys.readouterr().err


def test_what_comes_with_the_package(capsys):
    assert main(['recipe', 'list']) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {'images', 'slurm.sh', 'imagenet1k/', 'mnist5k/'} <= set(names) and 'benchmarks/' not in names
    assert main(['recipe', 'list', 'mnist5k']) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines['mnist5k/full'] == 'Exact attention on 5,000 MNIST digits (64 patches)'
    assert lines['mnist5k/prepare.py'].startswith('Writes the 5,000 MNIST digits') and 'mnist5k/options/' in lines


@pytest.mark.parametrize('name', ['images', 'images.yaml', 'recipes/images.yaml'])
def test_a_recipe_is_printed(name, capsys):
    assert main(['recipe', 'show', name]) == 0
    assert capsys.readouterr().out == (ROOT / 'recipes' / 'images.yaml').read_text(encoding='utf-8')


@pytest.mark.parametrize(
    ('name', 'copied'),
    [
        ('mnist5k/options/kv', ['mnist5k/base.yaml', 'mnist5k/dct.yaml', 'mnist5k/options/kv.yaml']),
        (
            'imagenet1k/distill/dct_small',
            [f'imagenet1k/{x}.yaml' for x in ('base', 'deit3', 'deit3/dct_small', 'distill/dct_small')],
        ),
        ('slurm.sh', ['slurm.sh']),
    ],
)
def test_a_copy_has_what_it_extends(name, copied, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['recipe', 'copy', name]) == 0
    assert sorted(capsys.readouterr().out.split()) == [f'recipes/{path}' for path in copied]
    assert sorted(path.as_posix() for path in Path().rglob('*') if path.is_file()) == [
        f'recipes/{path}' for path in copied
    ]
    if name != 'slurm.sh':
        config = load_recipe(f'recipes/{name}.yaml')
        assert config.output == f'runs/{name}'
        assert config == replace(load_recipe(ROOT / f'recipes/{name}.yaml'), recipe=config.recipe)


def test_a_folder_is_copied_and_nothing_overwritten(tmp_path, capsys):
    command = ['recipe', 'copy', 'mnist5k', 'images', '--to', str(tmp_path)]
    assert main(command) == 0
    copied = {path.relative_to(tmp_path) for path in tmp_path.rglob('*') if path.is_file()}
    assert {Path('images.yaml'), Path('mnist5k/prepare.py'), Path('mnist5k/treeformer/tc.yaml')} <= copied
    assert main(command) == 0  # the same again
    (tmp_path / 'mnist5k' / 'dct.yaml').write_text('mine: 1')
    (tmp_path / 'mnist5k' / 'base.yaml').unlink()
    capsys.readouterr()
    assert main(command) == 2
    assert f'{tmp_path}/mnist5k/dct.yaml is there and differs' in capsys.readouterr().err
    assert not (tmp_path / 'mnist5k' / 'base.yaml').exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / 'file').touch()
    assert main(['recipe', 'copy', 'images', '--to', f'{tmp_path}/file']) == 2
    expected = f'error: {tmp_path}/file/images.yaml cannot be written: File exists; name another folder by --to\n'
    assert capsys.readouterr().err.endswith(expected)


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        (['show', 'imges'], 'imges: no such recipe; did you mean images?'),
        (['copy', 'mnist5k/dtc'], 'mnist5k/dtc: no such recipe; did you mean mnist5k/dct?'),
        (['list', 'minst5k'], 'did you mean mnist5k/?'),
        (['show', 'mnist5k'], 'mnist5k is a folder of recipes'),
        (['show', '../setup.py'], '../setup.py: no such recipe'),
    ],
)
def test_recipes_that_are_not_there(command, message, capsys):
    assert main(['recipe', *command]) == 2
    assert message in capsys.readouterr().err
