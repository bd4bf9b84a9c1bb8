import csv
import json
import math

import pytest
import timm

from vit_efficient import list_attentions
from vit_efficient.benchmark import Candidate, LayerSetting, layers, timing
from vit_efficient.flops import count_flops
from vit_efficient_cli import main

pytestmark = [pytest.mark.usefixtures('short_clocks'), pytest.mark.once]
SMALL = ['--dim', '32', '--heads', '2', '--rounds', '2']
FAST = [*SMALL, '--tokens', '36', '91', '--no-memory']


def test_layer(capsys, tmp_path):
    out = tmp_path / 'new' / 'layer.json'
    attentions = ['--attentions', 'dct', 'dct:keep_ratio=1/9,place=kv', 'dct1d']
    assert main(['benchmark', 'layer', *FAST, *attentions, '--format', 'json', '--out', str(out)]) == 0
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
        assert row['rounds'] == 2 and row['error'] is row['peak_mib'] is None
        small, large = (r for r in rows if (r['attention'], r['work']) == (row['attention'], row['work']))
        rise = math.log(large['milliseconds'] / small['milliseconds']) / math.log(91 / 36)
        assert row['slope'] == pytest.approx(rise)


def test_csv_and_plot_lie_beside_the_table(capsys, tmp_path):
    out = tmp_path / 'layer.md'
    assert main(['benchmark', 'layer', *FAST, '--attentions', 'dct', '--out', str(out)]) == 0
    printed = capsys.readouterr()
    assert out.read_text() == printed.out
    assert len(printed.err.splitlines()) == 2 * 2  # each block, as it is done
    rows = list(csv.DictReader((tmp_path / 'layer.csv').read_text().splitlines()))
    assert len(rows) == 2 * 2 * 2
    assert [float(row['slope']) for row in rows[:4]] == [float(row['slope']) for row in rows[4:]]
    assert f'{float(rows[5]["milliseconds"]):,.1f}' in printed.out
    assert (tmp_path / 'layer.png').read_bytes().startswith(b'\x89PNG')
    assert {path.name for path in tmp_path.iterdir()} == {'layer.md', 'layer.csv', 'layer.png'}


def test_csv_alone(capsys, tmp_path):
    out = tmp_path / 'layer.csv'
    assert main(['benchmark', 'layer', *FAST, '--attentions', 'dct', '--format', 'csv', '--out', str(out)]) == 0
    assert out.read_text() == capsys.readouterr().out
    assert list(csv.DictReader(out.read_text().splitlines()))[1]['attention'] == 'dct'


def test_by_default_all_attentions(capsys):
    assert main(['benchmark', 'layer', *SMALL, '--tokens', '256', '--no-memory', '--format', 'json']) == 0
    rows = json.loads(capsys.readouterr().out)
    names = [name for name in list_attentions() if name != 'full']
    expected = ['exact (timm)', *names, 'dct (keep_ratio=0.0625)']
    assert [row['attention'] for row in rows] == expected * 2
    assert [row['error'] for row in rows] == [None] * len(rows)
    assert all(row['slope'] is None for row in rows)  # of one N


def test_prefix_tokens(capsys):
    command = ['benchmark', 'layer', *FAST, '--attentions', 'dct', '--prefix', '5']
    assert main([*command, '--format', 'json']) == 0
    assert [row['attended'] for row in json.loads(capsys.readouterr().out)[:2]] == [41, 14]
    assert main(command) == 0
    assert 'batch 1, float32, 5 prefix tokens, cpu' in capsys.readouterr().out


@pytest.fixture
def plotted(monkeypatch):
    """The lines of plots: (work, label) and points."""
    from matplotlib.figure import Figure

    lines = {}

    def save(figure, *_, **__):
        for axes in figure.axes:
            for line in axes.lines:
                points = dict(zip(map(float, line.get_xdata()), line.get_ydata(), strict=True))
                lines[axes.get_title(), line.get_label()] = points

    monkeypatch.setattr(Figure, 'savefig', save)
    return lines


def test_a_sweep_of_layers(capsys, tmp_path, plotted):
    out = tmp_path / 'layer.md'
    sweep = ['--attentions', 'dct', '--batch-size', '1', '3', '--dtype', 'float32', 'bfloat16', '--out', str(out)]
    assert main(['benchmark', 'layer', *FAST, *sweep]) == 0
    printed = capsys.readouterr()
    assert 'batch 1 / 3, float32 / bfloat16' in printed.out
    assert 'N = 91, forward, batch 3, bfloat16: done' in printed.err
    rows = list(csv.DictReader(out.with_suffix('.csv').read_text().splitlines()))
    assert [row['batch_size'] + row['dtype'] for row in rows[::8]] == ['1float32', '1bfloat16', '3float32', '3bfloat16']
    assert len(rows) == 4 * 2 * 2 * 2 and len(plotted) == 4 * 2 * 2
    assert float(rows[16]['gmacs']) == pytest.approx(3 * float(rows[0]['gmacs']))
    for i, row in enumerate(rows):
        milliseconds = float(row['milliseconds'])
        assert float(row['ratio']) == pytest.approx(float(rows[i - i % 2]['milliseconds']) / milliseconds)
        line = plotted[row['work'], f'{row["attention"]}, batch {row["batch_size"]}, {row["dtype"]}']
        assert line[int(row['tokens'])] == milliseconds
        assert float(row['slope']) == pytest.approx(math.log(line[91] / line[36]) / math.log(91 / 36))
    slopes = [line.split('|')[1].strip() for line in printed.out.split('\n\n')[1].splitlines()[2:]]
    assert slopes == list(dict.fromkeys(label for _, label in plotted))


