"""Pooling and subsampling against their equations, and against exact attention at their limit."""

import math

import pytest
import torch
from timm.layers import Attention, DiffAttention
from torch import nn

from vit_efficient import PatchGrid, create_attention
from vit_efficient.attention import functional, swap_attention
from vit_efficient.compress.budget import Budget, kept_grid

from .reference import (
    SUMMARIES,
    cells,
    pool_down_and_up,
    reference,
    softmax_attention,
    subsample_down_and_up,
    with_prefix,
)
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


def summarised(attention, x, grid, kept, summary, counts):
    """The equations of place kv, with qk-norm before; `attention` lends its parameters."""
    heads, dim, images = attention.num_heads, attention.head_dim, []
    for image in x:
        qkv = nn.functional.linear(image, attention.qkv.weight, attention.qkv.bias)
        outputs = []
        for head in range(heads):
            q, k, v = (qkv[:, (part * heads + head) * dim :][:, :dim] for part in range(3))
            q, k = attention.q_norm(q), attention.k_norm(k)
            outputs.append(softmax_attention(q, *SUMMARIES[summary](q, k, v, grid, kept), counts))
        y = attention.norm(torch.cat(outputs, dim=1))
        if attention.gate is not None:
            y = y * torch.sigmoid(attention.gate(image))
        images.append(attention.proj(y))
    return torch.stack(images)


@pytest.mark.parametrize('summary', SUMMARIES)
class TestSummaries:
    """What stands for a cell at place kv, read off its queries and keys."""

    @pytest.mark.parametrize('fused', [True, False])
    @pytest.mark.parametrize('prefix, extra', [(0, dict(qkv_bias=True)), (5, {}), (1, EVERYTHING)])
    @pytest.mark.parametrize('grid, kept', [((7, 13), (3, 5)), ((1, 9), (1, 4)), ((8, 6), (4, 2))])
    @pytest.mark.parametrize('count_bias', [True, False])
    def test_against_equations(self, summary, count_bias, grid, kept, prefix, extra, fused):
        options = dict(summary=summary, num_tokens=kept, count_bias=count_bias, dtype=torch.float64)
        attention, grid = randomised(create_attention('pool', 12, 3, **options, **extra)), PatchGrid(*grid, prefix)
        attention.fused_attn = fused
        counts = [1] * prefix + [len(patches) if count_bias else 1 for patches in cells(grid.height, grid.width, kept)]
        x = torch.randn(2, grid.num_tokens, 12, dtype=torch.float64, requires_grad=True)
        expected = summarised(attention, x, grid, kept, summary, torch.tensor(counts, dtype=torch.float64))
        assert_same(attention(x, grid), expected, [x, *attention.parameters()], 1e-9)

    @pytest.mark.parametrize('prefix', PREFIXES)
    @pytest.mark.parametrize('cls', [Attention, DiffAttention])
    def test_nothing_left_out_is_exact_attention(self, summary, prefix, cls):
        exact, grid = randomised(cls(48, 4, qkv_bias=True)).eval(), PatchGrid(7, 13, prefix)
        x = torch.randn(1, grid.num_tokens, 48, requires_grad=True)
        attention = swap_attention(exact, 'pool', keep_ratio=1, summary=summary)
        assert_same(attention(x, grid), exact(x), [x, *exact.parameters()], 1e-5)

    def test_image_of_equal_cells_is_attended_exactly(self, summary):
        exact, grid, x = DiffAttention(48, 4).eval(), PatchGrid(7, 13, 5), torch.randn(1, 96, 48)
        for patches in cells(7, 13, kept_grid(7, 13, Budget(keep_ratio=0.25))):
            x[:, [grid.prefix + patch for patch in patches]] = torch.randn(48)
        attention = swap_attention(exact, 'pool', summary=summary)
        assert (attention(x, grid) - exact(x)).abs().max() < 1e-6

    def test_both_maps_of_a_differential_head_read_the_same_patches(self, summary):
        """What stands for a cell is that of a map: its keys, and the values that both maps share."""
        attention = swap_attention(randomised(DiffAttention(24, 2)), 'pool', summary=summary, num_tokens=(2, 3)).eval()
        grid, seen, hook = PatchGrid(4, 6), [], attention.compress.keys_and_values
        attention.compress.keys_and_values = lambda *args: seen.append(args) or hook(*args)
        attention(torch.randn(1, 24, 24), grid)
        ((q, k, v, _),) = seen
        assert q.shape == k.shape == (1, 4, 24, 6) and v.shape == (1, 4, 24, 12)

    @pytest.mark.parametrize('autocast', [True, False])
    def test_large_scores(self, summary, autocast):
        attention = create_attention('pool', 48, 3, summary=summary)
        with torch.no_grad():
            attention.qkv.weight[:96] *= 300
        x = torch.randn(2, 92, 48, requires_grad=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = attention(x, PatchGrid(7, 13, 1))
        y.float().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()

    @pytest.mark.parametrize('place', ['x', 'qkv', 'block'])
    def test_elsewhere_there_are_no_queries(self, summary, place):
        with pytest.raises(ValueError, match=f"summary='{summary}'.* only stand at place='kv', got place='{place}'"):
            create_attention('pool', 12, 3, summary=summary, place=place)

    def test_is_saved(self, summary):
        assert create_attention('pool', 12, 3, summary=summary).options['summary'] == summary

    def test_is_no_option_of_subsampling(self, summary):
        with pytest.raises(ValueError, match="'subsample' has no option 'summary'"):
            create_attention('subsample', 12, 3, summary=summary)


def test_a_medoid_is_a_patch():
    grid, compress = PatchGrid(5, 7), create_attention('pool', 12, 3, summary='medoid', num_tokens=(2, 3)).compress
    q, k, v = torch.randn(3, 2, 3, 35, 4)
    kept_k, kept_v = compress.keys_and_values(q, k, v, grid)
    at = (kept_k[..., None, :] == k[:, :, None]).all(-1).float().argmax(-1)
    assert torch.equal(v.gather(2, at[..., None].expand(-1, -1, -1, 4)), kept_v)
    for i, patches in enumerate(cells(5, 7, (2, 3))):
        assert set(at[..., i].flatten().tolist()) <= set(patches)


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


def test_an_unknown_summary():
    with pytest.raises(ValueError, match="summary must be one of mean, local, medoid, got summary='median'"):
        create_attention('pool', 12, 3, summary='median')


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
