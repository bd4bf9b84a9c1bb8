"""What holds for every mechanism but exact attention: dropout, and calls that none of them can serve."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from vit_efficient import PatchGrid, create_attention, list_attentions
from vit_efficient.attention import layer_options
from vit_efficient.attention.combiner import chunks

GRID = PatchGrid(7, 13, 1)
MECHANISMS = [name for name in list_attentions() if name != 'full']
AXIAL = pytest.param('combiner', dict(pattern='axial'), id='axial')


def build(name, **options):
    return create_attention(name, 12, 3, **layer_options(name, options, 0, 1, (GRID.height, GRID.width)))


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('name', MECHANISMS)
class TestDropout:
    def test_in_training_only(self, name, fused):
        x = torch.randn(2, 92, 12)
        for dropout in ('attn_drop', 'proj_drop'):
            attention = build(name, **{dropout: 0.5})
            attention.fused_attn = fused
            assert not torch.equal(attention(x, GRID), attention(x, GRID))
            attention.eval()
            assert torch.equal(attention(x, GRID), attention(x, GRID))

    def test_after_the_output_projection(self, name, fused):
        """At full resolution, as timm's."""
        attention = build(name, proj_drop=0.5)
        attention.fused_attn = fused
        assert 0.4 < (attention(torch.randn(2, 92, 12), GRID) == 0).float().mean() < 0.6


@pytest.mark.parametrize('name', ('combiner', 'monarch', 'nystrom', 'performer', 'treeformer_tc'))
class TestDropoutWithoutAMatrix:
    """There is no N × N matrix: keys are dropped, each from all queries of its head."""

    @pytest.mark.parametrize('fused', [True, False])
    def test_the_mean_over_masks_is_the_output_without(self, name, fused):
        """The keys that stay keep their weights, scaled up."""
        attention = build(name, attn_drop=0.2, dtype=torch.float64)
        attention.fused_attn = fused
        x = torch.randn(1, 92, 12, dtype=torch.float64)
        with torch.no_grad():
            draws = torch.stack([attention(x, GRID) for _ in range(1000)])
            expected = attention.eval()(x, GRID)
        error = draws.mean(0) - expected
        assert (error.abs() <= 5 * draws.std(0) / 1000**0.5 + 1e-12).all()

    def test_all_channels_of_a_key_are_dropped_together(self, name):
        attention = build(name, attn_drop=0.5, dtype=torch.float64)
        with torch.no_grad():
            attention.qkv.weight[24:] = attention.qkv.weight[24::4].repeat_interleave(4, dim=0)  # those of a head alike
            attention.proj.weight.copy_(torch.eye(12))
            attention.proj.bias.zero_()
            heads = attention(torch.randn(1, 92, 12, dtype=torch.float64), GRID).unflatten(2, (3, 4))
        assert torch.allclose(heads, heads[..., :1].expand_as(heads))


@pytest.mark.parametrize('name', MECHANISMS)
def test_bad_calls(name):
    attention = build(name)
    x = torch.randn(1, 10, 12)
    with pytest.raises(ValueError, match='10 tokens.*height=3'):
        attention(x, PatchGrid(3, 4))
    with pytest.raises(ValueError, match=f"'{name}'.*attn_mask.*'full'"):
        attention(x, PatchGrid(2, 5), attn_mask=torch.zeros(10, 10))
    with pytest.raises(ValueError, match=f"'{name}'.*is_causal"):
        attention(x, PatchGrid(2, 5), is_causal=True)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', [name for name in MECHANISMS if name not in ('treeformer_tf', 'linformer')])
def test_devices_are_not_mixed(name, training):
    """On tensors of a GPU that need not be there. TF-Attention has a test of its own; Linformer moves a module, whose
    parameters must not be such."""
    with FakeTensorMode():
        attention = build(name, device='cuda').train(training)
        with torch.set_grad_enabled(training):
            y = attention(torch.randn(2, 92, 12, device='cuda'), GRID)
        assert y.device.type == 'cuda' and y.shape == (2, 92, 12)


@pytest.mark.parametrize(
    ('name', 'options', 'rotary'),
    [
        *((*AXIAL.values, rotary) for rotary in (False, True)),
        *((name, {}, False) for name in list_attentions()),
        *((name, {}, True) for name in list_attentions() if name != 'dct1d'),  # which has no rotary positions
    ],
)
def test_autocast(name, options, rotary):
    """Half precision by autocast, in which rotations are not, changes the output a little, and gradients are finite."""
    attention, x = build(name, **options), torch.randn(2, 92, 12)
    angles = (torch.arange(91.0)[:, None] / 10).expand(-1, 4)
    rope = torch.cat([angles.sin(), angles.cos()], dim=-1) if rotary else None
    torch.manual_seed(0)  # merged patches and trees are other ones where scores are nearly equal
    with torch.autocast('cpu', torch.bfloat16):
        y = attention(x, GRID, rope=rope)
    y.float().square().sum().backward()
    expected = attention(x, GRID, rope=rope)
    assert (y - expected).abs().mean() <= 0.05 * expected.abs().mean()
    assert all(p.grad.isfinite().all() for p in attention.parameters() if p.requires_grad)


@pytest.mark.parametrize(('name', 'options'), [*((name, {}) for name in MECHANISMS), AXIAL])
def test_no_images(name, options):
    """As a data loader that sorts images out may hand down."""
    attention, x = build(name, **options), torch.randn(0, 92, 12, requires_grad=True)
    y = attention(x, GRID)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 92, 12)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize(
    ('name', 'options'), [*((name, {}) for name in MECHANISMS if not name.startswith('treeformer')), AXIAL]
)
@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_gradients_of_each_image(name, options, fused, monkeypatch):
    """By torch.func, whatever is fused or checkpointed elsewhere. (Trees have gradients of their own.)"""
    monkeypatch.setattr(chunks, 'CHUNK_OF_HOST', 1)
    attention, x = build(name, **options).eval(), torch.randn(2, 92, 12)
    attention.fused_attn = fused
    weights = {key: each.detach() for key, each in attention.named_parameters()}

    def loss(weights, image):
        return torch.func.functional_call(attention, weights, (image[None], GRID)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i, image in enumerate(x):
        attention.zero_grad()
        attention(image[None], GRID).square().sum().backward()
        for key, each in attention.named_parameters():
            assert torch.allclose(found[key][i], each.grad, rtol=1e-4, atol=1e-4 * each.grad.abs().max() + 1e-9)


@pytest.mark.parametrize(('name', 'options'), [*((name, {}) for name in MECHANISMS if name != 'treeformer_tc'), AXIAL])
def test_forward_mode(name, options):
    """By torch.func, where attention is not fused, which PyTorch has no forward mode of; nor have means of trees."""
    attention, x = build(name, **options, dtype=torch.float64).eval(), torch.randn(2, 92, 12, dtype=torch.float64)
    attention.fused_attn = False
    along = torch.randn_like(x)
    y, slope = torch.func.jvp(lambda x: attention(x, GRID), (x,), (along,))
    assert torch.allclose(y, attention(x, GRID), atol=1e-12)
    by_differences = (attention(x + 1e-6 * along, GRID) - attention(x - 1e-6 * along, GRID)) / 2e-6
    assert torch.allclose(slope, by_differences, atol=1e-6)
