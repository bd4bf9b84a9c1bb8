"""timm's `VisionTransformer` of other blocks than the plain one: post-norm, parallel, with differential attention."""

import copy
import math
import pickle

import pytest
import timm
import torch
from timm.layers import DiffAttention, RmsNorm
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vit_efficient
from tests.attention.reference import down_and_up, softmax_attention, with_prefix
from vit_efficient import PatchGrid, convert, count_flops, kept_tokens, save_model
from vit_efficient.attention import swap_attention
from vit_efficient.attention.treeformer.leaves import find_leaves
from vit_efficient.models import blocks, freeze_truncation, load_model
from vit_efficient.models.truncation import soft_cost
from vit_efficient.utils.errors import UserError

SMALL = dict(embed_dim=24, depth=2, num_heads=3, img_size=(32, 48), patch_size=8, num_classes=5)
NAMES = [
    'vit_base_patch16_rpn_224',
    'vit_small_patch16_18x2_224',
    'vit_base_patch16_xp_224',
    'vit_pwee_patch16_reg1_gap_256',
    'vit_dlittle_patch16_reg1_gap_256',
    'vit_dpwee_patch16_reg1_gap_256',
]
THINGS, FUSED, DIFF, FUSED_DIFF = NAMES[1], NAMES[3], NAMES[4], NAMES[5]

OPTIONS = dict(qkv_bias=True, qk_norm=True)
BLOCKS = {
    'post-norm': lambda: ResPostBlock(24, 3, **OPTIONS, init_values=0.5, scale_attn_norm=True),
    'things': lambda: ParallelThingsBlock(24, 3, **OPTIONS, init_values=0.5, scale_attn_norm=True),
    'fused': lambda: ParallelScalingBlock(24, 3, **OPTIONS, init_values=0.5, fuse_out_proj=True),
    'two out': lambda: ParallelScalingBlock(24, 3, norm_layer=RmsNorm),
    'diff': lambda: Block(24, 3, **OPTIONS, attn_layer='diff', scale_attn_norm=True),
    'dual': lambda: with_attention(Block(24, 3), DiffAttention(24, 3, dual_lambda=True, depth=2)),
    'fused diff': lambda: DiffParallelScalingBlock(24, 3, **OPTIONS, depth=1),
    'fused dual': lambda: DiffParallelScalingBlock(24, 3, dual_lambda=True, init_values=0.5),
}


def with_attention(block, attention):
    block.attn = attention
    return block


def block_of(kind):
    block = BLOCKS[kind]()
    for parameter in block.parameters():  # what starts at nothing would show nothing
        nn.init.normal_(parameter, std=0.3)
    return block


def on_grid(block, name, **options):
    """A copy of timm's block, on a grid, with an attention."""
    block = copy.deepcopy(block)
    made = {place: swap_attention(old, name, **options) for place, old in blocks.attentions_of(block).items()}
    block.__class__ = blocks.BLOCKS[type(block)]
    block.complete()
    for place, attention in made.items():
        block.set_submodule(place, attention)
    return block


