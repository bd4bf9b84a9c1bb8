"""Curves of runs: what is read, what is drawn, and what is said of folders that are no runs."""

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from vit_efficient.report.curves import known_values, plot_curves, points_of
from vit_efficient.train.log import read_metrics
from vit_efficient_cli import main

pytestmark = pytest.mark.once


def write_run(folder, epochs=3, per_epoch=4, extra=''):
    folder.mkdir(parents=True)
    lines = []
    for epoch in range(epochs):
        for step in range(epoch * per_epoch + 2, (epoch + 1) * per_epoch + 1, 2):
            lines.append({'kind': 'train', 'epoch': epoch, 'step': step, 'loss': 9 - step / 2, 'lr': 0.1})
        values = {'loss': 5.0 - epoch, 'top1': 10.0 * epoch, 'train_seconds': 1800.0 * (epoch + 1)}
        lines.append({'kind': 'val', 'epoch': epoch, 'step': (epoch + 1) * per_epoch, **values})
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + extra)
    return folder


def test_points(tmp_path):
    lines = read_metrics(write_run(tmp_path / 'run', extra='{"kind": "tra'))
    assert known_values(lines) == ['train/loss', 'train/lr', 'val/loss', 'val/top1', 'val/train_seconds']
    assert points_of(lines, 'val/top1', 'epoch') == [(1, 0), (2, 10), (3, 20)]
    assert points_of(lines, 'val/top1', 'hours') == [(0.5, 0), (1, 10), (1.5, 20)]
    assert points_of(lines, 'train/loss', 'step')[:2] == [(2, 8), (4, 7)]
    assert points_of(lines, 'train/loss', 'epoch')[:2] == [(0.5, 8), (1, 7)]
    assert points_of(lines, 'train/loss', 'hours') == []


def test_a_line_for_each_run(tmp_path, monkeypatch):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    runs = [write_run(tmp_path / name) for name in ('a/s0', 'a/s1', 'b/s0')]
    assert plot_curves(runs, tmp_path / 'c.png')[0] == ['train/loss', 'val/loss', 'val/top1']
    panels = figures[0].axes
    assert [len(axes.lines) for axes in panels] == [3, 3, 3]
    assert [line.get_label() for line in panels[0].lines] == ['a/s0', 'a/s1', 'b/s0']
    assert [axes.get_title() for axes in panels] == ['train/loss', 'val/loss', 'val/top1']
    assert plot_curves(runs, tmp_path / 'h.svg', against='hours')[0] == ['val/loss', 'val/top1']


