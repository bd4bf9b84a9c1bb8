"""Functions of a model take it wrapped too, or say what to do instead; what is no model is named."""

import pytest
import timm
import torch
from torch import nn

import vit_efficient
from vit_efficient.attention.performer import redraw_features
from vit_efficient.attention.treeformer.leaves import find_leaves
from vit_efficient.export import export_model
from vit_efficient.models import compile_blocks, load_model, model_arguments
from vit_efficient.utils.errors import UserError

SMALL = dict(embed_dim=32, depth=2, num_heads=2, img_size=64, patch_size=8)
WRAPPERS = {'compiled': lambda model: torch.compile(model, backend='eager'), 'parallel': nn.DataParallel}


def build(name='vit_dct_tiny', **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL | arguments).eval()


@pytest.fixture(params=[[name] for name in WRAPPERS] + [['compiled', 'parallel']], ids='-'.join)
def wrapped(request):
    def wrap(model):
        for name in request.param:
            model = WRAPPERS[name](model)
        return model

    return wrap


def test_what_is_read_off_a_model(wrapped):
    model, x = build('vit_treeformer_tc_tiny'), torch.rand(1, 3, 64, 64)
    wrapper = wrapped(model)
    assert vit_efficient.kept_tokens(wrapper) == vit_efficient.kept_tokens(model)
    assert vit_efficient.count_flops(wrapper, (3, 64, 64)) == vit_efficient.count_flops(model, (3, 64, 64))
    assert torch.equal(find_leaves(wrapper, x)[1].keys, find_leaves(model, x)[1].keys)
    assert model_arguments(wrapper) == model_arguments(model)


def test_what_is_saved(wrapped, tmp_path):
    model, x = build(num_classes=3), torch.rand(1, 3, 64, 64)
    vit_efficient.save_model(wrapped(model), tmp_path, ['a', 'b', 'c'])
    loaded = load_model(tmp_path).eval()
    assert torch.equal(loaded(x), model(x)) and loaded.pretrained_cfg['label_names'] == ['a', 'b', 'c']


def test_windows_are_frozen_in_what_is_compiled_alone():
    model = build(patch_embed='dct', patch_window=True)
    with pytest.raises(UserError, match='freeze the model, then wrap it'):
        vit_efficient.freeze_truncation(nn.DataParallel(model))
    assert vit_efficient.freeze_truncation(WRAPPERS['compiled'](model)) == {'patch_embed': [(8, 8)] * 3}
    assert model.patch_embed.window is None


@pytest.mark.parametrize('name, feature_cls', [('vit_dct_tiny', 'getter'), ('vit_tiny_patch16_224', 'hook')])
def test_features_only(name, feature_cls, tmp_path):
    """What is saved has the blocks that timm has left, and all arguments."""
    arguments = dict(features_only=True, feature_cls=feature_cls, out_indices=(0, 1))
    backbone, x = build(name, depth=3, mlp_ratio=2, **arguments), torch.rand(1, 3, 64, 64)
    vit_efficient.convert(backbone, 'pool', keep_ratio=1 / 16)
    assert set(vit_efficient.kept_tokens(backbone)) == {5}
    vit_efficient.save_model(backbone, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **arguments).eval()
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), backbone(x), strict=True))


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'resnet10t'])
def test_features_of_timm_are_not_saved(name, tmp_path):
    backbone = timm.create_model(name, features_only=True, out_indices=(0, 1))
    with pytest.raises(UserError, match='save the model built without it'):
        vit_efficient.save_model(backbone, tmp_path)
    with pytest.raises(UserError, match='is not a model of vit_efficient; convert'):
        vit_efficient.kept_tokens(backbone)


@pytest.mark.parametrize(
    'function, arguments',
    [
        (vit_efficient.convert, ['dct']),
        (vit_efficient.convert_patch_embed, []),
        (vit_efficient.count_flops, []),
        (vit_efficient.freeze_truncation, []),
        (vit_efficient.graphed, []),
        (vit_efficient.kept_tokens, []),
        (vit_efficient.save_model, ['folder']),
        (compile_blocks, []),
        (export_model, ['model.pt2', (3, 64, 64)]),
        (find_leaves, [torch.zeros(1, 3, 64, 64)]),
        (model_arguments, []),
        (redraw_features, []),
    ],
)
def test_what_is_no_model(function, arguments):
    with pytest.raises(UserError, match=r'nn\.Module.*timm\.create_model|cannot convert a str: .*timm\.create_model'):
        function('vit_dct_tiny', *arguments)
