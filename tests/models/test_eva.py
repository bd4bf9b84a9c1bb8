"""timm's `Eva`, converted: EVA, EVA-02, SBB, Perception Encoder, RoPE-ViT and DINOv3, at reduced width and depth."""

import copy
import warnings

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vit_efficient
from vit_efficient.attention.rotary import table_of
from vit_efficient.flops import count_flops

SMALL = dict(embed_dim=32, depth=2, num_heads=2, img_size=(56, 104), patch_size=8, num_classes=5)
MODELS = {
    'vit_small_patch16_dinov3': {},
    'vit_small_patch16_dinov3_qkvb': {},
    'vit_base_patch16_lingbot': {},
    'vit_base_patch16_sapiens2': dict(num_kv_heads=(2, 1)),
    'eva02_tiny_patch14_224': {},
    'eva02_base_patch16_clip_224': {},
    'eva_giant_patch14_224': {},
    'eva02_enormous_patch14_clip_224': {},
    'vit_pe_core_tiny_patch16_384': dict(attn_pool_num_heads=2),
    'vit_pe_spatial_small_patch16_512': {},
    'vit_base_patch16_rope_reg1_gap_256': {},
    'vit_small_patch16_rope_224': {},
    'vit_small_patch16_rope_ape_224': {},
    'vit_small_patch16_rope_mixed_224': {},
    'vit_small_patch16_rope_mixed_ape_224': {},
}
MECHANISMS = vit_efficient.list_attentions()
DINOV3, MIXED = 'vit_small_patch16_dinov3', 'vit_small_patch16_rope_mixed_224'


def build(name, **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **MODELS.get(name, {}), **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at nothing would show nothing
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.2))
    return model


