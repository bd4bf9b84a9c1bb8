"""Backends of SDPA, compiled blocks and graphs: of all that is timed, or of one name of it."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from vit_efficient.benchmark import (
    EXACT,
    PASSES,
    WORKS,
    Candidate,
    LayerSetting,
    ModelCandidate,
    ModelSetting,
    benchmark_layer,
    benchmark_models,
    layers,
    models,
    timing,
    ways,
)
from vit_efficient_cli import main

SMALL = LayerSetting(dim=16, num_heads=2)
TINY = dict(patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
SPEC = ':' + ','.join(f'{key}={value}' for key, value in TINY.items())


@pytest.fixture(autouse=True)
def _rate(monkeypatch):
    monkeypatch.setattr(timing, 'matmul_rate', lambda *_, **__: 1e9)  # which takes a second, twice for each block


def names_switched_on():
    cuda = torch.backends.cuda
    on = dict(flash=cuda.flash_sdp_enabled(), math=cuda.math_sdp_enabled(), cudnn=cuda.cudnn_sdp_enabled())
    return {name for name, is_on in on.items() if is_on}


@pytest.fixture
def backends(monkeypatch):
    """Which backends were switched on in each call of SDPA."""
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **kwargs):
        if not args[0].is_meta:
            seen.append(names_switched_on())
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', watched)
    return seen


def test_names():
    assert ways.way_of('dct', SMALL) == ('dct', SMALL)
    assert ways.way_of('package/linformer', SMALL) == ('package/linformer', SMALL)
    name, setting = ways.way_of('compiled/graph/flash/package/linformer', SMALL)
    assert name == 'package/linformer'
    assert (setting.compiled, setting.graph, setting.sdpa) == (True, True, 'flash')


@pytest.mark.parametrize('work', PASSES)
@pytest.mark.parametrize(('name', 'sdpa', 'on'), [('timm', 'math', 'math'), ('flash/timm', 'math', 'flash')])
def test_layers_are_called_with_one_backend(name, sdpa, on, work, backends):
    setting = LayerSetting(dim=16, num_heads=2, sdpa=sdpa)
    before = names_switched_on()
    call = layers.layer_call(Candidate(name), 16, setting, work, lambda: setting.inputs(16))
    backends.clear()  # what the check tried
    call()
    timing.take_turns([call], setting.device, 1, seconds=0)
    assert set(map(frozenset, backends)) == {frozenset([on])} and names_switched_on() == before


@pytest.mark.parametrize('work', WORKS)
def test_models_are_called_with_one_backend(work, backends):
    call = models.model_call(ModelCandidate('math/vit_tiny_patch16_224', TINY), 16, ModelSetting(), work)
    backends.clear()
    call()
    assert backends == [{'math'}] * 2 and names_switched_on() != {'math'}


def test_what_a_device_lacks_is_said_before_anything_is_timed():
    cudnn = r'cudnn/NAME: SDPA has no such backend on cpu in float32 with 8 channels .*; it has flash, math$'
    for candidates, setting in (
        ([Candidate('cudnn/timm')], SMALL),
        ([], LayerSetting(16, 2, sdpa='cudnn')),
    ):
        with pytest.raises(ValueError, match=cudnn):
            benchmark_layer(candidates, [16], setting)
    candidate = ModelCandidate('vit_tiny_patch16_224', TINY)
    with pytest.raises(ValueError, match="sdpa must be one of cudnn, .*sdpa='cuddn'"):
        benchmark_models([candidate], [16], setting=ModelSetting(sdpa='cuddn'))
    with pytest.raises(ValueError, match='--sdpa efficient.* on cpu in bfloat16'):
        benchmark_models([candidate], [16], setting=ModelSetting(dtype=torch.bfloat16, sdpa='efficient'))
    for name in ('graph/timm', 'compiled/graph/timm'):
        with pytest.raises(ValueError, match='graph/NAME, needs a GPU.* cpu; give --device cuda'):
            benchmark_layer([Candidate(name)], [16], SMALL)


@pytest.mark.parametrize(
    ('option', 'named'), [(['--sdpa', 'cudnn'], '--sdpa cudnn'), (['--cuda-graph'], 'needs a GPU')]
)
@pytest.mark.parametrize('kind', [['layer', '--dim', '16', '--heads', '2'], ['model', '--models', f'test_vit{SPEC}']])
def test_mistakes_of_the_command_are_one_line(kind, option, named, capsys):
    assert main(['benchmark', *kind, *option]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count('\n') == 1


def test_tables_name_the_backend(capsys):
    layer = ['benchmark', 'layer', '--dim', '16', '--heads', '2', '--tokens', '16', '--attentions', 'math/dct']
    fast = ['--rounds', '1', '--no-memory', '--sdpa', 'flash']
    assert main([*layer, *fast, '--format', 'json']) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row['attention'], row['sdpa']) for row in rows] == [('exact (timm)', 'flash'), ('math/dct', 'math')] * 2
    assert main([*layer, *fast]) == 0
    text = capsys.readouterr().out
    assert '| SDPA  |' in text and 'float32, SDPA by flash alone, cpu' in text
    assert not any(word in text for word in ('graph', 'host', 'Host', 'depends'))
    model = ['benchmark', 'model', '--img-sizes', '16', *fast, '--models', f'vit_tiny_patch16_224{SPEC}']
    assert main([*model, '--format', 'json']) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row['sdpa'] == 'flash' and not {'graph', 'fresh_inputs', 'host_milliseconds'} & set(row)


def test_inputs_are_fresh_where_costs_depend_on_them(monkeypatch):
    seen = {}

    class Watched(LayerSetting):
        def layer(self, candidate, *args, **kwargs):
            layer = super().layer(candidate, *args, **kwargs)
            of_name = seen.setdefault(candidate.name, [])
            layer.register_forward_pre_hook(lambda module, args: of_name.append(args[0]))
            return layer

    setting = Watched(16, 2)
    inputs = timing.Shared(lambda: setting.inputs(16))
    names = ('treeformer_tf', 'dct')
    for work in PASSES:
        calls = [layers.layer_call(Candidate(name), 16, setting, work, inputs) for name in names]
        seen['treeformer_tf'].clear()
        timing.take_turns(calls, setting.device, 2, seconds=0.1)
        given = seen['treeformer_tf']
        assert len({x.data_ptr() for x in given[-10:]}) == len(given[-10:])
        assert not any(torch.equal(x, given[-1]) for x in given[:-1])
        assert all(x.requires_grad and x.grad is None for x in given)
        assert all(x is inputs()[0] for x in seen['dct'])
    monkeypatch.setattr(ways, 'POOL', 3 * inputs()[0].nbytes)
    pool = ways.Inputs(inputs()[0], fresh=True)
    pool.prepare(100)
    drawn = [pool() for _ in range(7)]
    assert len({x.data_ptr() for x in drawn}) == 3 and drawn[0] is drawn[3] is drawn[6]


def test_what_is_said_of_fresh_inputs(capsys):
    command = ['benchmark', 'layer', '--dim', '16', '--heads', '2', '--tokens', '16', '--rounds', '1', '--no-memory']
    attentions = ['--attentions', 'dct', 'treeformer_tf', 'compiled/treeformer_tf']
    assert main([*command, *attentions[:3]]) == 0
    text = capsys.readouterr().out
    assert 'The cost of treeformer_tf depends on the input: each call has one of its own' in text
    assert 'fresh_inputs' not in text
    assert main([*command, *attentions[:3], '--format', 'json']) == 0
    assert [row['fresh_inputs'] for row in json.loads(capsys.readouterr().out)] == [None, None, True] * 2
    candidate = ModelCandidate('vit_treeformer_tf_tiny', TINY)
    (block,) = benchmark_models([candidate], [16], rounds=1, memory=False)
    assert block[0]['fresh_inputs'] is True and block[0]['error'] is None


class Replay(nn.Module):
    """Stands for what `graphed` makes of a module."""

    def __init__(self, module, example, reasons):
        super().__init__()
        self.module, self.reasons = module, reasons
        self.seen = [names_switched_on()]
        assert torch.is_inference_mode_enabled() and not example.requires_grad

    def forward(self, x):
        self.seen.append(names_switched_on())
        return self.module(x)


@pytest.mark.parametrize(
    ('reasons', 'said'),
    [
        ([], 'replayed'),
        (None, 'replayed'),
        (['a', 'b'], 'a; b'),
        ('no GPU', 'no GPU'),
        ({'blocks.1': 'a'}, 'blocks.1: a'),
    ],
)
def test_graphs(reasons, said, monkeypatch):
    made = []
    module = ModuleType('vit_efficient.graphs')
    module.graphed = lambda *given: made.append(Replay(*given, reasons)) or made[-1]
    monkeypatch.setitem(sys.modules, 'vit_efficient.graphs', module)
    for of in (layers, models):
        monkeypatch.setattr(of, 'check_way', lambda *_: None)
    rows = [
        row for block in benchmark_layer([Candidate('graph/math/dct')], [16], SMALL, 1, memory=False) for row in block
    ]
    assert [row['error'] for row in rows] == [None] * 4
    assert [row['graph'] for row in rows] == [None, said, None, 'not the backward pass']
    assert len(made) == 1 and len(made[0].seen) > 3 and all(seen == {'math'} for seen in made[0].seen)
    setting = ModelSetting(dtype=torch.bfloat16, amp=True, graph=True)
    candidate = ModelCandidate('vit_tiny_patch16_224', TINY)
    blocks = list(benchmark_models([candidate], [16], ['inference', 'training step'], setting, 1, memory=False))
    assert [(row['graph'], row['error']) for (row,) in blocks] == [(said, None), ('not the backward pass', None)]


def test_the_memory_of_a_replay_is_not_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(timing, 'peak_on_cuda', lambda call, device: measured.append(call) or 2**20)
    for graph, peak in (('replayed', None), ('why not', 1), ('', 1)):
        trial = timing._Trial(lambda graph=graph: timing.Call(lambda: None, graph=graph))
        trial.build()
        trial.measure_on_cuda(None)
        row = trial.row(trial, None)
        assert (row['peak_mib'], row['graph']) == (peak, graph or None)
    assert len(measured) == 2


def test_products_are_those_of_the_layer_in_no_way(monkeypatch):
    """Compiled or replayed, a call shows no operators."""
    monkeypatch.setattr(layers, 'check_way', lambda *_: None)
    monkeypatch.setattr(torch, 'compile', None)
    inputs = timing.Shared(lambda: SMALL.inputs(16))
    layers._products(Candidate('compiled/graph/math/dct'), 16, SMALL, 'forward', inputs)()


def test_exact_attention_is_the_first_and_a_name():
    setting = SimpleNamespace()
    assert ways.way_of(EXACT.name, setting) == (EXACT.name, setting)
    (block, _) = benchmark_layer([Candidate('timm')], [16], SMALL, rounds=1, memory=False)
    assert [row['error'] for row in block] == [None, None] and block[0]['gmacs'] == block[1]['gmacs']


def test_layers_with_rotary_positions():
    """`rope/` before a name: the layer is given them, and turns queries and keys."""
    layer, plain = (SMALL.layer(Candidate(name), 16) for name in ('rope/dct', 'dct'))
    assert layer.rope.shape == (16, 16) and plain.rope is None
    plain.load_state_dict(layer.state_dict())
    x, _ = SMALL.inputs(16)
    assert not torch.allclose(layer(x), plain(x), atol=1e-6)
    assert torch.equal(layer(x), layer.attn(x, layer.grid, layer.rope))
    for name, message in (('rope/dct1d', "'dct1d'.*mixtures"), ('rope/timm', 'rope/full')):
        with pytest.raises(ValueError, match=message):
            SMALL.layer(Candidate(name), 16)
    with pytest.raises(ValueError, match='rope/vit_dct_tiny'):
        next(benchmark_models([ModelCandidate('rope/vit_dct_tiny')], [32], 'inference', ModelSetting()))
