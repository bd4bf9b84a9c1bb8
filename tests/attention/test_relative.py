"""Relative position biases: of all pairs timm's own, of cells their log-sum-exp, in windows those of their patches."""

import copy
import itertools
from functools import partial

import pytest
import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.models import beit
from timm.models.vision_transformer_relpos import RelPosAttention

from vit_efficient import PatchGrid
from vit_efficient.attention import swap_attention
from vit_efficient.attention.functional import attend
from vit_efficient.attention.relative import (
    RelativeBias,
    bias_of_kept,
    grid_of_bias,
    relative_bias,
    whole_bias,
    without_index,
)
from vit_efficient.attention.window import WindowAttention
from vit_efficient.utils.errors import UserError

DIM, HEADS = 12, 3
GRIDS = [(14, 14), (7, 13), (1, 9), (33, 17)]


def modules(grid, prefix):
    """Of each kind that holds biases, with what timm makes of it: (1, heads, N, N)."""
    table, mlp = RelPosBias(grid, HEADS, prefix), RelPosMlp(grid, HEADS, hidden_dim=8, prefix_tokens=prefix)
    found = [(table, table.get_bias), (mlp, mlp.get_bias)]
    if min(grid) > 1:  # its coordinates are 0 / 0 on a side of one patch
        swin = RelPosMlp(grid, HEADS, hidden_dim=8, prefix_tokens=prefix, mode='swin')
        found.append((swin, swin.get_bias))
    if prefix:
        shared, attention = beit.RelativePositionBias(grid, HEADS), beit.Attention(DIM, HEADS, window_size=grid)
        found += [(shared, lambda: shared()[None]), (attention, attention._get_rel_pos_bias)]
    for module, _ in found:
        randomise(module.eval())
    return found


