"""`convert_pool`: ViTs and convolutional networks that one has, with pooling by attention."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vit_efficient import convert, convert_pool, save_model
from vit_efficient.models import EfficientVisionTransformer, load_model
from vit_efficient.models.aggregation import Aggregation2d, ClassHead
from vit_efficient.utils.errors import UserError

SMALL = dict(img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=5)


def vit(name='vit_tiny_patch16_224', **options):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL | options).eval()


def images(side=32, width=None):
    torch.manual_seed(1)
    return torch.randn(2, 3, side, width or side)


def test_the_class_token_asks_and_the_norm_and_the_classifier_stay():
    model, before = vit(), vit()
    assert convert_pool(model, heads=2, init=0.1) is model and isinstance(model, EfficientVisionTransformer)
    assert torch.equal(model.attn_pool.cls_token, before.cls_token) and model.head.weight.equal(before.head.weight)
    tokens = before.blocks(before._pos_embed(before.patch_embed(images())))
    pooled = model.attn_pool.block(tokens[:, 1:], before.cls_token.expand(2, -1, -1))[:, 0]
    torch.testing.assert_close(model(images()), before.head(before.norm(pooled)))
    parts = model.attn_pool.block.state_dict()
    assert parts['gamma_1'].eq(0.1).all() and model.attn_pool.block.attn.num_heads == 2


@pytest.mark.parametrize('pool', ['token', 'avg', 'map'])
def test_whatever_pooled_before(pool, tmp_path):
    model = convert_pool(convert(vit(global_pool=pool), 'dct', keep_ratio=0.5))
    assert isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.LayerNorm)
    save_model(model, tmp_path)
    again = load_model(tmp_path).eval()
    assert torch.equal(again(images()), model(images()))
    assert again.attention_spec() == model.attention_spec()


@pytest.mark.parametrize(
    'name', ['eva02_tiny_patch14_224', 'vit_full_rope_tiny', 'vit_dct_tiny', 'vit_small_patch16_dinov3']
)
def test_other_families_pool_their_patches_too(name, tmp_path):
    side = 28 if 'patch14' in name else 32
    model = convert_pool(vit(name, img_size=side), tokens='class', init=0.1).eval()
    given, prefix = images(side), model.num_prefix_tokens
    pooled = model.fc_norm(model.attn_pool(model.forward_features(given)[:, prefix:]))
    torch.testing.assert_close(model(given), model.head(pooled))
    assert isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).eval()(given), model(given))
    model.reset_classifier(7)
    assert model(given).shape == (2, 7)
    if name.startswith('vit_full'):
        made = vit(name, global_pool='aggregate', pool_heads=2)
        assert made.attn_pool.block.attn.num_heads == 2 and made(given).shape == (2, 5)


def test_a_token_for_each_class_and_back(tmp_path):
    model, before = convert_pool(vit(), tokens='class'), vit()
    assert model.attn_pool.cls_token.eq(before.cls_token).all() and model.attn_pool.cls_token.shape == (1, 5, 24)
    assert isinstance(model.head, ClassHead)
    for name, value in before.head.state_dict().items():
        assert torch.equal(model.head.state_dict()[name], value)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).eval()(images()), model(images()))
    convert_pool(model, tokens='one')
    assert isinstance(model.head, nn.Linear) and model(images()).shape == (2, 5)
    assert torch.equal(model.head.weight, before.head.weight)


CNNS = {
    'resnet10t': {},
    'convnext_atto': {},
    'mobilenetv3_small_050': {},
    'swin_tiny_patch4_window7_224': dict(depths=(1, 1, 1, 1)),
}


@pytest.mark.parametrize('name', CNNS)
def test_convolutional_networks_learn_and_come_back_from_a_folder(name, tmp_path):
    torch.manual_seed(0)
    model = convert_pool(timm.create_model(name, num_classes=3, **CNNS[name]), init=0.1)
    given = images(224) if 'swin' in name else images(64, 96)
    model(given).square().sum().backward()
    pool = next(module for module in model.modules() if isinstance(module, Aggregation2d))
    assert all(parameter.grad.abs().sum() > 0 for parameter in (pool.aggregation.cls_token, pool.norm.weight))
    save_model(model.eval(), tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(given), model(given))
    assert convert_pool(model, heads=2)(given).shape == (2, 3)
    made = timm.create_model('cnn_aggregated', base=name, num_classes=4, pool_heads=2, **CNNS[name]).eval()
    assert made(given).shape == (2, 4) and made.pretrained_cfg['mean'] == model.pretrained_cfg['mean']


def test_a_network_whose_pooling_is_as_wide_as_another_layer():
    model = convert_pool(timm.create_model('efficientvit_b0', num_classes=3)).eval()
    assert model(images(64)).shape == (2, 3)


def test_weights_of_the_plain_network_are_taken():
    plain = timm.create_model('resnet10t', num_classes=3).eval()
    overlay = dict(state_dict=plain.state_dict(), num_classes=3)
    options = dict(base='resnet10t', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    model = timm.create_model('cnn_aggregated', **options).eval()
    given = images(64)
    torch.testing.assert_close(model.forward_features(given), plain.forward_features(given))


def test_a_transformer_on_the_maps_of_a_network_is_a_transformer():
    model = convert_pool(timm.create_model('vit_tiny_r_s16_p8_224', depth=1, num_classes=3)).eval()
    assert isinstance(model, EfficientVisionTransformer) and model(images(224)).shape == (2, 3)


def test_heads_of_other_kinds():
    model = vit()
    model.head = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 5))
    with pytest.raises(UserError, match="tokens='class' takes the classifier of 5 classes apart.*has a Sequential"):
        convert_pool(model, tokens='class')
    assert type(model) is VisionTransformer and model.global_pool == 'token'
    head = model.head
    assert convert_pool(model).head is head and model(images()).shape == (2, 5) and not model.attn_pool.training
    without_bias = vit()
    without_bias.head = nn.Linear(24, 5, bias=False).requires_grad_(False)
    convert_pool(without_bias, tokens='class')
    assert not without_bias.head.weight.requires_grad and not without_bias.head.bias.any()


def test_what_pools_is_what_the_maps_hold():
    """Maps with the channels last and first, against the pooling of their patches in rows."""
    torch.manual_seed(0)
    for last in (True, False):
        for flatten in (True, False):
            pool = Aggregation2d(8, 2, 0.5, flatten, last).eval()
            maps = torch.randn(2, 3, 5, 8)
            expected = pool.norm(pool.aggregation(maps.reshape(2, 15, 8)))
            found = pool(maps if last else maps.permute(0, 3, 1, 2))
            assert found.shape == ((2, 8) if flatten else (2, 1, 1, 8) if last else (2, 8, 1, 1))
            torch.testing.assert_close(found.flatten(1), expected)


@pytest.mark.parametrize(
    ('build', 'options', 'message'),
    [
        (vit, dict(pool='avg'), "pool must be 'aggregate', got 'avg'"),
        (vit, dict(heads=5), 'pool_heads must divide embed_dim=24, got 5'),
        (vit, dict(tokens='two'), "pool_tokens must be one of one, class, got pool_tokens='two'"),
        (lambda: timm.create_model('resnet10t'), dict(heads=3), 'pool_heads must divide embed_dim=512, got 3'),
        (
            lambda: timm.create_model('resnet10t'),
            dict(tokens='class'),
            r"tokens='class' is for ViTs; a ResNet has 'one'",
        ),
        (
            lambda: timm.create_model('resnet10t', global_pool='catavgmax'),
            {},
            "cannot convert the pooling of a ResNet, which is 'catavgmax'; build it with global_pool='avg'",
        ),
        (
            lambda: timm.create_model('levit_128s'),
            {},
            'of a LevitDistilled: it is neither a VisionTransformer nor an Eva',
        ),
        (lambda: timm.create_model('samvit_base_patch16_224', depth=1), {}, 'of a VisionTransformerSAM: it is neither'),
        (vit, dict(init=float('inf')), 'pool_init must be a finite number'),
        (vit, dict(heads=True), 'pool_heads must be a positive integer'),
        (lambda: timm.create_model('beit_base_patch16_224', depth=1), {}, 'cannot convert the pooling of a Beit'),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_stays(build, options, message):
    model = build()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(UserError, match=message):
        convert_pool(model, **options)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_a_base_without_maps_to_pool_is_refused():
    with pytest.raises(
        UserError, match='cnn_aggregated: base must name a convolutional network of timm.*got base=None'
    ):
        timm.create_model('cnn_aggregated')
    with pytest.raises(
        UserError, match='cnn_aggregated: vit_tiny_patch16_224 pools no maps; of a ViT, use convert_pool'
    ):
        timm.create_model('cnn_aggregated', base='vit_tiny_patch16_224')
    with pytest.raises(UserError, match='cnn_aggregated: features come before what pools; take resnet10t itself'):
        timm.create_model('cnn_aggregated', base='resnet10t', features_only=True)
    with pytest.raises(
        UserError, match=r"convert_pool: model must be an nn.Module, made by timm.create_model, got 'vit'"
    ):
        convert_pool('vit')
