"""Layers of others: that they compute what they say."""

import pytest
import torch
from timm.layers import Attention
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vit_efficient.benchmark import Candidate, LayerSetting, benchmark_layer, layers, peers, timing
from vit_efficient.benchmark.peers import FlexWindows, TokenMerging
from vit_efficient.grid import PatchGrid


def merged_slowly(layer: TokenMerging, x, merged):
    """Token merging of one image, in float64, one patch after the other."""
    attn, first, patches = layer.attn, list(x[: layer.prefix]), list(x[layer.prefix :])
    _, k, _ = attn.qkv(x[layer.prefix :]).unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
    k = F.normalize(k.mean(-2), dim=-1)
    a, b = range(0, len(patches), 2), range(1, len(patches), 2)
    match = {i: max(b, key=lambda j: float(k[i].detach() @ k[j].detach())) for i in a}
    going = sorted(a, key=lambda i: -float(k[i].detach() @ k[match[i]].detach()))[:merged]
    groups = [[i] for i in range(len(patches))]
    for i in going:
        groups[match[i]] += groups[i]
    groups = [group for i, group in enumerate(groups) if i not in going]
    tokens = torch.stack([*first, *(sum(patches[i] for i in group) / len(group) for group in groups)])
    sizes = torch.tensor([1] * len(first) + list(map(len, groups)), dtype=x.dtype)
    q, k, v = attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
    scores = q @ k.mT / q.shape[-1] ** 0.5 + (sizes.log() if layer.proportional else 0)
    y = attn.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    of_patch = {i: y[len(first) + n] for n, group in enumerate(groups) for i in group}
    return torch.stack([*y[: len(first)], *(of_patch[i] for i in range(len(patches)))])


