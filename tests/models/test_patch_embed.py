"""Patch embedding from DCT coefficients: against scipy patch by patch, against the convolution, and in a timm model."""

import numpy as np
import pytest
import timm
import torch
from scipy.fft import dctn
from timm.layers import PatchEmbed, create_feature_extractor
from timm.models import VisionTransformer

import vit_efficient
from vit_efficient import DctPatchEmbed, dct
from vit_efficient.models.patch_kernels import YCBCR

SMALL = dict(embed_dim=32, depth=2, num_heads=2, num_classes=5, img_size=(64, 96), patch_size=16)


def slow_embedding(module, x):
    """Patch by patch, channel by channel, in float64."""
    (p, q), x = module.patch_size, x.double().numpy()
    tokens = []
    for image in x:
        for top in range(0, x.shape[2], p):
            for left in range(0, x.shape[3], q):
                patch = image[:, top : top + p, left : left + q]
                if module.color == 'ycbcr':
                    patch = np.einsum('ij,jpq->ipq', np.array(YCBCR), patch)
                low = [
                    dctn(c, norm='ortho')[:f, :g].ravel() for c, (f, g) in zip(patch, module.truncation, strict=True)
                ]
                tokens.append(np.concatenate(low))
    y = torch.from_numpy(np.stack(tokens)).unflatten(0, (len(x), -1))
    return y @ module.linear.weight.detach().double().T + module.linear.bias.detach().double()


@pytest.mark.parametrize('patch_size', [8, 14, (4, 6)])
@pytest.mark.parametrize(
    'in_chans, keep, color',
    [(1, None, 'rgb'), (3, 3, 'rgb'), (3, [4, 2, 1], 'ycbcr'), (3, [[4, 3], 2, [1, 3]], 'rgb'), (5, 1, 'rgb')],
)
def test_equals_scipy_patch_by_patch(patch_size, in_chans, keep, color):
    module = DctPatchEmbed(None, patch_size, in_chans, 7, keep=keep, color=color).double()
    x = torch.randn(2, in_chans, 3 * module.patch_size[0], 5 * module.patch_size[1], dtype=torch.float64)
    torch.testing.assert_close(module(x), slow_embedding(module, x), atol=1e-12, rtol=0)


@pytest.mark.parametrize('patch_size', [8, 14, 16, 32])
@pytest.mark.parametrize('in_chans', [1, 3, 5])
@pytest.mark.parametrize('layout', [{}, {'strict_img_size': False, 'output_fmt': 'NHWC'}, {'flatten': False}])
def test_untruncated_is_the_convolution_and_back(patch_size, in_chans, layout):
    conv = PatchEmbed((patch_size * 2, patch_size * 3), patch_size, in_chans, 24, **layout)
    module = DctPatchEmbed.from_conv(conv)
    x = torch.randn(2, in_chans, patch_size * 2, patch_size * 3, requires_grad=True)
    torch.testing.assert_close(module(x), conv(x), atol=1e-5, rtol=0)
    grad = torch.autograd.grad(conv(x).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(module(x).square().sum(), x)[0], grad, atol=1e-4, rtol=1e-4)
    back = module.to_conv()
    torch.testing.assert_close(back.proj.weight, conv.proj.weight, atol=1e-6, rtol=0)
    assert torch.equal(back.proj.bias, conv.proj.bias)
    assert back(x).shape == conv(x).shape
    if not module.strict_img_size:
        other = torch.randn(1, in_chans, patch_size * 5, patch_size)
        torch.testing.assert_close(module(other), conv(other), atol=1e-5, rtol=0)


@pytest.mark.parametrize('keep, color', [(4, 'rgb'), ([8, 4, 2], 'ycbcr')])
def test_truncated_is_the_convolution_of_the_truncated_image(keep, color):
    conv = PatchEmbed(32, 8, 3, 24).double()
    module = DctPatchEmbed.from_conv(conv, keep, color=color)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    mix = torch.tensor(YCBCR, dtype=torch.float64) if color == 'ycbcr' else torch.eye(3, dtype=torch.float64)
    patches = torch.einsum('ij,bjhw->bihw', mix, x).unflatten(3, (4, 8)).unflatten(2, (4, 8))
    for c, (f, g) in enumerate(module.truncation):
        patches[:, c] = dct.truncate(patches[:, c], (f, g), dims=(2, 4))
    truncated = torch.einsum('ij,bjhw->bihw', torch.linalg.inv(mix), patches.flatten(4).flatten(2, 3))
    torch.testing.assert_close(module(x), conv(truncated), atol=1e-10, rtol=0)
    torch.testing.assert_close(module.to_conv()(x), module(x), atol=1e-10, rtol=0)


