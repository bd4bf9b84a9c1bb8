"""Models by one line of text: whose option a key is, and what is said of one that is nobody's."""

from pathlib import Path

import pytest
import timm
import torch

import vit_efficient
from vit_efficient.benchmark import ModelCandidate
from vit_efficient.models import create_from_spec, input_size
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.options import parse_spec, parse_value

SMALL = 'depth=1,embed_dim=16,num_heads=2,patch_size=8'


def create(spec, img_size=None, **factory):
    return create_from_spec(*parse_spec(spec), img_size, **factory)


@pytest.mark.parametrize(
    'spec, name, options',
    [
        ('vit_dct_tiny:keep_ratio=1/16', 'dct', dict(keep_ratio=1 / 16, place='x')),
        (
            "vit_dct_tiny:keep_ratio=1/16,attention_kwargs={'place':'block'}",
            'dct',
            dict(keep_ratio=0.0625, place='block'),
        ),
        ('vit_dct_tiny:compressor=pool,count_bias=False,axes=2d', None, "'axes'"),
        ('vit_linformer_tiny:num_tokens=9,sharing=headwise,qk_norm=True', 'linformer', dict(sharing='headwise')),
        ('vit_full_tiny:attention=nystrom,num_landmarks=4', 'nystrom', dict(num_landmarks=4)),
        ('vit_converted:base=vit_tiny_patch16_224,attention=pool,num_tokens=4', 'pool', dict(summary='mean')),
        ('convert:vit_tiny_patch16_224:pool,num_tokens=4', 'pool', dict(num_tokens=4, summary='local')),
        ('convert:vit_tiny_patch16_224:pool,place=x', 'pool', dict(place='x', summary='mean')),
    ],
)
def test_options_of_the_attention(spec, name, options):
    spec = f'{spec},{SMALL}'
    if name is None:
        with pytest.raises(UserError, match=options):
            create(spec, 64)
        return
    ((mechanism, found),) = create(spec, 64).attention_spec()
    assert mechanism == name and found == {**found, **options}


