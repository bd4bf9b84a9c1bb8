"""The counter of operators that the mechanisms' tests hold them to."""

import pytest
import torch
from torch.nn import functional as F

from recipes.benchmarks.operators import CANDIDATES, count_operators, measure
from vit_efficient.benchmark.layers import Candidate
from vit_efficient.utils.device import on_gpu


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_views_are_free_and_attention_is_one(device):
    x = torch.zeros(1, 2, 8, 8, device=device, requires_grad=True)
    assert count_operators(lambda: x.mT.flatten(0, 1)[:1].unsqueeze(0)) == (0, 0)
    assert count_operators(lambda: x.mT.reshape(-1)) == (1, 0)  # a copy
    assert count_operators(lambda: F.scaled_dot_product_attention(x, x, x) + 1) == (2, 0)
    assert count_operators(lambda: F.scaled_dot_product_attention(x, x, x).sum().backward())[0] < 9


def test_synchronisations():
    x = torch.arange(4)
    names = ('tolist', 'cpu', 'numpy', 'nonzero', 'unique', 'bincount')
    calls = [lambda name=name: getattr(x, name)() for name in names]
    calls += [
        lambda: x.amax().item(),
        lambda: x[x > 1],
        lambda: x.repeat_interleave(x),
        lambda: x.new_tensor([1, 2]),
        lambda: x.split(int(x[1])),
    ]
    assert [count_operators(call).synchronisations for call in calls] == [1] * len(calls)
    assert not count_operators(lambda: x.repeat_interleave(x, output_size=6) + x[2] * 3).synchronisations


def test_takes_the_ways_of_a_gpu():
    x, seen = torch.zeros(1), []
    count_operators(lambda: seen.append(on_gpu(x)))
    assert seen == [True, True]
    assert not on_gpu(x) and on_gpu(x.to('meta'))


def test_layers():
    rows = {str(candidate): measure(candidate, 64) for candidate in CANDIDATES}
    assert rows['exact (timm)']['forward'] == 3
    assert all(row['both'] > row['forward'] for row in rows.values())
    waiting = {name for name, row in rows.items() if row['forward_waits']}
    assert all(name.startswith('treeformer_tf') for name in waiting)


@pytest.mark.parametrize(
    'name, options, forward, both',
    [
        ('performer', {}, 24, 90),
        ('combiner', {'window_size': 16, 'cell_size': 8}, 45, 130),
        ('monarch', {}, 35, 90),
        ('nystrom', {}, 54, 200),
        ('window', {'window_size': 8, 'shift': True}, 8, 28),
        ('dct', {}, 7, 22),
    ],
)
def test_few_operators_at_any_length(name, options, forward, both):
    """What starts more kernels than it needs is bound by the host."""
    rows = [measure(Candidate(name, options), tokens) for tokens in (4096, 16384)]
    assert all(row['forward'] <= forward and row['both'] <= both for row in rows)
