import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from vit_efficient.benchmark import EXACT, LayerSetting, Shared, peak_memory
from vit_efficient.benchmark.layers import layer_call
from vit_efficient.benchmark.peak_memory import Killed, peak_in_child, peak_on_cuda

MB = 2**20


def _floats(mb):
    return torch.ones(mb * MB // 4)


class Allocating(torch.nn.Module):
    def forward(self, x):
        _floats(200)  # freed again before the next ones: not part of the peak
        return [x, _floats(100), _floats(200)]


def _allocating():
    x = _floats(150)  # an input: before the call, and not part of it
    _floats(400)  # freed: neither
    return partial(Allocating(), x)


def _failing():
    raise ValueError('does not work\nat all')


def _killed():
    return partial(os.kill, os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='the peak cannot be reset')
@pytest.mark.subprocess
def test_a_known_allocation():
    assert peak_in_child(_allocating) / MB == pytest.approx(300, abs=5)


@pytest.mark.subprocess
def test_a_layer():
    # Forward, without gradients: x stays an input; q, k, v (3), what is attended (1), its projection (1).
    setting = LayerSetting(dim=1024, num_heads=16)
    n = 4096
    make = partial(layer_call, EXACT, n, setting, 'forward', Shared(partial(setting.inputs, n)))
    assert peak_in_child(make) == pytest.approx(5 * n * 1024 * 4, rel=0.15)


@pytest.mark.subprocess
def test_what_fails_says_why():
    with pytest.raises(RuntimeError, match='^ValueError: does not work$'):
        peak_in_child(_failing)
    with pytest.raises(Killed, match='signal 9, perhaps out of memory'):
        peak_in_child(_killed)
    with pytest.raises(RuntimeError, match='in another process'):
        peak_in_child(lambda: None)


def test_a_peak_that_cannot_be_reset(monkeypatch):
    monkeypatch.setattr(peak_memory, '_reset_peak', lambda: False)
    peaks = iter([500, 800, 800, 800])
    monkeypatch.setattr(peak_memory, 'peak_resident', lambda: next(peaks))
    calls = []
    assert peak_memory._measure(lambda: lambda: calls.append(1)) == 300
    assert calls == [1]  # a second one would not rise above the first
    with pytest.raises(RuntimeError, match='earlier'):
        peak_memory._measure(lambda: lambda: None)


@pytest.mark.cuda
def test_cuda():
    device = torch.device('cuda')
    x = torch.ones(50 * MB // 4, device=device)
    assert peak_on_cuda(lambda: [x + 1, x + 2], device) == 100 * MB