def test_runs_too_short_for_lines_of_updates_have_a_training_loss(tmp_path, monkeypatch):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    lines = [{'kind': 'val', 'epoch': epoch, 'step': 3 * epoch + 3, 'train_loss': 2.0 - epoch} for epoch in range(2)]
    (tmp_path / 'short').mkdir()
    (tmp_path / 'short/metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert points_of(lines, 'train/loss', 'epoch') == [(1, 2), (2, 1)]
    assert points_of([{'kind': 'train', 'step': 5, 'loss': 9}, *lines], 'train/loss', 'epoch') == [(1, 2), (2, 1)]
    assert plot_curves([tmp_path / 'short'], tmp_path / 'c.png')[0] == ['train/loss']
    assert plot_curves([tmp_path / 'short', write_run(tmp_path / 'long')], tmp_path / 'c.png')[0][0] == 'train/loss'
    assert [len(axes.lines) for axes in figures[1].axes] == [2, 1, 1]


def test_short_and_equal_runs_are_seen(tmp_path, monkeypatch):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    runs = [write_run(tmp_path / name, epochs) for name, epochs in (('one', 1), ('a', 3), ('b', 3), ('long', 30))]
    plot_curves(runs[:1], tmp_path / 'c.png', ['val/top1'])
    low, high = figures[0].axes[0].get_xlim()
    assert [tick for tick in figures[0].axes[0].get_xticks() if low <= tick <= high] == [1]
    plot_curves(runs, tmp_path / 'd.png', ['val/top1'])
    one, first, second, long = figures[1].axes[0].lines
    assert all(line.get_marker() != 'None' for line in (one, first, second)) and long.get_marker() == 'None'
    assert first.get_linewidth() >= second.get_linewidth() + 1 and first.get_markersize() > second.get_markersize()
    plot_curves(runs[1:2], tmp_path / 'e.png', ['val/top1'])
    assert all(tick == int(tick) for tick in figures[2].axes[0].get_xticks())


FIRST_EPOCH = [{'kind': 'train', 'epoch': 0, 'step': step, 'loss': 5 - step} for step in (1, 2)]


def write_lines(folder, lines, per_epoch=None):
    folder.mkdir()
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if per_epoch:
        (folder / 'environment.json').write_text(json.dumps({'scale': {'updates_per_epoch': per_epoch}}))
    return folder


def test_a_run_in_its_first_epoch(tmp_path, monkeypatch, capsys):
    """Its environment tells how many updates an epoch has, until an evaluation does."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    plot_curves([write_lines(tmp_path / 'told', FIRST_EPOCH, 8)], tmp_path / 'c.png')
    assert figures[0].axes[0].lines[0].get_xydata().tolist() == [[0.125, 4], [0.25, 3]]
    evaluated = [*FIRST_EPOCH, {'kind': 'val', 'epoch': 0, 'step': 2}]
    assert points_of(evaluated, 'train/loss', 'epoch', 8) == [(0.5, 4), (1, 3)]
    untold, out = write_lines(tmp_path / 'untold', FIRST_EPOCH), tmp_path / 'd.png'
    assert main(['plot', str(untold), '--out', str(out)]) == 2
    assert f'{untold}: nothing to draw against epoch, it has train/loss; --against step' in capsys.readouterr().err
    assert not out.exists()
    assert main(['plot', str(untold), '--out', str(out), '--against', 'step']) == 0


def test_runs_without_curves_are_left_out(tmp_path, monkeypatch, capsys):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    runs = [write_lines(tmp_path / 'empty', []), write_lines(tmp_path / 'untold', FIRST_EPOCH)]
    runs = [str(run) for run in (*runs, write_run(tmp_path / 'good'))]
    assert main(['plot', *runs, '--out', str(tmp_path / 'c.png')]) == 0
    out, err = capsys.readouterr()
    assert out.endswith('of 1 runs\n') and [line.get_label() for line in figures[0].axes[0].lines] == ['good']
    empty, untold = err.splitlines()
    assert empty == f'left out: {runs[0]}/metrics.jsonl is empty: the run has not come to its first line'
    assert untold.startswith(f'left out: {runs[1]}: nothing to draw against epoch')
    assert main(['plot', *runs[:2], '--out', str(tmp_path / 'd.png')]) == 2
    err = capsys.readouterr().err
    assert all(run in err for run in runs[:2]) and err.count('\n') == 1
    assert main(['plot', *runs, str(tmp_path / 'typo'), '--out', str(tmp_path / 'd.png')]) == 2
    assert not (tmp_path / 'd.png').exists()


@pytest.mark.parametrize('gap', ['null', 'NaN', 'Infinity'])
def test_values_that_are_not_finite_are_passed_over(gap, tmp_path):
    folder = write_run(tmp_path / 'run')
    path = folder / 'metrics.jsonl'
    path.write_text(path.read_text().replace('"loss": 4.0', f'"loss": {gap}').replace('"lr": 0.1', f'"lr": {gap}'))
    lines = read_metrics(folder)
    assert points_of(lines, 'val/loss', 'epoch') == [(1, 5), (3, 3)]
    assert 'train/lr' not in known_values(lines) and 'val/loss' in known_values(lines)
    assert plot_curves([folder], tmp_path / 'c.png')[0] == ['train/loss', 'val/loss', 'val/top1']


def test_a_folder_in_the_place_of_the_figure(tmp_path, capsys):
    assert main(['plot', str(write_run(tmp_path / 'run')), '--out', str(tmp_path)]) == 2
    assert f'error: --out={tmp_path} is a folder' in capsys.readouterr().err


def test_by_command(tmp_path, capsys):
    run, out = write_run(tmp_path / 'run'), tmp_path / 'curves.png'
    assert main(['plot', str(run), '--values', 'train/lr', 'val/top1', '--out', str(out)]) == 0
    assert capsys.readouterr().out == f'saved {out}: train/lr, val/top1 of 1 runs\n'
    assert Image.open(out).width > 900


@pytest.mark.parametrize(
    'text, options, message',
    [
        (None, [], 'cannot be read: No such file or directory; give the folder of a run'),
        ('', [], 'is empty'),
        ('[1]\n', [], 'line 1: not a line of metrics'),
        ('nonsense\n{}\n', [], 'line 1: not JSON'),
        ('{"kind": "train", "epoch": 0, "step": 1, "loss": 3}\n', ['--against', 'hours'], 'nothing to draw against'),
        ('{"kind": "val", "epoch": 0, "step": 1, "top1": 3}\n', ['--values', 'val/top9'], 'they have val/top1'),
        (
            '{"kind": "val", "epoch": 0, "step": 1, "top1": 3}\n',
            ['--against', 'days'],
            "against must be one of epoch, step, hours, got against='days'",
        ),
    ],
)
def test_what_is_no_run(tmp_path, text, options, message, capsys):
    if text is not None:
        (tmp_path / 'metrics.jsonl').write_text(text)
    assert main(['plot', str(tmp_path), *options, '--out', str(tmp_path / 'c.png')]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / 'c.png').exists()
