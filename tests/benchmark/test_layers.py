import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vit_efficient.attention import GridAttention, list_attentions, registry
from vit_efficient.benchmark import (
    EXACT,
    PASSES,
    Candidate,
    LayerSetting,
    benchmark_layer,
    layers,
    plot_times,
    squarest_grid,
)
from vit_efficient.utils.errors import UserError

pytestmark = pytest.mark.usefixtures('short_clocks')
CPU = torch.device('cpu')
SMALL = LayerSetting(dim=16, num_heads=2)


class Picky(GridAttention):
    """Cannot be had on grids below 4 × 4, and fails on 8 × 8 when it runs."""

    @classmethod
    def at_layer(cls, options, layer, depth, grid_size):
        assert (layer, depth) == (0, 1)
        if grid_size[0] < 4:
            raise UserError(f'grid_size must be at least (4, 4), got {grid_size=}')
        return options

    def forward(self, x, grid, attn_mask=None, is_causal=False):
        if grid.height == 8 and not x.is_meta:
            raise RuntimeError('out of memory')
        return self.proj(x)

    def num_attended(self, grid):
        return 1


@pytest.fixture
def picky(monkeypatch):
    monkeypatch.setitem(registry.ATTENTIONS, 'picky', registry.Entry(Picky, {}))
    return Candidate('picky')


def test_error_rows(picky):
    dct = Candidate('dct')
    blocks = list(benchmark_layer([picky, dct], [9, 16, 64], SMALL, rounds=1, memory=False))
    assert [[(r['tokens'], r['work']) for r in block] for block in blocks] == [
        [(n, work)] * 3 for n in (9, 16, 64) for work in ('forward', 'forward+backward')
    ]
    for block in blocks:
        assert [row['attention'] for row in block] == [str(EXACT), 'picky', 'dct']
        exact, failing, fine = block
        assert exact['ratio'] == 1 and fine['ratio'] == pytest.approx(exact['milliseconds'] / fine['milliseconds'])
        assert exact['error'] is fine['error'] is None
        if failing['tokens'] == 16:
            assert failing['milliseconds'] > 0 and failing['error'] is None
        else:
            assert failing['milliseconds'] is failing['ratio'] is None
        assert len({tuple(row) for row in block}) == 1  # the same keys
    assert 'grid_size=(3, 3)' in blocks[0][1]['error'] and blocks[0][1]['gmacs'] is None
    assert blocks[4][1]['error'] == 'RuntimeError: out of memory' and blocks[4][1]['attended'] == 1


@pytest.mark.parametrize(
    ('candidates', 'tokens', 'kwargs', 'named'),
    [
        ([Candidate('dct'), Candidate('picky')], [4, 9], {}, r'grid_size=\(2, 2\)'),  # at none of the N
        ([Candidate('dct'), Candidate('dtc')], [16], {}, r'did you mean dct\?'),
        ([Candidate('dct', dict(keep_ration=0.5))], [16], {}, 'keep_ration'),
        ([Candidate('dct'), Candidate('dct')], [16], {}, 'dct is given twice'),
        ([Candidate('dct')], [16, 16], {}, '16 is given twice'),
        ([Candidate('dct')], [16], dict(max_seconds=0), 'max_seconds=0'),
        ([Candidate('dct')], [16], dict(max_seconds=math.nan), 'max_seconds=nan'),
        ([Candidate('dct')], [16], dict(setting=LayerSetting(dim=16, num_heads=3)), 'num_heads=3'),
        ([Candidate('dct')], [16], dict(setting=LayerSetting(16, 2, prefix=-1)), 'prefix=-1'),
        ([Candidate('dct', dict(place='block'))], [16], {}, "place='block'.*benchmark model"),
    ],
)
def test_mistakes_are_found_before_anything_is_timed(candidates, tokens, kwargs, named, picky, monkeypatch):
    monkeypatch.setattr(layers, 'measure_block', None)
    with pytest.raises(ValueError, match=named):
        benchmark_layer(candidates, tokens, **dict(setting=SMALL) | kwargs)  # before the first block is asked for


def test_the_passes_compute_what_they_say():
    n = 16
    x, gradient = SMALL.inputs(n)
    assert x.requires_grad and not gradient.requires_grad and x.shape == gradient.shape == (1, n, 16)
    seen = []

    def watch(module, args, output):
        seen.append((module.training, output.requires_grad))
        if output.requires_grad:
            output.register_hook(lambda given: seen.append(torch.equal(given, gradient)))

    class Watched(LayerSetting):
        def layer(self, *args, **kwargs):
            layer = super().layer(*args, **kwargs)
            layer.register_forward_hook(watch)
            return layer

    for work in PASSES:
        setting = Watched(dim=16, num_heads=2)
        layers.layer_call(Candidate('dct'), n, setting, work, lambda: (x, gradient))()
    assert seen == [(False, False), (True, True), True]
    assert x.grad is None


@pytest.mark.parametrize('name', [EXACT.name, *list_attentions(), 'package/linformer'])
def test_prefix_tokens(name):
    if name.startswith('package'):
        pytest.importorskip('linformer')
    setting = LayerSetting(dim=16, num_heads=2, batch_size=3, prefix=5)
    candidate = EXACT if name == EXACT.name else Candidate(name)
    x, gradient = setting.inputs(16)
    assert x.shape == gradient.shape == setting.layer(candidate, 16)(x).shape == (3, 21, 16)
    plan = layers._plan(candidate, 16, setting)
    assert plan['error'] is None
    if name in (EXACT.name, 'full'):
        assert plan['attended'] == 21
        assert plan['gmacs'] == 3 * (4 * 21 * 16 * 16 + 2 * 21 * 21 * 16) / 1e9
    elif name == 'dct':
        assert plan['attended'] == 5 + 4
        assert plan['gmacs'] > layers._plan(candidate, 16, replace(setting, prefix=0))['gmacs']


def test_grids():
    assert (squarest_grid(91).height, squarest_grid(91).width) == (7, 13)
    assert (squarest_grid(13).height, squarest_grid(13).width) == (1, 13)


@pytest.mark.parametrize('tokens', [(1024,), (1024, 4096, 65536)])
def test_plot(tokens, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    names = [str(EXACT), *(f'attention {i}' for i in range(18))]
    rows = [
        dict(tokens=n, work=work, attention=name, milliseconds=None if (i, n) == (3, 65536) else n * (i + 1))
        for n in tokens
        for work in PASSES
        for i, name in enumerate(names)
    ]
    plot_times(rows, tmp_path / 'plot.png')
    with Image.open(tmp_path / 'plot.png') as image:
        assert image.format == 'PNG' and image.width > 1000
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == list(PASSES)
    for axes in panels:
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == names
        assert lines[str(EXACT)].get_color() == 'black'
        looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
        assert len(looks) == len(names)
        assert axes.get_xscale() == axes.get_yscale() == 'log'
        assert list(lines['attention 0'].get_ydata()) == [2 * n for n in tokens]
        assert list(lines['attention 2'].get_xdata()) == [n for n in tokens if n != 65536]
    legend = [text.get_text() for text in figures[0].legends[0].texts]
    assert sorted(legend) == sorted(names) and legend[0] == names[-1]  # the slowest on top


def test_plot_of_nothing(tmp_path):
    plot_times([], tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')
