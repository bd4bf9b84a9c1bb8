"""Learned truncations: the window, what it costs, and what it becomes when it is frozen."""

import pytest
import timm
import torch

from vit_efficient import DctPatchEmbed, PatchGrid, count_flops, create_attention, freeze_truncation
from vit_efficient.dct.window import FrequencyWindow
from vit_efficient.models.truncation import has_windows, soft_cost

SMALL = dict(embed_dim=32, depth=2, num_heads=2, num_classes=5, img_size=(56, 104), patch_size=8)
LEARNED = dict(learned=True)


def build(domain='space', place='x', patch=True, **options):
    torch.manual_seed(0)
    patch = dict(patch_embed='dct', patch_window=True) if patch else {}
    options = dict(LEARNED, domain=domain, place=place, **options)
    return timm.create_model('vit_dct_tiny', **SMALL, **patch, attention_kwargs=options).eval()


def set_shares(model, value):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('window.share'):
                parameter.copy_(torch.tensor(value))


def test_gains_by_hand():
    window = FrequencyWindow(smoothness=2.0, share=(0.5, 1.25))
    # L = 4 of 8: half height between frequencies 3 and 4, a slope of two.
    assert window.gains(0, 8).tolist() == [1, 1, 1, 0.75, 0.25, 0, 0, 0]
    assert window.gains(1, 4).tolist() == [1, 1, 1, 1]
    assert window(8, 4).shape == (8, 4) and window.hard_size(8, 4) == (5, 4)
    height, width = window.soft_size(8, 4)
    assert (height.item(), width.item()) == (5.0, 4.0)
    (height + width).backward()
    assert window.share.grad.tolist() == [8.0, 4.0]  # one that is wider than all frequencies can become narrower


@pytest.mark.parametrize('share', [1e-3, 0.1, 0.9])
@pytest.mark.parametrize('n', [1, 2, 7, 32])
@pytest.mark.parametrize('smoothness', [1.25, 2.0, 4.0])
def test_hard_size_is_that_of_the_cost_rounded_and_never_0(share, n, smoothness):
    window = FrequencyWindow(smoothness, share=(share, share))
    assert window.gains(0, n)[0] == 1
    assert 1 <= window.hard_size(n, n)[0] <= n
    assert abs(window.hard_size(n, n)[0] - window.soft_size(n, n)[0]) <= 0.5 + 1e-5


@pytest.mark.parametrize(
    'options',
    [dict(smoothness=1), dict(smoothness=True), dict(share=(0.0, 1.0)), dict(share=(1.0, 'a')), dict(share=1)],
)
def test_bad_windows(options):
    with pytest.raises(ValueError, match='of a frequency window must be'):
        FrequencyWindow(**options)


@pytest.mark.parametrize('smoothness', [1.25, 2.0, 4.0])
def test_there_is_a_gradient_where_it_starts_and_none_beyond(smoothness):
    n = 16
    for share, learns in ((1.0, True), (1 + (smoothness - 1) / (2 * n) + 1e-3, False)):
        window = FrequencyWindow(smoothness, share=(share, 1.0))
        window(n, n).sum().backward()
        assert (window.share.grad[0] > 0) == learns


@pytest.mark.parametrize('domain', ['space', 'frequency'])
@pytest.mark.parametrize('place', ['x', 'qkv', 'kv'])
def test_an_open_window_changes_nothing(domain, place):
    model = build(domain, place)
    set_shares(model, (2.0, 2.0))
    plain = timm.create_model('vit_dct_tiny', **SMALL, attention_kwargs=dict(domain=domain, place=place)).eval()
    plain.patch_embed = model.patch_embed
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if '.compress.' not in name})
    x = torch.randn(2, 3, 56, 104)
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)
    # A soft size may yet have to be transformed, where the whole has not.
    assert soft_cost(model).item() == 1 if domain == 'frequency' else 1 <= soft_cost(model).item() < 1.6
    assert soft_cost(model, hard=True).item() == 1


@pytest.mark.parametrize('domain', ['space', 'frequency'])
@pytest.mark.parametrize('place', ['x', 'qkv', 'kv'])
def test_sizes_are_learned_from_loss_and_cost(domain, place):
    model = build(domain, place)
    set_shares(model, (0.5, 0.7))
    windows = [p for name, p in model.named_parameters() if name.endswith('window.share')]
    assert len(windows) == 3 and len(model.state_dict()) == len(set(model.state_dict()))
    for loss in (model(torch.randn(2, 3, 56, 104)).square().sum(), soft_cost(model)):
        model.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().min() > 0 for p in windows)