def build(name, **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **arguments}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(height=32, width=48):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_same(y, expected, ours, theirs, tolerance):
    """Outputs, and all gradients, of a size that does not grow with the number of tokens."""
    weights = torch.randn_like(expected) / math.sqrt(expected[..., 0].numel())
    found = [y, *torch.autograd.grad((y * weights).sum(), ours)]
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), theirs)]
    for a, e in zip(found, wanted, strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max().clamp(min=1)


@pytest.mark.parametrize('kind', BLOCKS)
class TestBlocks:
    @pytest.mark.parametrize('grid', [(14, 14), (7, 13), (1, 9)])
    @pytest.mark.parametrize('prefix', [0, 1, 5])
    def test_nothing_truncated_is_timms(self, kind, grid, prefix):
        exact = block_of(kind)
        x = torch.randn(2, prefix + math.prod(grid), 24, requires_grad=True)
        whole = dict(keep_ratio=1, domain='space')
        for name, options in [
            ('full', {}),
            *(('dct', dict(place=place, **whole)) for place in ('x', 'qkv', 'kv', 'block')),
            ('pool', dict(keep_ratio=1)),
            ('subsample', dict(keep_ratio=1)),
            ('window', dict(window_size=14)),
        ]:
            block = on_grid(exact, name, **options)
            assert list(block.state_dict()) == list(exact.state_dict())
            y = block(x, PatchGrid(*grid, prefix))
            assert_same(y, exact(x), [x, *block.parameters()], [x, *exact.parameters()], 1e-6)

    @pytest.mark.parametrize('fused', [False, True])
    def test_masks_and_dropout_are_timms(self, kind, fused):
        exact = block_of(kind)
        rate = 0 if fused and kind.startswith('fused d') else 0.3  # there timm draws for one map after the other
        for module in exact.modules():
            if hasattr(module, 'fused_attn'):
                module.fused_attn = fused
            if isinstance(module, nn.Dropout):
                module.p = rate
            if hasattr(module, 'attn_drop_p'):
                module.attn_drop_p = rate
        block, grid, x = on_grid(exact, 'full'), PatchGrid(2, 3, 1), torch.randn(2, 7, 24)
        for mask in (dict(is_causal=True), dict(attn_mask=torch.eye(7).bool()), dict(attn_mask=torch.randn(7, 7)), {}):
            found = []
            for call in (lambda: block(x, grid, **mask), lambda: exact(x, **mask)):  # noqa: B023
                torch.manual_seed(1)
                found.append(call())
            torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize('prefix', [0, 5])
    @pytest.mark.parametrize(
        'name, place', [('dct', 'x'), ('dct', 'qkv'), ('dct', 'kv'), ('pool', 'kv'), ('dct', 'block')]
    )
    def test_truncated_is_the_equation(self, kind, name, place, prefix):
        exact = block_of(kind).double()
        block = on_grid(exact, name, place=place, num_tokens=(2, 3))
        down, up, counts = matrices(name, prefix)
        x = torch.randn(prefix + 24, 24, dtype=torch.float64, requires_grad=True)
        if place == 'block':
            kept = down @ x
            expected = x + up @ (exact(kept[None])[0] - kept)
        else:
            expected = equation(kind, exact, x, lambda h, weights: attend(h, weights, down, up, place, counts))
        y = block(x[None], PatchGrid(4, 6, prefix))[0]
        # timm rounds λ, and so its gradient, to float32.
        tolerance = 1e-8 if kind in ('diff', 'fused diff') else 1e-9
        assert (y - expected).abs().max() <= 1e-9
        assert_same(y, expected, [x, *block.parameters()], [x, *exact.parameters()], tolerance)


def matrices(name, prefix):
    """The way down and up of 4 × 6 patches to 2 × 3, and how many patches a key stands for."""
    if name == 'dct':
        return *(with_prefix(matrix, prefix) for matrix in down_and_up(4, 6, (2, 3), '2d', 'space')), None
    cells = torch.kron(torch.eye(2).repeat_interleave(2, 1), torch.eye(3).repeat_interleave(2, 1)).double()
    return with_prefix(cells / 4, prefix), None, torch.tensor([1.0] * prefix + [4.0] * 6).double()


def attend(x, a, down, up, place, counts):
    """An attention, a map at a time: (tokens, C) → (tokens, C)"""
    q, k, v = ((down @ x if place == 'x' else x) @ a['qkv'][0].T + a['qkv'][1]).chunk(3, dim=1)
    if place != 'x':
        k, v = down @ k, down @ v
    q = down @ q if place == 'qkv' else q
    outputs, maps = [], 2 if a['lambda'] is not None else 1
    dim = 8 // maps
    for head in range(3):
        v_head = v[:, 8 * head : 8 * head + 8]
        read = []
        for i in range(maps * head, maps * head + maps):
            q_map, k_map = a['q_norm'](q[:, dim * i : dim * i + dim]), a['k_norm'](k[:, dim * i : dim * i + dim])
            read.append(softmax_attention(q_map, k_map, v_head, counts))
        if maps == 2:
            weight, start, norm = a['lambda']
            read = [norm(read[0] - weight * read[1]) * (1 - start)]
        outputs += read
    y = torch.cat(outputs, dim=1)
    y = up @ a['norm'](y) if place == 'x' else a['norm'](up @ y if place == 'qkv' else y)
    return y @ a['proj'][0].T + a['proj'][1]


def weights_of(owner, qkv, proj, norm):
    """What `attend` takes, of timm's attention, or of a parallel block and of parts of its layers."""
    qkv, proj = ((weight, torch.zeros(()) if bias is None else bias) for weight, bias in (qkv, proj))
    weight = None
    if isinstance(owner, (DiffAttention, DiffParallelScalingBlock)):
        if owner.dual_lambda:
            weight = owner.lambda_a.exp() - owner.lambda_b.exp()
        else:
            products = owner.lambda_q1 @ owner.lambda_k1, owner.lambda_q2 @ owner.lambda_k2
            weight = products[0].float().exp() - products[1].float().exp()  # timm's, rounded
        weight = (weight + owner.lambda_init, owner.lambda_init, owner.sub_norm)
    return dict(qkv=qkv, proj=proj, q_norm=owner.q_norm, k_norm=owner.k_norm, norm=norm, **{'lambda': weight})


def weights_of_attention(a):
    return weights_of(a, (a.qkv.weight, a.qkv.bias), (a.proj.weight, a.proj.bias), a.norm)


def equation(kind, block, x, attend):
    """A block, with an attention of inputs and weights."""
    if kind == 'post-norm':
        x = x + block.norm1(attend(x, weights_of_attention(block.attn)))
        return x + block.norm2(block.mlp(x))
    if kind == 'things':
        x = x + sum(part.ls(attend(part.norm(x), weights_of_attention(part.attn))) for part in block.attns)
        return x + sum(part.ls(part.mlp(part.norm(x))) for part in block.ffns)
    if kind in ('diff', 'dual'):
        x = x + block.ls1(attend(block.norm1(x), weights_of_attention(block.attn)))
        return x + block.ls2(block.mlp(block.norm2(x)))
    h, w, bias = block.in_norm(x), block.in_proj.weight, block.in_proj.bias
    qkv = (w[96:], None if bias is None else bias[96:])
    hidden = nn.functional.gelu(h @ w[:96].T + (block.mlp_bias if bias is None else bias[:96]))
    if block.out_proj is not None:
        proj = (block.out_proj.weight[:, :24], block.out_proj.bias)
        of_mlp = hidden @ block.out_proj.weight[:, 24:].T
    else:
        proj = (block.attn_out_proj.weight, block.attn_out_proj.bias)
        of_mlp = block.mlp_out_proj(hidden)
    return x + block.ls(attend(h, weights_of(block, qkv, proj, nn.Identity())) + of_mlp)


@pytest.mark.parametrize('name', NAMES)
class TestModels:
    def test_there_and_back(self, name):
        model = build(name)
        expected, state = model(images()), list(model.state_dict())
        exact = convert(copy.deepcopy(model), 'full')
        torch.testing.assert_close(exact(images()), expected, atol=1e-6, rtol=1e-6)
        parameters = dict(model.named_parameters())
        for attention in ('dct', 'linformer', 'window', 'combiner', 'monarch', 'nystrom', 'performer'):
            options = {'linformer': dict(num_tokens=4), 'window': dict(window_size=2), 'nystrom': dict(num_landmarks=6)}
            options |= dict(combiner=dict(window_size=2, cell_size=2))
            convert(model, attention, **options.get(attention, {}))
            assert model(images()).isfinite().all() and not torch.equal(model(images()), expected)
            assert attention in ('linformer', 'performer') or list(model.state_dict()) == state
        convert(model, 'full')
        assert torch.equal(model(images()), exact(images())) and list(model.state_dict()) == state
        assert all(parameter is parameters[key] for key, parameter in model.named_parameters())

    @pytest.mark.parametrize(
        'attention, options', [('dct', dict(place='block')), ('linformer', dict(num_tokens=4, sharing='none'))]
    )
    def test_saved_and_read_back(self, name, attention, options, tmp_path, caplog):
        """Also for images of another size, and its copies."""
        model = convert(build(name), [(attention, options), 'full'])
        assert model.attention_spec()[0][0] == attention and model.attention_spec()[1] == ('full', {})
        save_model(model, tmp_path)
        caplog.clear()
        assert torch.equal(load_model(tmp_path).eval()(images()), model(images())) and not caplog.text
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(images()), model(images()))
        model.set_input_size((40, 48))
        loaded = load_model(tmp_path, img_size=(40, 48)).eval()
        torch.testing.assert_close(loaded(images(40)), model(images(40)))

    def test_copies_are_apart(self, name):
        """What a copy has by reference is its own."""
        model = convert(build(name), 'dct')
        copied, expected = copy.deepcopy(model), model(images())
        for parameter in copied.parameters():
            nn.init.ones_(parameter)
        assert torch.equal(model(images()), expected)
        copied.load_state_dict(model.state_dict())
        assert torch.equal(copied(images()), expected)
        torch.testing.assert_close(model.double()(images().double()).float(), expected, atol=1e-4, rtol=1e-4)

    def test_pretrained_weights(self, name):
        """Those of timm's class load, position embeddings follow the size, and what is added begins as in convert."""
        plain = build(name, img_size=32)
        overlay = dict(state_dict=plain.state_dict(), num_classes=5)
        arguments = dict(SMALL, img_size=(40, 56), pretrained=True, pretrained_cfg_overlay=overlay)
        loaded = timm.create_model('vit_converted', base=name, attention='linformer', **arguments).eval()
        expected = convert(timm.create_model(name, **arguments).eval(), 'linformer')
        assert torch.equal(loaded(images(40, 56)), expected(images(40, 56)))

    def test_gradient_checkpointing(self, name):
        model = convert(build(name), 'pool', place='x').train()
        checkpointed = copy.deepcopy(model)
        checkpointed.set_grad_checkpointing()
        outputs = model(images()), checkpointed(images())
        assert_same(*outputs, list(model.parameters()), list(checkpointed.parameters()), 1e-6)

    @pytest.mark.parametrize(
        'attention, options',
        [
            ('full', {}),
            *(('dct', dict(place=place, keep_ratio=0.3)) for place in ('x', 'qkv', 'kv', 'block')),
            ('linformer', dict(num_tokens=4)),
            ('window', dict(window_size=2)),
            ('performer', {}),
        ],
    )
    def test_flops(self, name, attention, options):
        model = convert(build(name), attention, **options)
        count = count_flops(model, (3, 32, 48))
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images()[:1])
        assert 2 * count.products == counter.get_total_flops()
        assert count.by_role == count_flops(model, (3, 32, 48), engine='fvcore').by_role

    def test_roles(self, name):
        model = convert(build(name), 'dct', num_tokens=(2, 3))
        prefix, several = model.num_prefix_tokens, 2 if name == THINGS else 1
        n, m, c = prefix + 24, prefix + 6, 24
        hidden = next(
            shape
            for shape in (120, 134, 96)
            if any(shape in p.shape or shape + 72 in p.shape for p in model.parameters())
        )
        roles = count_flops(model, (3, 32, 48)).by_role
        assert roles['attention projections'] == 2 * several * m * 4 * c**2
        assert roles['attention products'] == 2 * several * m**2 * (3 * c if name in (DIFF, FUSED_DIFF) else 2 * c)
        assert roles['mlp'] == 2 * several * n * 2 * c * hidden
        assert kept_tokens(model) == [m, m]


