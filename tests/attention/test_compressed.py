"""DCT attention against its equations, against exact attention at its limit, and in every mode timm's has."""

import copy
import pickle

import pytest
import torch
import torch.nn.utils.prune
from timm.layers import Attention
from torch import nn

from vit_efficient import PatchGrid, create_attention
from vit_efficient.attention import CompressedAttention, swap_attention
from vit_efficient.compress.budget import Budget, kept_count, kept_grid

from .reference import dct_former_code_form, down_and_up, reference, with_prefix

PLACES = ('x', 'qkv', 'kv')
GRIDS = ((14, 14), (7, 13), (1, 9))
PREFIXES = (0, 1, 5)
EVERYTHING = dict(qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm)
COMPRESSORS = [
    dict(axes='2d', domain='space'),
    dict(axes='2d', domain='frequency'),
    dict(axes='1d', domain='frequency'),
    dict(axes='1d', domain='space'),
]


def randomised(attention):
    for p in attention.parameters():
        nn.init.normal_(p, std=0.3)
    return attention


def gradients(output, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


def assert_same(actual, expected, parameters, tolerance):
    """Values and gradients agree to a share of the largest expected one."""
    pairs = [(actual, expected), *zip(gradients(actual, parameters), gradients(expected, parameters), strict=True)]
    for a, e in pairs:
        assert (a - e).abs().max() <= tolerance * e.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('compressor', COMPRESSORS, ids=lambda c: '-'.join(c.values()))
class TestAgainstEquations:
    def check(self, attention, grid, batch=2, tolerance=1e-9):
        x = torch.randn(batch, grid.num_tokens, 12, dtype=torch.float64, requires_grad=True)
        options = attention.compress
        kept = (kept_grid if options.axes == '2d' else kept_count)(grid.height, grid.width, options.budget)
        down, up = (
            with_prefix(matrix, grid.prefix)
            for matrix in down_and_up(grid.height, grid.width, kept, options.axes, options.domain)
        )
        expected = reference(attention, x, down, up, attention.place)
        assert_same(attention(x, grid), expected, [x, *attention.parameters()], tolerance)

    @pytest.mark.parametrize('prefix', (0, 5))
    @pytest.mark.parametrize('grid', ((7, 13), (1, 9), (6, 4)))
    def test_plain(self, place, compressor, grid, prefix):
        attention = create_attention(
            'dct', 12, 3, qkv_bias=True, place=place, keep_ratio=0.3, dtype=torch.float64, **compressor
        )
        self.check(randomised(attention), PatchGrid(*grid, prefix))

    @pytest.mark.parametrize('extra', [EVERYTHING, dict(qk_norm=True, norm_layer=nn.LayerNorm), dict(gated=True)])
    def test_with_norms_and_gates(self, place, compressor, extra):
        attention = create_attention(
            'dct', 12, 3, qkv_bias=True, place=place, num_tokens=9, dtype=torch.float64, **compressor, **extra
        )
        self.check(randomised(attention), PatchGrid(7, 13, 1), batch=1)

    def test_without_biases(self, place, compressor):
        attention = create_attention('dct', 12, 3, proj_bias=False, place=place, dtype=torch.float64, **compressor)
        self.check(randomised(attention), PatchGrid(7, 13, 1))

    def test_unfused_and_not_commuting(self, place, compressor):
        """The general paths, for compressors that are not one map for all channels, and for odd devices."""
        attention = create_attention('dct', 12, 3, qkv_bias=True, place=place, dtype=torch.float64, **compressor)
        attention.fused_attn = False
        attention.compress.commutes = False
        self.check(randomised(attention), PatchGrid(7, 13, 5))


def test_paper_in_its_codes_form():
    attention = randomised(create_attention('dct1d', 12, 3, qkv_bias=True, num_tokens=20, dtype=torch.float64))
    x = torch.randn(2, 91, 12, dtype=torch.float64, requires_grad=True)
    expected = dct_former_code_form(attention, x, 20)
    assert_same(attention(x, PatchGrid(7, 13)), expected, [x, *attention.parameters()], 1e-9)


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('prefix', PREFIXES)
@pytest.mark.parametrize('extra', [{}, EVERYTHING], ids=['plain', 'norms-and-gate'])
@pytest.mark.parametrize('axes', ['1d', '2d'])
def test_nothing_truncated_is_exact_attention(place, grid, prefix, extra, axes):
    exact = Attention(48, 4, qkv_bias=True, **extra)
    attention = swap_attention(exact, 'dct', keep_ratio=1, domain='space', place=place, axes=axes)
    grid = PatchGrid(*grid, prefix)
    x = torch.randn(1, grid.num_tokens, 48, requires_grad=True)
    assert_same(attention(x, grid), exact(x), [x, *exact.parameters()], 1e-5)


def test_resampling_to_the_same_size_is_not_a_shortcut_in_frequency():
    """With every coefficient kept, the frequency domain still attends among coefficients: it is not exact attention."""
    exact = randomised(Attention(48, 4, qkv_bias=True))
    attention = swap_attention(exact, 'dct', keep_ratio=1, domain='frequency')
    x = torch.randn(1, 91, 48)
    assert (attention(x, PatchGrid(7, 13)) - exact(x)).abs().max() > 1e-2


def test_parameters_are_shared_and_left_alone():
    exact = Attention(48, 4, qkv_bias=True)
    attention = swap_attention(exact, 'dct', local=3)
    assert attention.qkv.weight is exact.qkv.weight and attention.proj.bias is exact.proj.bias
    assert set(attention.added_state()) == {'local.weight'}
    back = swap_attention(attention, 'full')
    assert list(back.state_dict()) == list(exact.state_dict())
    assert not hasattr(back, 'compress') and not hasattr(back, 'local')
    assert attention.compress is not None  # the one it came from is whole


def test_local_starts_at_nothing_and_learns():
    torch.manual_seed(0)
    plain = create_attention('dct', 12, 3)
    local = swap_attention(plain, 'dct', local=3)
    grid, x = PatchGrid(7, 13, 1), torch.randn(2, 92, 12)
    assert torch.equal(local(x, grid), plain(x, grid))
    nn.init.normal_(local.local.weight)
    patches = x[:, 1:].transpose(1, 2).unflatten(2, (7, 13))
    expected = plain(x, grid)
    convolved = nn.functional.conv2d(patches, local.local.weight, padding=1, groups=12).flatten(2).transpose(1, 2)
    expected = torch.cat([expected[:, :1], expected[:, 1:] + convolved], dim=1)
    assert torch.allclose(local(x, grid), expected, atol=1e-6)
    local(x, grid).square().sum().backward()
    assert local.local.weight.grad.abs().min() > 0


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('compressor', COMPRESSORS, ids=lambda c: '-'.join(c.values()))
def test_autocast_error(place, compressor):
    """DCT-Former runs its transform and attention in float32; following autocast costs at most 2e-2."""
    attention = create_attention('dct', 192, 3, qkv_bias=True, place=place, **compressor)
    grid, x = PatchGrid(14, 14, 1), torch.randn(2, 197, 192)
    expected = attention(x, grid)
    with torch.autocast('cpu', torch.bfloat16):
        y = attention(x, grid)
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() / expected.abs().max() <= 2e-2


def test_replaced_projections_are_called():
    """Adapters such as LoRA put a module of their own where the linear layer was."""

    class Doubled(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

        def forward(self, x):
            return 2 * self.linear(x)

    for place in PLACES:
        attention = create_attention('dct', 12, 3, place=place)  # no qkv bias
        doubled = copy.deepcopy(attention)
        doubled.qkv = Doubled(doubled.qkv)
        twice = copy.deepcopy(attention)
        with torch.no_grad():
            twice.qkv.weight.mul_(2)
        grid, x = PatchGrid(7, 13), torch.randn(2, 91, 12)
        assert torch.allclose(doubled(x, grid), twice(x, grid), atol=1e-6)


@pytest.mark.parametrize('place', PLACES)
def test_pruned_projections(place):
    """Pruning computes the weight before each call of the layer."""
    attention = create_attention('dct', 12, 3, place=place)
    torch.nn.utils.prune.random_unstructured(attention.qkv, 'weight', 0.5)
    grid, x = PatchGrid(2, 3), torch.randn(1, 6, 12)
    for _ in range(2):
        attention(x, grid).sum().backward()
    before = attention(x, grid)
    with torch.no_grad():
        attention.qkv.weight_orig.mul_(2)
    assert not torch.equal(attention(x, grid), before)


def test_copies():
    attention = create_attention('dct', 12, 3, local=3)
    grid, x = PatchGrid(7, 13), torch.randn(2, 91, 12)
    for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(copied(x, grid), attention(x, grid))


def test_repr_tells_the_truth():
    text = repr(create_attention('dct', 12, 3, place='kv', keep_ratio=1 / 16))
    assert "place='kv'" in text and 'keep_ratio=0.0625' in text and "domain='" in text


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(keep_ratio=0), 'keep_ratio=0'),
        (dict(keep_ratio=1.5), 'keep_ratio=1.5'),
        (dict(keep_ratio=float('nan')), 'keep_ratio=nan'),
        (dict(keep_ratio='a'), "keep_ratio='a'"),
        (dict(keep_ratio=True), 'keep_ratio=True'),
        (dict(keep_ratio=0.5, num_tokens=4), 'one of keep_ratio and num_tokens'),
        (dict(num_tokens=0), 'num_tokens=0'),
        (dict(num_tokens=(3, 0)), 'num_tokens'),
        (dict(num_tokens=(3, 4), axes='1d'), 'num_tokens'),
        (dict(place='v'), "place='v'"),
        (dict(axes='3d'), "axes='3d'"),
        (dict(domain='time'), "domain='time'"),
        (dict(local=2), 'local=2'),
        (dict(local=-1), 'local=-1'),
        (dict(compressor='pol'), r"compressor='pol'; did you mean pool\?"),
        (
            dict(keep_ration=0.5),
            r"'dct' has no option 'keep_ration'; did you mean keep_ratio\? \(it has .*, place",
        ),
        (dict(num_heads=5), 'num_heads=5'),
        (dict(qk_norm=True), 'norm_layer'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_attention('dct', 12, **{'num_heads': 3, **options})


def test_bad_calls():
    with pytest.raises(ValueError, match=r'num_tokens=\(4, 4\).*2 × 5'):
        create_attention('dct', 12, 3, num_tokens=(4, 4))(torch.randn(1, 10, 12), PatchGrid(2, 5))
    with pytest.raises(ValueError, match=r"unknown attention 'dtc'; did you mean dct\?"):
        create_attention('dtc', 12, 3)


def test_full_has_masks():
    exact = Attention(12, 3)
    attention = swap_attention(exact, 'full')
    x, mask = torch.randn(1, 10, 12), torch.randn(10, 10)
    assert torch.equal(attention(x, PatchGrid(2, 5), attn_mask=mask), exact(x, attn_mask=mask))
    assert torch.equal(attention(x, PatchGrid(2, 5), is_causal=True), exact(x, is_causal=True))


def test_budget_is_kept():
    assert Budget(num_tokens=[3, 4]).num_tokens == (3, 4)  # as JSON gives it back
    attention = create_attention('dct', 12, 3, num_tokens=(3, 4))
    assert attention.num_attended(PatchGrid(7, 13, 5)) == 17
    assert isinstance(attention, CompressedAttention)
