"""timm's `Beit` and `VisionTransformerRelPos`, converted, at reduced width and depth."""

import copy

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import vit_efficient
from vit_efficient.conversion import convert_patch_embed
from vit_efficient.export import export_model
from vit_efficient.flops import count_flops
from vit_efficient.models import EfficientBeit, EfficientVisionTransformerRelPos, load_model
from vit_efficient.utils.errors import UserError

SMALL = dict(embed_dim=24, depth=2, num_heads=3, img_size=(28, 52), patch_size=4, num_classes=5)
BEIT, RELPOS, POST = 'beit_base_patch16_224', 'vit_relpos_base_patch16_224', 'vit_relpos_base_patch16_rpn_224'
MODELS = {
    'beit': (BEIT, {}),
    'beit v2': ('beitv2_base_patch16_224', {}),
    'beit, shared': (BEIT, dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True, use_abs_pos_emb=True)),
    'beit, both': (BEIT, dict(use_shared_rel_pos_bias=True, init_values=None)),
    'mlp': (RELPOS, {}),
    'mlp, class token': ('vit_relpos_medium_patch16_cls_224', {}),
    'mlp, swin': (RELPOS, dict(rel_pos_type='mlp-swin')),
    'mlp, shared': ('vit_srelpos_small_patch16_224', dict(rel_pos_dim=16)),
    'table': (RELPOS, dict(rel_pos_type='bias', class_token=True)),
    'table, shared, post-norm': (POST, dict(rel_pos_type='bias', shared_rel_pos=True, qk_norm=True)),
}
EACH_CLASS = ['beit', 'beit, shared', 'mlp, class token', 'table, shared, post-norm']
TRUNCATED = [
    ('dct', dict(keep_ratio=0.3)),
    ('pool', dict(keep_ratio=0.3)),
    ('subsample', dict(keep_ratio=0.3, place='qkv')),
    ('dct', dict(keep_ratio=0.3, place='block')),
    ('window', dict(window_size=4)),
]


def build(name, **arguments):
    torch.manual_seed(0)
    entry, own = MODELS[name]
    model = timm.create_model(entry, **{**SMALL, **own, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at nothing would show nothing
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.2))
    return model


def convert(model, attention, **options):
    return vit_efficient.convert(copy.deepcopy(model), attention, **options)


def images(height=28, width=52, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def gradients(model, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return y, torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])


def assert_same(model, expected, x, tolerance=1e-6):
    (y, found), (y_expected, wanted) = gradients(model, x), gradients(expected, x)
    assert (y - y_expected).abs().max() <= tolerance * y_expected.abs().max().clamp(min=1)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize('name', MODELS)
