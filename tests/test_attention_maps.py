"""Where models look, against weights that are written out."""

import pytest
import timm
import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer

from vit_efficient import DenseModel, convert, convert_pool
from vit_efficient.attention_maps import attention_maps
from vit_efficient.utils.errors import UserError


def tiny(**options):
    """A timm ViT in float64 for images of 28 × 52 px, patches of 4: a grid of 7 × 13."""
    torch.manual_seed(0)
    given = dict(img_size=(28, 52), patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=5)
    return VisionTransformer(**given | options).double().eval()


def images(number=2):
    torch.manual_seed(1)
    return torch.randn(number, 3, 28, 52, dtype=torch.float64)


def inputs_of(model, module, given):
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(given)
    handle.remove()
    return seen[0].detach()


def as_maps(weights, prefix):
    return weights[..., prefix:].unflatten(-1, (7, 13)), weights[..., :prefix].sum(-1)


@pytest.mark.parametrize('registers', [0, 4])
@pytest.mark.parametrize('block', [None, 0, -2])
def test_the_class_token_looks_as_its_scores_say(registers, block):
    model, given = tiny(reg_tokens=registers), images()
    attention = model.blocks[-1 if block is None else block].attn
    x = inputs_of(model, attention, given)
    q, k, _ = attention.qkv(x).detach().unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    patches, others = as_maps((q[:, :, :1] @ k.mT / 12**0.5).softmax(-1), 1 + registers)
    found = attention_maps(model, given, block)
    torch.testing.assert_close(found.patches, patches)
    torch.testing.assert_close(found.others, others)
    assert found.source == f'class token, block {(2 if block is None else block) % 3}'
    assert type(model) is VisionTransformer and not attention._forward_hooks  # it is as it was
    converted = attention_maps(convert(model, 'dct', layers=[1], keep_ratio=0.5), given, 0)
    assert converted.patches.shape == (2, 2, 1, 7, 13)


def test_the_class_token_of_rotary_positions_looks_as_its_scores_say():
    torch.manual_seed(0)
    model = timm.create_model('vit_full_rope_tiny', img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    model, given = model.double().eval(), torch.randn(1, 3, 32, 64, dtype=torch.float64)
    found, block = attention_maps(model, given), model.blocks[1]
    assert found.patches.shape == (1, 2, 1, 2, 4)
    seen = []
    handle = block.attn.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args, kwargs)), with_kwargs=True
    )
    block.attn.fused_attn, drop = False, []
    block.attn.attn_drop.register_forward_hook(lambda _, args, out: drop.append(args[0]))
    model(given)
    handle.remove()
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(found.patches[:, :, 0].flatten(2), drop[0][:, :, 0, prefix:])


@pytest.mark.parametrize('include', [True, False])
def test_timms_attention_pooling_looks_as_its_scores_say(include):
    model, given = tiny(global_pool='map', reg_tokens=2, pool_include_prefix=include), images()
    pool = model.attn_pool
    assert isinstance(pool, AttentionPoolLatent)
    x = inputs_of(model, pool, given)
    q = pool.q(pool.latent).detach().unflatten(-1, (2, 12)).transpose(1, 2)
    k = pool.kv(x).detach().unflatten(-1, (2, 2, 12))[:, :, 0].transpose(1, 2)
    patches, others = as_maps((q @ k.mT / 12**0.5).softmax(-1), 3 if include else 0)
    found = attention_maps(model, given)
    torch.testing.assert_close(found.patches, patches)
    torch.testing.assert_close(found.others, others)
    assert attention_maps(model, given, -1).source == 'class token, block 2'


@pytest.mark.parametrize('fused', [True, False])
def test_maps_are_the_same_whatever_attention_computes_with(fused):
    model, given = tiny(), images(1)
    for block in model.blocks:
        block.attn.fused_attn = fused
    found = attention_maps(model.train(), given)
    assert model.training and model.blocks[2].attn.fused_attn is fused
    torch.testing.assert_close(found.patches, attention_maps(tiny(), given).patches)
    torch.testing.assert_close(found.patches.sum((-1, -2)) + found.others, torch.ones(1, 2, 1, dtype=torch.float64))


@pytest.mark.parametrize('heads', [1, 3])
def test_aggregation_of_a_model_looks_at_patches_and_at_itself(heads):
    model, given = convert_pool(tiny(reg_tokens=4), heads=heads), images()
    found = attention_maps(model, given)
    assert found.source == 'aggregation' and found.patches.shape == (2, heads, 1, 7, 13)
    attention = model.attn_pool.block.attn
    u = inputs_of(model, attention, given)
    q, k = (each(u).detach().unflatten(-1, (heads, -1)).transpose(1, 2) for each in (attention.q, attention.k))
    patches, others = as_maps((q[:, :, :1] @ k.mT * attention.scale).softmax(-1), 1)
    torch.testing.assert_close(found.patches, patches)
    torch.testing.assert_close(found.others, others)
    of_classes = attention_maps(convert_pool(tiny(), tokens='class'), given)
    assert of_classes.patches.shape == (2, 1, 5, 7, 13) and not of_classes.others.any()


@pytest.mark.parametrize('name', ['resnet10t', 'convnext_atto', 'swin_tiny_patch4_window7_224'])
def test_maps_of_convolutional_networks_have_their_last_resolution(name):
    sizes = dict(img_size=(64, 96), window_size=2) if 'swin' in name else {}
    model = convert_pool(timm.create_model(name, num_classes=3, **sizes)).eval()
    found = attention_maps(model, torch.randn(1, 3, 64, 96))
    assert found.patches.shape == (1, 1, 1, 2, 3)
    torch.testing.assert_close(found.patches.sum((-1, -2)) + found.others, torch.ones(1, 1, 1))


def test_the_backbone_of_a_model_with_a_head_for_patches_looks():
    backbone = timm.create_model('vit_full_tiny', img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    given = torch.randn(1, 3, 32, 32)
    found = attention_maps(DenseModel(backbone, num_classes=3).eval(), given)
    torch.testing.assert_close(found.patches, attention_maps(backbone, given).patches)


def test_what_looks_nowhere_is_refused():
    given = images(1)
    with pytest.raises(UserError, match=r'images must be a batch of one size, \(B, channels, height, width\)'):
        attention_maps(tiny(), given[0])
    with pytest.raises(UserError, match="a PatchConvNet with global_pool='' pools nothing"):
        network = timm.create_model('patch_convnet_s60', embed_dim=16, depth=1, num_classes=0, global_pool='')
        attention_maps(network, given.float())
    with pytest.raises(UserError, match=r"global_pool='avg' and no class token has nothing that asks.*convert_pool"):
        attention_maps(tiny(global_pool='avg', class_token=False), given)
    with pytest.raises(UserError, match='a ResNet takes the mean of its maps, and looks nowhere; convert_pool'):
        attention_maps(timm.create_model('resnet10t'), given.float())
    model = convert(tiny(), 'dct', layers=[1, 2], keep_ratio=0.5)
    with pytest.raises(UserError, match=r"block=-1 has attention 'dct', whose keys are not the patches; exact are 0$"):
        attention_maps(model, given)
    with pytest.raises(UserError, match='block: the model has blocks 0 … 2, got 3'):
        attention_maps(model, given, 3)
    with pytest.raises(UserError, match='block=0: a PatchConvNet has no class token in its blocks; leave block out'):
        network = timm.create_model('patch_convnet_s60', embed_dim=16, depth=1)
        attention_maps(network, torch.randn(1, 3, 64, 96), 0)
