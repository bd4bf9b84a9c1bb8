"""Of what is compiled: calls are measured, and the compiler is not."""

import sys
from functools import partial

import pytest
import torch

from vit_efficient.benchmark import (
    PASSES,
    WORKS,
    Candidate,
    LayerSetting,
    ModelCandidate,
    ModelSetting,
    layers,
    models,
    peak_memory,
    timing,
)

pytestmark = pytest.mark.once

CPU = torch.device('cpu')
TINY = dict(patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)


class SlowCompiler:
    """Stands for `torch.compile` and for the clock: each pass takes 20 s when it first runs, and 1/4 s from then on."""

    def __init__(self):
        self.now = 0.0
        self.limits = []

    def perf_counter(self):
        return self.now

    def compile(self, module, dynamic):
        left = dict(forward=20, backward=20)
        assert dynamic is False  # one size, as a user would have it who has no other

        def take(which, *_):
            self.now += left.pop(which, 0.25)

        def run(*args, **kwargs):  # a layer's, or a block's
            self.limits.append(torch._dynamo.config.recompile_limit)
            take('forward')
            output = module(*args, **kwargs)
            if output.requires_grad:
                output.register_hook(partial(take, 'backward'))
            return output

        return run


@pytest.fixture
def compiler(monkeypatch):
    compiler = SlowCompiler()
    monkeypatch.setattr(torch, 'compile', compiler.compile)
    monkeypatch.setattr(timing, 'time', compiler)
    monkeypatch.setattr(peak_memory, 'time', compiler)
    return compiler


def layer(work):
    setting = LayerSetting(dim=16, num_heads=2, compiled=True)
    return partial(layers.layer_call, Candidate('dct'), 16, setting, work, partial(setting.inputs, 16))


def model(work):
    return partial(models.model_call, ModelCandidate('vit_dct_tiny', TINY), 32, ModelSetting(compiled=True), work)


MAKES = [*((layer, work) for work in PASSES), *((model, work) for work in WORKS)]


@pytest.mark.parametrize(('kind', 'work'), MAKES)
def test_compiling_is_not_timed(kind, work, compiler):
    # Were it, the second round would not fit.
    (row,) = timing.compare([kind(work)], CPU, rounds=2, max_seconds=5, memory=False)
    assert row['error'] is None and row['rounds'] == 2
    assert row['median_milliseconds'] == row['milliseconds'] == (250 if work in ('forward', 'inference') else 500)


@pytest.mark.parametrize(('kind', 'work'), MAKES)
def test_the_peak_is_reset_after_compiling(kind, work, compiler, monkeypatch):
    resets = []
    monkeypatch.setattr(peak_memory, '_reset_peak', lambda: resets.append(compiler.now) or True)
    peak_memory._measure(kind(work))
    assert resets[0] >= (20 if work in ('forward', 'inference') else 40)
    assert len(resets) == 2  # the call was a short one, and so was made once more


def test_any_number_of_layers_is_compiled(compiler):
    """Of one class, more than `recompile_limit` would run as they are written."""
    with torch._dynamo.config.patch(recompile_limit=8):
        layer('forward')()()
    assert compiler.limits == [sys.maxsize, 8]


def test_products_are_those_of_the_layer_as_it_is_written(compiler):
    setting = LayerSetting(dim=16, num_heads=2, compiled=True)
    layers._products(Candidate('dct'), 16, setting, 'forward', partial(setting.inputs, 16))()
    assert not compiler.limits