def test_a_window_that_starts_changes_nothing():
    conv = PatchEmbed(32, 8, 3, 24)
    module = DctPatchEmbed.from_conv(conv, [8, 4, 5], color='ycbcr', window=True)
    assert 0 < module.window(8, 8).min() < 1
    x = torch.randn(2, 3, 32, 32)
    expected = DctPatchEmbed.from_conv(conv, [8, 4, 5], color='ycbcr')(x)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


def test_a_coefficient_image_gives_the_same_tokens():
    pixels = DctPatchEmbed((16, 40), 8, 3, 24, keep=[5, 3, 2], color='ycbcr')
    module = DctPatchEmbed((16, 40), 8, 3, 24, keep=[5, 3, 2], color='ycbcr', input='coefficients')
    module.load_state_dict(pixels.state_dict())
    x = torch.randn(2, 3, 16, 40)
    y = dct.dct2(x.unflatten(3, (5, 8)).unflatten(2, (2, 8)), (5, 5), dims=(3, 5)).flatten(4).flatten(2, 3)
    assert y.shape == (2, 3, 10, 25)
    torch.testing.assert_close(module(y), pixels(x), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match='height of the input is 16 coefficients.* built for 10'):
        module(x)


@pytest.mark.parametrize(
    'options', [{}, {'dynamic_img_size': True}, {'dynamic_img_size': True, 'dynamic_img_pad': True}]
)
def test_in_a_model_it_is_what_timm_computes(options):
    torch.manual_seed(0)
    plain = VisionTransformer(**SMALL, **options).eval()
    model = timm.create_model('vit_full_tiny', **SMALL, **options, patch_embed='dct').eval()
    model.load_state_dict(vit_efficient.models.checkpoints.checkpoint_filter_fn(plain.state_dict(), model))
    x = torch.randn(2, 3, 70, 90) if 'dynamic_img_pad' in options else torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)
    if options:
        x = torch.randn(1, 3, 32, 112)
        torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('in_chans', [1, 3, 5])
def test_checkpoints_of_timm_load(in_chans, caplog):
    torch.manual_seed(0)
    source = timm.create_model('vit_tiny_patch16_224', num_classes=5, depth=2).state_dict()
    overlay = dict(state_dict=source, num_classes=5)
    arguments = dict(pretrained=True, pretrained_cfg_overlay=overlay, depth=2, num_classes=5, in_chans=in_chans)
    conv = timm.create_model('vit_full_tiny', img_size=(112, 160), **arguments).eval()
    model = timm.create_model('vit_full_tiny', img_size=(112, 160), **arguments, patch_embed='dct').eval()
    x = torch.randn(1, in_chans, 112, 160)
    torch.testing.assert_close(model(x), conv(x), atol=1e-5, rtol=1e-5)
    other = timm.create_model('vit_full_tiny', img_size=112, patch_size=8, **arguments).eval()
    model = timm.create_model('vit_full_tiny', img_size=112, patch_size=8, **arguments, patch_embed='dct').eval()
    torch.testing.assert_close(model.patch_embed.kernel(), other.patch_embed.proj.weight, atol=1e-6, rtol=0)
    assert timm.create_model('vit_full_tiny_dctpatch32', **arguments)(torch.randn(1, in_chans, 224, 224)).shape == (
        1,
        5,
    )
    assert 'Loading unchanged' not in caplog.text  # it is the model's filter that fits the weights to the channels


@pytest.mark.parametrize(
    'options',
    [dict(keep=5), dict(keep=[8, 4, 2], color='ycbcr'), dict(window=True), dict(keep=4, input='coefficients')],
)
def test_a_converted_model_saves_and_loads(options, tmp_path):
    model = timm.create_model('vit_tiny_patch16_224', depth=2, num_classes=5).eval()
    before = model(x := torch.randn(1, 3, 224, 224))
    assert vit_efficient.convert_patch_embed(model) is model
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    vit_efficient.convert_patch_embed(vit_efficient.convert(model, 'dct'), **options)
    x = torch.randn(1, 3, 56, 56) if 'input' in options else x
    vit_efficient.save_model(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    assert loaded.patch_embed.options == model.patch_embed.options
    assert loaded.blocks[0].attn.mechanism == 'dct'


def test_a_timm_model_with_a_swapped_embedding_is_not_saved_as_another(tmp_path):
    model = timm.create_model('vit_tiny_patch16_224', depth=1)
    model.patch_embed = DctPatchEmbed.from_conv(model.patch_embed, 4)
    with pytest.raises(ValueError, match='convert_patch_embed'):
        vit_efficient.save_model(model, tmp_path)


@pytest.mark.parametrize('patch_keep', [8, [8, 3, 3]])
def test_saved_models_of_other_budgets_are_told_apart(patch_keep, tmp_path):
    model = timm.create_model('vit_dct_tiny', **SMALL, patch_embed='dct', patch_keep=patch_keep).eval()
    vit_efficient.save_model(model, tmp_path)
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))
    with pytest.raises(ValueError, match='patch_keep=4 of 3 channels.* what they were'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, patch_keep=4)
    with pytest.raises(RuntimeError, match='patch_embed.linear.weight'):
        timm.create_model('vit_dct_tiny', **SMALL).load_state_dict(model.state_dict())