def images(height=56, width=104, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def gradients(model, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return y, torch.autograd.grad((y * weights).sum(), [x, *parameters])


def assert_same(model, expected, x, tolerance=1e-6):
    (y, found), (y_expected, wanted) = gradients(model, x), gradients(expected, x)
    assert (y - y_expected).abs().max() <= tolerance * y_expected.abs().max()
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 2 * tolerance * theirs.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize('name', MODELS)
class TestEach:
    @pytest.mark.parametrize('size', [(56, 104), (8, 72)])
    def test_nothing_truncated_is_timms(self, name, size):
        model = build(name, img_size=size)
        state = set(model.state_dict())
        for attention, options in (('full', {}), ('pool', dict(keep_ratio=1)), ('dct', dict(keep_ratio=1, place='kv'))):
            converted = vit_efficient.convert(copy.deepcopy(model), attention, **options)
            assert set(converted.state_dict()) == state
            assert_same(converted, model, images(*size))

    def test_there_and_back(self, name):
        model = build(name)
        expected = model(images())
        for attention in ('dct', 'linformer', 'window', 'full'):
            vit_efficient.convert(model, attention)
            assert model(images()).isfinite().all()
        assert torch.equal(model(images()), expected)

    def test_saved_and_read_back(self, name, tmp_path):
        """Also for images of another size, and with what images its weights are for."""
        model = vit_efficient.convert(build(name), 'dct', keep_ratio=0.3)
        vit_efficient.save_model(model, tmp_path)
        for arguments in ({}, dict(img_size=(72, 80))):
            loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **arguments).eval()
            if arguments:
                model.set_input_size(arguments['img_size'])
            x = images(*arguments.get('img_size', (56, 104)))
            torch.testing.assert_close(loaded(x), model(x))
        config = timm.get_pretrained_cfg(name)
        assert tuple(loaded.pretrained_cfg['mean']) == config.mean

    def test_intermediates(self, name):
        model = build(name)
        options = dict(indices=[0, 1], return_prefix_tokens=True, norm=True)
        y, expected = model.forward_intermediates(images(), **options)
        found = vit_efficient.convert(copy.deepcopy(model), 'full').forward_intermediates(images(), **options)
        assert torch.equal(found[0], y)
        for ours, theirs in zip(found[1], expected, strict=True):
            ours, theirs = (pair if isinstance(pair, tuple) else (pair,) for pair in (ours, theirs))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def test_gradient_checkpointing(self, name):
        model = vit_efficient.convert(build(name), 'pool', place='x')
        checkpointed = copy.deepcopy(model)
        checkpointed.set_grad_checkpointing()
        assert_same(checkpointed.train(), model.train(), images())


@pytest.mark.parametrize('name', [DINOV3, MIXED, 'vit_small_patch16_rope_ape_224', 'eva02_tiny_patch14_224'])
def test_any_size(name):
    """A model that takes any is the model that is built for it."""
    model = vit_efficient.convert(build(name, dynamic_img_size=True), 'dct')
    for size in ((56, 104), (72, 40), (8, 8)):
        fixed = vit_efficient.convert(build(name, dynamic_img_size=True), 'dct')
        fixed.set_input_size(size)
        torch.testing.assert_close(model(images(*size)), fixed(images(*size)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match='image height 60 is not a multiple of the patch size 8; use 56 or 64'):
        model(images(60, 80))
    padded = vit_efficient.convert(build(name, dynamic_img_size=True, dynamic_img_pad=True), 'dct')
    assert padded(images(60, 81)).isfinite().all()


@pytest.mark.parametrize('name', [DINOV3, MIXED])
def test_features_only(name):
    """The wrapper of timm, converted as it is, saved and read back."""
    wrapper = build(name, features_only=True, out_indices=(0, 1))
    expected = wrapper(images())
    assert vit_efficient.convert(wrapper, 'full') is wrapper
    assert all(torch.equal(a, b) for a, b in zip(wrapper(images()), expected, strict=True))
    vit_efficient.convert(wrapper, 'dct', keep_ratio=0.3)
    assert [f.shape for f in wrapper(images())] == [f.shape for f in expected]


def test_features_only_saved(tmp_path):
    wrapper = vit_efficient.convert(build(DINOV3, features_only=True, out_indices=(0,)), 'dct')
    vit_efficient.save_model(wrapper, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True, out_indices=(0,)).eval()
    assert torch.equal(again(images())[0], wrapper(images())[0])


@pytest.mark.parametrize('name', [DINOV3, MIXED])
def test_patch_dropout(name):
    """Rotations are those of the patches that are left, of each image."""
    model = build(name, patch_drop_rate=0.5).train()
    assert_same(vit_efficient.convert(copy.deepcopy(model), 'full'), model, images())
    with pytest.raises(ValueError, match="patch_drop_rate=0.5: attention 'dct' needs the whole patch grid"):
        vit_efficient.convert(model, 'dct')


@pytest.mark.parametrize('options', [dict(keep_ratio=1), dict(keep_ratio=0.25), dict(keep_ratio=0.25, place='kv')])
def test_augmented_coordinates_are_drawn_once(options, monkeypatch):
    """DINOv3 shifts, jitters and rescales coordinates in training: queries and keys of all layers have one draw."""
    augmentation = dict(rope_shift_coords=0.3, rope_jitter_coords=2.0, rope_rescale_coords=2.0)
    model = build(DINOV3, **augmentation).train()
    converted = vit_efficient.convert(copy.deepcopy(model), 'pool', place=options.pop('place', 'x'), **options)
    draws, seen = [], []
    get_embed = type(model.rope).get_embed
    monkeypatch.setattr(type(model.rope), 'get_embed', lambda *args, **kw: draws.append(1) or get_embed(*args, **kw))
    for block in converted.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    torch.manual_seed(3)
    converted(images())
    torch.manual_seed(3)
    expected = converted.rope.get_embed(shape=(7, 13))
    assert len(draws) == 2 and all(torch.equal(table_of(rope), expected) for rope in seen)
    assert not torch.equal(expected, converted.rope.get_embed(shape=(7, 13)))  # another draw
    if options['keep_ratio'] == 1:
        assert_same(converted, model, images())


@pytest.mark.parametrize(
    'name', ['vit_small_patch16_dinov3', 'eva02_tiny_patch14_224', MIXED, 'vit_base_patch16_sapiens2']
)
@pytest.mark.parametrize('attention', ['full', 'dct', 'pool'])
@pytest.mark.parametrize('size', [(56, 104), (128, 128)])
def test_flops(name, attention, size):
    """By PyTorch's own counter; rotations are arithmetic of elements, which nobody counts."""
    model = vit_efficient.convert(build(name, img_size=size), attention)
    count = count_flops(model, (3, *size))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images(*size, batch=1))
    assert count.products == counter.get_total_flops() / 2
    assert count.by_role['attention products'] > 0 and count.by_role['mlp'] > 0
    assert count.total == count_flops(model, (3, *size), engine='fvcore').total


def test_weights_made_on_no_device():
    """As timm builds large models: buffers that no checkpoint has are filled, too."""
    expected = build('vit_small_patch16_dinov3_qkvb')
    with torch.device('meta'):
        model = vit_efficient.convert(
            timm.create_model('vit_small_patch16_dinov3_qkvb', **SMALL), 'pool', keep_ratio=1, place='x'
        )
    model.to_empty(device='cpu')
    with torch.no_grad():
        model.blocks[0].attn.k_bias.fill_(torch.nan)
    model.init_weights()
    model.rope.reset_parameters()
    assert model.blocks[0].attn.k_bias.eq(0).all() and model.blocks[0].attn.q_bias.eq(0).all()
    model.load_state_dict(expected.state_dict())
    torch.testing.assert_close(model.eval()(images()), expected(images()))


@pytest.mark.parametrize('attention', ['performer', 'treeformer_tc', 'treeformer_tf'])
def test_what_mechanisms_add_is_made_anew(attention):
    with torch.device('meta'):
        model = vit_efficient.convert(timm.create_model(DINOV3, **SMALL), attention)
    model.to_empty(device='cpu')
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in model.blocks[0].attn.state_dict().values())