def randomise(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return module


def cells(kept, grid, prefix):
    """The tokens that each kept token stands for, prefix tokens for themselves."""
    sides = [[range(i * n // m, (i + 1) * n // m) for i in range(m)] for m, n in zip(kept, grid, strict=True)]
    patches = [[prefix + y * grid[1] + x for y, x in itertools.product(*cell)] for cell in itertools.product(*sides)]
    return [[i] for i in range(prefix)] + patches


def slow(whole, kept, grid, prefix, of_queries, counted):
    """From the bias of all pairs, (1, heads, N, N): a key's is the log-sum-exp over its cell, a query's the mean."""
    tokens = cells(kept, grid, prefix)
    counts = torch.tensor([0 if counted else len(cell) for cell in tokens]).clamp(min=1).to(whole).log()
    bias = torch.stack([whole[..., cell].logsumexp(-1) for cell in tokens], -1) - counts
    return torch.stack([bias[..., cell, :].mean(-2) for cell in tokens], -2) if of_queries else bias


@pytest.mark.parametrize('prefix', [0, 1])
@pytest.mark.parametrize('grid', GRIDS)
def test_of_all_pairs_it_is_timms(grid, prefix):
    for module, bias in modules(grid, prefix):
        torch.testing.assert_close(whole_bias(relative_bias(module), prefix), bias(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('prefix', [0, 1, 2])
@pytest.mark.parametrize(
    ('grid', 'kept'), [((6, 9), (3, 3)), ((7, 13), (3, 5)), ((1, 9), (1, 4)), ((5, 4), (1, 1)), ((4, 5), (4, 5))]
)
def test_of_kept_tokens(grid, kept, prefix):
    size = [2 * side - 1 for side in grid]
    table, entries = torch.randn(HEADS, *size, dtype=torch.float64), torch.randn(HEADS, 3, dtype=torch.float64)
    bias = RelativeBias(table.requires_grad_(), entries.requires_grad_())
    for of_queries, counted in itertools.product((False, True), repeat=2):
        found = bias_of_kept(bias, prefix, kept, of_queries, counted, table)
        expected = slow(whole_bias(bias, prefix), kept, grid, prefix, of_queries, counted)
        assert (found - expected).abs().max() < 1e-9
        weights = torch.randn_like(found)
        pairs = zip(
            torch.autograd.grad((found * weights).sum(), bias[:2], materialize_grads=True),
            torch.autograd.grad((expected * weights).sum(), bias[:2], materialize_grads=True),
            strict=True,
        )
        assert all((ours - theirs).abs().max() < 1e-9 for ours, theirs in pairs)


def test_no_matrix_of_all_pairs_is_made():
    grid, kept = (32, 48), (4, 4)
    bias = RelativeBias(torch.randn(HEADS, 63, 95), torch.randn(HEADS, 3))
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(t))
            return result

    with Sizes():
        y = bias_of_kept(bias, 1, kept, False, True, bias.table)
    assert max(sizes) == y.numel() == HEADS * (32 * 48 + 1) * 17
    assert grid == grid_of_bias(bias)


def attentions(grid, prefix):
    """timm's, of each class that has biases, and their bias."""
    made = []
    for cls, options in ((RelPosBias, {}), (RelPosMlp, dict(hidden_dim=8))):
        build = partial(cls, grid, prefix_tokens=prefix, **options)
        made.append(RelPosAttention(DIM, HEADS, qkv_bias=True, qk_norm=True, rel_pos_cls=build))
    if prefix:
        made.append(beit.Attention(DIM, HEADS, qkv_bias=True, window_size=grid))
    return [randomise(attention).eval() for attention in made]


def whole_of(attention):
    held = getattr(attention, 'rel_pos', None)
    return attention._get_rel_pos_bias() if held is None else held.get_bias()


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('place', ['kv', 'x', 'qkv', 'block'])
@pytest.mark.parametrize('name', ['dct', 'pool', 'subsample'])
def test_truncated_keys(name, place, fused):
    """Against attention written out, with biases of all pairs brought to cells."""
    grid, kept, prefix = PatchGrid(5, 7, prefix=1), (2, 3), 1
    x = torch.randn(2, 36, DIM, dtype=torch.float64)
    for original in attentions((5, 7), prefix):
        original = original.double()
        for counted in (True, False) if name != 'dct' else (False,):
            options = dict(count_bias=counted) if name != 'dct' else {}
            attention = swap_attention(original, name, place=place, num_tokens=kept, **options).double().eval()
            attention.fused_attn = fused
            bias = slow(whole_of(original), kept, (5, 7), prefix, place != 'kv', counted)
            kept_x = attention._down(x, grid)[0]
            q, k, v = attention.project_heads(kept_x if place in ('x', 'block') else x)
            if place in ('kv', 'qkv'):
                q, k, v, _ = attention._kept_of_heads(q, k, v, grid)
            weights = attention.q_norm(q) @ attention.k_norm(k).mT * attention.scale + bias
            y = (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)
            expected = attention.proj(y if place in ('kv', 'block') else attention.up(y, grid, None))
            found = attention(attention.down(x, grid)[0] if place == 'block' else x, grid)
            assert (found - expected).abs().max() < 1e-9


def test_local_expectations():
    """Weights of values are of queries and keys alone; the scores of what stands for cells have their biases."""
    grid, x = PatchGrid(5, 7, prefix=1), torch.randn(2, 36, DIM, dtype=torch.float64)
    for original in attentions((5, 7), 1):
        attention = swap_attention(original.double(), 'pool', summary='local', num_tokens=(2, 3)).eval()
        q, k, v = attention.project(x)
        of_cells = attention.compress.keys_and_values(q[:, :, 1:] * attention.scale, k[:, :, 1:], v[:, :, 1:], grid)
        k, v = (torch.cat([t[:, :, :1], of_cell], dim=2) for t, of_cell in zip((k, v), of_cells, strict=True))
        weights = (q @ k.mT * attention.scale + slow(whole_of(original), (2, 3), (5, 7), 1, False, True)).softmax(-1)
        expected = attention.proj((weights @ v).transpose(1, 2).flatten(2))
        assert (attention(x, grid) - expected).abs().max() < 1e-9


@pytest.mark.parametrize('shift', [False, True])
@pytest.mark.parametrize('prefix', [0, 1])
def test_windows(prefix, shift):
    grid = PatchGrid(7, 10, prefix)
    begins = [side // 2 if shift else 0 for side in (4, 3)]
    row, column = ((torch.arange(n) - b) // side for n, side, b in zip((7, 10), (4, 3), begins, strict=True))
    window = (100 * row[:, None] + column).flatten()
    sees = torch.ones(prefix + 70, prefix + 70, dtype=torch.bool)
    sees[prefix:, prefix:] = window[:, None] == window
    x = torch.randn(2, prefix + 70, DIM, dtype=torch.float64)
    for original in attentions((7, 10), prefix):
        attention = swap_attention(original.double(), 'window', window_size=(4, 3), shift=shift).eval()
        assert isinstance(attention, WindowAttention)
        mask = whole_of(original).masked_fill(~sees, -torch.inf)
        y = attend(*attention.project(x), attention.scale, True, mask=mask).transpose(1, 2).flatten(2)
        assert (attention(x, grid) - attention.proj(y)).abs().max() < 1e-9


def test_without_an_index_it_is_the_same_at_any_size():
    for module, bias in modules((5, 4), 1)[:4]:
        lean = without_index(module)
        assert type(lean) is not type(module) and lean.relative_position_index.numel() == 0
        assert list(lean.state_dict()) == list(module.state_dict())
        torch.testing.assert_close(lean.get_bias(), bias(), rtol=1e-6, atol=1e-6)
        assert module.relative_position_index.numel()
        assert all(a is b for a, b in zip(lean.parameters(), module.parameters(), strict=True))
        lean = copy.deepcopy(lean)
        for each in (lean, module):
            each.set_window_size((3, 6))
            each.init_non_persistent_buffers()
        torch.testing.assert_close(lean.get_bias(), bias(), rtol=1e-6, atol=1e-6)
        assert lean.relative_position_index.numel() == 0


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('linformer', dict(num_tokens=4, grid_size=(4, 4)), "'linformer': the keys kept are mixtures.*use 'pool'"),
        ('dct1d', {}, "'dct1d': the keys kept are mixtures.*axes='1d'"),
        ('dct', dict(domain='frequency', place='kv'), "'dct': the keys kept are mixtures.*domain='frequency'"),
        (
            'pool',
            dict(summary='medoid'),
            "'pool': the keys kept .* chosen patches .*use 'pool' .without summary='medoid'",
        ),
        ('combiner', {}, "'combiner' cannot have the model's relative position bias.*use 'pool'"),
        ('monarch', {}, "'monarch' cannot have the model's relative position bias.*use 'pool'"),
        ('nystrom', {}, "'nystrom' cannot have the model's relative position bias.*use 'pool'"),
        ('performer', {}, "'performer' cannot have"),
        ('treeformer_tf', {}, "'treeformer_tf' cannot have"),
        ('treeformer_tc', {}, "'treeformer_tc' cannot have"),
    ],
)
def test_what_cannot_have_it_refuses(name, options, message):
    for original in attentions((4, 4), 1):
        with pytest.raises(UserError, match=message):
            swap_attention(original, name, **options)


@pytest.mark.parametrize('name', ['full', 'pool', 'window'])
def test_another_grid_and_masks_are_refused(name):
    for original in attentions((4, 4), 1):
        attention = swap_attention(original, name)
        with pytest.raises(UserError, match='4 × 4 patches, the input has 2 × 8; call set_input_size'):
            attention(torch.randn(1, 17, DIM), PatchGrid(2, 8, prefix=1))
        for mask in (dict(attn_mask=torch.zeros(17, 17)), dict(is_causal=True)):
            with pytest.raises(UserError, match=f'cannot have {next(iter(mask))}'):
                attention(torch.randn(1, 17, DIM), PatchGrid(4, 4, prefix=1), **mask)