@pytest.mark.parametrize('name', ['vit_full_base_dctpatch32', 'vit_dct_base_dctpatch32'])
def test_large_patches_cost_as_much_as_small_ones(name):
    with torch.device('meta'):
        model = timm.create_model(name, img_size=1024)
        small = timm.create_model('vit_full_base', img_size=1024)
    assert model.patch_embed.num_patches * 4 == small.patch_embed.num_patches
    large, small = (vit_efficient.count_flops(m, (3, 1024, 1024)).by_role for m in (model, small))
    assert large['patch embedding'] * 4 == small['patch embedding']  # a quarter of the tokens, each at the same cost
    assert large['patch transform'] == 32 * 32 * 3 * (16 * 32 * 32 + 16 * 32 * 16)
    assert small['patch transform'] == 0


def test_flops_by_both_engines():
    model = timm.create_model('vit_dct_tiny', **SMALL, patch_embed='dct', patch_keep=[8, 4, 4], patch_color='ycbcr')
    meta, fvcore = (vit_efficient.count_flops(model, (3, 64, 96), engine=engine) for engine in ('meta', 'fvcore'))
    assert meta.by_role == fvcore.by_role
    assert meta.by_role['patch embedding'] == 24 * (64 + 16 + 16) * 32
    assert meta.by_role['patch transform'] == 24 * 3 * (8 * 16 * 16 + 8 * 16 * 8)


@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize(
    'options', [dict(patch_keep=7), dict(patch_keep=[8, 4, 4], patch_color='ycbcr', patch_window=True)]
)
@pytest.mark.compiled
def test_compiles_and_exports(dynamic, options):
    torch.compiler.reset()  # what was compiled for another size would make this one's sizes symbols
    size = {**SMALL, 'depth': 1}
    model = timm.create_model('vit_full_tiny', **size, dynamic_img_size=dynamic, patch_embed='dct', **options).eval()
    x = torch.randn(2, 3, 64, 96)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    if dynamic:
        sides = {name: 16 * torch.export.Dim(name, min=2, max=64) for name in ('h', 'w')}
        program = torch.export.export(model, (x,), dynamic_shapes=({2: sides['h'], 3: sides['w']},)).module()
        x = torch.randn(2, 3, 112, 48)
        torch.testing.assert_close(program(x), model(x))


def test_follows_another_image_and_patch_size():
    model = timm.create_model('vit_full_tiny', **SMALL, patch_embed='dct', patch_keep=6)
    model.set_input_size((96, 48))
    assert model(torch.randn(1, 3, 96, 48)).shape == (1, 5)
    conv = model.patch_embed.to_conv()
    conv.set_input_size((96, 48), patch_size=8)
    model.set_input_size(patch_size=8)
    assert model.patch_embed.grid_size == (12, 6) and model.patch_embed.keep == (6, 6)
    expected = DctPatchEmbed.from_conv(conv, 6).linear.weight
    torch.testing.assert_close(model.patch_embed.linear.weight, expected, atol=1e-6, rtol=0)
    assert model(torch.randn(1, 3, 96, 48)).shape == (1, 5)
    with pytest.raises(ValueError, match='patch_keep'):
        model.patch_embed.set_input_size(patch_size=4)
    assert model.patch_embed.patch_size == (8, 8)


