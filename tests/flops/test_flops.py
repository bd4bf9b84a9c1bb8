import copy
import math
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vit_efficient.attention import GridAttention
from vit_efficient.flops import ROLES, count_flops, register_flops
from vit_efficient.utils.errors import UserError

# Models of different kinds, at reduced depth: their blocks repeat.
TIMM_MODELS = {
    'vit_tiny_patch16_224': {'depth': 1},
    'deit3_small_patch16_224': {'depth': 1},
    'swin_tiny_patch4_window7_224': {'depths': (2, 1, 1, 1)},
    'resnet18': {},
    'pvt_v2_b0': {'depths': (1, 1, 1, 1)},
    'eva02_tiny_patch14_224': {'depth': 1, 'patch_size': 16},
    'vit_base_patch16_siglip_224': {'depth': 1},
}
OURS = [
    ('vit_full_tiny', {}),
    ('vit_dct1d_tiny', {}),
    ('vit_dct_tiny', {'attention_kwargs': {'local': 3}}),
    *(
        ('vit_dct_tiny', {'attention_kwargs': {'place': place, 'domain': domain}})
        for place in ('x', 'qkv', 'kv')
        for domain in ('space', 'frequency')
    ),
    *(
        ('vit_linformer_tiny', {'attention_kwargs': {'sharing': sharing}})
        for sharing in ('none', 'headwise', 'key-value', 'layerwise')
    ),
    *(('vit_linformer_tiny', {'attention_kwargs': {'projection': p}}) for p in ('mean', 'max', 'conv')),
    *((f'vit_{name}_tiny', {'attention_kwargs': {'place': p}}) for name in ('pool', 'subsample') for p in ('x', 'kv')),
    *(('vit_merge_tiny', {'attention_kwargs': {'place': place, 'local_first': place == 'x'}}) for place in ('x', 'kv')),
    *(('vit_pool_tiny', {'attention_kwargs': {'summary': summary}}) for summary in ('local', 'medoid')),
    ('vit_combiner_tiny', {'attention_kwargs': {'window_size': 3, 'cell_size': 2, 'reach': 1}}),
    ('vit_combiner_tiny', {'attention_kwargs': {'pattern': 'axial'}}),
    *((f'vit_{name}_tiny', {}) for name in ('combiner', 'monarch', 'nystrom', 'performer', 'window', 'treeformer_tc')),
]
NO_TRANSFORM = (
    'vit_full_tiny',
    'vit_combiner_tiny',
    'vit_monarch_tiny',
    'vit_performer_tiny',
    'vit_window_tiny',
    'vit_treeformer_tc_tiny',
)
PICKS = ('vit_subsample_tiny', {'attention_kwargs': {'place': 'kv'}})


def reference(model, size):
    """MACs of the products by PyTorch's own counter, on real tensors on the CPU."""
    model = model.eval().requires_grad_(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *size))
    macs, odd = divmod(counter.get_total_flops(), 2)
    assert not odd
    return macs


@pytest.mark.parametrize('size', [224, 384])
@pytest.mark.parametrize('name', TIMM_MODELS)
def test_timm_models_against_both_counters(name, size):
    sized = {} if name in ('resnet18', 'pvt_v2_b0') else {'img_size': size}
    model = timm.create_model(name, **TIMM_MODELS[name], **sized)
    count = count_flops(model, (3, size, size))
    assert count.products == reference(model, (3, size, size))
    if size == 224:
        assert_same(count, count_flops(model, (3, size, size), engine='fvcore'))


@pytest.mark.parametrize('size', [224, 384])
@pytest.mark.parametrize(('name', 'kwargs'), OURS)
def test_our_models_against_both_counters(name, kwargs, size):
    model = timm.create_model(name, img_size=size, depth=1, **kwargs)
    count = count_flops(model, (3, size, size))
    assert count.products == reference(model, (3, size, size))
    if size == 224:
        assert_same(count, count_flops(model, (3, size, size), engine='fvcore'))
    # A largest value, or a patch that is picked, is no arithmetic.
    picks = kwargs.get('attention_kwargs') == dict(projection='max') or (name, kwargs) == PICKS
    assert (count.by_role['transform'] == 0) == (name in NO_TRANSFORM or picks)


def test_a_transform_by_fft_against_fvcore():
    model = timm.create_model('vit_dct1d_tiny', img_size=1040, depth=1, embed_dim=24)  # 1,056 of 4,225 coefficients
    count = count_flops(model, (3, 1040, 1040))
    assert count.by_operator['fft_rfft'] > 0 and count.by_role['transform'] >= count.by_operator['fft_rfft']
    assert count.total - count.products >= count.by_operator['fft_rfft'] + count.by_operator['fft_irfft']
    assert_same(count, count_flops(model, (3, 1040, 1040), engine='fvcore'))