def test_a_sweep_of_models(capsys, tmp_path, plotted):
    out = tmp_path / 'model.md'
    model = 'vit_tiny_patch16_224:patch_size=8,embed_dim=16,depth=1,num_heads=2'
    command = ['benchmark', 'model', '--models', model, '--img-sizes', '16', '--rounds', '1', '--no-memory']
    assert main([*command, '--labels', 'ViT', '--batch-size', '1', '2', '--out', str(out)]) == 0
    head, _, *lines = [line.split('|')[1:3] for line in capsys.readouterr().out.split('\n\n')[0].splitlines()]
    assert [[cell.strip() for cell in line] for line in [head, *lines]] == [['batch', 'px'], ['1', '16'], ['2', '16']]
    assert list(plotted) == [('inference', 'ViT, batch 1'), ('inference', 'ViT, batch 2')]


def test_layer_counts_what_count_flops_counts(capsys):
    main(['benchmark', 'layer', *FAST, '--attentions', 'dct', '--format', 'json', '--batch-size', '3'])
    row = json.loads(capsys.readouterr().out)[1]
    layer = LayerSetting(32, 2).layer(Candidate('dct'), 36)
    assert row['gmacs'] == pytest.approx(3 * count_flops(layer, (32, 6, 6)).total / 1e9)


def test_memory(capsys, monkeypatch):
    monkeypatch.setattr(timing, 'peak_in_child', lambda make: 98_765 * 2**20)
    assert main(['benchmark', 'layer', *SMALL, '--tokens', '36', '--attentions', 'dct']) == 0
    text = capsys.readouterr().out
    assert text.count(' 98,765.0 |') == 4 and 'peak MiB' in text and 'Peak: ' in text


def test_markdown_says_on_what_it_was_measured(capsys, monkeypatch):
    monkeypatch.setenv('MKL_DYNAMIC', 'FALSE')
    assert main(['benchmark', 'layer', *FAST, '--attentions', 'dct']) == 0
    text = capsys.readouterr().out
    assert 'MKL_DYNAMIC=FALSE' in text and 'spread: ' in text
    assert f'timm {timm.__version__}' in text and 'd = 32, 2 heads, batch 1, float32, cpu' in text
    assert 'peak' not in text.lower() and 'error' not in text
    head, *lines = [line.split('|')[1:-1] for line in text.split('\n\n')[1].splitlines()]
    assert [cell.strip() for cell in head] == ['slope', 'forward', 'forward+backward']
    assert [line[0].strip() for line in lines[1:]] == ['exact (timm)', 'dct']


def test_the_spread_of_one_round_is_not_known(capsys):
    assert main(['benchmark', 'layer', *FAST, '--rounds', '1', '--tokens', '16', '--attentions', 'dct']) == 0
    head, _, *lines = [line.split('|') for line in capsys.readouterr().out.split('\n\n')[0].splitlines()]
    at = [cell.strip() for cell in head].index('spread %')
    assert head[at - 1].strip() == 'median ms'
    assert [line[at].strip() for line in lines] == ['–'] * 4


def test_markdown_says_what_failed(capsys, monkeypatch):
    forward = layers.LayerOnGrid.forward

    def fail(self, x):
        if not x.is_meta and x.shape[1] == 91 and x.requires_grad and not self.training:
            raise RuntimeError('out of memory')
        return forward(self, x)

    monkeypatch.setattr(layers.LayerOnGrid, 'forward', fail)
    sizes = ['--tokens', '16', '36', '91']
    assert main(['benchmark', 'layer', *FAST, *sizes, '--attentions', 'dct']) == 0
    table, slopes, _ = capsys.readouterr().out.split('\n\n')
    failed = [line for line in table.splitlines() if 'RuntimeError: out of memory' in line]
    assert len(failed) == 2 and all(line.split('|')[2].strip() == 'forward' for line in failed)
    assert slopes.splitlines()[3].split('|')[-2].strip() == '91 forward'
    assert '–' not in slopes.splitlines()[3]


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        (['--attentions', 'dtc'], 'did you mean dct?'),
        (['--attentions', 'dct:keep_ratio'], 'keep_ratio'),
        (['--attentions', 'dct:keep_ratio=2'], 'keep_ratio=2'),
        (['--attentions', 'dct:place=block'], "place='block'"),
        (['--prefix', '-1'], 'prefix=-1'),
        (['--tokens', '0'], 'tokens=0'),
        (['--heads', '5'], 'num_heads=5'),
        (['--batch-size', '2', '2'], '2 is given twice'),
        (['--batch-size', '2', '0'], 'batch_size=0'),
        (['--dtype', 'float32', 'float32'], 'float32 is given twice'),
        (['--rounds', '0'], 'rounds=0'),
        (['--max-seconds', '0'], 'max_seconds=0'),
        (['--threads', '0'], '--threads'),
        (['--device', 'cudda'], 'cudda'),
        (['--out', 'table.png'], 'table.png'),
        (['--out', 'table.csv'], 'table.csv'),
    ],
)
def test_bad_arguments_are_one_line(options, named, capsys):
    assert main(['benchmark', 'layer', '--dim', '32', '--heads', '2', *options]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count('\n') == 1