class TestEach:
    @pytest.mark.parametrize('grid', [(14, 14), (7, 13), (1, 9), (33, 17)])
    def test_nothing_truncated_is_timms(self, name, grid):
        if name == 'mlp, swin' and grid[0] == 1:
            pytest.skip('its coordinates are 0 / 0 on a side of one patch')
        size = (4 * grid[0], 4 * grid[1])
        model = build(name, img_size=size)
        for attention, options in (
            ('full', {}),
            ('pool', dict(keep_ratio=1)),
            ('dct', dict(keep_ratio=1, place='kv')),
            ('window', dict(window_size=33)),
        ):
            converted = convert(model, attention, **options)
            assert list(converted.state_dict()) == list(model.state_dict())
            assert_same(converted, model, images(*size, batch=1))

    def test_nothing_truncated_is_timms_in_training(self, name):
        """Where an MLP makes biases it has dropout: one draw for all blocks that share them."""
        model = build(name).train()
        for attention in ('full', 'window') if 'shared' in name else ('full',):
            options = dict(window_size=33) if attention == 'window' else {}
            assert_same(convert(model, attention, **options), model, images())

    @pytest.mark.parametrize(('attention', 'options'), [TRUNCATED[0], TRUNCATED[4]])
    def test_saved_and_read_back(self, name, attention, options, tmp_path):
        """Also at another size: the tables follow as timm's `set_input_size` has them."""
        square = dict(img_size=(32, 32))
        model = convert(build(name, **square), attention, **options)
        vit_efficient.save_model(model, tmp_path)
        for size in ((32, 32), (28, 44)):
            loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=size).eval()
            model.set_input_size(size)
            assert torch.equal(loaded(images(*size)), model(images(*size)))
        original = build(name, **square)
        original.set_input_size((28, 44))
        assert torch.equal(convert(model, 'full')(images(28, 44)), original(images(28, 44)))

    def test_there_and_back(self, name):
        model = build(name)
        expected = model(images())
        kind = EfficientBeit if 'beit' in name else EfficientVisionTransformerRelPos
        for attention in ('dct', 'window', 'subsample', 'full'):
            vit_efficient.convert(model, attention)
            assert type(model) is kind and model(images()).isfinite().all()
        assert torch.equal(model(images()), expected)

    def test_a_copy_has_biases_of_its_own(self, name):
        model = convert(build(name), 'pool')
        expected, copied = model(images()), copy.deepcopy(model)
        assert torch.equal(copied(images()), expected)
        for parameter in copied.parameters():
            parameter.data.zero_()
        assert torch.equal(model(images()), expected)

    def test_intermediates(self, name):
        model = build(name)
        y, expected = model.forward_intermediates(images(), indices=[0, 1], norm=True)
        found = convert(model, 'full').forward_intermediates(images(), indices=[0, 1], norm=True)
        for ours, theirs in zip((found[0], *found[1]), (y, *expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)

    def test_gradient_checkpointing(self, name):
        model = convert(build(name), 'pool', place='x')
        checkpointed = copy.deepcopy(model)
        checkpointed.set_grad_checkpointing()
        assert_same(checkpointed, model, images())

    def test_from_nothing(self, name):
        """Buffers that no checkpoint has are made anew."""
        model = convert(build(name), ('dct', dict(keep_ratio=0.3)), layers=[0])
        empty = copy.deepcopy(model).to('meta').to_empty(device='cpu')
        empty.init_weights()
        empty.load_state_dict(model.state_dict())
        assert torch.equal(empty(images()), model(images()))

    def test_in_bfloat16(self, name):
        model = convert(build(name), 'pool')
        expected = model(images())
        with torch.autocast('cpu', torch.bfloat16):
            y = model(images())
            y.float().sum().backward()
        for found in (y, copy.deepcopy(model).bfloat16()(images().bfloat16())):
            assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize('name', ['beit, both', 'mlp, shared'])
def test_mixed_with_full_attention(name):
    """Exact attention has the biases of all pairs, made once; the rest of the blocks those of cells."""
    model = build(name)
    mixed = convert(model, [('full', {}), ('pool', dict(keep_ratio=1))])
    assert_same(mixed, model, images())


@pytest.mark.parametrize('grid', [(5, 13), (1, 5)])
def test_a_grid_whose_table_could_be_that_of_a_square(grid, tmp_path):
    """As many entries as 8 × 8 patches have, or 2 × 2."""
    model = convert(build('beit', img_size=(4 * grid[0], 4 * grid[1])), 'dct')
    vit_efficient.save_model(model, tmp_path)
    x = images(4 * grid[0], 4 * grid[1])
    assert torch.equal(load_model(tmp_path).eval()(x), model(x))


@pytest.mark.parametrize('name', EACH_CLASS)
class TestEachClass:
    @pytest.mark.parametrize('size', [(28, 52), (32, 40)])
    @pytest.mark.parametrize(('attention', 'options'), [('full', {}), TRUNCATED[0], TRUNCATED[3]])
    def test_flops(self, name, attention, options, size):
        model = convert(build(name, img_size=size), attention, **options).requires_grad_(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images(*size, batch=1))
        assert count_flops(model, input_size=(3, *size)).products == counter.get_total_flops() / 2

    @pytest.mark.parametrize(('attention', 'options'), [('full', {}), ('dct', dict(keep_ratio=0.3))])
    def test_fx(self, name, attention, options):
        model = convert(build(name), attention, **options)
        found = create_feature_extractor(copy.deepcopy(model), ['head'])(images())
        torch.testing.assert_close(found['head'], model(images()))

    def test_features_only(self, name, tmp_path):
        """What features leave out is left out of what is saved."""
        wrapper = build(name, features_only=True, out_indices=(0, 1))
        expected = wrapper(images())
        vit_efficient.convert(wrapper, 'full')
        assert all(torch.equal(a, b) for a, b in zip(wrapper(images()), expected, strict=True))
        vit_efficient.convert(wrapper, 'pool')
        vit_efficient.save_model(wrapper, tmp_path)
        arguments = dict(pretrained=True, features_only=True, out_indices=(0, 1))
        loaded = timm.create_model(f'local-dir:{tmp_path}', **arguments).eval()
        assert all(torch.equal(a, b) for a, b in zip(loaded(images()), wrapper(images()), strict=True))
        whole = load_model(tmp_path).eval()
        assert torch.equal(whole.forward_features(images()), loaded.model.forward_features(images()))

    def test_an_embedding_of_coefficients(self, name):
        model = convert(build(name), 'dct')
        expected = model(images())
        torch.testing.assert_close(convert_patch_embed(model, 'dct')(images()), expected, rtol=1e-4, atol=1e-4)

    def test_a_list_of_images_is_of_one_size(self, name):
        for attention, options in (('full', {}), *TRUNCATED):
            model = convert(build(name), attention, **options)
            torch.testing.assert_close(model([*images()]), model(images()), rtol=1e-5, atol=1e-5)
            for x in ([images()[0], images(32, 52)[0]], images(32, 52)):
                with pytest.raises(UserError, match='was built for 28'):
                    model(x)

    @pytest.mark.parametrize(
        'attention',
        ['linformer', 'combiner', 'monarch', 'nystrom', 'performer', 'treeformer_tf', 'treeformer_tc', 'dct1d'],
    )
    def test_what_cannot_have_a_bias_is_refused(self, name, attention):
        model = build(name)
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(UserError, match=f"'{attention}'.* relative position bias.*use 'pool'"):
            vit_efficient.convert(model, attention)
        assert [type(module) for module in model.modules()] == kinds


def test_compiled_as_one_graph():
    torch.compiler.reset()
    model = convert(build('mlp, shared', class_token=True, global_pool='token', depth=1), 'dct', keep_ratio=0.3)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize('suffix', ['.pt2', '.onnx'])
def test_exported(suffix, tmp_path):
    """It compares the outputs; to ONNX also where biases have gradients, which choose another kernel for attention."""
    for module in ('onnx', 'onnxscript', 'onnxruntime') if suffix == '.onnx' else ():
        pytest.importorskip(module)
    model = convert(build('beit', depth=1), 'pool')
    assert export_model(model, tmp_path / f'model{suffix}', input_size=(3, 28, 52)) < 1e-5


@pytest.mark.parametrize(
    ('attention', 'options'),
    [('dct', {}), *((name, dict(count_bias=counted)) for name in ('pool', 'subsample') for counted in (True, False))],
)
def test_biases_of_zero_change_nothing(attention, options):
    """A key weighs as many patches as without biases."""
    model, plain = build('beit'), build('beit', use_rel_pos_bias=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    for block in model.blocks:
        block.attn.relative_position_bias_table.data.zero_()
    found, expected = (convert(m, attention, keep_ratio=0.3, **options)(images()) for m in (model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('size, other', [((28, 52), (52, 28)), ((28, 52), (32, 40)), ((12, 92), (32, 32))])
@pytest.mark.parametrize('name', ['beit', 'beit, shared', 'table'])
def test_saved_for_one_grid_and_read_for_another(name, size, other, tmp_path):
    """Tables are resized as `set_input_size` does, also where both grids have tables of as many entries."""
    model = convert(build(name, img_size=size, use_abs_pos_emb=False) if 'beit' in name else build(name), 'full')
    if 'beit' not in name:
        model.set_input_size(size)
    vit_efficient.save_model(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=other).eval()
    model.set_input_size(other)
    tables = [key for key in model.state_dict() if key.endswith('relative_position_bias_table')]
    assert tables and all(torch.equal(loaded.state_dict()[key], model.state_dict()[key]) for key in tables)
    torch.testing.assert_close(loaded(images(*other)), model(images(*other)))


def test_another_image_size_names_the_way_out():
    with pytest.raises(UserError, match='input is 32 × 52 pixels, the model was built for 28 × 52; call its set_input'):
        convert(build('beit'), 'pool')(images(32, 52))


@pytest.mark.compiled
def test_windows_compiled_for_open_sizes():
    """Their biases are of a grid that is known, also where the sizes of the input are symbols."""
    torch.compiler.reset()
    model = convert(build('beit'), 'window', window_size=4)
    compiled = torch.compile(model, dynamic=True, backend='aot_eager')
    torch.testing.assert_close(compiled(images()), model(images()))
