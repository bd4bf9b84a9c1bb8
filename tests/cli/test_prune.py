import json

import pytest
import timm
import torch

from tests.data.trees import write_tree
from tests.train.recipes import tiny_recipe
from vit_efficient.prune import METHODS, densities
from vit_efficient.train import load_model, train
from vit_efficient_cli import main
from vit_efficient_cli import prune as command


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    config = tiny_recipe(write_tree(folder / 'data'), folder / 'run')
    config.sched.epochs = 1
    train(config)
    return folder / 'run'


def test_a_run_is_pruned_and_what_is_left_is_listed(run, tmp_path, capsys):
    assert main(['prune', str(run), '--keep', '1/10', '--out', str(tmp_path / 'pruned')]) == 0
    printed = capsys.readouterr()
    assert printed.err == ''
    *lines, saved = printed.out.splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]
    assert ['blocks.0.attn.qkv, q', 'q', '144'] in [row[:3] for row in rows]
    assert [row[1] for row in rows if row[0] == '–'] == [
        *('patch embedding', 'q', 'k', 'v', 'proj', 'mlp', 'head', 'all')
    ]
    assert ['head', 'head', '36', '36', '1.000'] in rows
    assert rows[-1] == ['–', 'all', '4,068', '439', '0.108']
    assert saved == (f'saved {tmp_path}/pruned: 439 of 4,068 weights of linear layers and convolutions are not 0')
    model = timm.create_model(f'local-dir:{tmp_path}/pruned', pretrained=True)
    assert sum(each.left for each in densities(model)) == 439
    config = json.loads((tmp_path / 'pruned/config.json').read_text())
    assert config['pruned'] == {'method': 'lamp', 'keep': 0.1, 'skip': ['head']} and config['label_names'] == [
        'c0',
        'c1',
        'c2',
    ]
    before = load_model(run)
    assert torch.equal(model.blocks[0].norm1.weight, before.blocks[0].norm1.weight)


def test_shares_are_of_all_weights_and_tables_of_any_format(run, tmp_path, capsys):
    half, fifth = str(tmp_path / 'half'), str(tmp_path / 'fifth')
    assert main(['prune', str(run), '--keep', '0.5', '--method', 'erk', '--out', half]) == 0
    arguments = ['prune', half, '--keep', '0.2', '--skip', '--method', 'global', '--out', fifth, '--format', 'json']
    capsys.readouterr()
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[-1] == {'layer': None, 'role': 'all', 'weights': 4068, 'left': 814, 'density': 814 / 4068}
    assert sum(row['left'] for row in rows if row['layer']) == 814
    assert command.METHODS == METHODS


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--keep', '0'], "--keep must be a share above 0 and at most 1, such as 1/10, got '0'"),
        (['--keep', 'most'], "got 'most'"),
        (['--keep', '0.5', '--skip', 'blok'], "skip: the model has no module 'blok'"),
        (['--keep', '1e-9'], 'none would be left'),
        (['--keep', '0.01', '--method', 'uniform+'], "method='uniform+' keeps 576 weights of the first and last layer"),
    ],
)
def test_what_does_not_fit_is_named(run, tmp_path, capsys, options, message):
    assert main(['prune', str(run), '--out', str(tmp_path / 'out'), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_a_model_is_not_overwritten_nor_filled_again(run, tmp_path, capsys):
    half = str(tmp_path / 'half')
    assert main(['prune', str(run), '--keep', '0.5', '--out', half]) == 0
    for taken in (str(run), str(run / 'model'), half):
        assert main(['prune', str(run), '--keep', '0.5', '--out', taken]) == 2
        assert f'--out {taken}: holds something already; name a new folder' in capsys.readouterr().err
    assert main(['prune', half, '--keep', '0.6', '--out', str(tmp_path / 'more')]) == 2
    assert '--keep=0.6: only 0.500 of the weights are left already; keep fewer' in capsys.readouterr().err
    assert main(['prune', 'nothing', '--keep', '0.6', '--out', half]) == 2
    assert 'nothing: no such run or model folder' in capsys.readouterr().err