def assert_same(count, other):
    for field in ('total', 'products', 'by_role', 'by_module', 'by_operator'):
        assert getattr(count, field) == getattr(other, field), field


@pytest.mark.parametrize('fused', [True, False])
def test_roles_of_a_vit_by_hand(fused):
    model = timm.create_model('vit_tiny_patch16_224')
    for block in model.blocks:
        block.attn.fused_attn = fused
    count = count_flops(model)
    n, d = 197, 192
    assert count.by_role == {
        'attention products': 12 * 2 * n * n * d,
        'attention projections': 12 * 4 * n * d * d,
        'transform': 0,
        'mlp': 12 * 8 * n * d * d,
        'patch embedding': 196 * d * 3 * 256,
        'patch transform': 0,
        'rest': 25 * 5 * n * d + d * 1000,
    }
    assert tuple(count.by_role) == ROLES
    assert sum(count.by_role.values()) == count.total == sum(count.by_operator.values()) == count.by_module['']
    assert count.products == count.total - 25 * 5 * n * d
    assert count.by_module['blocks.0.attn'] == 4 * n * d * d + 2 * n * n * d
    assert count.uncounted['add'] == 25 and count.uncounted['gelu'] == 12 and 'reshape' not in count.uncounted


def test_linformer_by_hand():
    """k̄ = E x W_k: E, and then the projection, of k tokens and not of n."""
    n, p, k, d = 196, 1, 64, 192
    for sharing, matrices in (('headwise', 2), ('layerwise', 1)):
        model = timm.create_model('vit_linformer_tiny', attention_kwargs=dict(num_tokens=k, sharing=sharing))
        role = count_flops(model).by_role
        assert role['transform'] == 12 * matrices * k * n * d
        assert role['attention products'] == 12 * 2 * (n + p) * (k + p) * d
        assert role['attention projections'] == 12 * (2 * (n + p) + 2 * (k + p)) * d * d


def test_pooling_by_hand():
    n, p, m, d = 196, 1, 49, 192
    role = count_flops(timm.create_model('vit_pool_tiny')).by_role
    assert role['transform'] == 12 * n * d
    assert role['attention products'] == 12 * 2 * (n + p) * (m + p) * d
    assert role['attention projections'] == 12 * (2 * (n + p) + 2 * (m + p)) * d * d


def test_batch_dtype_device_and_image_size():
    model = timm.create_model('vit_tiny_patch16_224', depth=2, dynamic_img_size=True)
    count = count_flops(model, (3, 96, 128))
    assert count_flops(model, (3, 96, 128), batch_size=3).products == 3 * count.products
    assert count_flops(copy.deepcopy(model).to(torch.bfloat16), (3, 96, 128)) == count
    assert count_flops(copy.deepcopy(model).to('meta'), (3, 96, 128)) == count
    assert count.products == reference(model, (3, 96, 128))


