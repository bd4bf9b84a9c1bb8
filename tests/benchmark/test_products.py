"""The matrix products of a call, timed alone: all of them, and nothing else."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vit_efficient import list_attentions
from vit_efficient.benchmark import EXACT, Candidate, LayerSetting, benchmark_layer, layers, products_of

pytestmark = pytest.mark.usefixtures('short_clocks')
SETTING = LayerSetting(dim=24, num_heads=2, batch_size=2, prefix=1)


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def make(candidate, work):
    x, gradient = SETTING.inputs(91)
    inputs = x.detach() if work == 'forward' else x, gradient
    return lambda: layers.layer_call(candidate, 91, SETTING, work, lambda: inputs, guard=torch.no_grad)


@pytest.mark.parametrize('work', ['forward', 'forward+backward'])
@pytest.mark.parametrize('name', [EXACT.name, *list_attentions()])
def test_as_many_products_as_the_call_has(name, work):
    torch.manual_seed(0)  # trees of one draw, so groups of one size
    make_call = make(EXACT if name == EXACT.name else Candidate(name), work)
    torch.manual_seed(0)
    products = products_of(make_call)
    torch.manual_seed(0)
    assert flops(products) == flops(make_call()) > 0


def test_nothing_but_products():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.add(operator.overloadpacket.__name__)
            return operator(*args, **(kwargs or {}))

    products = products_of(make(Candidate('dct', dict(place='kv')), 'forward+backward'))
    with Names():
        products()
    fused = '_scaled_dot_product_flash_attention_for_cpu'
    assert seen <= {'addmm', 'mm', 'bmm', fused, f'{fused}_backward'} and fused in seen


def test_rows_have_the_ratio():
    rows = [
        row
        for block in benchmark_layer([Candidate('dct')], [64], SETTING, rounds=1, memory=False, products=True)
        for row in block
    ]
    assert len(rows) == 4 and all(row['to_part'] > 0 and row['peak_share'] > 0 for row in rows)


def test_other_packages():
    pytest.importorskip('nystrom_attention')
    pytest.importorskip('performer_pytorch')
    pytest.importorskip('linformer')
    names = ['package/linformer', 'package/nystrom-attention', 'package/performer-pytorch']
    candidates = [Candidate(names[0], dict(k=16)), Candidate(names[1], dict(num_landmarks=8)), Candidate(names[2])]
    for block in benchmark_layer(candidates, [64], SETTING, rounds=1, memory=False):
        assert [row['error'] for row in block] == [None] * 4
        assert all(row['milliseconds'] > 0 and row['gmacs'] for row in block[:3])
    with pytest.raises(ValueError, match=r'package/linformer: .*heads_of'):
        benchmark_layer([Candidate(names[0], dict(heads_of=16))], [64], SETTING)


@pytest.mark.compiled
def test_compiled_layers():
    setting = LayerSetting(24, 2, compiled=True)
    (block, _) = benchmark_layer([Candidate('dct')], [64], setting, rounds=1, memory=False)
    assert all(row['error'] is None and row['milliseconds'] > 0 for row in block)
