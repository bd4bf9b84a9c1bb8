"""convert() on the ViTs that users have, and the way to disk and back."""

import copy
import json
import pickle

import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.models import save_for_hf
from timm.models._features_fx import FeatureGraphNet
from torch import nn

import vit_efficient
from vit_efficient import convert, convert_patch_embed, save_model
from vit_efficient.models import compile_blocks
from vit_efficient.utils.errors import UserError

SMALL = dict(embed_dim=48, depth=3, num_heads=3, num_classes=5)
# Plain; layer scale; registers without class embedding and with layer scale; pre-norm and other activations; attention
# pooling without class token; two prefix tokens and two heads; average pooling; qk-norm.
MODELS = {
    'vit_tiny_patch16_224': dict(img_size=64),
    'deit3_small_patch16_224': dict(img_size=64),
    'deit_tiny_distilled_patch16_224': dict(img_size=64),
    'vit_small_patch14_dinov2': dict(img_size=(98, 182)),
    'vit_small_patch14_reg4_dinov2': dict(img_size=(98, 182)),
    'vit_base_patch16_clip_224': dict(img_size=64),
    'vit_base_patch16_clip_quickgelu_224': dict(img_size=64),
    'vit_base_patch16_siglip_224': dict(img_size=64),
    'vit_base_patch16_siglip_gap_224': dict(img_size=64),
    'vit_medium_patch16_gap_240': dict(img_size=64, qk_norm=True),
}


def build(name, **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **MODELS.get(name, {}), **arguments}).eval()
    for parameter in model.parameters():  # some start at zero, and would hide a wrong attention
        nn.init.normal_(parameter, std=0.2)
    return model


def image(model, batch=2):
    return torch.randn(batch, 3, *model.patch_embed.img_size)


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


class TestOutputs:
    def test_there_and_back(self, model):
        x = image(model)
        expected = model(x)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert convert(model, 'dct', keep_ratio=0.25) is model
        assert not torch.equal(model(x), expected)
        assert list(model.state_dict()) == list(state)
        convert(model, 'full')
        assert torch.equal(model(x), expected)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    def test_nothing_truncated(self, model):
        x = image(model)
        expected = model(x)
        for place in ('x', 'qkv', 'kv'):
            convert(model, 'dct', keep_ratio=1, domain='space', place=place)
            assert torch.allclose(model(x), expected, atol=1e-4 * expected.abs().max().item())

    def test_intermediates_and_features(self, model):
        x = image(model)
        expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
        convert(model, 'dct', layers=[2])  # after the layer that is looked at
        assert torch.equal(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], expected)

    def test_parameters_stay_the_same_objects(self, model):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        before = dict(model.named_parameters())
        convert(model, 'dct', local=3)
        after = dict(model.named_parameters())
        assert all(after[name] is parameter for name, parameter in before.items())
        model.train()(image(model)).sum().backward()
        optimiser.step()


class TestLayers:
    def test_subset_and_options_per_layer(self):
        model = convert(build('vit_tiny_patch16_224'), 'dct', layers=[-1], keep_ratio=0.5)
        convert(model, [('dct', dict(place='kv')), 'dct1d'], layers=[0, 1])
        names = [(name, options.get('place')) for name, options in model.attention_spec()]
        assert names == [('dct', 'kv'), ('dct1d', 'x'), ('dct', 'x')]
        assert vit_efficient.kept_tokens(model) == [1 + 4, 1 + 4, 1 + 4]

    def test_registered_and_converted_models_are_one_mechanism(self):
        plain = build('vit_tiny_patch16_224')
        registered = timm.create_model('vit_dct_tiny', **SMALL, img_size=64).eval()
        registered.load_state_dict(plain.state_dict())
        x = image(plain)
        assert torch.equal(convert(plain, 'dct')(x), registered(x))
        assert type(plain) is type(registered)
        assert torch.equal(convert(registered, 'full')(x), convert(plain, 'full')(x))

    @pytest.mark.parametrize(
        ('arguments', 'message'),
        [
            (dict(attention='dtc'), "unknown attention 'dtc'"),
            (dict(attention='dct', keep_ratio=2), 'keep_ratio=2'),
            (dict(attention='dct', layers=[0, 3]), 'got 3'),
            (dict(attention='dct', layers=[0, -3]), 'twice'),
            (dict(attention='dct', layers=['0']), "got '0'"),
            (dict(attention='dct', layers=torch.tensor(0)), r'several, got tensor\(0\)'),
            (dict(attention=['dct', 'full']), 'lists 2 layers'),
            (dict(attention=['full', 'full', ('dct', dict(keep_ratio=0))]), 'keep_ratio=0'),
        ],
    )
    def test_errors_change_nothing(self, arguments, message):
        model = build('vit_tiny_patch16_224')
        kinds = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=message):
            convert(model, **arguments)
        assert [type(m) for m in model.modules()] == kinds