@pytest.mark.parametrize('proportional', [False, True])
@pytest.mark.parametrize(('height', 'width', 'prefix', 'keep_ratio', 'merged'), [
    (7, 13, 0, 0.5, 45), (7, 13, 5, 0.75, 23), (4, 4, 1, 0.5, 8), (1, 2, 0, 0.5, 1), (4, 4, 0, 1.0, 0),
])  # fmt: skip
def test_token_merging(height, width, prefix, keep_ratio, merged, proportional):
    layer = TokenMerging(16, 2, PatchGrid(height, width, prefix), keep_ratio, proportional).double()
    x = torch.randn(2, prefix + height * width, 16, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = torch.stack([merged_slowly(layer, each, merged) for each in x])
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(y)
    parts = [x, *layer.parameters()]
    torch.testing.assert_close(torch.autograd.grad(y, parts, gradient), torch.autograd.grad(expected, parts, gradient))
    if not merged:
        torch.testing.assert_close(y, layer.attn(x))


@pytest.mark.filterwarnings('ignore:flex_attention called without')
@pytest.mark.parametrize(('window', 'size'), [(8, (16, 24)), (4, (8, 16)), (16, (16, 32))])
def test_windows_of_flex_attention(window, size, monkeypatch):
    monkeypatch.setattr(peers, '_flex', lambda: flex_attention)  # which makes all scores, as the CPU does
    heads, dim = 2, 32
    layer = FlexWindows(dim, heads, PatchGrid(*size), window)
    x = torch.randn(2, size[0] * size[1], dim)
    timms = Attention(dim, heads, qkv_bias=True)
    timms.load_state_dict(layer.state_dict())
    with torch.no_grad():
        given = x.view(2, *size, dim)
        expected = torch.empty_like(given)
        for i in range(0, size[0], window):
            for j in range(0, size[1], window):
                tokens = given[:, i : i + window, j : j + window]
                expected[:, i : i + window, j : j + window] = timms(tokens.flatten(1, 2)).view_as(tokens)
        torch.testing.assert_close(layer(x), expected.flatten(1, 2))
        monkeypatch.setattr(layer, 'by_blocks', layer.by_windows)
        torch.testing.assert_close(layer(x), expected.flatten(1, 2))


@pytest.mark.parametrize(('tokens', 'window'), [(256, 64), (512, 256), (384, 16)])
def test_blocks_of_windows_are_those_that_hold_them(tokens, window):
    ours = peers.window_blocks(tokens, window, torch.device('cpu'))
    theirs = create_block_mask(
        lambda b, h, i, j: i // window == j // window, None, None, tokens, tokens, device='cpu', BLOCK_SIZE=128
    )
    assert torch.equal(ours.to_dense().bool(), theirs.to_dense().bool()) and ours.shape == theirs.shape


@pytest.mark.parametrize(
    ('name', 'options', 'setting', 'message'),
    [
        ('flex_window', dict(window_size=12), {}, 'flex_window: window_size=12 on a grid of 16 × 16'),
        ('tome', dict(keep_ratio=0.25), {}, 'tome: keep_ratio must be 1/2 at least.*0.25'),
        ('tome', dict(r=8), {}, 'tome: .*r'),
        ('timm', dict(keys=8), {}, 'timm: .*keys'),
    ],
)
def test_mistakes(name, options, setting, message):
    with pytest.raises(ValueError, match=message):
        benchmark_layer([Candidate(name, options)], [256], LayerSetting(16, 2, **setting))


@pytest.mark.parametrize(
    ('size', 'window', 'message'),
    [((16, 20), 8, 'grid of 16 × 20'), ((8, 8), 8, 'window_size=8'), ((24, 24), 12, 'whole blocks of 128'),
     ((16, 16, 1), 8, '--prefix 0')],
)  # fmt: skip
def test_windows_that_are_no_blocks(size, window, message):
    with pytest.raises(ValueError, match=message):
        FlexWindows(16, 2, PatchGrid(*size), window)


def test_token_merging_by_name(monkeypatch):
    monkeypatch.setattr(timing, 'matmul_rate', lambda *_, **__: 1e9)
    (forward, both) = benchmark_layer([Candidate('tome')], [91], LayerSetting(16, 2, prefix=1), 1, memory=False)
    for row in (forward[1], both[1]):
        assert row['error'] is None and row['milliseconds'] > 0 and row['attended'] is None
    patches, kept, heads_dim = 91, 1 + 46, 8
    merging = patches * 16 * heads_dim + 46 * 45 * heads_dim
    assert forward[1]['gmacs'] * 1e9 == pytest.approx(merging + 4 * kept * 16 * 16 + 2 * kept * kept * 16, rel=0.05)


@pytest.mark.filterwarnings('ignore:flex_attention called without')
def test_on_a_cpu_flex_attention_has_no_backward_pass(monkeypatch):
    """But for what PyTorch 2.10 has, as it is written out."""
    monkeypatch.setattr(timing, 'matmul_rate', lambda *_, **__: 1e9)
    monkeypatch.setattr(peers, '_flex', lambda: flex_attention)
    forward, both = benchmark_layer([Candidate('flex_window')], [256], LayerSetting(32, 2), 1, memory=False)
    assert forward[1]['error'] is None and forward[1]['milliseconds'] > 0
    error = both[1]['error'] or ('' if torch.__version__ < '2.11' else 'none')
    assert both[0]['error'] is None and (not error or 'FlexAttention does not support backward on CPU' in error)


def test_the_products_of_windows_are_counted():
    """Though FlexAttention shows none: on the meta device the layer goes another way."""
    with_gpu = LayerSetting(32, 2, device=torch.device('cuda'))
    plan = layers._plan(Candidate('flex_window'), 256, with_gpu)
    assert plan['gmacs'] * 1e9 == 256 * (4 * 32 * 32 + 2 * 64 * 32)


def test_peers_of_timm_at_sizes_that_they_take():
    from vit_efficient.benchmark import ModelCandidate, models

    for name in ('swin_base_patch4_window7_224', 'hiera_base_224'):
        for size in (224, 1024):
            plan = models._plan(ModelCandidate(name), size, models.ModelSetting())
            assert plan['error'] is None and plan['gmacs'] > 5
