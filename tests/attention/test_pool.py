"""Pooling and subsampling against their equations, and against exact attention at their limit."""

import math

import pytest
import torch
from timm.layers import Attention

from vit_efficient import PatchGrid, create_attention
from vit_efficient.attention import functional, swap_attention
from vit_efficient.compress.budget import Budget, kept_grid

from .reference import cells, pool_down_and_up, reference, subsample_down_and_up, with_prefix
from .test_compressed import EVERYTHING, GRIDS, PLACES, PREFIXES, assert_same, randomised

MATRICES = {'pool': pool_down_and_up, 'subsample': subsample_down_and_up}


@pytest.fixture(params=sorted(MATRICES))
def name(request):
    return request.param


def check(attention, grid, batch=2):
    x = torch.randn(batch, grid.num_tokens, 12, dtype=torch.float64, requires_grad=True)
    kept = kept_grid(grid.height, grid.width, attention.compress.budget)
    down, up = (
        with_prefix(matrix, grid.prefix) for matrix in MATRICES[attention.mechanism](grid.height, grid.width, kept)
    )
    counts = None
    if attention.compress.count_bias:
        counts = [1] * grid.prefix + [len(patches) for patches in cells(grid.height, grid.width, kept)]
        counts = torch.tensor(counts, dtype=torch.float64)
    expected = reference(attention, x, down, up, attention.place, counts)
    assert_same(attention(x, grid), expected, [x, *attention.parameters()], 1e-9)


@pytest.mark.parametrize('place', PLACES)
class TestAgainstEquations:
    @pytest.mark.parametrize('prefix', (0, 5))
    @pytest.mark.parametrize('grid', ((7, 13), (1, 9), (8, 4)))
    @pytest.mark.parametrize('count_bias', (True, False))
    def test_plain(self, name, place, grid, prefix, count_bias):
        options = dict(place=place, keep_ratio=0.3, count_bias=count_bias, dtype=torch.float64)
        check(randomised(create_attention(name, 12, 3, qkv_bias=True, **options)), PatchGrid(*grid, prefix))

    @pytest.mark.parametrize('prefix', (0, 1))
    def test_even_cells(self, name, place, prefix):
        options = dict(place=place, num_tokens=(4, 2), dtype=torch.float64)
        check(randomised(create_attention(name, 12, 3, qkv_bias=True, **options)), PatchGrid(8, 6, prefix), batch=1)

    @pytest.mark.parametrize('extra', [EVERYTHING, dict(gated=True), dict(proj_bias=False)])
    def test_with_norms_and_gates(self, name, place, extra):
        options = dict(place=place, num_tokens=9, dtype=torch.float64, **extra)
        check(randomised(create_attention(name, 12, 3, **options)), PatchGrid(7, 13, 1), batch=1)

    def test_unfused_and_not_commuting(self, name, place):
        attention = create_attention(name, 12, 3, qkv_bias=True, place=place, dtype=torch.float64)
        attention.fused_attn = False
        attention.compress.commutes = False
        check(randomised(attention), PatchGrid(7, 13, 5))


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('prefix', PREFIXES)
@pytest.mark.parametrize('extra', [{}, EVERYTHING], ids=['plain', 'norms-and-gate'])
def test_nothing_left_out_is_exact_attention(name, place, grid, prefix, extra):
    exact = Attention(48, 4, qkv_bias=True, **extra)
    attention = swap_attention(exact, name, keep_ratio=1, place=place)
    grid = PatchGrid(*grid, prefix)
    x = torch.randn(1, grid.num_tokens, 48, requires_grad=True)
    assert_same(attention(x, grid), exact(x), [x, *exact.parameters()], 1e-5)


@pytest.mark.parametrize('grid', ((8, 8), (7, 13)))
def test_image_of_equal_cells_is_attended_exactly(name, grid):
    """A kept key weighs as many as the patches it stands for: where these are equal, nothing is lost by leaving them
    out. Without the bias, the prefix tokens would weigh too much."""
    exact = Attention(48, 4, qkv_bias=True)
    grid = PatchGrid(*grid, 5)
    kept = kept_grid(grid.height, grid.width, Budget(keep_ratio=0.25))
    x = torch.randn(1, grid.num_tokens, 48)
    for patches in cells(grid.height, grid.width, kept):
        x[:, [grid.prefix + patch for patch in patches]] = torch.randn(48)
    attention = swap_attention(exact, name, place='kv')
    assert (attention(x, grid) - exact(x)).abs().max() < 1e-6
    without = swap_attention(exact, name, place='kv', count_bias=False)
    assert (without(x, grid) - exact(x)).abs().max() > 1e-3


def test_subsampling_takes_every_nth_patch():
    down = create_attention('subsample', 12, 3).compress.down
    patches = torch.arange(6 * 8.0).reshape(48, 1)
    assert down(patches, PatchGrid(6, 8))[0].flatten().tolist() == [
        row * 8 + column for row in (1, 3, 5) for column in (1, 3, 5, 7)
    ]


def test_num_attended(name):
    attention = create_attention(name, 12, 3, keep_ratio=1 / 16)
    assert attention.num_attended(PatchGrid(16, 16, 5)) == 5 + 16
    assert math.isclose(attention.options['keep_ratio'], 1 / 16) and attention.options['place'] == 'kv'


@pytest.mark.parametrize('options', [dict(count_bias=1), dict(count_bias='no'), dict(num_tokens=(3, 0))])
def test_bad_options(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        create_attention(name, 12, 3, **options)


def test_pair_beyond_the_grid(name):
    with pytest.raises(ValueError, match=r'num_tokens=\(8, 8\) exceeds the grid of 7 × 13'):
        create_attention(name, 12, 3, num_tokens=(8, 8))(torch.randn(1, 91, 12), PatchGrid(7, 13))


def test_repr_tells_the_truth(name):
    assert 'keep_ratio=0.25, count_bias=True' in repr(create_attention(name, 12, 3))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_bias_is_a_channel_on_gpus(name, dtype, monkeypatch):
    """There a mask would cost the fastest kernels."""
    attention = create_attention(name, 48, 3, dtype=dtype)
    grid, x = PatchGrid(7, 13, 5), torch.randn(1, 96, 48, dtype=dtype)
    expected, seen = attention(x, grid), []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, 'on_gpu', lambda x: True)
    monkeypatch.setattr(
        torch.nn.functional,
        'scaled_dot_product_attention',
        lambda *args, **options: seen.append(options['attn_mask']) or fused(*args, **options),
    )
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    assert (attention(x, grid) - expected).abs().max() <= tolerance * expected.abs().max()
    assert seen == [None]
