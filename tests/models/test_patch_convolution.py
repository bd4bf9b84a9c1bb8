"""The convolution of patches as a product, as on a GPU, against PyTorch's."""

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from torch import nn

import vit_efficient
from vit_efficient.models.patch_convolution import PatchConvolution, use_products
from vit_efficient.utils import device

SMALL = dict(embed_dim=12, depth=1, num_heads=3, num_classes=5)


@pytest.mark.parametrize('bias', (False, True))
@pytest.mark.parametrize('patch, size', [((4, 4), (28, 52)), ((2, 3), (7, 13)), ((5, 1), (5, 1)), ((8, 8), (9, 15))])
@pytest.mark.parametrize('channels_last', (False, True))
def test_against_the_convolution(monkeypatch, patch, size, bias, channels_last):
    """Pixels beyond the last whole patch are left out, as by a convolution."""
    conv = nn.Conv2d(3, 7, patch, patch, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    given = x.to(memory_format=torch.channels_last) if channels_last else x
    expected = conv(given)
    gradient = torch.randn_like(expected)
    inputs = [x, *conv.parameters()]
    wanted = torch.autograd.grad(expected, inputs, gradient)
    embedding = nn.Module()
    embedding.proj = conv
    use_products(embedding)
    monkeypatch.setattr(device, 'HOSTS', ())
    y = conv(given)
    assert type(conv) is PatchConvolution and torch.allclose(y, expected, atol=1e-12)
    for found, other in zip(torch.autograd.grad(y, inputs, gradient), wanted, strict=True):
        assert torch.allclose(found, other, atol=1e-12)


@pytest.mark.parametrize('change', [dict(stride=2), dict(padding=1), dict(dilation=2), dict(groups=3)], ids=str)
def test_other_convolutions_stay(change):
    embedding = nn.Module()
    embedding.proj = nn.Conv2d(3, 6, 4, **dict(dict(stride=4), **change))
    use_products(embedding)
    assert type(embedding.proj) is nn.Conv2d
    use_products(nn.Identity())


def test_models_have_it(monkeypatch):
    """With timm's state, its checks of sizes, and on a host its bits."""
    plain = timm.create_model('vit_tiny_patch16_224', img_size=64, **SMALL)
    x = torch.randn(1, 3, 64, 64)
    expected = plain.eval().patch_embed(x)
    converted = vit_efficient.convert(plain, 'dct')
    assert type(converted.patch_embed) is PatchEmbed and type(converted.patch_embed.proj) is PatchConvolution
    assert torch.equal(converted.patch_embed(x), expected)
    made = timm.create_model('vit_dct_tiny', img_size=64, **SMALL)
    assert list(made.state_dict()) == list(timm.create_model('vit_tiny_patch16_224', img_size=64, **SMALL).state_dict())
    monkeypatch.setattr(device, 'HOSTS', ())
    assert torch.allclose(converted.patch_embed(x), expected, atol=1e-6)
    with pytest.raises(AssertionError, match='Input height'):
        made.patch_embed(torch.zeros(1, 3, 80, 64))
