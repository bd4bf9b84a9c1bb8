"""Models with a head for patches: what they compute, that they train, convert, save and load as their backbone does."""

import copy
from itertools import pairwise

import pytest
import timm
import timm.optim
import torch
from torch.utils.flop_counter import FlopCounterMode

import vit_efficient
from vit_efficient import DenseModel, convert, count_flops, kept_tokens, save_model
from vit_efficient.dense import HEADS
from vit_efficient.models import compile_blocks, load_model

BACKBONES = {
    'vit_tiny_patch16_224': dict(img_size=(48, 80), reg_tokens=4),
    'vit_small_patch14_dinov2': dict(img_size=(42, 70), patch_size=14),
    'vit_small_patch16_dinov3': dict(img_size=(48, 80)),
    'eva02_tiny_patch14_224': dict(img_size=(42, 70)),
    'vit_dct_tiny': dict(img_size=(48, 80)),
}


def build(name='vit_tiny_patch16_224', head='multilayer', classes=5, in_chans=3, **options):
    torch.manual_seed(0)
    small = dict(depth=4, embed_dim=48, num_heads=3)
    backbone = timm.create_model(name, **small, in_chans=in_chans, **BACKBONES[name])
    return DenseModel(backbone, head, classes, **({'width': 16} if head == 'multilayer' else {}), **options).eval()


def image_of(model, batch=2):
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size)


def slow_head(model, x):
    """From timm's own features, token by token."""
    backbone, head = model.backbone, model.head
    features = backbone.forward_intermediates(x, head.layers, output_fmt='NLC', intermediates_only=True)
    normed = [torch.nn.functional.layer_norm(one, one.shape[-1:]) for one in features]
    grid = backbone.patch_embed.dynamic_feat_size(x.shape[-2:])
    tokens = torch.cat(normed, 2)
    if model.head_name == 'linear':
        weight, bias = head.classify.weight[..., 0, 0], head.classify.bias
        return (tokens @ weight.T + bias).transpose(1, 2).unflatten(2, grid)
    y = (tokens @ head.project.weight[..., 0, 0].T + head.project.bias).transpose(1, 2).unflatten(2, grid)
    for mix in head.mix:
        centred = y - y.mean((1, 2, 3), keepdim=True)
        normal = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        active = torch.nn.functional.gelu(normal * mix.norm.weight[:, None, None] + mix.norm.bias[:, None, None])
        padded = torch.nn.functional.pad(active, (1, 1, 1, 1))
        moved = mix.conv.bias[:, None, None].expand(y.shape).clone()
        for i in range(3):
            for j in range(3):
                part = padded[:, :, i : i + y.shape[2], j : j + y.shape[3]]
                moved = moved + torch.einsum('bchw,dc->bdhw', part, mix.conv.weight[:, :, i, j])
        y = y + moved
    logits = torch.einsum('bchw,kc->bkhw', y, head.classify.weight[..., 0, 0]) + head.classify.bias[:, None, None]
    batch, _, h, w = logits.shape
    up = head.shuffle.upscale_factor
    fine = logits.view(batch, model.num_classes, up, up, h, w).permute(0, 1, 4, 2, 5, 3)
    return fine.reshape(batch, model.num_classes, h * up, w * up)


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize(('head', 'options'), [('linear', {}), ('multilayer', {}), ('multilayer', {'upscale': 3})])
def test_against_a_slow_head(name, head, options):
    model = build(name, head, **options).double()
    x = image_of(model).double()
    expected = slow_head(model, x)
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-10)
    assert torch.equal(model(model.features(x)), model(x))
    up = options.get('upscale', 1 if head == 'linear' else 2)
    assert model(x).shape == (2, 5, 3 * up, 5 * up)


def test_default_layers():
    backbone = timm.create_model('vit_tiny_patch16_224', depth=12)
    assert DenseModel(backbone, 'multilayer', 3).head.layers == [2, 5, 8, 11]
    assert build(layers=[-1, 0]).head.layers == [0, 3]
    assert build('vit_tiny_patch16_224', 'linear').head.layers == [3]


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('in_chans', [3, 5])
def test_saved_and_loaded(tmp_path, name, head, in_chans):
    model = build(name, head, in_chans=in_chans)
    convert(model, 'combiner', layers=[-1, 1], window_size=2, cell_size=2)
    x = image_of(model)
    save_model(model, tmp_path, list('abcde'))
    for again in (timm.create_model(f'local-dir:{tmp_path}', pretrained=True), load_model(tmp_path)):
        assert isinstance(again, DenseModel) and again.pretrained_cfg['label_names'] == list('abcde')
        assert torch.equal(again.eval()(x), model(x))
        assert kept_tokens(again) == kept_tokens(model)
        assert again.construction() == model.construction()
        if in_chans == 3:
            assert list(again.pretrained_cfg['mean']) == list(model.pretrained_cfg['mean'])


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'vit_small_patch16_dinov3', 'vit_dct_tiny'])
def test_loaded_for_another_size(tmp_path, name):
    model = build(name)
    model.set_input_size((64, 64))  # of an embedding of positions timm knows square grids only
    save_model(model, tmp_path)
    larger = load_model(tmp_path, img_size=(96, 64)).eval()
    model.set_input_size((96, 64))
    x = torch.randn(1, 3, 96, 64)
    assert torch.allclose(larger(x), model(x), atol=1e-5)


