"""Rotary positions: every mechanism against its equations, with each token turned by complex numbers where it lies."""

import math

import pytest
import torch
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
from torch import nn

from tests.attention import rotations
from tests.attention.reference import (
    SUMMARIES,
    cells,
    down_and_up,
    pool_down_and_up,
    pooling,
    softmax_attention,
    subsample_down_and_up,
    with_prefix,
)
from tests.attention.rotations import DIM, FAMILIES, HEADS, patches, rope_at, turn
from vit_efficient import PatchGrid, create_attention, list_attentions
from vit_efficient.attention import GridAttention, layer_options, swap_attention
from vit_efficient.attention.monarch import attend_in_blocks
from vit_efficient.attention.performer import attend_features
from vit_efficient.attention.rotary import rope_of_kept
from vit_efficient.compress.budget import Budget, kept_grid
from vit_efficient.compress.cells import COORDINATES

CHANNELS = HEADS * DIM
GRIDS = ((14, 14), (7, 13), (1, 9), (33, 17))


def randomise(module):
    """In place; large enough that positions tell."""
    random = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.5)
    return module


class TestKeptTokens:
    @pytest.mark.parametrize('family', FAMILIES)
    @pytest.mark.parametrize('places', COORDINATES)
    @pytest.mark.parametrize(
        'grid, kept', [((14, 14), (7, 7)), ((7, 13), (3, 5)), ((33, 17), (4, 2)), ((1, 9), (1, 4)), ((28, 42), (4, 3))]
    )
    @pytest.mark.parametrize('half', [True, False])
    def test_rotation_at_their_coordinate(self, family, places, grid, kept, half):
        """Cells of 7 and wider too, over which the mean of RoPE-ViT's rotations would have changed its sign."""
        angles = FAMILIES[family](*grid)
        rope = rope_at(angles, patches(*grid), half)
        expected = rope_at(angles, getattr(rotations, places)(*grid, kept), half)
        assert (rope_of_kept(rope, *grid, kept, places) - expected).abs().max() <= 1e-12

    def test_as_the_mean_of_rotations_where_that_has_a_sense(self):
        """The mean of a cell, normalised: of cells that are narrow for the frequencies it is the same rotation."""
        angles = FAMILIES['dinov3'](28, 28)
        rope = rope_at(angles, patches(28, 28), True)
        mean = (pooling(28, 28, (14, 14)) @ rope).unflatten(-1, (2, DIM))
        expected = (mean / mean.norm(dim=-2, keepdim=True)).flatten(-2)
        assert (rope_of_kept(rope, 28, 28, (14, 14), 'means') - expected).abs().max() <= 1e-12
        wide = FAMILIES['mixed'](28, 28)
        rope = rope_at(wide, patches(28, 28), True)
        mean = (pooling(28, 28, (4, 4)) @ rope).unflatten(-1, (2, DIM))
        wrong = (mean / mean.norm(dim=-2, keepdim=True)).flatten(-2)
        assert (rope_of_kept(rope, 28, 28, (4, 4), 'means') - wrong).abs().max() > 1

    @pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
    def test_dtypes(self, dtype, tolerance):
        angles = FAMILIES['mixed'](7, 13)
        rope = rope_at(angles, patches(7, 13), False).to(dtype)
        actual = rope_of_kept(rope, 7, 13, (3, 5), 'means')
        assert actual.dtype == dtype
        expected = rope_at(angles, rotations.means(7, 13, (3, 5)), False)
        assert (actual.double() - expected).abs().max() <= tolerance

    def test_all_kept_is_what_was_given(self):
        rope = torch.randn(91, 2 * DIM)
        assert rope_of_kept(rope, 7, 13, (7, 13), 'means') is rope

    def test_gradients(self):
        """Of learned frequencies."""
        frequencies = torch.randn(DIM, dtype=torch.float64, requires_grad=True)

        def kept(frequencies):
            angle = torch.arange(12, dtype=torch.float64)[:, None] * frequencies
            return rope_of_kept(torch.cat([angle.sin(), angle.cos()], dim=-1), 1, 12, (1, 5), 'means')

        assert torch.autograd.gradcheck(kept, frequencies)


