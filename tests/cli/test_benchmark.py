import json

import pytest
import timm
import torch

from vit_efficient.benchmark import squarest_grid, take_turns
from vit_efficient.cli import main
from vit_efficient.flops import count_flops

SMALL = ['--dim', '32', '--heads', '2', '--tokens', '36', '91', '--rounds', '2']


def test_layer(capsys, tmp_path):
    out = tmp_path / 'layer.json'
    attentions = ['--attentions', 'dct', 'dct:keep_ratio=1/9,place=kv', 'dct1d']
    assert main(['benchmark', 'layer', *SMALL, *attentions, '--format', 'json', '--out', str(out)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads(out.read_text())
    assert len(rows) == 2 * 2 * 4
    exact = rows[0]
    assert (exact['attention'], exact['attended'], exact['ratio']) == ('exact (timm)', 36, 1)
    assert exact['gmacs'] == pytest.approx((4 * 36 * 32 * 32 + 2 * 36 * 36 * 32) / 1e9)
    assert [row['attended'] for row in rows[:4]] == [36, 9, 4, 9]
    for row in rows:
        first = next(r for r in rows if (r['tokens'], r['work']) == (row['tokens'], row['work']))
        assert row['ratio'] == pytest.approx(first['milliseconds'] / row['milliseconds'])
        assert 0 < row['milliseconds'] <= row['median_milliseconds']


def test_layer_counts_what_count_flops_counts(capsys):
    from vit_efficient import create_attention
    from vit_efficient.benchmark import _OnGrid

    main(['benchmark', 'layer', *SMALL, '--attentions', 'dct', '--format', 'json', '--batch-size', '3'])
    row = json.loads(capsys.readouterr().out)[1]
    layer = _OnGrid(create_attention('dct', 32, 2), squarest_grid(36))
    assert row['gmacs'] == pytest.approx(3 * count_flops(layer, (32, 6, 6)).total / 1e9)


def test_markdown_says_on_what_it_was_measured(capsys):
    assert main(['benchmark', 'layer', *SMALL, '--attentions', 'dct']) == 0
    text = capsys.readouterr().out
    assert f'timm {timm.__version__}' in text and 'd = 32, 2 heads, batch 1, float32, cpu' in text


def test_grids():
    assert (squarest_grid(91).height, squarest_grid(91).width) == (7, 13)
    assert (squarest_grid(13).height, squarest_grid(13).width) == (1, 13)


def test_turns():
    order = []
    timed = take_turns([lambda: order.append('a'), lambda: order.append('b')], torch.device('cpu'), 3, seconds=1e-9)
    assert [len(times) for times in timed] == [3, 3]
    assert ''.join(order) == 'aabb' + 'ab' * 3


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        (['--attentions', 'dtc'], "'dct'"),
        (['--attentions', 'dct:keep_ratio'], 'keep_ratio'),
        (['--attentions', 'dct:keep_ratio=2'], 'keep_ratio=2'),
        (['--tokens', '0'], 'tokens=0'),
        (['--heads', '5'], 'num_heads=5'),
        (['--rounds', '0'], 'rounds=0'),
        (['--threads', '0'], '--threads'),
        (['--device', 'cudda'], 'cudda'),
    ],
)
def test_bad_arguments_are_one_line(options, named, capsys):
    assert main(['benchmark', 'layer', '--dim', '32', '--heads', '2', *options]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count('\n') == 1