class Operators(nn.Module):
    """What a model may compute apart from linear layers."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 8, 3, stride=2, groups=1)
        self.mix = nn.Conv2d(8, 8, 3, padding='same', groups=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.group = nn.GroupNorm(2, 8)
        self.rms = nn.RMSNorm(8)

    def forward(self, x):
        x = self.group(self.mix(F.interpolate(self.up(x), scale_factor=2, mode='bilinear')))
        x = self.rms(F.avg_pool2d(x, 2).flatten(2).mT)
        x = self.attention(x, x, x, need_weights=False)[0]
        basis = torch.ones(5, x.shape[1], device=x.device)
        x = torch.baddbmm(x[:, :5], basis.expand(len(x), -1, -1), x) + basis @ x
        return torch.einsum('bnd,bmd,bme->ne', x, x, x), (x @ x[0, 0]).mean(1)


def test_operators_against_both_counters(monkeypatch):
    model = Operators().eval()
    count = count_flops(model, (3, 6, 6), batch_size=2)
    assert_same(count, count_flops(model, (3, 6, 6), batch_size=2, engine='fvcore'))
    x = torch.zeros(2, 3, 6, 6)
    monkeypatch.setattr(torch.backends.mha, 'get_fastpath_enabled', lambda: False)
    model.requires_grad_(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    vector_product = 2 * 5 * 8  # for which FlopCounterMode has no formula
    assert count.products == counter.get_total_flops() // 2 + vector_product


def test_fft_counts_in_total_and_not_in_products():
    class Fourier(nn.Module):
        def forward(self, x):
            return torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:]), torch.fft.fft(x, dim=1)

    count = count_flops(Fourier(), (3, 8, 16))
    assert count.by_operator == {
        'fft_rfft2': 3 * 128 * 7,
        'fft_irfft2': 3 * 128 * 7,
        'fft_fft': round(2 * 3 * 128 * math.log2(3)),
    }
    assert count.products == 0 and count.total == count.by_role['rest'] > 0
    assert_same(count, count_flops(Fourier(), (3, 8, 16), engine='fvcore'))


@torch.library.custom_op('vit_efficient_test::gram', mutates_args=())
def gram(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mT


@gram.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-2])


@pytest.mark.parametrize('engine', ['meta', 'fvcore'])
def test_an_unknown_product_raises_until_it_is_registered(engine, monkeypatch):
    from vit_efficient.flops import formulas as flop_formulas

    monkeypatch.delitem(flop_formulas.FORMULAS, 'vit_efficient_test::gram', raising=False)

    class Gram(nn.Module):
        def forward(self, x):
            return torch.ops.vit_efficient_test.gram(x)

    with pytest.raises(ValueError, match=r'vit_efficient_test::gram.*register_flops'):
        count_flops(Gram(), (3, 4, 5), engine=engine)
    register_flops('vit_efficient_test::gram')(lambda inputs, output: math.prod(output) * inputs[0][-1])
    assert count_flops(Gram(), (3, 4, 5), engine=engine).products == 3 * 4 * 4 * 5


def test_an_unknown_product_of_pytorch_raises():
    class Inverse(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x)

    with pytest.raises(ValueError, match=r'aten::linalg_inv.*register_flops'):
        count_flops(Inverse(), (3, 4, 4))


def test_a_batched_operator_is_a_product_of_an_attention():
    class Attention(nn.Module):
        flop_role = 'attention'

        def forward(self, x):
            return torch.ops.vit_efficient_test.gram(x)

    for batched, role in ((True, 'attention products'), (False, 'attention projections')):
        register_flops('vit_efficient_test::gram', batched=batched)(lambda inputs, output: math.prod(output))
        count = count_flops(nn.Sequential(Attention()), (3, 4, 5))
        assert count.by_role[role] == count.total == count.products == 3 * 4 * 4


class Scores(nn.Module):
    """The products of an attention, in a module within it."""

    def forward(self, q, k, v):
        return (q @ k.mT).softmax(-1) @ v


class Adapter(nn.Module):
    """A multiplication by a weight that is not a linear layer."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, x):
        return x @ self.weight


class Average(nn.Module):
    """A user's own compressor."""

    flop_role = 'transform'

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 16, bias=False)

    def forward(self, x):
        return self.linear(x.mT).mT


class Plugin(GridAttention):
    """A user's own attention, of which the counters know nothing."""

    def configure(self):
        self.scores, self.adapter, self.down = Scores(), Adapter(self.attn_dim), Average()

    def forward(self, x, grid, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        prefix, patches = v[:, : grid.prefix], v[:, grid.prefix :]
        k = torch.cat([k[:, : grid.prefix], self.down(k[:, grid.prefix :])], dim=1)
        v = torch.cat([prefix, self.down(patches)], dim=1)
        return self.proj(self.adapter(self.scores(q, k, v)))

    def num_attended(self, grid):
        return grid.prefix + 16


@pytest.mark.parametrize('engine', ['meta', 'fvcore'])
def test_an_attention_of_the_user_is_counted_by_role(engine):
    """What stands in it is an attention's, but for a module that has a role of its own."""
    model = timm.create_model('vit_full_tiny', img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    for block in model.blocks:
        block.attn = Plugin.from_attention(block.attn)
    role = count_flops(model, (3, 64, 64), engine=engine).by_role
    n, m, d = 65, 17, 32
    assert role['attention products'] == 2 * 2 * n * m * d
    assert role['attention projections'] == 2 * (4 + 1) * n * d * d
    assert role['transform'] == 2 * 2 * 64 * 16 * d
    assert role['mlp'] == 2 * 8 * n * d * d

    model.blocks[1].attn.scores.flop_role = 'rest'
    assert count_flops(model, (3, 64, 64), engine=engine).by_role['attention products'] == 2 * n * m * d
    model.blocks[1].attn.scores.flop_role = 'scores'
    with pytest.raises(UserError, match="flop_role of Scores must be one of attention, .*'scores'"):
        count_flops(model, (3, 64, 64), engine=engine)


@pytest.mark.parametrize('engine', ['meta', 'fvcore'])
def test_the_model_is_left_as_it_was_and_nothing_is_printed(engine, capfd, caplog):
    model = timm.create_model('vit_tiny_patch16_224', depth=1).train()
    model.blocks[0].eval()
    model.cache = [torch.ones(3)]  # a tensor that is neither parameter nor buffer
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.state_dict().items()}
    modes = {name: m.training for name, m in model.named_modules()}
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        count_flops(model, engine=engine)
        with pytest.raises(ValueError, match='224'):
            count_flops(model, (3, 200, 200), engine=engine)
    assert {name: m.training for name, m in model.named_modules()} == modes
    for name, p in model.state_dict().items():
        assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state) and model.cache[0].device.type == 'cpu'
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()
    out, err = capfd.readouterr()
    assert not out and not err and not caplog.records