# Sources: a class of timm's and what it is built with.
SOURCES = {
    'eva': (EvaAttention, dict(scale_norm=False)),
    'eva-without-bias': (EvaAttention, dict(scale_norm=False, qkv_bias=False)),
    'eva-split': (EvaAttention, dict(scale_norm=True, qkv_fused=False, norm_layer=nn.LayerNorm)),
    'eva-separate': (
        EvaAttention,
        dict(scale_norm=False, qkv_bias_separate=True, qk_norm=True, norm_layer=nn.LayerNorm),
    ),
    'eva-gated': (EvaAttention, dict(scale_norm=True, gated=True, norm_layer=nn.LayerNorm, attn_head_dim=DIM)),
    'rope': (AttentionRope, {}),
    'rope-split': (AttentionRope, dict(qkv_fused=False, qk_norm=True, norm_layer=nn.LayerNorm)),
    'rope-grouped': (AttentionRope, dict(qkv_fused=False, num_kv_heads=1)),
    'rope-gated': (AttentionRope, dict(gated=True, scale_norm=True, norm_layer=nn.LayerNorm, proj_bias=False)),
}
# What equals exact attention when nothing is left out, by name and options.
EXACT = {
    'full': ('full', {}),
    'dct-x': ('dct', dict(keep_ratio=1)),
    'dct-qkv': ('dct', dict(keep_ratio=1, place='qkv')),
    'dct-kv': ('dct', dict(keep_ratio=1, place='kv')),
    'pool-kv': ('pool', dict(keep_ratio=1)),
    'pool-x': ('pool', dict(keep_ratio=1, place='x')),
    'subsample-qkv': ('subsample', dict(keep_ratio=1, place='qkv')),
    'merge-kv': ('merge', dict(keep_ratio=1)),
    'linformer': ('linformer', dict(projection='mean', keep_ratio=1)),
    'window': ('window', dict(window_size=40)),
    'treeformer_tf': ('treeformer_tf', dict(tree_height=0)),
}
ROPES = ('common', 'of heads', 'of images', 'of both')


def shaped(rope, shape, batch):
    """The rotations of each head in one of the shapes in which timm hands them down."""
    if shape == 'common':
        return rope[0]
    if shape == 'of heads':
        return rope
    of_images = torch.stack([rope.roll(i, dims=0) for i in range(batch)])
    return of_images if shape == 'of both' else of_images[:, :1]


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize('half, prefix', [(False, 0), (True, 1), (False, 5)])
def test_nothing_truncated_is_timms_own_class(source, half, prefix):
    """In float32, outputs and all gradients, on all grids, of all shapes of the rotations."""
    cls, options = SOURCES[source]
    exact = randomise(cls(CHANNELS, HEADS, num_prefix_tokens=prefix, rotate_half=half, **options)).eval()
    exact_names = {name for name, _ in exact.named_parameters()}
    for number, grid in enumerate(GRIDS):
        rope = rope_at(FAMILIES['mixed'](*grid), patches(*grid), half).float()
        x = torch.randn(2, prefix + grid[0] * grid[1], CHANNELS, requires_grad=True)
        shapes = ROPES if source != 'rope-grouped' else ('common', 'of images')  # the others timm cannot have there
        every = 1 if grid == (7, 13) else 4
        for shape in shapes if every == 1 else shapes[number % len(shapes) :: every]:
            given = shaped(rope, shape, 2).requires_grad_()
            inputs = [x, given, *exact.parameters()]
            y = exact(x, rope=given)
            weights = torch.randn_like(y)
            expected = torch.autograd.grad((y * weights).sum(), inputs)
            for name, (mechanism, of_mechanism) in list(EXACT.items())[number % every :: every]:
                attention = swap_attention(exact, mechanism, **of_mechanism)
                actual = attention(x, PatchGrid(*grid, prefix), given)
                assert (actual - y).abs().max() <= 1e-6 * y.abs().max(), (name, grid, shape)
                found = torch.autograd.grad((actual * weights).sum(), inputs)
                for ours, theirs in zip(found, expected, strict=True):
                    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max(), (name, grid, shape)
                assert exact_names <= {key for key, _ in attention.named_parameters()}