@pytest.mark.parametrize(
    'attention', ['dct1d', 'linformer', 'combiner', 'monarch', 'nystrom', 'performer', 'treeformer_tc', 'treeformer_tf']
)
def test_every_mechanism_trains(attention):
    options = dict(place='qkv') if attention == 'dct1d' else {}
    model = vit_efficient.convert(build(MIXED), attention, **options).train()
    model(images()).square().sum().backward()
    used = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert 'rope.freqs' in used
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name, dynamic', [(DINOV3, True), (DINOV3, False), (MIXED, False)])
@pytest.mark.parametrize(
    'attention', ['full', 'dct', 'pool', 'window', 'combiner', 'monarch', 'nystrom', 'linformer', 'treeformer_tc']
)
def test_fx(name, dynamic, attention):
    """timm's own feature extractor traces it, as it does the model that is not converted."""
    model = vit_efficient.convert(build(name, dynamic_img_size=dynamic), attention)
    extractor = create_feature_extractor(model, {'blocks.0': 'block', 'head': 'logits'})
    out = extractor(images())
    assert torch.equal(out['logits'], model(images()))


def test_what_cannot_have_positions_changes_nothing():
    model = build(DINOV3)
    with pytest.raises(ValueError, match="'dct1d'.*mixtures.*place='kv' or 'qkv'"):
        vit_efficient.convert(model, 'dct1d')
    assert type(model) is timm.models.Eva
    vit_efficient.convert(build('eva_giant_patch14_224'), 'dct1d')  # it has none


@pytest.mark.compiled
@pytest.mark.parametrize('name', [DINOV3, MIXED])
def test_compiled_as_one_graph(name):
    torch.compiler.reset()
    model = vit_efficient.convert(build(name), 'dct', keep_ratio=0.3)
    expected = model(images())
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(images()), expected)


ROPE_MODELS = [name for name in MECHANISMS if name not in ('dct1d', 'treeformer_tc')]


