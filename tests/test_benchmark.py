import math
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
from PIL import Image

from vit_efficient import benchmark
from vit_efficient.attention import GridAttention, registry
from vit_efficient.benchmark import (
    EXACT,
    Candidate,
    LayerSetting,
    Shared,
    benchmark_layer,
    compare,
    plot_times,
    slope,
    squarest_grid,
    take_turns,
)
from vit_efficient.peak_memory import Killed

CPU = torch.device('cpu')
SMALL = LayerSetting(dim=16, num_heads=2)


class Clock:
    """Stands for the `time` module; calls made by it take as long as they say."""

    def __init__(self):
        self.now = 0.0
        self.order = ''

    def perf_counter(self):
        return self.now

    def call(self, name, *seconds):
        """Takes the seconds given, the last of them from then on."""
        left = list(seconds)

        def call():
            self.order += name
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(benchmark, 'time', clock)
    return clock


def test_turns_interleave(clock):
    timed = take_turns([clock.call('a', 9, 0.5), clock.call('b', 0.25)], CPU, 3)
    # 'a' looked long at first, so that one call has to tell how long it takes.
    assert clock.order == 'abb' + 'ab' * 3
    assert timed == [[0.5] * 3, [0.25] * 3]


def test_short_calls_are_repeated(clock):
    timed = take_turns([clock.call('a', 1 / 32), clock.call('b', 0.5, 1 / 64)], CPU, 2)
    assert clock.order == 'aabb' + ('a' * 4 + 'b' * 7) * 2
    assert timed == [[1 / 32] * 2, [1 / 64] * 2]


def test_a_very_long_first_call_is_a_turn(clock):
    timed = take_turns([clock.call('a', 20, 16), clock.call('b', 2)], CPU, 2)
    assert clock.order == 'ab' + 'b' + 'ab'
    assert timed == [[20, 16], [2, 2]]


@pytest.mark.parametrize(('max_seconds', 'rounds'), [(1, 1), (43, 1), (44, 2), (63, 2), (64, 3), (1000, 4)])
def test_rounds_adapt(clock, max_seconds, rounds):
    # The first round, with the first calls, takes 16 + 4 + 4 seconds, every further round 20.
    timed = take_turns([clock.call('a', 16), clock.call('b', 4)], CPU, 4, max_seconds=max_seconds)
    assert [len(times) for times in timed] == [rounds, rounds]
    assert rounds == 1 or clock.now <= max_seconds


def test_slope_of_a_power_law():
    sizes = (1024, 4096, 16384, 65536)
    assert slope([(n, 3e-5 * n**1.7) for n in sizes]) == pytest.approx(1.7, abs=1e-12)
    # The exponent that fits best, and not that between the ends: residuals at the right are twice those in the middle.
    assert slope([(1, 1), (math.e, 1), (math.e**2, math.e**3)]) == pytest.approx(1.5)
    assert slope([(1, math.e), (math.e, 1), (math.e**2, 1), (math.e**3, 1)]) == pytest.approx(-0.3)
    assert slope([(1024, 5)]) is None and slope([]) is None


def test_one_that_fails_does_not_stop_the_others():
    calls = Counter()

    def fail_at(n):
        def call():
            calls[n] += 1
            if calls[n] == n:
                raise RuntimeError(f'failed at {n}\nand so on')

        return call

    def not_even_made():
        raise MemoryError('no room')

    makes = [lambda: fail_at(-1), lambda: fail_at(1), not_even_made, lambda: fail_at(5)]
    rows = compare(makes, CPU, rounds=2, memory=False)
    assert [row['error'] for row in rows] == [
        None,
        'RuntimeError: failed at 1',
        'MemoryError: no room',
        'RuntimeError: failed at 5',
    ]
    assert rows[0]['rounds'] == 2 and rows[0]['ratio'] == 1
    for row in rows[1:]:
        assert row['milliseconds'] is row['median_milliseconds'] is row['rounds'] is row['ratio'] is None
    assert calls[1] == 1 and calls[5] == 5


