from itertools import combinations

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from skimage.color import rgb2lab

from vit_efficient.report.plot import COLOURS, Panel, Point, line_style, log_axis, log_ticks, plot_accuracy

pytestmark = pytest.mark.once


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


def test_colours_are_told_apart():
    """From each other, and from the black and white that are taken: 2.3 is what can just be noticed."""
    found = [line_style(number)['color'] for number in range(len(COLOURS))]
    assert len(set(found)) == len(COLOURS) >= 16
    hexes = [*found, '#000000', '#FFFFFF']
    colours = [rgb2lab(np.array([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)])) for code in hexes]
    assert min(np.linalg.norm(a - b) for a, b in combinations(colours, 2)) > 20
    looks = [tuple(line_style(number).values()) for number in range(3 * len(COLOURS))]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize(
    'low, high, ticks',
    [
        (0.9, 2e4, [1, 10, 100, 1000, 1e4]),
        (40, 500, [50, 100, 200, 500]),
        (2.2e3, 8e4, [5e3, 1e4, 2e4, 5e4]),
        (1.4, 3.2, [1.5, 2, 3]),
        (0.0105, 0.0168, [0.012, 0.014, 0.016]),
        (1e-9, 1e9, [1e-9, 1e-6, 1e-3, 1, 1e3, 1e6, 1e9]),
    ],
)
def test_ticks_of_logarithmic_axes(low, high, ticks):
    found = log_ticks(low, high)
    assert found == pytest.approx(ticks)


@pytest.mark.parametrize('values', [(2400, 61000), (0.0087, 0.0089), (3, 3), (1e-4, 5e6)])
def test_labels_of_logarithmic_axes(values):
    """At least three, plain numbers, and none without."""
    axes = Figure().subplots()
    axes.plot(values, values)
    axes.set(xscale='log', yscale='log')
    for axis in (axes.xaxis, axes.yaxis):
        log_axis(axis)
        labels = [label.get_text() for label in axis.get_ticklabels()]
        assert len(labels) > 2 and not any('e' in label or '$' in label for label in labels)
        assert [float(label.replace(',', '')) for label in labels] == pytest.approx(list(axis.get_ticklocs()))
        assert not len(axis.get_minorticklocs())