@pytest.mark.parametrize(
    'arguments',
    [
        {'input_size': (3, 224)},
        {'input_size': (3, 0, 224)},
        {'input_size': 32},
        {'input_size': (3, 224.0, 224)},
        {'batch_size': 0},
        {'engine': 'guess'},
    ],
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        count_flops(nn.Identity(), **arguments)


class BatchStatistics(nn.Module):
    """What weight standardisation does, in evaluation too."""

    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)


def test_statistics_of_the_batch_cost_the_same_in_both_engines():
    meta, fvcore = (count_flops(BatchStatistics(), (3, 8, 8), engine=engine) for engine in ('meta', 'fvcore'))
    assert meta.total == fvcore.total == 4 * 3 * 8 * 8


def test_distances_multiply_matrices():
    class Distances(nn.Module):
        def forward(self, x):
            return torch.cdist(x, x)

    with pytest.raises(ValueError, match='dist.*register_flops'):
        count_flops(Distances(), (3, 64, 8))


@pytest.mark.subprocess
def test_large_at_4096_px_takes_seconds_and_little_memory():
    code = (
        'import time, timm\n'
        'from vit_efficient.flops import count_flops\n'
        'from vit_efficient.benchmark.peak_memory import peak_resident\n'
        "model = timm.create_model('vit_large_patch16_224', img_size=4096, device='meta')\n"
        'start = time.perf_counter()\n'
        'count = count_flops(model, (3, 4096, 4096))\n'
        'seconds = time.perf_counter() - start\n'
        'print(count.products, seconds, peak_resident())\n'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    products, seconds, peak = run.stdout.split()
    n, d = 65537, 1024
    by_hand = 24 * (12 * n * d * d + 2 * n * n * d) + (n - 1) * 768 * d + 1000 * d
    assert int(products) == by_hand
    assert float(seconds) < 20 and int(peak) < 2e9


@pytest.mark.subprocess
def test_importing_it_loads_neither_fvcore_nor_matplotlib():
    modules = 'sys, vit_efficient.flops, vit_efficient.report.table'
    code = f"import {modules}; print({{'fvcore', 'matplotlib'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == 'set()'


class Complex(nn.Module):
    """A product of complex matrices."""

    def __init__(self, product):
        super().__init__()
        self.product, self.weight = product, nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))

    def forward(self, x):  # (2, 3, 4, 4)
        return self.product(torch.complex(x, x), self.weight).abs()


@pytest.mark.parametrize('engine', ['meta', 'fvcore'])
@pytest.mark.parametrize(
    ('product', 'macs'),
    [
        (lambda z, w: z @ w, 2 * 3 * 4**3),
        (lambda z, w: F.linear(z, w), 2 * 3 * 4**3),
        (lambda z, w: torch.bmm(z.flatten(0, 1), z.flatten(0, 1)), 2 * 3 * 4**3),
        (lambda z, w: torch.einsum('bcij,jk->bcik', z, w), 2 * 3 * 4**3),
        (lambda z, w: F.conv2d(z[:, :1], w[None, None]), 2 * 4**2 * 3 / 4),  # three real convolutions
        (lambda z, w: torch.addmm(w, w, w), 4**3),
    ],
)
def test_products_of_complex_numbers_have_four_parts(product, macs, engine):
    count = count_flops(Complex(product), (3, 4, 4), batch_size=2, engine=engine)
    assert count.total == count.products == 4 * macs


class Hidden(nn.Module):
    """Layers that are kept where PyTorch does not look for them, one of them with a way back."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.layers = [nn.Linear(4, 8), {'a': (nn.Sequential(nn.Linear(8, 8), nn.ReLU()),)}]
        self.layers[0].owner = [self]
        vars(self)['last'] = nn.Linear(8, 2)

    def forward(self, x):
        first, rest = self.layers
        return self.last(rest['a'][0](first(self.norm(x))))


def test_modules_outside_of_the_tree_are_counted():
    model = Hidden()
    count = count_flops(model, (3, 5, 4))
    assert count.products == 3 * 5 * (4 * 8 + 8 * 8 + 8 * 2) == count.by_module[''] - count.by_module['norm']
    assert all(not parameter.is_meta for parameter in (*model.parameters(), *model.layers[0].parameters()))