def test_without_the_first_there_are_no_ratios():
    def fail():
        raise RuntimeError('out of memory')

    first, second = compare([lambda: fail, lambda: lambda: None], CPU, rounds=1, memory=False)
    assert first['error'] and second['error'] is None
    assert second['milliseconds'] > 0 and second['ratio'] is None


def test_what_happens_to_the_child(monkeypatch):
    """A peak; a killed child, after which the call is not tried here; one that cannot tell, after which it is."""
    calls = []
    makes = [lambda i=i: partial(calls.append, i) for i in range(3)]
    answers = {makes[0]: 3 * 2**20, makes[1]: Killed('signal 9'), makes[2]: RuntimeError('no such thing')}

    def peak_in_child(make):
        assert not calls, 'memory is measured before anything runs'
        if isinstance(answers[make], Exception):
            raise answers[make]
        return answers[make]

    monkeypatch.setattr(benchmark, 'peak_in_child', peak_in_child)
    first, second, third = compare(makes, CPU, rounds=1)
    assert set(calls) == {0, 2}
    assert first['peak_mib'] == 3 and first['error'] is None
    assert second['milliseconds'] is None and second['error'] == 'Killed: signal 9'
    assert third['milliseconds'] > 0 and third['error'] == 'memory: no such thing' and third['peak_mib'] is None


def test_shared_values_are_made_once_and_not_pickled():
    shared = Shared(partial(torch.rand, 100_000))
    assert shared() is shared()
    pickled = pickle.dumps(shared)
    assert len(pickled) < 1000 and pickle.loads(pickled)().shape == (100_000,)


class Picky(GridAttention):
    """Cannot be had on grids below 4 × 4, and fails on 8 × 8 when it runs."""

    @classmethod
    def at_layer(cls, options, layer, depth, grid_size):
        assert (layer, depth) == (0, 1)
        if grid_size[0] < 4:
            raise ValueError(f'grid_size must be at least (4, 4), got {grid_size=}')
        return options

    def forward(self, x, grid, attn_mask=None, is_causal=False):
        if grid.height == 8 and not x.is_meta:
            raise RuntimeError('out of memory')
        return self.proj(x)

    def num_attended(self, grid):
        return 1


@pytest.fixture
def picky(monkeypatch):
    monkeypatch.setitem(registry._ATTENTIONS, 'picky', registry.Entry(Picky, {}))
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
        ([Candidate('dct'), Candidate('dtc')], [16], {}, "did you mean 'dct'"),
        ([Candidate('dct', dict(keep_ration=0.5))], [16], {}, 'keep_ration'),
        ([Candidate('dct'), Candidate('dct')], [16], {}, 'dct is given twice'),
        ([Candidate('dct')], [16, 16], {}, '16 is given twice'),
        ([Candidate('dct')], [16], dict(max_seconds=0), 'max_seconds=0'),
        ([Candidate('dct')], [16], dict(max_seconds=math.nan), 'max_seconds=nan'),
        ([Candidate('dct')], [16], dict(setting=LayerSetting(dim=16, num_heads=3)), 'num_heads=3'),
    ],
)
def test_mistakes_are_found_before_anything_is_timed(candidates, tokens, kwargs, named, picky, monkeypatch):
    monkeypatch.setattr(benchmark, 'compare', None)
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

    for work in benchmark.PASSES:
        setting = Watched(dim=16, num_heads=2)
        benchmark._layer_call(Candidate('dct'), n, setting, work, lambda: (x, gradient))()
    assert seen == [(False, False), (True, True), True]
    assert x.grad is None


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
        for work in benchmark.PASSES
        for i, name in enumerate(names)
    ]
    plot_times(rows, tmp_path / 'plot.png')
    with Image.open(tmp_path / 'plot.png') as image:
        assert image.format == 'PNG' and image.width > 1000
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == list(benchmark.PASSES)
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