def test_starts_like_a_convolution():
    torch.manual_seed(0)
    model = timm.create_model('vit_full_tiny', **SMALL, patch_embed='dct', patch_keep=8)
    plain = timm.create_model('vit_full_tiny', **SMALL)
    ratio = model.patch_embed.linear.weight.std() / plain.patch_embed.proj.weight.std()
    assert 0.95 < ratio < 1.05


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(patch_keep=4), "patch_keep=4 is an option of patch_embed='dct'"),
        (dict(patch_window=True), 'patch_window=True is an option'),
        (dict(patch_embed='fft'), "patch_embed must be one of conv, dct, got patch_embed='fft'"),
        (dict(patch_embed='dct', patch_keep=17), 'patch_keep=17.* 1 to the 16×16 pixels'),
        (dict(patch_embed='dct', patch_keep=0), 'patch_keep=0'),
        (dict(patch_embed='dct', patch_keep=2.5), 'patch_keep=2.5'),
        (dict(patch_embed='dct', patch_keep='all'), "patch_keep='all'"),
        (dict(patch_embed='dct', patch_keep=[4, 4]), 'one for each of the 3 channels'),
        (dict(patch_embed='dct', patch_color='hsv'), "patch_color must be .* got patch_color='hsv'"),
        (dict(patch_embed='dct', patch_color='ycbcr', in_chans=1), 'needs the 3 channels'),
        (dict(patch_embed='dct', patch_input='jpeg'), "patch_input must be .* got patch_input='jpeg'"),
        (dict(patch_embed='dct', patch_input='coefficients', dynamic_img_pad=True), 'cannot be padded'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('vit_full_tiny', **{**SMALL, **options})


def test_bad_images():
    module = DctPatchEmbed(32, 16, 3, 8, keep=4)
    with pytest.raises(ValueError, match='height of the input is 1 pixels.* built for 32'):
        module(torch.randn(1, 3, 1, 1))
    module.strict_img_size = False
    with pytest.raises(
        ValueError, match='width of the input is 40 pixels.* multiple of 16 .* use 32 or 48, or dynamic_img_pad'
    ):
        module(torch.randn(1, 3, 32, 40))


def test_other_embeddings_are_refused():
    with pytest.raises(ValueError, match='Identity is not a PatchEmbed'):
        DctPatchEmbed.from_conv(torch.nn.Identity())
    overlapping = PatchEmbed(32, 16, 3, 8)
    overlapping.proj.stride = (8, 8)
    with pytest.raises(ValueError, match='not one convolution over each'):
        DctPatchEmbed.from_conv(overlapping)


@pytest.mark.parametrize(
    'options', [dict(patch_keep=7), dict(patch_keep=[8, 4, 4], patch_color='ycbcr', patch_window=True)]
)
@pytest.mark.parametrize('dynamic', [False, True])
def test_fx(options, dynamic):
    model = timm.create_model('vit_full_tiny', **SMALL, dynamic_img_size=dynamic, patch_embed='dct', **options).eval()
    extract = create_feature_extractor(model, {'norm': 'features'})
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(extract(x)['features'], model.forward_features(x))


def test_another_patch_size_with_a_window():
    module = DctPatchEmbed((32, 32), 16, 3, 24, keep=8, window=True)
    with torch.no_grad():
        module.window.share.fill_(0.5)
    conv = module.to_conv()
    conv.set_input_size(64, 32)
    expected = DctPatchEmbed.from_conv(conv, 8).to_conv().proj.weight
    module.set_input_size(64, 32)
    gains = module.window(8, 8) > 0  # what the window has faded out is gone
    cut = DctPatchEmbed.from_conv(conv, 8).linear.weight.unflatten(1, (3, 8, 8)) * gains
    torch.testing.assert_close(module._weight().unflatten(1, (3, 8, 8)), cut, atol=1e-6, rtol=1e-5)
    assert (module.kernel() - expected).norm() < (0.3 * expected).norm()


@pytest.mark.parametrize('img_size', [224, 225])
def test_padded_at_sizes_that_patches_do_not_divide(img_size):
    conv = PatchEmbed(img_size, 16, 3, 8, dynamic_img_pad=True)
    module = DctPatchEmbed.from_conv(conv)
    x = torch.randn(1, 3, img_size, img_size)
    torch.testing.assert_close(module(x), conv(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=f'built for {img_size}'):
        module(torch.randn(1, 3, 240, 240))


def test_frozen_weights_stay_frozen():
    model = timm.create_model('vit_tiny_patch16_224', depth=1).requires_grad_(False)
    vit_efficient.convert_patch_embed(model, keep=8, window=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ['patch_embed.window.share']
    for embedding in (model.patch_embed.freeze(), model.patch_embed.to_conv()):
        assert not any(parameter.requires_grad for parameter in embedding.parameters())


def test_hooks_on_the_layer_are_called():
    module = DctPatchEmbed(32, 16, 3, 8, keep=4)
    module.linear.register_forward_hook(lambda layer, inputs, output: output + 1)
    x = torch.randn(1, 3, 32, 32)
    with_hook = module(x)
    module.linear._forward_hooks.clear()
    torch.testing.assert_close(with_hook, module(x) + 1)


@pytest.mark.parametrize('name', ['vit_full_tiny', 'vit_full_tiny_dctpatch32'])
def test_the_way_back_is_saved(name, tmp_path):
    model = timm.create_model(
        name, img_size=64, embed_dim=32, depth=1, num_heads=2, patch_embed='dct', patch_keep=8
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    vit_efficient.convert_patch_embed(model, 'conv')
    assert type(model.patch_embed) is PatchEmbed
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    torch.nn.init.normal_(model.patch_embed.proj.weight)
    vit_efficient.save_model(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert type(loaded.patch_embed) is PatchEmbed and torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match='patch_keep=3 is an option'):
        vit_efficient.convert_patch_embed(model, 'conv', keep=3)


def test_kernels_over_pixels_load_without_a_filter():
    """As `checkpoint_path=` and `load_state_dict` have it."""
    plain = timm.create_model('vit_full_tiny', **SMALL).eval()
    x = torch.randn(1, 3, 64, 96)
    for options in ({}, dict(patch_color='ycbcr', patch_window=True)):
        model = timm.create_model('vit_full_tiny', **SMALL, patch_embed='dct', **options).eval()
        state = plain.state_dict()
        model.load_state_dict(state)
        assert 'patch_embed.proj.weight' in state
        torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)


def test_npz_checkpoints_load(tmp_path):
    """Those of the original ViTs, in the form of JAX."""
    plain = timm.create_model('vit_full_tiny', **SMALL).eval()
    state = {name: value.detach().numpy() for name, value in plain.state_dict().items()}
    d, heads = 32, 2
    arrays = {
        'cls': state['cls_token'],
        'embedding/kernel': state['patch_embed.proj.weight'].transpose(2, 3, 1, 0),
        'embedding/bias': state['patch_embed.proj.bias'],
        'Transformer/posembed_input/pos_embedding': state['pos_embed'],
        'Transformer/encoder_norm/scale': state['norm.weight'],
        'Transformer/encoder_norm/bias': state['norm.bias'],
        'head/kernel': state['head.weight'].T,
        'head/bias': state['head.bias'],
    }
    for i in range(2):
        ours, theirs = f'blocks.{i}.', f'Transformer/encoderblock_{i}/'
        attention = f'{theirs}MultiHeadDotProductAttention_1/'
        for number, norm in ((0, 'norm1'), (2, 'norm2')):
            arrays[f'{theirs}LayerNorm_{number}/scale'] = state[f'{ours}{norm}.weight']
            arrays[f'{theirs}LayerNorm_{number}/bias'] = state[f'{ours}{norm}.bias']
        for number, name in enumerate(('query', 'key', 'value')):
            rows = slice(number * d, (number + 1) * d)
            arrays[f'{attention}{name}/kernel'] = state[f'{ours}attn.qkv.weight'][rows].T.reshape(d, heads, -1)
            arrays[f'{attention}{name}/bias'] = state[f'{ours}attn.qkv.bias'][rows].reshape(heads, -1)
        arrays[f'{attention}out/kernel'] = state[f'{ours}attn.proj.weight'].T.reshape(heads, -1, d)
        arrays[f'{attention}out/bias'] = state[f'{ours}attn.proj.bias']
        for number, layer in enumerate(('fc1', 'fc2')):
            arrays[f'{theirs}MlpBlock_3/Dense_{number}/kernel'] = state[f'{ours}mlp.{layer}.weight'].T
            arrays[f'{theirs}MlpBlock_3/Dense_{number}/bias'] = state[f'{ours}mlp.{layer}.bias']
    np.savez(tmp_path / 'vit.npz', **arrays)
    model = timm.create_model('vit_full_tiny', **SMALL, patch_embed='dct').eval()
    model.load_pretrained(str(tmp_path / 'vit.npz'))
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)


def test_a_replaced_layer_is_called_with_a_window_too():
    class Doubled(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return 2 * self.linear(x)

    embedding, x = DctPatchEmbed(16, 4, 3, 12, keep=2, window=True), torch.randn(2, 3, 16, 16)
    expected = embedding(x)
    embedding.linear = Doubled(embedding.linear)
    assert torch.allclose(embedding(x), 2 * expected, atol=1e-5)