@pytest.mark.parametrize('place', ['x', 'qkv', 'kv'])
def test_the_cost_is_that_of_flops(place):
    """At sizes with no frequency on a slope, soft cost and counted cost are one."""
    model = build('frequency', place, keep_ratio=1)
    full = count_flops(
        timm.create_model(
            'vit_dct_tiny',
            **SMALL,
            attention_kwargs=dict(place=place, domain='frequency', keep_ratio=1),
            patch_embed='dct',
        ),
        (3, 56, 104),
    )
    for window in (model.patch_embed.window, *(block.attn.compress.window for block in model.blocks)):
        window.smoothness = 1e-6
    set_shares(model, (4 / 7, 6 / 13))
    with torch.no_grad():
        model.patch_embed.window.share.fill_(0.5)
    share = soft_cost(model).item()
    assert freeze_truncation(model) == {
        'patch_embed': [(4, 4)] * 3,
        'blocks.0.attn': (4, 6),
        'blocks.1.attn': (4, 6),
    }
    cut = count_flops(model, (3, 56, 104))

    def cost(count):
        return count.attention + count.by_role['patch embedding'] + count.by_role['patch transform']

    assert share == pytest.approx(cost(cut) / cost(full), rel=1e-5)


@pytest.mark.parametrize('domain', ['space', 'frequency'])
def test_frozen_without_a_slope_is_the_same(domain):
    """With no coefficient between in and out, freezing changes nothing in the patch embedding, and nothing among
    coefficients; in the domain `space` tokens become fewer, and the softmax is over those."""
    model = build(domain, patch=True)
    for window in (model.patch_embed.window, *(block.attn.compress.window for block in model.blocks)):
        window.smoothness = 1e-6
    set_shares(model, (0.67, 0.6))
    x = torch.randn(2, 3, 56, 104)
    before = model(x)
    assert has_windows(model)
    freeze_truncation(model)
    assert not has_windows(model)
    if domain == 'frequency':
        torch.testing.assert_close(model(x), before, atol=1e-4, rtol=1e-4)
    else:
        assert 0 < (model(x) - before).abs().max() < 0.5


def test_a_frozen_embedding_keeps_its_gains():
    module = DctPatchEmbed((16, 24), 8, 3, 16, keep=[8, 6, 5], window=True)
    with torch.no_grad():
        module.window.share.copy_(torch.tensor([0.55, 0.8]))
    frozen = module.freeze()
    assert frozen.window is None and frozen.truncation == [module.window.hard_size(f, f) for f in (8, 6, 5)]
    cut = DctPatchEmbed((16, 24), 8, 3, 16, keep=[8, 6, 5])
    with torch.no_grad():
        gains = [module.window(f, f) for f in (8, 6, 5)]
        cut.linear.weight.copy_(module.linear.weight * torch.cat([g.flatten() for g in gains]))
        cut.linear.bias.copy_(module.linear.bias)
    x = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(frozen(x), cut(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(frozen(x), module(x), atol=1e-5, rtol=1e-5)
    assert frozen.truncation[0] == (5, 7) and frozen.linear.in_features < module.linear.in_features
    with pytest.raises(ValueError, match='no window to freeze'):
        frozen.freeze()


def test_errors():
    plain = timm.create_model('vit_dct_tiny', **SMALL)
    for function in (soft_cost, freeze_truncation):
        with pytest.raises(ValueError, match='learns no truncation'):
            function(plain)
    with pytest.raises(ValueError, match="learned=True needs axes='2d'"):
        timm.create_model('vit_dct1d_tiny', **SMALL, attention_kwargs=LEARNED)


@pytest.mark.parametrize('domain', ['space', 'frequency'])
@pytest.mark.compiled
def test_compiles_exports_and_saves(domain, tmp_path):
    from vit_efficient import save_model

    model = build(domain)
    set_shares(model, (0.6, 0.7))
    x = torch.randn(2, 3, 56, 104)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    save_model(model, tmp_path)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), expected)


@pytest.mark.parametrize(
    'options',
    [
        dict(patch_embed='dct', patch_window=True, patch_keep=[8, 4, 4], patch_color='ycbcr'),
        dict(patch_embed='dct', patch_window=True, patch_input='coefficients'),
        dict(patch_embed='dct', patch_window=True, patch_keep=[(4, 8), (8, 4), (4, 4)]),
        dict(attention=('dct', dict(learned=True, keep_ratio=1))),
        dict(attention=('dct', dict(learned=True, keep_ratio=1, place='kv', local=3))),
        dict(attention=('dct', dict(learned=True, keep_ratio=0.5, place='block'))),
    ],
)
def test_the_cost_of_what_is_left_is_that_of_flops(options, shares=(0.45, 0.62)):
    size = SMALL['img_size']
    model = timm.create_model('vit_full_tiny', **SMALL, **options)
    set_shares(model, shares)
    whole = {key: value for key, value in options.items() if key != 'patch_window'}
    if 'attention' in whole:
        name, given = whole['attention']
        whole['attention'] = (name, {key: value for key, value in given.items() if key != 'learned'})
    whole = timm.create_model('vit_full_tiny', **SMALL, **whole)
    share = soft_cost(model, hard=True).item()
    freeze_truncation(model)
    counts = [
        count_flops(m, (3, *(m.patch_embed.input_size(*size) if 'patch_embed' in options else size)))
        for m in (model, whole)
    ]

    def cost(count):
        if 'patch_embed' in options:
            return count.by_role['patch embedding'] + count.by_role['patch transform']
        return count.attention + (count.by_role['mlp'] if options['attention'][1].get('place') == 'block' else 0)

    assert share == pytest.approx(cost(counts[0]) / cost(counts[1]), rel=1e-5)


