"""Place 'block': attention and MLP on the kept tokens, the residual carrying the rest."""

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import nn

import vit_efficient
from tests.attention.reference import down_and_up, with_prefix
from vit_efficient import PatchGrid, create_attention
from vit_efficient.attention import swap_attention
from vit_efficient.compress.budget import Budget, kept_grid
from vit_efficient.models import GridBlock

GRIDS = ((7, 13), (1, 9), (6, 4))
SMALL = dict(embed_dim=32, depth=3, num_heads=2, num_classes=5, img_size=(56, 104), patch_size=8)


def blocks(**options):
    """timm's block, and ours around the same weights."""
    exact = Block(24, 3, qkv_bias=True, qk_norm=True, init_values=0.3)
    for parameter in exact.parameters():
        nn.init.normal_(parameter, std=0.3)
    block = GridBlock(24, 3, qkv_bias=True, qk_norm=True, init_values=0.3)
    block.load_state_dict(exact.state_dict())
    block.attn = swap_attention(block.attn, options.pop('name', 'dct'), place='block', **options)
    return exact.double(), block.double()


def gradients(output, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


def assert_same(actual, expected, theirs, ours, tolerance):
    pairs = [(actual, expected), *zip(gradients(actual, ours), gradients(expected, theirs), strict=True)]
    for a, e in pairs:
        assert (a - e).abs().max() <= tolerance * e.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('prefix', [0, 1, 5])
@pytest.mark.parametrize('domain', ['space', 'frequency'])
@pytest.mark.parametrize('batch', [1, 2])
def test_equals_the_equation(grid, prefix, domain, batch):
    """x + U (block(D x) - D x), with D and U as matrices over the tokens."""
    exact, block = blocks(domain=domain, keep_ratio=0.3)
    kept = kept_grid(*grid, Budget(0.3))
    down, up = (with_prefix(matrix, prefix) for matrix in down_and_up(*grid, kept, '2d', domain))
    x = torch.randn(batch, prefix + grid[0] * grid[1], 24, dtype=torch.float64, requires_grad=True)
    y = down @ x
    expected = x + up @ (exact(y) - y)
    actual = block(x, PatchGrid(*grid, prefix))
    assert_same(actual, expected, [x, *exact.parameters()], [x, *block.parameters()], 1e-9)


@pytest.mark.parametrize('name, options', [('dct', dict(keep_ratio=1)), ('pool', dict(keep_ratio=1))])
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('prefix', [0, 5])
def test_nothing_truncated_is_timms_block(name, options, grid, prefix):
    exact, block = blocks(name=name, **options)
    x = torch.randn(1, prefix + grid[0] * grid[1], 24, dtype=torch.float64, requires_grad=True)
    assert_same(block(x, PatchGrid(*grid, prefix)), exact(x), [x, *exact.parameters()], [x, *block.parameters()], 1e-9)


def test_layers_of_both_kinds(tmp_path):
    """What is cheap and what is whole in one model: as built, converted, saved and read back."""
    spec = [('dct', dict(place='block', keep_ratio=1 / 16)), ('dct', dict(place='x')), 'full']
    model = timm.create_model('vit_full_tiny', **SMALL, attention=spec).eval()
    x = torch.randn(2, 3, 56, 104)
    expected = model(x)
    vit_efficient.save_model(model, tmp_path)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), expected)
    plain = timm.create_model('vit_full_tiny', **SMALL).eval()
    plain.load_state_dict(model.state_dict())
    vit_efficient.convert(plain, spec)
    assert torch.equal(plain(x), expected)
    exact = timm.create_model('vit_full_tiny', **SMALL).eval()
    exact.load_state_dict(model.state_dict())
    assert torch.equal(vit_efficient.convert(plain, 'full')(x), exact(x))


def test_flops_are_those_of_the_kept_tokens():
    model = timm.create_model('vit_dct_tiny', **SMALL, attention_kwargs=dict(place='block', num_tokens=(3, 5)))
    count = vit_efficient.count_flops(model, (3, 56, 104))
    m, d = 1 + 15, 32
    assert count.by_role['mlp'] == 3 * m * 8 * d**2
    assert count.by_role['attention projections'] == 3 * m * 4 * d**2
    assert count.by_role['attention products'] == 3 * 2 * m**2 * d
    assert count.by_role['transform'] == 3 * 2 * d * (7 * 13 * 3 + 13 * 3 * 5)
    fvcore = vit_efficient.count_flops(model, (3, 56, 104), engine='fvcore')
    assert fvcore.by_role == count.by_role
    assert vit_efficient.kept_tokens(model) == [m] * 3


def test_in_training_branches_are_dropped_for_whole_images():
    _, block = blocks(keep_ratio=0.3)
    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 0.0
    dropped = GridBlock(24, 3, qkv_bias=True, qk_norm=True, init_values=0.3, drop_path=0.5).double()
    dropped.load_state_dict(block.state_dict())
    dropped.attn = block.attn
    x = torch.randn(64, 91, 24, dtype=torch.float64)
    torch.manual_seed(0)
    y = dropped(x, PatchGrid(7, 13))
    untouched = (y == x).flatten(1).all(dim=1)
    assert 4 < untouched.sum() < 32  # a quarter loses both branches


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(local=3), "local=3 cannot be had at place='block'"),
        (dict(compressor='learned', grid_size=(4, 6)), 'no way up'),
    ],
)
def test_what_cannot_be_had(options, message):
    with pytest.raises(ValueError, match=message):
        create_attention('dct', 24, 3, place='block', **options)


def test_the_attention_alone_takes_kept_tokens():
    attention = create_attention('dct', 24, 3, place='block', num_tokens=(2, 3))
    grid = PatchGrid(4, 6, 1)
    assert attention(torch.randn(2, 7, 24), grid).shape == (2, 7, 24)
    with pytest.raises(ValueError, match='among the 7 tokens that its block keeps, and was given 25'):
        attention(torch.randn(2, 25, 24), grid)
    with pytest.raises(ValueError, match='cannot have is_causal'):
        attention(torch.randn(2, 7, 24), grid, is_causal=True)


def test_with_a_learned_size():
    options = dict(place='block', learned=True, keep_ratio=1, domain='frequency')
    model = timm.create_model('vit_dct_tiny', **SMALL, attention_kwargs=options).eval()
    x = torch.randn(2, 3, 56, 104)
    full = vit_efficient.count_flops(model, (3, 56, 104))
    for block in model.blocks:
        block.attn.compress.window.smoothness = 1e-6
        block.attn.compress.window.share.data = torch.tensor((4 / 7, 8 / 13))
    before, share = model(x), vit_efficient.models.truncation.soft_cost(model).item()
    assert set(vit_efficient.freeze_truncation(model).values()) == {(4, 8)}
    torch.testing.assert_close(model(x), before, atol=1e-4, rtol=1e-4)
    cut = vit_efficient.count_flops(model, (3, 56, 104))
    costs = [count.attention + count.by_role['mlp'] for count in (cut, full)]
    assert share == pytest.approx(costs[0] / costs[1], rel=1e-5)
