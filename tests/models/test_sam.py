"""timm's `VisionTransformerSAM`, converted, at reduced width and depth: its global blocks, the others stay timm's."""

import copy
import itertools

import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat, create_feature_extractor
from timm.models import vision_transformer_sam as sam
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vit_efficient
from vit_efficient import PatchGrid
from vit_efficient.attention import swap_attention
from vit_efficient.attention.decomposed import DecomposedBias, decomposed_of_kept
from vit_efficient.conversion import convert_patch_embed
from vit_efficient.flops import count_flops
from vit_efficient.models import EfficientVisionTransformerSAM, load_model
from vit_efficient.utils.errors import UserError

SMALL = dict(embed_dim=24, depth=3, num_heads=3, img_size=(28, 52), patch_size=4, num_classes=5)
SMALL |= dict(window_size=4, global_attn_indexes=(0, 2))
ROPE = dict(use_rel_pos=False, use_rope=True)
MODELS = {
    'relative': dict(neck_chans=16),
    'relative, qk-norm': dict(neck_chans=None, use_abs_pos=False, qk_norm=True, init_values=0.5),
    'rotary': dict(neck_chans=None, embed_dim=48, **ROPE, ref_feat_shape=((4, 4), (4, 4))),
}
FULL_KEEP = [
    ('full', {}),
    ('pool', dict(keep_ratio=1)),
    ('dct', dict(keep_ratio=1, place='x')),
    ('subsample', dict(keep_ratio=1, place='qkv')),
    ('window', dict(window_size=33)),
]