@pytest.mark.parametrize('name', [THINGS, FUSED_DIFF])
@pytest.mark.compiled
def test_compiled_as_one_graph(name):
    torch.compiler.reset()
    for place in ('kv', 'block'):
        model = convert(build(name, depth=1), 'dct', place=place)
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        x = images().requires_grad_()
        assert_same(compiled(x), model(x), [x, *model.parameters()], [x, *model.parameters()], 1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize('name', NAMES)
def test_graphs_of_fx(name):
    model = convert(build(name), 'dct')
    extractor = timm.layers.create_feature_extractor(model, ['blocks.0', 'head'])
    torch.testing.assert_close(extractor(images())['head'], model(images()))
    trained = timm.layers.create_feature_extractor(model.train(), ['head'])
    for _ in range(2):
        trained(images())['head'].sum().backward()


class Adapter(nn.Module):
    """A layer in the place of a linear one, with no weight to read."""

    def __init__(self, linear):
        super().__init__()
        self.base = linear

    def forward(self, x):
        return self.base(x) * 1.5 + 0.1


@pytest.mark.parametrize('kind', ['fused', 'two out', 'fused diff'])
def test_replaced_projections_count_in_full(kind):
    """Of the block, before it is converted or after."""
    exact = block_of(kind).eval()
    layers = [name for name, module in exact.named_children() if isinstance(module, nn.Linear)]
    x, grid = torch.randn(2, 13, 24), PatchGrid(3, 4, 1)
    for place in ('x', 'kv', 'block'):
        before, after = copy.deepcopy(exact), on_grid(exact, 'dct', place=place, keep_ratio=1, domain='space')
        for block in (before, after):
            for name in layers:
                setattr(block, name, Adapter(getattr(block, name)))
        torch.testing.assert_close(after(x, grid), before(x), atol=1e-4, rtol=1e-4)
        later = on_grid(before, 'dct', place=place, keep_ratio=1, domain='space')
        torch.testing.assert_close(later(x, grid), before(x), atol=1e-4, rtol=1e-4)


class TestSideBySide:
    """Several attentions in a block."""

    def test_each_gets_what_a_mechanism_adds(self):
        model = convert(build(THINGS), 'linformer', num_tokens=4)
        added = [key for key in model.state_dict() if '.compress.' in key]
        assert len(added) == 2 * 2 * 2 and added[0].startswith('blocks.0.attns.0.attn.compress')
        model = convert(build(THINGS), 'linformer', num_tokens=4, sharing='layerwise')
        assert [key for key in model.state_dict() if 'compress' in key] == [] and 'shared.weight' in model.state_dict()

    def test_leaves_of_all_heads(self):
        found = find_leaves(convert(build(THINGS), 'treeformer_tf', tree_height=2), images())
        assert {layer: leaves.keys.shape for layer, leaves in found.items()} == {0: (2, 6, 24), 1: (2, 6, 24)}

    def test_learned_sizes(self):
        model = convert(build(THINGS), 'dct', learned=True, keep_ratio=1, domain='frequency')
        assert 0.99 < soft_cost(model) < 1.3
        sizes = freeze_truncation(model, {'blocks.1.attns.0.attn': (2, 2)})
        assert len(sizes) == 4 and sizes['blocks.1.attns.0.attn'] == (2, 2)
        assert model.blocks[1].attns[0].attn.compress.budget.num_tokens == (2, 2)

    def test_what_each_would_learn_of_one_way_down(self):
        model = build(THINGS)
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(UserError, match=r"blocks\.0: place='block'.* once for 2 attentions.*use place='x'"):
            convert(model, 'dct', place='block', learned=True)
        assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize('name', [DIFF, FUSED_DIFF])
class TestDifferential:
    @pytest.mark.parametrize('attention', ['treeformer_tc', 'treeformer_tf'])
    def test_what_cannot_be(self, name, attention):
        model = build(name)
        with pytest.raises(UserError, match=f'{attention}. cannot be differential.*use one of combiner, dct, .*window'):
            convert(model, [('dct', {}), (attention, {})])
        assert not any(isinstance(module, vit_efficient.attention.GridAttention) for module in model.modules())

    @pytest.mark.parametrize(
        'attention, options',
        [
            ('nystrom', dict(num_landmarks=24, pinv='exact', residual_kernel=3)),
            ('linformer', dict(num_tokens=24)),
            ('combiner', dict(window_size=3, cell_size=1)),
            ('combiner', dict(window_size=12)),
            ('monarch', dict(block_size=24)),
        ],
    )
    def test_others_with_as_many_tokens_as_patches(self, name, attention, options):
        model = build(name).double()
        expected = model(images().double())
        convert(model, attention, **options)
        torch.testing.assert_close(model(images().double()), expected, atol=1e-6, rtol=1e-6)

    def test_more_features_are_closer(self, name):
        model = build(name)
        expected, errors = model(images()), []
        for features in (4, 4096):
            convert(model, 'performer', num_features=features)
            errors.append((model(images()) - expected).abs().max())
        assert errors[1] < errors[0] / 4

    def test_weights_begin_anew(self, name):
        """After `to_empty`, of what timm begins at random and what a mechanism adds."""
        model = convert(build(name), 'performer')
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(torch.nan)
        model.init_weights()
        weights = {key: value for key, value in model.state_dict().items() if 'lambda' in key or 'features' in key}
        assert len(weights) == 2 * 5 and all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize('arguments', [dict(attn_layer='diff'), dict(block_fn=ParallelScalingBlock)])
def test_registered_models_of_other_blocks(arguments):
    model = timm.create_model('vit_dct_tiny', **SMALL, **arguments).eval()
    exact = timm.create_model('vit_full_tiny', **SMALL, **arguments).eval()
    model.load_state_dict(exact.state_dict())
    assert torch.equal(convert(exact, 'dct')(images()), model(images()))