class TestRegistered:
    """`vit_{attention}_rope_{size}`: for training at mixed sizes."""

    def test_those_that_can_have_positions(self):
        """DCT-Former's own form keeps mixtures that have no place, and TC-Attention takes means."""
        assert {f'vit_{name}_rope_tiny' for name in ROPE_MODELS} <= set(timm.list_models('vit_*_rope_tiny'))
        assert not timm.is_model('vit_dct1d_rope_tiny') and not timm.is_model('vit_treeformer_tc_rope_tiny')
        layers = ['dct', ('dct1d', dict(place='kv'))]
        model = timm.create_model('vit_full_rope_tiny', attention=layers, depth=2, num_classes=3)
        assert model(images(64, 96)).shape == (2, 3)

    @pytest.mark.parametrize('attention', ROPE_MODELS)
    def test_trains_at_mixed_sizes_and_is_saved(self, attention, tmp_path):
        small = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8, num_classes=3)
        model = timm.create_model(f'vit_{attention}_rope_tiny', img_size=64, **small)
        for size in ((64, 64), (56, 104)):
            model(images(*size)).square().sum().backward()
        assert model.pos_embed is None and model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
        vit_efficient.save_model(model, tmp_path)
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        assert torch.equal(loaded(images()), model.eval()(images()))

    def test_places_matter(self):
        """Without an embedding of positions, patches in another order would be another picture all the same."""
        model = timm.create_model('vit_pool_rope_tiny', depth=2, num_classes=3).eval()
        x = images(64, 64)
        assert not torch.allclose(model(x), model(x.flip(-1).unflatten(-1, (4, 16)).flip(-1).flatten(-2)), atol=1e-6)

    def test_an_embedding_of_coefficients_is_saved(self, tmp_path):
        """No entry point of a rotary model takes one: the model is a converted one from then on."""
        model = build('vit_dct_rope_tiny')
        for embedding in (dict(keep=4), dict(patch_embed='conv')):
            vit_efficient.convert_patch_embed(model, **embedding)
            vit_efficient.save_model(model, tmp_path)
            loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
            assert torch.equal(loaded(images()), model(images()))

    def test_patches_divide_the_image(self):
        with pytest.raises(ValueError, match='image height 230 is not a multiple of the patch size 16'):
            timm.create_model('vit_dct_rope_tiny', img_size=230, dynamic_img_size=False)

    def test_specs(self):
        model = vit_efficient.models.create_from_spec('vit_dct_rope_tiny', dict(keep_ratio=0.5, rope_temperature=50.0))
        assert model.rope.temperature == 50 and model.attention_spec()[0][1]['keep_ratio'] == 0.5
        options = dict(keep_ratio=0.5, rope_temperature=50.0)
        model = vit_efficient.models.create_from_spec('convert:vit_small_patch16_dinov3:dct', {'keep_ratio': 0.5})
        assert model.attention_spec()[0][1]['keep_ratio'] == 0.5
        with pytest.raises(ValueError, match='rope_temperatur'):
            vit_efficient.models.create_from_spec('vit_dct_rope_tiny', dict(rope_temperatur=1))
        with pytest.raises(ValueError, match='multiple of 4, got embed_dim=36, num_heads=2, 18 for each'):
            timm.create_model('vit_dct_rope_tiny', embed_dim=36, num_heads=2)
        with pytest.raises(ValueError, match='num_heads must divide embed_dim'):
            timm.create_model('vit_dct_rope_tiny', embed_dim=36, num_heads=5)
        with pytest.raises(ValueError, match='EfficientVisionTransformer'):
            vit_efficient.models.create_from_spec('vit_dct_tiny', options)


@pytest.mark.compiled
@pytest.mark.parametrize(
    'name, attention, options',
    [
        (DINOV3, 'dct', {}),
        ('eva02_tiny_patch14_224', 'pool', dict(summary='mean')),
        ('vit_pe_core_tiny_patch16_384', 'subsample', {}),
    ],
)
def test_exported_with_open_image_size(name, attention, options, tmp_path):
    """Of other sizes than the one that is traced: PyTorch's program, and ONNX of it."""
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = vit_efficient.convert(build(name, dynamic_img_size=True, depth=1), attention, **options)
    height, width = (torch.export.Dim(side, min=7, max=64) for side in ('height', 'width'))
    program = torch.export.export(model, (images(),), dynamic_shapes=({2: 8 * height, 3: 8 * width},))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        graph = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=['images'])
    graph.save(tmp_path / 'model.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    for size in ((64, 64), (104, 56), (72, 200)):
        x, expected = images(*size), model(images(*size))
        for y in (program.module()(x), torch.from_numpy(session.run(None, {'images': x.numpy()})[0])):
            assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
