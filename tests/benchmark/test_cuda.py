"""What is done on a GPU, on one that is made up: a clock, and work that is waited for where `synchronize` is called."""

import pytest
import torch

from vit_efficient.benchmark import compare, peak_memory, take_turns, timing

GPU = torch.device('cuda', 0)


class Gpu:
    """Takes calls at once, and their work when it is waited for."""

    def __init__(self):
        self.now, self.queued, self.log = 0.0, 0.0, []

    def perf_counter(self):
        return self.now

    def synchronize(self, device):
        assert device == GPU
        self.now += self.queued
        self.queued = 0.0

    def launch(self, host, work):
        self.now += host
        self.queued += work


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(timing, 'time', gpu)
    monkeypatch.setattr(torch.cuda, 'synchronize', gpu.synchronize)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: gpu.log.append('empty'))
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda device: gpu.log.append('reset'))
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: 2**20)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: 4 * 2**20)
    return gpu


def test_work_is_waited_for_before_and_after(gpu):
    call = timing.Call(lambda: gpu.launch(1 / 64, 1 / 4), prepare=lambda count: gpu.launch(0, 8))
    assert take_turns([call], GPU, 2) == [[17 / 64] * 2]  # without the inputs, which were drawn before


def test_a_first_call_that_plans_kernels_is_no_turn(gpu):
    left = [20]
    (times,) = take_turns([lambda: gpu.launch(left.pop() if left else 0, 1 / 32)], GPU, 2)
    assert times == [1 / 32] * 2


def test_rows(gpu):
    makes = [lambda: lambda: gpu.launch(1 / 64, 1 / 4), lambda: lambda: gpu.launch(1 / 2, 0)]
    first, second = compare(makes, GPU, rounds=1)
    assert (first['milliseconds'], first['host_milliseconds']) == (1e3 * 17 / 64, 1e3 / 64)
    assert second['milliseconds'] == second['host_milliseconds'] == 500
    assert first['peak_mib'] == second['peak_mib'] == 3 and first['error'] is second['error'] is None


def test_a_slow_call_is_not_repeated_for_the_host(gpu):
    calls = []
    call = timing.Call(lambda: calls.append(1) or gpu.launch(0.001, 5))
    assert timing.host_seconds(call, GPU) == pytest.approx(0.001)
    assert len(calls) == 1


@pytest.mark.parametrize('at', [0, 1, 4])
def test_out_of_memory_is_a_value_of_its_row(at, gpu):
    """When it is made, first called, or later."""
    calls = []

    def want():
        calls.append(1)
        if len(calls) > at:
            raise torch.OutOfMemoryError(
                'CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of …\nmore'
            )
        gpu.launch(1 / 64, 1)

    def make():
        if not at:
            want()
        return want

    fine, short = compare([lambda: lambda: gpu.launch(1 / 64, 1), make], GPU, rounds=3)
    assert short['error'] == 'OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB'
    assert short['milliseconds'] is short['host_milliseconds'] is None and len(calls) == at + 1
    assert fine['rounds'] == 3 and fine['error'] is None
    assert gpu.log.count('empty') == 1 + 2 + 1 - (at == 0)  # at first, of each whose memory is measured, of what failed


def test_other_errors_are_whole():
    assert peak_memory.one_line(ValueError('one. two. three\nfour')) == 'ValueError: one. two. three'


def test_the_rate_of_products_waits(gpu, monkeypatch):
    monkeypatch.setattr(torch, 'mm', lambda a, b: gpu.launch(0, 0.5))
    real = torch.randn
    monkeypatch.setattr(torch, 'randn', lambda *size, device: (gpu.launch(0, 100), real(*size))[1])
    assert timing.matmul_rate(torch.float32, GPU, side=8) == 8**3 / 0.5


@pytest.mark.cuda
@pytest.mark.parametrize('kind', ['layer', 'model'])
def test_by_command(kind, capsys):
    import json

    from vit_efficient_cli import main

    common = ['--device', 'cuda', '--dtype', 'bfloat16', '--rounds', '2', '--format', 'json']
    if kind == 'layer':
        names = [
            'flash/timm',
            'efficient/timm',
            'math/timm',
            'compiled/timm',
            'graph/dct',
            'flex_window',
            'tome',
        ]
        sizes = ['--attentions', *names, 'treeformer_tf', '--tokens', '256', '--dim', '128', '--heads', '2']
    else:
        name = 'vit_tiny_patch16_224:depth=2'
        names = [name, f'compiled/{name}', f'graph/{name}', f'flash/{name}']
        sizes = ['--models', *names, '--img-sizes', '64', '--work', 'inference', 'training step']
    assert main(['benchmark', kind, *sizes, *common]) == 0
    for row in json.loads(capsys.readouterr().out):
        assert row.get('error') is None and row['milliseconds'] > 0 and row['host_milliseconds'] > 0, row
