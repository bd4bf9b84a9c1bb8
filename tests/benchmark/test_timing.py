"""Turns, ratios, slopes, and calls that fail."""

import math
import pickle
from collections import Counter
from functools import partial

import pytest
import torch

from vit_efficient.benchmark import Shared, compare, slope, take_turns, timing
from vit_efficient.benchmark.peak_memory import Killed

pytestmark = pytest.mark.once

CPU = torch.device('cpu')


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
    monkeypatch.setattr(timing, 'time', clock)
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


@pytest.mark.parametrize(('rounds', 'spread'), [(3, 40), (1, None)])
def test_spread(clock, rounds, spread):
    (row,) = compare([lambda: clock.call('a', 1, 5, 4, 6)], CPU, rounds=rounds, memory=False)
    assert row['spread_percent'] == spread and row['median_milliseconds'] == 5000


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

    monkeypatch.setattr(timing, 'peak_in_child', peak_in_child)
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
