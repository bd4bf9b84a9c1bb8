"""Features of reduced images, brought back to the patches of whole ones."""

import pytest
import timm
import torch

from vit_efficient import DenseModel, count_flops, save_model
from vit_efficient.upsampling import GuidedUpsampler


def build(reduce=2, upsample=True, size=(24, 40), **options):
    torch.manual_seed(0)
    small = dict(depth=2, embed_dim=24, num_heads=2, patch_size=8, img_size=size, dynamic_img_size=True)
    backbone = timm.create_model('vit_tiny_patch16_224', **small)
    return DenseModel(backbone, 'multilayer', 5, reduce, upsample, width=16, layers=[0, 1], **options).eval()


def slow_upsampler(module, images, features):
    """Cell by cell, with the weights of the module."""
    f, (batch, layers, dim, h, w) = module.factor, features.shape
    guide = module.embed(images)
    guide = guide + module.mix(torch.nn.functional.gelu(guide))
    active = torch.nn.functional.gelu(guide)
    queries = module.queries(active)
    fine = features.new_zeros(batch, layers, dim, h * f, w * f)
    for b in range(batch):
        for row in range(h * f):
            for column in range(w * f):
                scores, values = [], []
                for place, (i, j) in enumerate((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
                    y, x = row // f + i, column // f + j
                    if not (0 <= y < h and 0 <= x < w):
                        continue
                    cell = active[b, :, y * f : (y + 1) * f, x * f : (x + 1) * f].mean((1, 2))
                    last = features[b, -1, :, y, x]
                    last = (last - last.mean()) / (last.var(unbiased=False) + 1e-5).sqrt()
                    key = module.keys.weight[..., 0, 0] @ torch.cat([cell, last]) + module.keys.bias
                    product = queries[b, :, row, column] @ key / len(key) ** 0.5
                    scores.append(product + module.bias[place, row % f, column % f])
                    values.append(features[b, :, :, y, x])
                shares = torch.stack(scores).softmax(0)
                fine[b, :, :, row, column] = sum(s * v for s, v in zip(shares, values, strict=True))
    return fine


@pytest.mark.parametrize('factor', [2, 3])
@pytest.mark.parametrize('grid', [(3, 5), (1, 2), (1, 1)])
def test_against_a_loop(factor, grid):
    torch.manual_seed(0)
    module = GuidedUpsampler(3, 8, (4, 4), factor, width=6).double()
    torch.nn.init.normal_(module.queries.weight)
    images = torch.randn(2, 3, *(4 * factor * side for side in grid), dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 2, 8, *grid, dtype=torch.float64, requires_grad=True)
    found, expected = module(images, features), slow_upsampler(module, images, features)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    sources = (images, features, *module.parameters())
    ours, theirs = (torch.autograd.grad(each.square().sum(), sources) for each in (found, expected))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


def test_untrained_it_weighs_by_distance():
    """What rises evenly goes on rising, and what is even stays so, up to the edges."""
    module = GuidedUpsampler(1, 4, (4, 4), 2)
    ramp = torch.arange(6.0).expand(1, 1, 4, 5, 6)
    found = module(torch.randn(1, 1, 40, 48), ramp)
    assert torch.allclose(found, found[..., :1, :].expand_as(found), atol=1e-5)
    steps = found[0, 0, 0, 0].diff()
    assert (steps[2:-2] > 0.4).all() and (steps[2:-2] < 0.6).all()
    assert torch.allclose(module(torch.randn(1, 1, 40, 48), torch.ones(1, 1, 4, 5, 6)), torch.tensor(1.0), atol=1e-6)


@pytest.mark.parametrize('upsample', [False, True])
def test_a_model_of_reduced_images(tmp_path, upsample):
    model = build(upsample=upsample)
    images = torch.randn(2, 3, 48, 80)
    assert model.patch_size == (16, 16)
    reduced = torch.nn.functional.avg_pool2d(images, 2)
    features = torch.stack(
        model.backbone.forward_intermediates(reduced, [0, 1], output_fmt='NCHW', intermediates_only=True), 1
    )
    expected = model.upsampler(images, features) if upsample else features
    assert torch.equal(model.features(images), expected)
    assert model(images).shape == (2, 5, *((12, 20) if upsample else (6, 10)))
    save_model(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(images), model(images)) and again.reduce == 2
    whole, half = (count_flops(build(reduce, False), (3, 48, 80)).total for reduce in (1, 2))
    assert half < whole / 3.5


def test_what_is_frozen():
    model = build()
    model.freeze_backbone()
    assert {name.partition('.')[0] for name, each in model.named_parameters() if each.requires_grad} == {'head'}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(reduce=0, upsample=False), 'reduce must be a positive integer, got reduce=0'),
        (dict(reduce=1, upsample=True), 'upsample=True gives back what reduce has taken, which is 1; set it to 2'),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