@pytest.mark.parametrize('head', HEADS)
def test_gradients_reach_all_that_it_reads(head):
    model = build(head=head).train()
    model(image_of(model)).square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(name.startswith('backbone.norm.') for name in without)


def test_a_frozen_backbone_is_as_in_evaluation():
    model = build()
    model.backbone.blocks[0].drop_path1 = torch.nn.Dropout(0.5)
    model.freeze_backbone()
    model.train()
    assert model.head.training and not any(module.training for module in model.backbone.modules())
    x = image_of(model)
    assert torch.equal(model.features(x), model.features(x))
    model(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_rates_by_layer():
    model = build()
    optimizer = timm.optim.create_optimizer_v2(model, 'sgd', 1.0, 0.1, layer_decay=0.5)
    scales = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    decays = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    found = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    assert {found[f'head.{name}.weight'] for name in ('project', 'classify')} == {1.0}
    of_blocks = [found[f'backbone.blocks.{i}.attn.qkv.weight'] for i in range(4)]
    assert all(below * 2 == above for below, above in pairwise(of_blocks))
    assert found['backbone.patch_embed.proj.weight'] < of_blocks[0] and of_blocks[-1] < 1
    assert decays[id(model.backbone.pos_embed)] == 0 and decays[id(model.head.project.weight)] == 0.1


def test_products_are_counted():
    model = build('vit_tiny_patch16_224', 'multilayer').requires_grad_(False)
    count = count_flops(model, (3, 48, 80))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(image_of(model, 1))
    assert count.products == counter.get_total_flops() / 2
    assert count.by_module['head'] > 0


def test_a_new_number_of_classes():
    model = build()
    model.reset_classifier(7)
    assert model(image_of(model)).shape[1] == 7 and model.pretrained_cfg['num_classes'] == 7
    assert copy.deepcopy(model).construction()['num_classes'] == 7


@pytest.mark.compiled
def test_compiled_and_exported():
    torch.compiler.reset()
    model = build()
    convert(model, 'dct')
    x = image_of(model)
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.compile(copy.deepcopy(model), fullgraph=True, backend='aot_eager')(x), expected)
    torch.testing.assert_close(compile_blocks(model, backend='aot_eager')(x), expected)


@pytest.mark.parametrize(
    ('backbone', 'head', 'options', 'message'),
    [
        ('vit_tiny_patch16_224', 'upernet', {}, "head must be one of linear, multilayer, got head='upernet'"),
        ('vit_tiny_patch16_224', 'linear', {'width': 3}, "head=linear has no option 'width'"),
        ('vit_tiny_patch16_224', 'multilayer', {'depth': 3}, "head=multilayer has no option 'depth'"),
        ('vit_tiny_patch16_224', 'multilayer', {'layers': [12]}, r'layers must list blocks .* 0 … 11, got \[12\]'),
        ('vit_tiny_patch16_224', 'multilayer', {'layers': []}, 'layers must list blocks'),
        ('vit_tiny_patch16_224', 'multilayer', {'width': 0}, 'width must be a positive integer, got width=0'),
        ('vit_tiny_patch16_224', 'multilayer', {'upscale': 1.5}, 'upscale must be a positive integer'),
        ('vit_tiny_patch16_224', 'linear', {'dropout': 1}, 'dropout must be at least 0 and below 1, got 1'),
        ('resnet18', 'linear', {}, 'cannot convert a ResNet'),
        ('samvit_base_patch16', 'linear', {}, 'needs the tokens of one grid, which a VisionTransformerSAM lacks'),
    ],
)
def test_what_does_not_fit_is_named(backbone, head, options, message):
    with torch.device('meta'):
        model = timm.create_model(backbone)
    with pytest.raises(ValueError, match=message):
        DenseModel(model, head, 3, **options)


def test_number_of_classes():
    with pytest.raises(ValueError, match='num_classes must be a positive integer, got num_classes=0'):
        build(classes=0)
    with pytest.raises(ValueError, match="vit_dense: backbone must name a timm ViT, .* got backbone='vit'"):
        timm.create_model('vit_dense', backbone='vit')
    assert vit_efficient.DenseModel is DenseModel
