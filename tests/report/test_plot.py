import numpy as np
import pytest
from PIL import Image

from vit_efficient.report.plot import Panel, Point, plot_accuracy

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