class TestWhatIsNotServed:
    @pytest.mark.parametrize(
        ('name', 'message'),
        [
            ('deepseek_vit_412m', r'rotary positions \(encoder\.rope'),
            ('swin_tiny_patch4_window7_224', r'SwinTransformer: .*several grids.*4, 8, 16, 32.*layers\.0 to layers\.3'),
            ('pit_ti_224', 'several grids.*8, 16, 32'),
            ('csatv2', 'CSATv2: .*several grids.*8, 16, 32, 64'),
            ('crossvit_tiny_240', 'several grids.*12, 17'),
            ('resnet18', 'ResNet: it is not a vision transformer'),
            ('convnext_atto', 'ConvNeXt: it is not a vision transformer'),
            ('mixer_s16_224', 'MlpMixer: it is not a vision transformer'),
            ('xcit_nano_12_p16_224', r'attention, blocks\.0\.attn, is none of timm.s that are served but .*XCA;'),
            ('cait_xxs24_224', r'attention, blocks\.0\.attn, is none of timm.s that are served but .*TalkingHeadAttn'),
        ],
    )
    def test_the_module_and_the_reason_are_named(self, name, message):
        with torch.device('meta'):
            model = timm.create_model(name)
        for change in (lambda model: convert(model, 'dct'), convert_patch_embed):
            with pytest.raises(UserError, match=f'cannot convert .*{message}'):
                change(model)

    @pytest.mark.parametrize(
        ('wrap', 'message'),
        [
            (lambda vit: nn.Sequential(vit, nn.ReLU()), r"VisionTransformer as its 0; .*get_submodule\('0'\)"),
            (lambda vit: nn.ModuleDict({'trunk': nn.Sequential(vit)}), r'VisionTransformer as its trunk\.0'),
            (nn.DataParallel, 'convert the model before it is wrapped'),
            (
                vit_efficient.graphed,
                'GraphedModel: it has a VisionTransformer as its model; .*anew what was captured',
            ),
            (lambda vit: FeatureGraphNet(vit, (0, 1)), 'FeatureGraphNet: it is a traced graph'),
            (torch.fx.symbolic_trace, 'traced graph.*before it is traced'),
            (lambda vit: create_feature_extractor(vit, ['norm']), 'traced graph'),
            (
                lambda vit: type('Mine', (timm.models.VisionTransformer,), {})(**SMALL, img_size=64),
                'Mine: it is a class der',
            ),
            (
                lambda vit: nn.ModuleDict({'attn': nn.ParameterDict({'rel_pos_h': nn.Parameter(torch.zeros(3, 4))})}),
                r'ModuleDict: it has a relative position bias \(attn\.rel_pos_h\)',
            ),
            (lambda vit: 'vit_tiny_patch16_224', 'str: it is not an nn.Module; create the model first'),
        ],
    )
    def test_wrappers_that_are_not_seen_through(self, wrap, message):
        model = wrap(build('vit_tiny_patch16_224'))
        with pytest.raises(UserError, match=message):
            convert(model, 'dct')

    def test_patch_dropout(self):
        model = build('vit_tiny_patch16_224', patch_drop_rate=0.5)
        with pytest.raises(ValueError, match=r'patch_drop_rate=0\.5'):
            convert(model, 'dct')