def heads_of(attention, x, part):
    """Queries (0), keys (1) or values (2) of one image, of each head: HEADS × (tokens, DIM)"""
    weight, bias = attention.qkv.weight, attention.qkv.bias
    rows = slice(part * CHANNELS, (part + 1) * CHANNELS)
    return (x @ weight[rows].T + bias[rows]).split(DIM, dim=1)


def build(name, **options):
    options = layer_options(name, options, 0, 1, (7, 13))
    attention = create_attention(name, CHANNELS, HEADS, qk_norm=True, qkv_bias=True, norm_layer=nn.LayerNorm, **options)
    return randomise(attention).double().eval()


def finished(attention, heads):
    return torch.cat(heads, dim=1) @ attention.proj.weight.T + attention.proj.bias


COMPRESSED = {
    'dct': (lambda grid, kept: down_and_up(*grid, kept, '2d', 'space'), rotations.samples),
    'pool': (lambda grid, kept: pool_down_and_up(*grid, kept), rotations.means),
    'subsample': (lambda grid, kept: subsample_down_and_up(*grid, kept), rotations.middles),
}


@pytest.mark.parametrize('name', COMPRESSED)
@pytest.mark.parametrize('place', ['x', 'qkv', 'kv', 'block'])
@pytest.mark.parametrize('prefix', [0, 5])
@pytest.mark.parametrize('family', FAMILIES)
def test_compressed(name, place, prefix, family):
    """Kept tokens are turned where they lie; at `kv` queries are those of all tokens, turned where these lie."""
    grid, kept, half = (7, 13), kept_grid(7, 13, Budget(0.3)), family == 'dinov3'
    angles = FAMILIES[family](*grid)
    matrices, places = COMPRESSED[name]
    down, up = (with_prefix(matrix, prefix) for matrix in matrices(grid, kept))
    counts = None
    if name != 'dct':
        of_cells = 1 / pooling(*grid, kept).max(dim=1).values
        counts = torch.cat([torch.ones(prefix, dtype=torch.float64), of_cells])
    attention, fine, coarse = build(name, place=place, keep_ratio=0.3), patches(*grid), places(*grid, kept)
    x = torch.randn(1, prefix + 91, CHANNELS, dtype=torch.float64)
    seen = down @ x[0] if place in ('x', 'block') else x[0]
    heads = []
    for head in range(HEADS):
        q, k, v = (heads_of(attention, seen, part)[head] for part in range(3))
        if place in ('qkv', 'kv'):
            k, v = down @ k, down @ v
        q = down @ q if place == 'qkv' else q
        q = turn(attention.q_norm(q), angles, head, fine if place == 'kv' else coarse, prefix, half)
        k = turn(attention.k_norm(k), angles, head, coarse, prefix, half)
        y = softmax_attention(q, k, v, counts)
        heads.append(up @ y if place in ('x', 'qkv') else y)
    expected = finished(attention, heads)
    attention.rotate_half = half
    rope = rope_at(angles, fine, half)
    actual = attention(seen[None] if place == 'block' else x, PatchGrid(*grid, prefix), rope)
    assert (actual[0] - expected).abs().max() <= 1e-9


MIXTURES = {
    'frequency-kv': ('dct', dict(domain='frequency', place='kv', num_tokens=(3, 5))),
    'frequency-qkv': ('dct', dict(domain='frequency', place='qkv', num_tokens=(3, 5))),
    'dct1d-qkv': ('dct1d', dict(place='qkv', num_tokens=20)),
    'linformer': ('linformer', dict(num_tokens=20, sharing='key-value')),
}