@pytest.mark.parametrize(
    'layers, converted',
    [
        ('', range(12)),
        (',layers=6-11', range(6, 12)),
        (',layers=-1', [11]),
        (',layers=[0,-2,-1]', [0, 10, 11]),
        (',layers=[0-2,11]', [0, 1, 2, 11]),
    ],
)
def test_converted_models(layers, converted):
    """They are the base model with other attentions: its classes, its size, its parameters."""
    base = 'vit_small_patch14_dinov2'  # without a head, for 518 px
    with torch.device('meta'):
        model = create(f'convert:{base}:dct,keep_ratio=1/16{layers}')
        converted_by_hand = vit_efficient.convert(timm.create_model(base), 'dct', list(converted), keep_ratio=1 / 16)
        timms = timm.create_model(base)
    assert model.attention_spec() == converted_by_hand.attention_spec()
    assert [i for i, (name, _) in enumerate(model.attention_spec()) if name == 'dct'] == list(converted)
    assert model.num_classes == 0 and model.patch_embed.img_size == (518, 518)
    shapes = {name: tensor.shape for name, tensor in timms.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_a_model_is_converted_by_the_plan_in_a_file():
    """As by hand; its other options are those of the model."""
    plan = Path(__file__).parents[2] / 'recipes/heal/plan-block.yaml'
    with torch.device('meta'):
        model = create(f'convert:vit_small_patch14_dinov2:{plan},reg_tokens=4', 252)
        by_hand = vit_efficient.convert(timm.create_model('vit_small_patch14_dinov2'), plan)
    assert model.attention_spec() == by_hand.attention_spec()
    assert model.num_reg_tokens == 4 and model.patch_embed.img_size == (252, 252)
    with pytest.raises(UserError, match=r'nothing\.yaml: no such plan'):
        create('convert:vit_small_patch14_dinov2:nothing.yaml')


def test_arguments_of_converted_models():
    spec = 'flash/convert:vit_small_patch14_dinov2.lvd142m:dct,reg_tokens=4,num_classes=7,depth=2,domain=frequency'
    name, options = parse_spec(spec)
    assert name == 'flash/convert:vit_small_patch14_dinov2.lvd142m:dct'
    model = ModelCandidate(name, options).build(28, device='meta')  # as benchmarks build it
    assert (model.num_reg_tokens, model.num_classes, len(model.blocks)) == (4, 7, 2)
    assert [options['domain'] for _, options in model.attention_spec()] == ['frequency'] * 2
    with torch.device('meta'):
        model = create('convert:vit_tiny_patch16_224:dct,patch_embed=dct,patch_keep=8', 32)
    assert model.patch_embed.truncation == [(8, 8)] * 3


def test_arguments_of_timm():
    model = create(f'vit_dct_tiny:{SMALL},num_tokens=9,patch_embed=dct,patch_keep=[4,2,2],patch_input=coefficients', 32)
    assert model.patch_embed.truncation == [(4, 4), (2, 2), (2, 2)] and model.patch_embed.img_size == (32, 32)
    assert input_size(model, 32) == (3, 16, 16) and input_size(model, (64, 32)) == (3, 32, 16)
    model = create(
        'vit_linformer_tiny:num_heads=2,embed_dim=16,depth=1,num_tokens=4', device='meta', dtype=torch.bfloat16
    )
    assert model.blocks[0].attn.num_heads == 2  # the model's, though the compressor has one of that name
    assert model.pos_embed.is_meta and model.pos_embed.dtype == torch.bfloat16


@pytest.mark.parametrize('name', ['resnet18', 'pvt_v2_b0', 'mobilevit_s', 'levit_128s', 'vit_tiny_patch16_224'])
def test_models_are_built_for_an_image_size_where_they_have_one(name):
    with torch.device('meta'):
        model = create(name, 256)
        assert model(torch.zeros(2, *input_size(model, 256))).shape == (2, 1000)


@pytest.mark.parametrize(
    'spec, message',
    [
        ('vit_dct_tinny', "no model 'vit_dct_tinny'; did you mean vit_dct_tiny?"),
        ('vit_dct_tiny:keep_ration=1', "vit_dct_tiny has no option 'keep_ration'; did you mean keep_ratio?"),
        ('vit_dct_tiny:patch_kept=8', "vit_dct_tiny has no option 'patch_kept'; did you mean patch_keep?"),
        ('vit_full_tiny:attention=linformer,sharin=none', "no option 'sharin'; did you mean sharing?"),
        ('vit_full_tiny:attention=dtc', "unknown attention 'dtc'"),
        ('vit_dct_tiny:keep_ratio=2', 'keep_ratio=2'),
        ("vit_dct_tiny:keep_ratio=.5,attention_kwargs={'keep_ratio':1}", 'keep_ratio=0.5 beside'),
        ('vit_dct_tiny:keep_ratio=.5,keep_ratio=1', 'keep_ratio is given twice'),
        ('vit_dct_tiny:img_size=64', 'img_size=64 must not be among'),
        ('vit_dct_tiny:patch_size=7', '32 is not a multiple of the patch size 7; use 28 or 35'),
        ('vit_dct_tiny:patch_size=64', '32 is not a multiple of the patch size 64; use 64,'),
        ('convert:vit_tiny_patch16_224', 'expected convert:BASE:ATTENTION'),
        ('convert::dct', 'expected convert:BASE:ATTENTION'),
        ('convert:vit_tiny_patch16_224:dct:keep_ratio=1', 'expected convert:BASE:ATTENTION'),
        ('convert:vit_tiny_patch16_24:dct', "no model 'vit_tiny_patch16_24'; did you mean vit_tiny_patch16_224?"),
        ('convert:vit_tiny_patch16_224:dtc', "unknown attention 'dtc'"),
        ('convert:vit_tiny_patch16_224:dct,keep_ration=1', "no option 'keep_ration'; did you mean keep_ratio?"),
        ('convert:vit_tiny_patch16_224:dct,base=vit_tiny_patch16_224', 'give it once'),
        ('convert:vit_tiny_patch16_224:dct,layers=11-6', 'layers must be blocks, such as 6-11, .* got layers=11-6'),
        ('convert:vit_tiny_patch16_224:dct,layers=6-12', 'the model has blocks 0 … 11, got 12'),
        ('convert:swin_tiny_patch4_window7_224:dct', 'cannot convert a SwinTransformer'),
        ('convert:resnet18:dct', '^cannot convert a ResNet: it is not a vision transformer'),
        ('vit_tiny_patch16_224:patch_size=7', 'img_size=32 is not a multiple of the patch size 7; use 28 or 35$'),
        ('vit_tiny_patch16_224:deth=3', "timm cannot build vit_tiny_patch16_224: .*'deth'"),
        ('local-dir:runs/mine/model', 'one that is saved is counted in Python'),
        ('resnet18:patch_embed=dct', "timm cannot build resnet18: .*'patch_embed'"),
        ('vit_dct_tiny:global_pool=some', 'timm cannot build vit_dct_tiny'),
    ],
)
def test_what_is_wrong_is_named(spec, message):
    with pytest.raises(UserError, match=message):
        create(spec, 32)


def test_without_a_network_the_way_around_is_named(monkeypatch):
    def offline(*_, **__):
        raise OSError('cannot be reached\nat all')

    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(UserError, match=r'vit_tiny_patch16_224 cannot be had: .*reached.*model.init_from=…'):
        create('vit_tiny_patch16_224:pretrained=true', 32)


def test_a_bug_in_an_attention_is_no_wrong_option(monkeypatch):
    from vit_efficient.attention import FullAttention

    monkeypatch.setattr(FullAttention, 'configure', lambda self: self.nothing)
    with pytest.raises(AttributeError, match='nothing'):
        create('vit_full_tiny')


@pytest.mark.parametrize(
    'text, value',
    [
        ('1/16', 0.0625),
        ('7', 7),
        ('.5', 0.5),
        ('[1,2]', [1, 2]),
        ('True', True),
        ('dct', 'dct'),
        ('1/0', '1/0'),
        ('', None),
    ],
)
def test_values(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_an_option_of_the_attention_that_a_model_has_too():
    """SAM's class has a `window_size`."""
    model = create_from_spec('convert:vit_tiny_patch16_224:window', dict(window_size=8, depth=1))
    assert model.attention_spec() == [('window', dict(window_size=8, shift=False))]