class TestWhatIsAdded:
    """It starts so that the outputs of a trained model change as little as they can, or it is said."""

    @pytest.mark.parametrize('sharing', ['none', 'headwise', 'key-value', 'layerwise'])
    def test_linformer_starts_as_pooling(self, sharing, caplog):
        pooled, plain = (build('vit_tiny_patch16_224', img_size=(64, 96)) for _ in range(2))
        convert(pooled, 'pool', summary='mean', num_tokens=(2, 3), count_bias=False)
        assert not caplog.text
        convert(plain, 'linformer', num_tokens=6, sharing=sharing)
        x = image(plain)
        torch.testing.assert_close(plain(x), pooled(x), atol=1e-4, rtol=1e-4)
        assert caplog.text.count('projections, which start as the means of cells') == 1 and 'fine-tune' in caplog.text

    @pytest.mark.parametrize('projection', ['linear', 'conv'])
    def test_with_as_many_tokens_as_patches_it_is_exact(self, projection):
        model = build('vit_tiny_patch16_224', img_size=(64, 96))
        x = image(model)
        expected = model(x)
        convert(model, 'linformer', num_tokens=24, projection=projection)
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)

    def test_projections_that_are_kept_stay_as_they_are(self, caplog):
        model = timm.create_model('vit_linformer_tiny', **SMALL, img_size=64, attention_kwargs=dict(num_tokens=4))
        weights = [model.get_parameter(f'blocks.{i}.attn.compress.down.weight') for i in range(3)]
        before = [weight.clone() for weight in weights]
        assert 0.2 < before[0].std() < 0.3  # the published start, 1 / sqrt(16)
        convert(model, 'linformer', layers=[1], num_tokens=4)
        assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)) and not caplog.text

    def test_plain_weights_in_a_linformer(self):
        options = dict(num_tokens=4)
        plain = build('vit_tiny_patch16_224')
        overlay = dict(state_dict=plain.state_dict(), num_classes=5)
        arguments = dict(**SMALL, img_size=64, pretrained=True, pretrained_cfg_overlay=overlay)
        loaded = timm.create_model('vit_linformer_tiny', **arguments, attention_kwargs=options).eval()
        x = image(plain)
        assert torch.equal(loaded(x), convert(plain, 'linformer', **options)(x))

    def test_trees_are_said_to_be_untrained(self, caplog):
        convert(build('vit_tiny_patch16_224'), 'treeformer_tc')
        assert caplog.text.count('trees, which start at random: no checkpoint has them; fine-tune') == 1

    def test_options_that_keep_more_are_the_default(self):
        """Of a model that is trained, pooled keys come with values as their cells read them; saved options say it."""
        summaries = {}
        for attention, options in (('pool', {}), ('pool', dict(place='x')), ('pool', dict(summary='mean'))):
            model = convert(timm.create_model('test_vit'), attention, **options)
            summaries[str(options)] = model.attention_spec()[0][1]['summary']
            again = convert(timm.create_model('test_vit'), model.attention_spec())
            assert again.attention_spec() == model.attention_spec()
        assert list(summaries.values()) == ['local', 'mean', 'mean']
        assert convert(timm.create_model('test_vit'), 'subsample').attention_spec()[0][0] == 'subsample'
        assert timm.create_model('vit_pool_tiny', depth=1).attention_spec()[0][1]['summary'] == 'mean'

    @pytest.mark.parametrize(
        ('attention', 'options'),
        [('dct', dict(keep_ratio=1, local=3)), ('nystrom', dict(num_landmarks=16, pinv='exact', residual_kernel=3))],
    )
    def test_convolutions_start_at_nothing(self, attention, options, caplog):
        model = build('vit_tiny_patch16_224')
        x = image(model)
        expected = model(x)
        convert(model, attention, **options)
        torch.testing.assert_close(model(x), expected, atol=2e-3, rtol=2e-3)
        assert not caplog.text

    def test_a_saved_model_is_loaded_without_a_word(self, tmp_path, caplog):
        model = convert(build('vit_tiny_patch16_224'), 'linformer', num_tokens=4)
        save_model(model, tmp_path)
        caplog.clear()
        loaded = vit_efficient.models.load_model(tmp_path).eval()
        x = image(model)
        assert torch.equal(loaded(x), model(x)) and not caplog.text


