"""Attention to parts of the keys: merged, it is attention to all of them, in any order, with gradients."""

import itertools

import pytest
import torch
from torch import nn

from vit_efficient import count_flops
from vit_efficient.attention.partial import attend_with_lse, combine

SCALE = 0.4


def inputs(keys=11, dim=6, of_values=6, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((2, 3, 7, dim), (2, 3, keys, dim), (2, 3, keys, of_values))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def whole(q, k, v, mask=None):
    scores = SCALE * q @ k.mT
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def gradients(outputs, given):
    weights = [torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output) for output in outputs]
    return torch.autograd.grad(
        sum((w * o).sum() for w, o in zip(weights, outputs, strict=True)), given, retain_graph=True
    )


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize(('dim', 'of_values'), [(6, 6), (4, 8), (8, 4), (16, 16)])
def test_outputs_and_gradients_of_both(fused, dim, of_values):
    given = inputs(dim=dim, of_values=of_values)
    mask = torch.rand(7, 11) > 0.3
    mask[:, 0] = True
    for m in (None, mask):
        part = attend_with_lse(*given, SCALE, fused, m)
        expected = whole(*given, m)
        for actual, wanted in zip(
            (*part, *gradients(part, given)), (*expected, *gradients(expected, given)), strict=True
        ):
            assert torch.allclose(actual, wanted, atol=1e-12)


@pytest.mark.parametrize('fused', [True, False])
def test_merged_parts_are_the_whole_in_any_order(fused):
    q, k, v = given = inputs()
    expected = whole(*given)
    for order in itertools.permutations(range(4)):
        parts = zip(k.split([2, 5, 0, 4], dim=2), v.split([2, 5, 0, 4], dim=2), strict=True)
        parts = [attend_with_lse(q, *part, SCALE, fused) for part in parts]
        merged = combine(parts[i] for i in order)
        for actual, wanted in zip(
            (*merged, *gradients(merged, given)), (*expected, *gradients(expected, given)), strict=True
        ):
            assert torch.allclose(actual, wanted, atol=1e-12)
    a, b, c, _ = parts
    left, right = combine([combine([a, b]), c]), combine([a, combine([b, c])])
    assert all(torch.allclose(x, y, atol=1e-14) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize('fused', [True, False])
def test_without_keys_and_all_masked(fused):
    q, k, v = inputs(keys=0)
    empty = attend_with_lse(q, k, v, SCALE, fused)
    assert not empty.output.any() and (empty.lse == -torch.inf).all()
    assert all(torch.equal(x, y) for x, y in zip(combine([empty, empty]), empty, strict=True))
    q, k, v = inputs()
    part = attend_with_lse(q, k, v, SCALE, fused)
    nothing = attend_with_lse(q, k, v, SCALE, fused, torch.zeros(7, 11, dtype=torch.bool))
    assert not nothing.output.any() and (nothing.lse == -torch.inf).all()
    for merged in (combine([part, nothing]), combine([nothing, part]), combine([empty, part])):
        assert all(torch.allclose(x, y, atol=1e-15) for x, y in zip(merged, part, strict=True))
        assert all(g.isfinite().all() for g in torch.autograd.grad(merged.output.sum(), [q, k, v], retain_graph=True))


@pytest.mark.parametrize('fused', [True, False])
def test_gradcheck(fused):
    assert torch.autograd.gradcheck(lambda q, k, v: tuple(attend_with_lse(q, k, v, SCALE, fused)), inputs())


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_large_scores(fused, dtype):
    q, k, v = inputs(dtype=torch.float64)
    q, k, v = ((1e2 * q).to(dtype).detach(), (1e3 * k).to(dtype).detach(), v.to(dtype).detach())
    parts = [attend_with_lse(q, *part, SCALE, fused) for part in zip(k.split(4, dim=2), v.split(4, dim=2), strict=True)]
    expected = whole(*(t.double() for t in (q, k, v)))[0]
    error = (combine(parts).output.double() - expected).abs().max()
    assert error < (1e-3 if dtype == torch.float32 else 0.05)


class Layer(nn.Module):
    def forward(self, x):
        return attend_with_lse(x, x, x, SCALE, fused=True).output


def test_products_are_counted():
    assert count_flops(Layer(), images=torch.randn(2, 3, 7, 6)).total == 2 * 3 * 7 * 7 * (6 + 6)