def test_what_cannot_be_frozen_leaves_the_model_as_it_was():
    model = build()
    model.blocks[1].attn.compress.window.share.data[0] = float('nan')
    modules = list(model.modules())
    for sizes, message in (
        (None, 'blocks.1.attn: the size of a frequency window is not finite'),
        ({'blocks.1.attn': (8, 4)}, r'blocks.1.attn: its size must be rows and columns of at most \(3, 7\)'),
        ({'blocks.1.attn': (4,)}, 'blocks.1.attn: its size must be rows and columns'),
        ({'patch_embed': [(9, 8)] * 3}, 'patch_embed: keep must be a pair for each channel'),
        ({'patch_embed': []}, 'patch_embed: keep must be a pair for each channel'),
        ({'blocks.2.attn': (3, 3)}, 'sizes names blocks.2.attn; the truncations that are learned are patch_embed, blo'),
    ):
        with pytest.raises(ValueError, match=message):
            freeze_truncation(model, sizes)
        assert list(model.modules()) == modules
    sizes = {'patch_embed': [(4, 4)] * 3, 'blocks.1.attn': (2, 3)}
    assert freeze_truncation(model, sizes) == {**sizes, 'blocks.0.attn': (3, 7)}


@pytest.mark.parametrize('shares', [(1.5, 0.4), (0.4, 1.5)])
@pytest.mark.parametrize('domain', ['space', 'frequency'])
def test_the_cost_where_one_axis_stays_whole(domain, shares):
    test_the_cost_of_what_is_left_is_that_of_flops(
        dict(attention=('dct', dict(learned=True, keep_ratio=1, domain=domain))), shares
    )


def test_on_the_meta_device():
    model = build().to('meta')
    assert soft_cost(model).shape == () and soft_cost(model, hard=True).shape == ()
    assert freeze_truncation(model)['blocks.0.attn'] == (3, 7)


def test_weights_without_a_window_load_into_one_as_they_are():
    options = dict(SMALL, patch_embed='dct', patch_keep=6)
    plain = timm.create_model('vit_full_tiny', **options).eval()
    overlay = dict(state_dict=plain.state_dict(), num_classes=5, input_size=(3, 56, 104))
    model = timm.create_model(
        'vit_full_tiny', pretrained=True, pretrained_cfg_overlay=overlay, patch_window=True, **options
    ).eval()
    x = torch.randn(1, 3, 56, 104)
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)


def test_what_is_faint_stays_faint():
    module = DctPatchEmbed(32, 16, 3, 8, window=True)
    module.window.share.data.fill_(0.34375625)
    largest = module.linear.weight.abs().max()
    module.set_input_size(16, patch_size=8)
    assert module.linear.weight.abs().max() < 300 * largest


def test_half_precision_keeps_the_size_in_float32():
    module = DctPatchEmbed(32, 16, 3, 8, window=True, dtype=torch.bfloat16)
    assert module.window.share.dtype == torch.float32 and module.linear.weight.dtype == torch.bfloat16
    module(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).sum().backward()
    assert module.window.share.grad.abs().min() > 0


@pytest.mark.parametrize('options', [dict(patch_window='no'), dict(attention=('dct', dict(learned='yes')))])
def test_switches_are_true_or_false(options):
    with pytest.raises(ValueError, match='must be True or False'):
        timm.create_model('vit_full_tiny', **{**SMALL, 'patch_embed': 'dct', **options})


def test_an_embedding_of_ones_own_and_one_of_ours():
    with pytest.raises(ValueError, match="embed_layer cannot be had with patch_embed='dct'"):
        timm.create_model('vit_full_tiny', **SMALL, patch_embed='dct', embed_layer=DctPatchEmbed)


@pytest.mark.parametrize('place', ['x', 'kv'])
@pytest.mark.parametrize('prefix', [0, 5])
def test_gains_of_keys_are_part_of_the_product(place, prefix):
    """Fused as written out, and no matrix of scores is kept for the gradient of the window."""
    options = dict(LEARNED, keep_ratio=1 / 4, domain='frequency', place=place)
    attention = create_attention('dct', 12, 3, dtype=torch.float64, **options)
    grid = PatchGrid(14, 26, prefix)
    with torch.no_grad():
        attention.compress.window.share.copy_(torch.tensor([0.5, 0.7]))
    x = torch.randn(2, grid.num_tokens, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *attention.parameters()]
    found, kept = [], []
    for attention.fused_attn in (True, False):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            y = attention(x, grid)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        kept.append(max(sizes))
    for fused, written_out in zip(*found, strict=True):
        assert torch.allclose(fused, written_out, atol=1e-10)
    queries = grid.num_tokens if place == 'kv' else attention.num_attended(grid)
    scores = 2 * 3 * queries * attention.num_attended(grid)
    assert kept[0] < scores == kept[1]