class TestWrappers:
    """They are converted through, and are what comes back."""

    @pytest.mark.parametrize('feature_cls', ['getter', 'hook'])
    def test_features_only(self, feature_cls):
        arguments = dict(features_only=True, feature_cls=feature_cls, out_indices=(0, 1))
        wrapper = build('vit_tiny_patch16_224', **arguments)
        x = torch.randn(2, 3, 64, 64)
        before = wrapper(x)
        assert convert(wrapper, 'dct', layers=[1], keep_ratio=0.25) is wrapper
        after = wrapper(x)
        assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])
        assert [y.shape for y in after] == [y.shape for y in before]
        vit = next(wrapper.children())
        assert vit.attention_spec()[1][0] == 'dct'
        convert(wrapper, 'full')
        assert torch.equal(wrapper(x)[1], before[1])
        assert convert_patch_embed(wrapper) is wrapper and isinstance(vit.patch_embed, vit_efficient.DctPatchEmbed)

    def test_compiled(self):
        """What was compiled before is compiled anew."""
        model = build('vit_tiny_patch16_224')
        compiled = torch.compile(model, backend='eager')
        x = image(model)
        before = compiled(x)
        for name in ('dct', 'pool', 'linformer'):
            assert convert(compiled, name) is compiled
            assert torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), before)
        convert(compiled, 'full')
        assert torch.equal(compiled(x), before)

    def test_compiled_by_blocks(self):
        model = build('vit_tiny_patch16_224')
        x = image(model)
        expected = [model(x), convert(copy.deepcopy(model), 'dct')(x)]
        compile_blocks(model, backend='eager')
        torch.testing.assert_close(model(x), expected[0])
        convert(model, 'dct')
        torch.testing.assert_close(model(x), expected[1], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(expected[0], expected[1], atol=1e-2)


class TestDisk:
    @pytest.mark.parametrize('options', [{}, dict(local=3, place='qkv'), dict(num_tokens=(2, 3), domain='frequency')])
    def test_round_trip(self, model, options, tmp_path):
        convert(model, 'dct', layers=[0, 2], **options)
        save_model(model, tmp_path)
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        x = image(model)
        assert torch.equal(loaded(x), model(x))
        assert loaded.attention_spec() == model.attention_spec()
        assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', 'model.safetensors']

    def test_after_changes(self, tmp_path):
        model = convert(build('vit_tiny_patch16_224'), 'dct', keep_ratio=0.3)
        model.set_input_size((96, 64))
        model.reset_classifier(7, 'avg')
        save_model(model, tmp_path)
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        x = torch.randn(2, 3, 96, 64)
        assert torch.equal(loaded(x), model(x)) and loaded(x).shape == (2, 7)

    @pytest.mark.parametrize('mechanism', vit_efficient.list_attentions())
    def test_registered(self, mechanism, tmp_path):
        model = timm.create_model(f'vit_{mechanism}_tiny', **SMALL, img_size=64, reg_tokens=2, in_chans=1).eval()
        save_model(model, tmp_path, label_names=list('abcde'))
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        x = torch.randn(2, 1, 64, 64)
        assert torch.equal(loaded(x), model(x))
        assert loaded.pretrained_cfg['label_names'] == list('abcde')
        config = json.loads((tmp_path / 'config.json').read_text())
        assert config['architecture'] == f'vit_{mechanism}_tiny'
        attention = config['model_args']['attention']  # of all layers, or a list
        assert mechanism in (attention[0], attention[0][0])

    def test_config_holds_defaults_too(self, tmp_path):
        """A later release may choose other defaults; a saved model must not follow them."""
        save_model(convert(build('vit_tiny_patch16_224'), 'dct'), tmp_path)
        options = json.loads((tmp_path / 'config.json').read_text())['model_args']['attention'][1]
        assert {'compressor', 'place', 'local', 'axes', 'domain', 'keep_ratio'} <= set(options)

    def test_other_head(self, tmp_path):
        save_model(convert(build('vit_tiny_patch16_224'), 'dct'), tmp_path)
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=9, img_size=96)
        assert loaded(torch.randn(1, 3, 96, 96)).shape == (1, 9)

    def test_features_only(self, tmp_path):
        model = convert(build('vit_tiny_patch16_224'), 'dct')
        save_model(model, tmp_path)
        features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True, out_indices=[1])
        x = image(model)
        expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
        assert torch.equal(features.eval()(x)[0], expected)

    def test_timms_own_saving(self, tmp_path):
        model = convert(build('vit_tiny_patch16_224'), 'dct', keep_ratio=0.1)
        save_for_hf(model, tmp_path, safe_serialization=True)
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        x = image(model)
        assert torch.equal(loaded(x), model(x))

    def test_a_failed_save_leaves_the_earlier_model(self, tmp_path, monkeypatch):
        model = convert(build('vit_tiny_patch16_224'), 'dct')
        save_model(model, tmp_path)
        x = image(model)
        expected = model(x)
        nn.init.zeros_(model.head.weight)

        def fail(*_):
            raise OSError('no space')

        monkeypatch.setattr('os.replace', fail)
        with pytest.raises(OSError, match='no space'):
            save_model(model, tmp_path)
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), expected)

    def test_what_cannot_be_described_leaves_the_earlier_model(self, tmp_path):
        model = timm.create_model('vit_dct_tiny', **SMALL, img_size=64).eval()
        save_model(model, tmp_path)
        other = timm.create_model('vit_dct_tiny', **SMALL, img_size=64, act_layer=nn.ReLU)
        with pytest.raises(ValueError, match='act_layer'):
            save_model(other, tmp_path)
        x = image(model)
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))

    def test_compiled_and_pruned(self, tmp_path):
        model = timm.create_model('vit_dct_tiny', **SMALL, img_size=64).eval()
        model.prune_intermediate_layers([1], prune_norm=True)
        save_model(torch.compile(model), tmp_path)
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        x = image(model)
        assert torch.equal(loaded.forward_features(x), model.forward_features(x))

    def test_another_attention_does_not_get_the_options(self, tmp_path):
        save_model(timm.create_model('vit_dct_tiny', **SMALL, img_size=64), tmp_path)
        name, options = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, attention='dct1d').attention_spec()[
            0
        ]
        assert (name, options['axes'], options['domain']) == ('dct1d', '1d', 'frequency')
        with pytest.raises(ValueError, match='keep_ratio'):
            timm.create_model(f'local-dir:{tmp_path}', pretrained=True, attention_kwargs=dict(keep_ratio=0.5))

    def test_what_cannot_be_saved(self, tmp_path):
        with pytest.raises(ValueError, match=r'timm\.create_model'):
            save_model(vit_efficient.models.EfficientVisionTransformer(**SMALL), tmp_path)

    def test_base_is_needed(self):
        with pytest.raises(ValueError, match='base'):
            timm.create_model('vit_converted')


def test_copies_of_converted_models(model):
    convert(model, 'dct')
    x = image(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))


def test_new_parts_are_in_the_mode_of_the_model():
    model = convert(build('vit_tiny_patch16_224'), 'dct', local=3)
    assert not any(module.training for module in model.modules())


def test_hooks_stay():
    model = build('vit_tiny_patch16_224')
    seen = []
    model.blocks[0].attn.register_forward_hook(lambda *_: seen.append(1))
    convert(model, 'dct')(image(model))
    assert seen == [1]
