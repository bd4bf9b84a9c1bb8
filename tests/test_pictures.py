"""The pictures of the README are drawn from the modules and the tables themselves."""

import runpy
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from vit_efficient import PatchGrid, list_attentions

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
GRID = PatchGrid(8, 8)


@pytest.fixture(scope='module')
def tool():
    pytest.importorskip('skimage')
    return runpy.run_path(str(ROOT / 'tools' / 'draw_mechanisms.py'))


@pytest.fixture(scope='module')
def known(tool):
    return tool['features'](tool['photograph'](), GRID)


def read(tool, known, name, **options):
    return tool['read_weights'](name, options, known, GRID)


def test_pictures(tool, tmp_path):
    names = ['full', 'dct', 'window']
    tool['draw_mechanisms'](tmp_path / 'mechanisms.png', names)
    tool['draw_speed'](tmp_path / 'speed.png')
    for name in ('mechanisms.png', 'speed.png'):
        for path in (tmp_path / name, ROOT / 'docs' / 'images' / name):
            assert path.stat().st_size < 150_000
            with Image.open(path) as image:
                assert image.width == 800
                corners = [image.convert('RGBA').getpixel((x, y)) for x in (0, 799) for y in (0, image.height - 1)]
            assert corners == [(255, 255, 255, 255)] * 4  # in dark mode too
    assert set(tool['MECHANISMS']) <= set(list_attentions())


def test_weights_are_those_of_the_attention(tool, known):
    weights, keys = read(tool, known, 'full')
    expected = (tool['SHARPNESS'] * known @ known.T).softmax(dim=1)
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-4)
    assert (weights.argmax(dim=1) == torch.arange(64)).all()  # itself
    assert keys == 64


@pytest.mark.parametrize('name', ['dct', 'pool', 'subsample', 'window', 'treeformer_tf'])
def test_what_a_query_does_not_read_weighs_nothing(tool, known, name):
    options = {'window': dict(window_size=4), 'treeformer_tf': dict(tree_height=2)}
    weights, keys = read(tool, known, name, **options.get(name, dict(keep_ratio=1 / 4)))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(64), atol=1e-4, rtol=1e-4)
    query = weights[9]  # of the first 4 × 4
    if name == 'window':
        in_window = query.view(8, 8)[:4, :4]
        assert keys == 16 and in_window.sum().item() == pytest.approx(1, abs=1e-4) and (in_window > 0).all()
    elif name == 'subsample':
        assert keys == 16 and (query > 1e-9).sum() <= 16
    elif name == 'pool':  # each cell of 2 × 2 as one
        cells = query.view(4, 2, 4, 2).transpose(1, 2).flatten(2)
        torch.testing.assert_close(cells, cells[..., :1].expand_as(cells))
    elif name == 'dct':  # of its rows, as of its columns, four frequencies are left
        assert torch.linalg.matrix_rank(weights, atol=1e-4) <= 16 == keys
    else:
        assert (query == 0).any()


def test_times_are_those_of_the_tables(tool):
    machine, times = tool['times_of_cpu']()
    assert machine == '2 cores of an Intel Xeon, float32'
    table = (ROOT / 'recipes/benchmarks/layer.md').read_text()
    line = next(line for line in table.splitlines() if '| 16,384 | forward          | dct  ' in line)
    (found,) = (ms for name, n, ms in times if (name, n) == ('dct', 16384))
    assert f' {found:.1f} |' in line
    machine, times = tool['times_of_gpu']()
    assert machine.startswith('NVIDIA H100') and ('dct', 16384, 0.1936) in times
    for _, found in (tool['times_of_cpu'](), (machine, times)):
        assert set(tool['LAYERS']) <= {name for name, _, _ in found}


def test_plots_are_drawn_again_from_the_tables(tmp_path, capsys):
    tool = runpy.run_path(str(ROOT / 'tools' / 'redraw.py'))
    for name in ('benchmarks/layer.csv', 'mnist5k/results.csv', 'benchmarks/dct.csv'):
        shutil.copy(ROOT / 'recipes' / name, tmp_path)
    for name in ('layer.png', 'results.png'):  # others had no plot
        (tmp_path / name).touch()
    tool['main'](tmp_path)
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / 'layer.png'), str(tmp_path / 'results.png')]
    for name in ('layer.png', 'results.png'):
        with Image.open(tmp_path / name) as image:
            assert image.width >= 1500
    assert not (tmp_path / 'dct.png').exists()
    stem, config = tool['recipe_of']('vit_dct_tiny (dct-51)', ROOT / 'recipes/megapixel_mnist/truncation')
    assert (stem, config.model.name) == ('dct-51', 'vit_dct_tiny')
    assert tool['recipe_of']('vit_dct_tiny', ROOT / 'recipes/mnist5k') is None
