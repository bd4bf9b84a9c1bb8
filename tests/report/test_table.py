import csv
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from vit_efficient.report.statistics import compare, mcnemar
from vit_efficient.report.table import Column, Panel, Point, Table, plot_accuracy

TABLE = Table(
    [Column('model'), Column('gmacs', 'GMACs', 2), Column('top1', 'top-1', 1, spread='std'), Column('std'), 'seed'],
    [
        {'model': 'a|b', 'gmacs': 1234.5678, 'top1': 97.25, 'std': 0.12, 'seed': 0},
        {'model': 'c', 'gmacs': math.nan, 'top1': 9.0},
    ],
)


def test_markdown_is_aligned():
    assert TABLE.render() == (
        '| model |    GMACs |      top-1 | seed |\n'
        '| ----- | -------: | ---------: | ---: |\n'
        '| a\\|b  | 1,234.57 | 97.2 ± 0.1 |    0 |\n'
        '| c     |        – |        9.0 |    – |\n'
    )


def test_csv_and_json_are_unrounded():
    first, second = csv.DictReader(io.StringIO(TABLE.render('csv')))
    assert first == {'model': 'a|b', 'gmacs': '1234.5678', 'top1': '97.25', 'std': '0.12', 'seed': '0'}
    assert second['gmacs'] == second['std'] == second['seed'] == ''
    first, second = json.loads(TABLE.render('json'))
    assert first['gmacs'] == 1234.5678 and second['gmacs'] is None


def test_a_table_without_rows_has_its_heads():
    assert Table(['a', 'b']).render().count('\n') == 2


def test_unknown_formats_and_keys_are_named():
    with pytest.raises(ValueError, match='html'):
        TABLE.render('html')
    with pytest.raises(ValueError, match="'c'"):
        Table(['a', 'b'], [{'c': 1}])


@pytest.mark.parametrize(('rows', 'models'), [(1, 2), (2, 23), (1, 1)])
def test_plot(rows, models, tmp_path):
    points = [Point(f'model {i}', 1 + i, 50 + i, i / 10 or None) for i in range(models)]
    plot_accuracy([[Panel(points), Panel(points, 'images per second', 'mIoU (%)')]] * rows, tmp_path / 'plot.png')
    with Image.open(tmp_path / 'plot.png') as image:
        assert image.width == 1500 and image.height > 540 * rows
        pixels = np.asarray(image.convert('RGB'))
    for colour in [(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)][:models]:  # wherever they are
        assert (pixels == colour).all(axis=2).any()


def test_points_of_one_name_share_a_line_and_a_legend_entry(tmp_path):
    points = [Point('a', 1, 50), Point('b', 2, 50, 0.5), Point('a', 4, 90)]
    plot_accuracy([[Panel(points)]], tmp_path / 'plot.png')
    with Image.open(tmp_path / 'plot.png') as image:
        pixels = np.asarray(image.convert('RGB'))
    first = (pixels == (0x00, 0x72, 0xB2)).all(axis=2)
    assert first.any(axis=0).sum() > 0.6 * pixels.shape[1]  # as wide as the panel: a line


def test_plot_refuses_what_a_logarithm_cannot_show(tmp_path):
    with pytest.raises(ValueError, match='GMACs per image must be above 0'):
        plot_accuracy([[Panel([Point('a', 0.0, 90)])]], tmp_path / 'plot.png')
    with pytest.raises(ValueError, match='points'):
        plot_accuracy([[Panel([])]], tmp_path / 'plot.png')
    with pytest.raises(ValueError, match='images per second must be above 0'):
        panel = Panel([Point('a', 0.0, 90)], 'images per second')
        plot_accuracy([[Panel([Point('a', 1.0, 90)]), panel]], tmp_path / 'plot.png')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('b', 'c'), [(0, 0), (1, 0), (5, 5), (3, 14), (30, 61), (900, 1100), (20, 3000)])
def test_mcnemar_against_scipy(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(c, b) == mcnemar(b, c)


def test_paired_comparison():
    draw = np.random.default_rng(1)
    first = draw.random((3, 2000)) < 0.9
    other = first ^ (draw.random((3, 2000)) < 0.04)
    found = compare(first, other)
    gains = (other.astype(float) - first).mean(axis=0)
    assert found.difference == pytest.approx(100 * gains.mean())
    assert found.pairs == 6000
    assert found.only_other - found.only_first == round(found.difference / 100 * 6000)
    assert found.p == pytest.approx(binomtest(found.only_first, found.only_first + found.only_other).pvalue)
    normal = 100 * 1.96 * gains.std() / 2000**0.5
    assert found.low == pytest.approx(found.difference - normal, abs=0.1)
    assert found.high == pytest.approx(found.difference + normal, abs=0.1)
    assert found == compare(first, other)


def test_paired_comparison_of_equals_and_of_bad_shapes():
    found = compare([[True, False]], [[True, False]])
    assert (found.p, found.difference, found.low, found.high) == (1, 0, 0, 0)
    for other in ([[True]], [True, False], []):
        with pytest.raises(ValueError, match='seeds, images'):
            compare([[True, False]], other)
