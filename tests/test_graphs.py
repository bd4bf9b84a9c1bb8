"""Models that are replayed: what is captured and when, without a GPU by a graph that calls the model; and with one."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import vit_efficient
from vit_efficient import graphs

SIZE = dict(patch_size=16, embed_dim=24, num_heads=3, depth=2, num_classes=5, dynamic_img_size=True)


def vit(attention='dct', **options):
    return timm.create_model(f'vit_{attention}_tiny', img_size=64, **SIZE, **options).eval()


def image(batch=2, side=64, **options):
    return torch.randn(batch, 3, side, side, **options)


class Graph:
    """Stands for a CUDA graph: replayed, it computes from the same inputs into the same outputs."""

    made = 0

    def __init__(self, model, inputs):
        self.model, self.inputs, self.outputs = model, inputs, model(*inputs)
        Graph.made += 1

    def replay(self):
        with torch.no_grad():
            self.outputs.copy_(self.model(*self.inputs))

    def pool(self):
        return None


@pytest.fixture
def as_on_cuda(monkeypatch):
    def record(model, inputs, amp, pool):
        with torch.autocast('cpu', dtype=amp or torch.bfloat16, enabled=amp is not None, cache_enabled=False):
            graph = Graph(model, inputs)
        return graph, graph.outputs

    monkeypatch.setattr(graphs, 'on_cuda', lambda x: True)
    monkeypatch.setattr(graphs, 'is_capturing', lambda: False)
    monkeypatch.setattr(graphs, '_record', record)
    Graph.made = 0


@pytest.mark.usefixtures('as_on_cuda')
class TestBookkeeping:
    def test_one_capture_a_size(self):
        model = vit()
        replayed = vit_efficient.graphed(model, image())
        assert Graph.made == 1
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                for batch, side in ((2, 64), (1, 64), (2, 96), (2, 64)):
                    x = image(batch, side)
                    assert torch.equal(replayed(x), model(x))
        assert Graph.made == 3 and not replayed.reasons

    def test_results_are_the_callers(self):
        replayed = vit_efficient.graphed(vit())
        with torch.no_grad():
            first = replayed(image())
            kept = first.clone()
            replayed(image())
        assert torch.equal(first, kept)

    def test_autocast_is_another_capture(self):
        model = vit()
        replayed = vit_efficient.graphed(model, image())
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            x = image()
            assert replayed(x).dtype == model(x).dtype
        assert Graph.made == 2

    def test_weights(self):
        model = vit()
        replayed, x = vit_efficient.graphed(model, image()), image()
        with torch.no_grad():
            model.head.weight.mul_(2)
            assert torch.equal(replayed(x), model(x)) and Graph.made == 1
            model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))
            assert torch.equal(replayed(x), model(x)) and Graph.made == 2
            model.double()
            assert torch.equal(replayed(x.double()), model(x.double())) and Graph.made == 3

    def test_no_more_than_max_sizes(self, caplog):
        model = vit()
        replayed = vit_efficient.graphed(model, max_sizes=1)
        with torch.no_grad():
            for _ in range(2):
                for batch in (1, 2):
                    x = image(batch)
                    assert torch.equal(replayed(x), model(x))
        assert Graph.made == 1 and list(replayed.reasons) == ['2 × 3 × 64 × 64 float32']
        assert caplog.text.count('max_sizes=1 other sizes') == 1

    def test_copies_begin_anew(self):
        replayed, x = vit_efficient.graphed(vit(), image()), image()
        for copied in (copy.deepcopy(replayed), pickle.loads(pickle.dumps(replayed))):
            with torch.no_grad():
                assert torch.equal(copied(x), replayed(x))
        assert Graph.made == 3

    def test_what_fails_is_computed(self, monkeypatch, caplog):
        calls = []

        def fail(*args):
            calls.append(1)
            raise RuntimeError('operation not permitted when stream is capturing')

        monkeypatch.setattr(graphs, '_record', fail)
        model, x = vit(), image()
        replayed = vit_efficient.graphed(model)
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(replayed(x), model(x))
        assert len(calls) == 1 and caplog.text.count('operation not permitted') == 1
        assert 'capture failed' in replayed.reasons['2 × 3 × 64 × 64 float32']

    def test_mistakes_are_the_models(self):
        with torch.no_grad(), pytest.raises(ValueError, match='multiple of the patch size'):
            vit_efficient.graphed(vit())(image(side=65))

    @pytest.mark.parametrize(
        ('change', 'reason'),
        [
            (lambda model: model.train(), 'training mode'),
            (lambda model: model.blocks[0].train(), 'blocks.0 is in training mode'),
            (lambda model: vit_efficient.convert(model, 'treeformer_tf'), 'blocks.0.attn depends on the values'),
        ],
    )
    def test_reasons(self, change, reason):
        model = vit('full')
        change(model)
        replayed = vit_efficient.graphed(model, image())
        assert reason in next(iter(replayed.reasons.values())) and not Graph.made

    def test_gradients(self):
        model, x = vit(), image()
        replayed = vit_efficient.graphed(model, x)
        replayed(x).sum().backward()
        assert model.head.weight.grad is not None
        assert 'gradients are enabled' in next(iter(replayed.reasons.values()))


def test_without_cuda():
    model, x = vit(), image()
    replayed = vit_efficient.graphed(model, x)
    with torch.no_grad():
        assert torch.equal(replayed(x), model(x))
    assert 'it is on cpu' in next(iter(replayed.reasons.values()))
    assert replayed.train().model.training


@pytest.mark.parametrize(('options', 'message'), [(dict(example=3), 'example'), (dict(max_sizes=0), 'max_sizes=0')])
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        vit_efficient.graphed(vit(), **options)


@pytest.mark.cuda
class TestOnGpu:
    @pytest.mark.parametrize(
        'attention', ['full', 'dct', 'dct1d', 'pool', 'linformer', 'combiner', 'monarch', 'nystrom', 'window']
    )
    @pytest.mark.parametrize('amp', [False, True])
    def test_replays_what_the_model_computes(self, attention, amp):
        from vit_efficient.dct.bases import memo

        memo.clear()
        model = vit(attention).cuda()
        x = image(device='cuda')
        replayed = vit_efficient.graphed(model)
        with torch.inference_mode(), torch.autocast('cuda', torch.bfloat16, enabled=amp):
            for batch, side in ((2, 64), (1, 64), (2, 64)):
                x = image(batch, side, device='cuda')
                torch.testing.assert_close(replayed(x), model(x), rtol=1e-3, atol=1e-3)
        assert not replayed.reasons and len(replayed._captures) == 2

    def test_a_capture_that_fails_leaves_the_stream(self):
        class Synchronises(nn.Module):
            def forward(self, x):
                return x * x.sum().item()

        before = torch.cuda.current_stream()
        replayed, x = vit_efficient.graphed(Synchronises().eval()), torch.ones(3, device='cuda')
        with torch.no_grad():
            assert torch.equal(replayed(x), 3 * x)
        assert torch.cuda.current_stream() == before and 'capture failed' in next(iter(replayed.reasons.values()))
        torch.randn(3, device='cuda')  # the random state is not in a capture

    def test_bases_that_are_built_in_a_capture_are_not_kept(self):
        from vit_efficient import dct
        from vit_efficient.dct.bases import memo

        x = torch.randn(2, 37, 29, device='cuda')
        expected = dct.dct2(x.cpu())
        memo.clear()
        torch.matmul(x, x.mT)  # handles of libraries
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = dct.dct2(x)
        torch.testing.assert_close(dct.dct2(x).cpu(), expected, rtol=1e-4, atol=1e-4)
        memo.clear()
        graph.replay()
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)