def build(name, **arguments):
    torch.manual_seed(0)
    model = timm.create_model('samvit_base_patch16', **{**SMALL, **MODELS[name], **arguments}).eval()
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
    @pytest.mark.parametrize('grid', [(14, 14), (7, 13)])
    def test_nothing_truncated_is_timms(self, name, grid):
        size = (4 * grid[0], 4 * grid[1])
        model = build(name, img_size=size)
        for attention, options in FULL_KEEP:
            converted = convert(model, attention, **options)
            assert list(converted.state_dict()) == list(model.state_dict())
            assert_same(converted, model, images(*size, batch=1))

    def test_there_and_back(self, name):
        model = build(name)
        expected, windowed = model(images()), model.blocks[1]
        for attention in ('dct', 'pool', 'window', 'full'):
            vit_efficient.convert(model, attention)
            assert type(model) is EfficientVisionTransformerSAM
            assert model.blocks[1] is windowed and type(windowed) is sam.Block
            assert type(windowed.attn) is sam.Attention
            assert (model(images()) - expected).abs().max() > 1e-3 or attention == 'full'
        assert torch.equal(model(images()), expected)

    @pytest.mark.parametrize('place', ['kv', 'block'])
    def test_saved_and_read_back(self, name, place, tmp_path):
        model = convert(build(name), [('dct', dict(place=place, keep_ratio=0.3)), ('pool', dict(num_tokens=(3, 5)))])
        vit_efficient.save_model(model, tmp_path)
        loaded = load_model(tmp_path).eval()
        assert loaded.attention_spec() == model.attention_spec()
        assert [kind for kind, _ in loaded.attention_spec()] == ['dct', 'pool']
        assert torch.equal(loaded(images()), model(images()))

    def test_intermediates(self, name):
        model = build(name)
        y, expected = model.forward_intermediates(images(), indices=[1, 2], norm=True)
        found = convert(model, 'full').forward_intermediates(images(), indices=[1, 2], norm=True)
        assert all(torch.equal(a, b) for a, b in zip((found[0], *found[1]), (y, *expected), strict=True))
        truncated = convert(model, 'pool')
        *_, last = truncated.forward_intermediates(images(), intermediates_only=True, norm=True)
        assert torch.equal(last, truncated.forward_features(images()))

    def test_gradient_checkpointing(self, name):
        model = convert(build(name), 'pool', place='x')
        checkpointed = copy.deepcopy(model)
        checkpointed.set_grad_checkpointing()
        assert_same(checkpointed, model, images())

    def test_features_only(self, name, tmp_path):
        """What features leave out, here the neck, is left out of what is saved."""
        wrapper = vit_efficient.convert(build(name, features_only=True, out_indices=(0, 1)), 'pool')
        vit_efficient.save_model(wrapper, tmp_path)
        arguments = dict(pretrained=True, features_only=True, out_indices=(0, 1))
        loaded = timm.create_model(f'local-dir:{tmp_path}', **arguments).eval()
        assert all(torch.equal(a, b) for a, b in zip(loaded(images()), wrapper(images()), strict=True))

    def test_in_bfloat16(self, name):
        model = convert(build(name), 'pool', num_tokens=(3, 5))
        expected = model(images())
        with torch.autocast('cpu', torch.bfloat16):
            y = model(images())
            y.float().sum().backward()
        for found in (y, copy.deepcopy(model).bfloat16()(images().bfloat16())):
            assert (found - expected).abs().max() < 0.1 * expected.abs().max()

    @pytest.mark.parametrize('size', [(28, 52), (56, 56)])
    @pytest.mark.parametrize(('attention', 'options'), [('full', {}), ('dct', {}), ('pool', dict(place='block'))])
    def test_flops(self, name, attention, options, size):
        model = convert(build(name, img_size=size), attention, **options).requires_grad_(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images(*size, batch=1))
        assert count_flops(model, input_size=(3, *size)).products == counter.get_total_flops() / 2

    def test_an_embedding_of_coefficients(self, name):
        model = convert(build(name), 'dct')
        expected = model(images())
        torch.testing.assert_close(convert_patch_embed(model, 'dct')(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('size', [(32, 40), (64, 20), (56, 104)])
def test_other_image_sizes(size):
    """timm interpolates embeddings and distances."""
    model = build('relative')
    for attention, options in FULL_KEEP:
        assert_same(convert(model, attention, **options), model, images(*size, batch=1))
    assert vit_efficient.kept_tokens(convert(model, 'pool', num_tokens=(2, 3)), size) == [6, 6]


def test_rotary_positions_are_of_one_size():
    for attention in ('full', 'pool'):
        with pytest.raises(UserError, match='positions are those of 7 × 13 patches, the input has 13 × 7; create the'):
            convert(build('rotary'), attention)(images(52, 28))


class TestLayers:
    def test_global_ones(self):
        model = convert(build('relative'), 'pool', layers=[-1])
        assert [kind for kind, _ in model.attention_spec()] == ['full', 'pool']
        assert vit_efficient.kept_tokens(model) == [91, 21]

    def test_one_with_windows_is_refused(self):
        with pytest.raises(UserError, match='layers: block 1 attends in windows of its own.*those to name are 0, 2'):
            convert(build('relative'), 'pool', layers=[0, 1])
        with pytest.raises(UserError, match='none among all patches'):
            convert(build('relative', global_attn_indexes=()), 'pool')


@pytest.mark.parametrize(
    'attention', ['linformer', 'combiner', 'monarch', 'nystrom', 'performer', 'treeformer_tf', 'treeformer_tc', 'dct1d']
)
def test_what_cannot_have_a_bias_is_refused(attention):
    model = build('relative')
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=f"'{attention}'.* relative position bias.*use 'pool'"):
        vit_efficient.convert(model, attention)
    assert [type(module) for module in model.modules()] == kinds


def test_what_cannot_have_rotary_positions_is_refused():
    with pytest.raises(UserError, match="'dct': at place='x'.*domain='frequency'"):
        convert(build('rotary'), 'dct', domain='frequency', place='x')


def test_masks_and_sizes_are_refused():
    attention = swap_attention(build('relative').blocks[0].attn, 'full')
    for mask in (dict(attn_mask=torch.zeros(91, 91)), dict(is_causal=True)):
        with pytest.raises(UserError, match=f'cannot have {next(iter(mask))}'):
            attention(torch.randn(1, 91, 24), PatchGrid(7, 13), **mask)
    with pytest.raises(UserError, match='takes images of other sizes as it is'):
        convert(build('relative'), 'pool').set_input_size((32, 32))


def cells(kept, grid):
    """The patches (y, x) that each kept token stands for."""
    sides = [[range(i * n // m, (i + 1) * n // m) for i in range(m)] for m, n in zip(kept, grid, strict=True)]
    return [list(itertools.product(*cell)) for cell in itertools.product(*sides)]


def slow_bias(attention, q, grid, kept, kept_queries, counted):
    """Of each image, head, query and key by itself, from the distances of their patches: (B, heads, queries, keys)."""
    tables = attention.rel_pos_h, attention.rel_pos_w
    keys = cells(kept, grid)
    queries = keys if kept_queries else [[place] for place in itertools.product(*map(range, grid))]
    rows = []
    for i, of_query in enumerate(queries):
        row = []
        for of_key in keys:
            entries = []
            for place in of_key:
                distances = [
                    torch.stack([table[y - to + n - 1] for y in {p[axis] for p in of_query}]).mean(0)
                    for axis, (table, to, n) in enumerate(zip(tables, place, grid, strict=True))
                ]
                entries.append(q[:, :, i] @ sum(distances))
            entries = torch.stack(entries, -1)
            row.append(entries.logsumexp(-1) if counted else entries.exp().mean(-1).log())
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('place', ['kv', 'qkv', 'x', 'block'])
@pytest.mark.parametrize(
    ('name', 'options'),
    [('dct', {}), *((name, dict(count_bias=counted)) for name in ('pool', 'subsample') for counted in (True, False))],
)
@torch.no_grad()
def test_truncated_keys(name, options, place, fused):
    """Against attention written out; the keys are of uneven cells along one side, of even ones along the other."""
    grid, kept = PatchGrid(5, 6), (2, 3)
    original = sam.Attention(12, 2, qk_norm=True, use_rel_pos=True, input_size=(5, 6)).double()
    for parameter in original.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.5)
    attention = swap_attention(original, name, place=place, num_tokens=kept, **options).eval()
    attention.fused_attn = fused
    x = torch.randn(2, 30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def down(tokens):
        return attention.compress.down(tokens, grid)[0]

    q, k, v = attention.project_heads(down(x) if place in ('x', 'block') else x)
    if place in ('kv', 'qkv'):
        k, v = down(k), down(v)
        q = down(q) if place == 'qkv' else q
    q, k = attention.q_norm(q), attention.k_norm(k)
    counted = options.get('count_bias', False)
    bias = slow_bias(original, q, (5, 6), kept, place != 'kv', counted)
    y = ((q @ k.mT * attention.scale + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected = attention.proj(y if place in ('kv', 'block') else attention.up(y, grid, None))
    found = attention(attention.down(x, grid)[0] if place == 'block' else x, grid)
    assert (found - expected).abs().max() < 1e-9


@pytest.mark.parametrize('place', ['kv', 'x'])
@torch.no_grad()
def test_rotations_of_truncated_keys(place):
    """Keys are turned by the angles of the mean coordinates of their cells; so are queries at place x."""

    def at(places):
        angles = (torch.tensor(places, dtype=torch.float64) @ frequencies).repeat_interleave(2, -1)
        return torch.cat([angles.sin(), angles.cos()], -1)

    grid, kept, frequencies = PatchGrid(7, 13), (3, 4), torch.rand(2, 8, dtype=torch.float64) - 0.5
    options = dict(place=place, num_tokens=kept, count_bias=False, summary='mean')
    block = convert(build('rotary'), 'pool', **options).double().blocks[0]
    attention, x = block.attn, torch.randn(2, 7, 13, 48, dtype=torch.float64)
    attention.rope.pos_embed = rope = at([*itertools.product(range(7), range(13))])
    patches = [[row * 13 + column for row, column in cell] for cell in cells(kept, (7, 13))]
    of_kept = at([[sum(axis) / len(axis) for axis in zip(*cell, strict=True)] for cell in cells(kept, (7, 13))])
    normed = block.norm1(x).flatten(1, 2)
    pooled = torch.stack([normed[:, cell].mean(1) for cell in patches], 1)
    q, k, v = attention.project(pooled)
    q = apply_rot_embed_cat(q, of_kept) if place == 'x' else apply_rot_embed_cat(attention.project(normed)[0], rope)
    y = ((q @ apply_rot_embed_cat(k, of_kept).mT * attention.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = x + attention.proj(attention.up(y, grid, None) if place == 'x' else y).unflatten(1, (7, 13))
    assert (block(x) - y - block.mlp(block.norm2(y))).abs().max() < 1e-9


@pytest.mark.parametrize('kept_queries', [False, True])
def test_gradients_of_uneven_cells(kept_queries):
    tables = [torch.randn(2 * side - 1, 4, dtype=torch.float64, requires_grad=True) for side in (5, 7)]
    q = torch.randn(1, 2, 6 if kept_queries else 35, 4, dtype=torch.float64, requires_grad=True)

    def bias(q, *tables):
        return decomposed_of_kept(DecomposedBias(*tables), q, 5, 7, (2, 3), kept_queries, True)

    assert torch.autograd.gradcheck(bias, (q, *tables), fast_mode=True)


@pytest.mark.parametrize('shift', [False, True])
def test_windows(shift):
    grid = PatchGrid(7, 10)
    original = sam.Attention(12, 2, use_rel_pos=True, input_size=(7, 10)).double()
    for table in (original.rel_pos_h, original.rel_pos_w):
        torch.nn.init.normal_(table)
    attention = swap_attention(original, 'window', window_size=(4, 3), shift=shift).eval()
    begins = [side // 2 if shift else 0 for side in (4, 3)]
    row, column = ((torch.arange(n) - b) // side for n, side, b in zip((7, 10), (4, 3), begins, strict=True))
    window = (100 * row[:, None] + column).flatten()
    x = torch.randn(2, 70, 12, dtype=torch.float64)
    q, k, v = attention.project(x)
    bias = sam.get_decomposed_rel_pos_bias(q.flatten(0, 1), original.rel_pos_h, original.rel_pos_w, (7, 10), (7, 10))
    scores = q @ k.mT * attention.scale + bias.unflatten(0, (2, 2))
    weights = scores.masked_fill(window[:, None] != window, -torch.inf).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).flatten(2))
    assert (attention(x, grid) - expected).abs().max() < 1e-9


@pytest.mark.parametrize('attention', ['full', 'pool', 'window'])
def test_fx(attention):
    model = convert(build('relative'), attention)
    found = create_feature_extractor(copy.deepcopy(model), ['head'])(images())
    torch.testing.assert_close(found['head'], model(images()))


def test_compiled_as_one_graph():
    torch.compiler.reset()
    model = convert(build('relative', depth=1), 'pool', num_tokens=(3, 5))
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


def test_a_list_of_images_is_refused():
    model = convert(build('relative'), 'pool')
    with pytest.raises(UserError, match='images of one size, as a tensor'):
        model([torch.zeros(3, 32, 32), torch.zeros(3, 64, 64)])
    with pytest.raises(UserError, match='images of one size, as a tensor'):
        model.forward_intermediates([torch.zeros(3, 32, 32)])