@pytest.mark.parametrize('case', MIXTURES)
@pytest.mark.parametrize('prefix', [0, 5])
def test_mixtures_of_patches(case, prefix):
    """They have no place: tokens are turned where they lie, then mixed."""
    name, options = MIXTURES[case]
    grid, angles, fine = (7, 13), FAMILIES['mixed'](7, 13), patches(7, 13)
    attention = build(name, **options)
    if name == 'linformer':
        down = up = with_prefix(attention.compress.down.weight[0].detach().flatten(1), prefix)
    else:
        kept = options['num_tokens']
        matrices = down_and_up(*grid, kept, '1d' if name == 'dct1d' else '2d', 'frequency')
        down, up = (with_prefix(matrix, prefix) for matrix in matrices)
    x = torch.randn(1, prefix + 91, CHANNELS, dtype=torch.float64)
    heads = []
    for head in range(HEADS):
        q, k, v = (heads_of(attention, x[0], part)[head] for part in range(3))
        q = turn(attention.q_norm(q), angles, head, fine, prefix, False)
        k = turn(attention.k_norm(k), angles, head, fine, prefix, False)
        q = down @ q if options.get('place') == 'qkv' else q
        y = softmax_attention(q, down @ k, down @ v)
        heads.append(up @ y if options.get('place') == 'qkv' else y)
    actual = attention(x, PatchGrid(*grid, prefix), rope_at(angles, fine, False))
    assert (actual[0] - finished(attention, heads)).abs().max() <= 1e-9


@pytest.mark.parametrize('prefix', [0, 5])
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('summary', SUMMARIES)
def test_summaries(summary, family, prefix):
    """Local expectations are of what is not turned, their keys turned at the mean coordinate; medoids stay."""
    grid, kept, half = PatchGrid(7, 13, prefix), (3, 5), family == 'dinov3'
    angles, fine, at = FAMILIES[family](7, 13), patches(7, 13), rotations.means(7, 13, (3, 5))
    attention = build('pool', summary=summary, num_tokens=kept)
    attention.rotate_half = half
    counts = torch.tensor([1] * prefix + [len(cell) for cell in cells(7, 13, kept)], dtype=torch.float64)
    x, heads = torch.randn(1, grid.num_tokens, CHANNELS, dtype=torch.float64), []
    for head in range(HEADS):
        q, k, v = (heads_of(attention, x[0], part)[head] for part in range(3))
        q, k = attention.q_norm(q), attention.k_norm(k)
        turned_q, turned_k = (turn(t, angles, head, fine, prefix, half) for t in (q, k))
        if summary == 'medoid':
            k, v = SUMMARIES[summary](turned_q, turned_k, v, grid, kept)
        else:
            k, v = SUMMARIES[summary](q, k, v, grid, kept)
            k = turn(k, angles, head, at, prefix, half)
        heads.append(softmax_attention(turned_q, k, v, counts))
    actual = attention(x, grid, rope_at(angles, fine, half))
    assert (actual[0] - finished(attention, heads)).abs().max() <= 1e-9


@pytest.mark.parametrize('prefix', [0, 5])
@pytest.mark.parametrize('name', ['monarch', 'nystrom', 'performer', 'window', 'treeformer_tf', 'treeformer_tc'])
def test_other_mechanisms(name, prefix):
    """Queries and keys are turned first: by those the equations of each hold. Landmarks are means of what is not
    turned, turned where their cells lie; trees route what is not turned."""
    grid, angles, fine = PatchGrid(7, 13, prefix), FAMILIES['mixed'](7, 13), patches(7, 13)
    options = dict(nystrom=dict(num_landmarks=(3, 5), pinv='exact'), window=dict(window_size=(4, 5)))
    options |= dict(treeformer_tf=dict(tree_height=2), treeformer_tc=dict(tree_height=2))
    attention = build(name, **options.get(name, {}))
    x = torch.randn(1, grid.num_tokens, CHANNELS, dtype=torch.float64)
    of_patch = torch.tensor([row // 4 * 3 + column // 5 for row, column in fine])
    with torch.no_grad():
        leaves = attention.leaves(x, grid) if name.startswith('tree') else None
    unturned = attention(x, grid)[0]
    heads = []
    for head in range(HEADS):
        q, k, v = (heads_of(attention, x[0], part)[head] for part in range(3))
        q, k = attention.q_norm(q), attention.k_norm(k)
        turned_q, turned_k = (turn(t, angles, head, fine, prefix, False) for t in (q, k))
        if name == 'performer':
            of_head = (t[None, None] for t in (turned_q, turned_k, v))
            y = attend_features(*of_head, attention.features, attention.scale, False)[0, 0]
        elif name == 'monarch':
            of_head = (t[None, None] for t in (turned_q, turned_k, v))
            y = attend_in_blocks(*of_head, 7, 13, prefix, None, 1, attention.scale, False)[0, 0]
        elif name == 'nystrom':
            down, at = with_prefix(pooling(7, 13, (3, 5)), prefix), rotations.means(7, 13, (3, 5))
            q_m, k_m = (turn(down @ t, angles, head, at, prefix, False) for t in (q, k))
            first, middle, last = (
                torch.softmax(a @ b.T / math.sqrt(DIM), dim=-1)
                for a, b in ((turned_q, k_m), (q_m, k_m), (q_m, turned_k))
            )
            y = first @ torch.linalg.pinv(middle) @ last @ v
        else:
            group_q, group_k = (t[0, head] for t in leaves) if leaves else (of_patch, of_patch)
            sees = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
            sees[prefix:, prefix:] = group_q[:, None] == group_k
            scores = (turned_q @ turned_k.T / math.sqrt(DIM)).masked_fill(~sees, -torch.inf)
            y = torch.softmax(scores, dim=-1).nan_to_num() @ v
        heads.append(y)
    actual, expected = attention(x, grid, rope_at(angles, fine, False))[0], finished(attention, heads)
    if name == 'treeformer_tc':  # patches take means of values, by no score
        assert torch.equal(actual[prefix:], unturned[prefix:])
        actual, expected = actual[:prefix], expected[:prefix]
    elif name == 'treeformer_tf':  # of queries that find a key; others read the parent of their leaf
        found = torch.stack(
            [(group_q[:, None] == group_k).any(1) for group_q, group_k in zip(*(t[0] for t in leaves), strict=True)]
        )
        tokens = torch.cat([torch.ones(prefix, dtype=torch.bool), found.all(0)])
        assert tokens.sum() > prefix + 10
        actual, expected = actual[tokens], expected[tokens]
    assert actual.numel() == 0 or (actual - expected).abs().max() <= 1e-9


@pytest.mark.parametrize('name', list_attentions())
def test_in_half_precision(name):
    """Rotations of float32 leave queries and keys as they are, in bfloat16."""
    options = dict(treeformer_tf=dict(tree_height=1), dct1d=dict(place='kv'))
    attention = create_attention(name, CHANNELS, HEADS, **layer_options(name, options.get(name, {}), 0, 1, (7, 13)))
    rope = rope_at(FAMILIES['dinov3'](7, 13), patches(7, 13), False).float()[0]
    y = attention.bfloat16().eval()(torch.randn(2, 92, CHANNELS).bfloat16(), PatchGrid(7, 13, 1), rope)
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


class Unaware(GridAttention):
    def forward(self, x, grid, attn_mask=None, is_causal=False):
        return x


def test_what_cannot_have_them():
    rope, x, grid = torch.randn(91, 2 * DIM), torch.randn(1, 91, CHANNELS), PatchGrid(7, 13)
    for name, options in (('dct1d', {}), ('dct', dict(domain='frequency')), ('dct', dict(axes='1d', place='block'))):
        attention = create_attention(name, CHANNELS, HEADS, **options)
        with pytest.raises(ValueError, match=f"'{name}'.*mixtures.*place='kv' or 'qkv'.*domain='space'"):
            attention(x, grid, rope)
    with pytest.raises(ValueError, match='Unaware takes no rope'):
        Unaware(CHANNELS, HEADS).check_rotary()


def test_what_is_written_for_the_plain_class():
    """It would not see biases that stand beside the projection."""
    with pytest.raises(ValueError, match=r"written for timm's Attention.*eva\.EvaAttention.*argument rope"):
        Unaware.from_attention(EvaAttention(CHANNELS, HEADS, scale_norm=False))
