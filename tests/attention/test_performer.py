"""Performer attention against its equations, a public implementation and exact attention; and its features."""

import copy
import math
import pickle

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn

from vit_efficient import PatchGrid, count_flops, create_attention
from vit_efficient.attention import performer, swap_attention
from vit_efficient.attention.performer import attend_features, orthogonal_features, redraw_features
from vit_efficient.utils import compat, device

from .test_compressed import EVERYTHING, assert_same, gradients, randomised


def positive_features(x, w):
    """φ(x) = exp(−‖x‖² / 2) / √r · (exp(w₁ · x), …, exp(w_r · x)) for the rows of x (N, D): (N, r)"""
    return torch.exp(x @ w.T) * torch.exp(-(x**2).sum(dim=1, keepdim=True) / 2) / math.sqrt(len(w))


def reference(attention, x):
    """The paper's equations, per image and head, nothing stabilised; `attention` lends its parameters and features."""
    dim, heads = attention.head_dim, attention.num_heads
    images = []
    for image in x:
        qkv = nn.functional.linear(image, attention.qkv.weight, attention.qkv.bias)
        outputs = []
        for head in range(heads):
            q, k, v = (qkv[:, (part * heads + head) * dim :][:, :dim] for part in range(3))
            q, k = attention.q_norm(q), attention.k_norm(k)
            kernel = positive_features(q / dim**0.25, attention.features) @ (
                positive_features(k / dim**0.25, attention.features).T
            )
            outputs.append(kernel / kernel.sum(dim=1, keepdim=True) @ v)
        y = attention.norm(torch.cat(outputs, dim=1))
        if attention.gate is not None:
            y = y * torch.sigmoid(attention.gate(image))
        images.append(attention.proj(y))
    return torch.stack(images)


@pytest.mark.parametrize('options', [{}, dict(num_features=1), dict(num_features=21)], ids=str)
class TestAgainstEquations:
    def check(self, attention, grid, batch=2):
        x = torch.randn(batch, grid.num_tokens, 12, dtype=torch.float64, requires_grad=True)
        assert_same(attention(x, grid), reference(attention, x), [x, *attention.parameters()], 1e-9)

    def build(self, options, **arguments):
        return randomised(create_attention('performer', 12, 3, dtype=torch.float64, **options, **arguments))

    @pytest.mark.parametrize('prefix', (0, 1, 5))
    @pytest.mark.parametrize('grid', ((7, 13), (1, 9), (6, 4)))
    def test_plain(self, options, grid, prefix):
        self.check(self.build(options, qkv_bias=True), PatchGrid(*grid, prefix))

    @pytest.mark.parametrize('extra', [EVERYTHING, dict(qk_norm=True, norm_layer=nn.LayerNorm), dict(gated=True)])
    def test_with_norms_and_gates(self, options, extra):
        self.check(self.build(options, qkv_bias=True, **extra), PatchGrid(7, 13, 1), batch=1)

    def test_without_biases(self, options):
        self.check(self.build(options, proj_bias=False), PatchGrid(6, 4, 1))

    def test_unfused(self, options):
        attention = self.build(options, qkv_bias=True)
        attention.fused_attn = False
        self.check(attention, PatchGrid(6, 4, 1))

    @pytest.mark.parametrize('head_dim', [1, 5, 6, 7])
    def test_other_head_sizes(self, options, head_dim):
        self.check(self.build(options, attn_head_dim=head_dim), PatchGrid(6, 4))


class TestOnGpu:
    """What GPUs do, on the CPU."""

    grid = PatchGrid(7, 13, 5)

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        monkeypatch.setattr(device, 'HOSTS', ())
        monkeypatch.setattr(performer, 'KEYS_OF_BLOCK', 5)

    def build(self, **arguments):
        return randomised(create_attention('performer', 12, 3, dtype=torch.float64, num_features=21, **arguments))

    @pytest.mark.parametrize('size', [2**29, 17 * 8 * 3 * 21])
    @pytest.mark.parametrize('batch', (1, 2))
    def test_against_equations(self, monkeypatch, size, batch):
        """In one block, and in several."""
        monkeypatch.setattr(performer, 'BYTES_OF_BLOCK', size)
        attention, x = self.build(), torch.randn(batch, 96, 12, dtype=torch.float64, requires_grad=True)
        assert_same(attention(x, self.grid), reference(attention, x), [x, *attention.parameters()], 1e-9)

    @pytest.mark.parametrize('arguments', [dict(qkv_bias=True), EVERYTHING], ids=['plain', 'norms'])
    def test_by_two_attentions(self, monkeypatch, arguments):
        """In float64, which the kernel does not take."""
        called = []

        def flash_attention_on_gpu(q, k, v, scale):
            assert q.shape[-1] == k.shape[-1] and q.shape[-1] % 8 == 0
            scores = scale * q @ k.mT
            called.append(scores.shape)
            return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)

        monkeypatch.setattr(performer, 'flash_attention_on_gpu', flash_attention_on_gpu)
        monkeypatch.setattr(performer, 'all_half', lambda *_: True)
        attention, x = self.build(**arguments).eval(), torch.randn(2, 96, 12, dtype=torch.float64)
        with torch.no_grad():
            # ‖k̂‖² is of float32.
            assert torch.allclose(attention(x, self.grid), reference(attention, x), atol=1e-5, rtol=1e-5)
        assert called == [(2, 3, 21, 96)]

    def test_a_bias_is_two_channels(self):
        """Its rounding in bfloat16 alone would be worth 3 % of a weight."""
        q, k = torch.randn(2, 9, 4).bfloat16(), torch.randn(2, 11, 4).bfloat16()
        bias = 10 + torch.randn(2, 11, 1)
        wide_q, wide_k = performer._with_bias(q, k, bias)
        assert wide_q.shape == (2, 9, 8) and wide_k.shape == (2, 11, 8)
        found = wide_q.double() @ wide_k.double().mT - q.double() @ k.double().mT
        assert (found - bias.mT.double()).abs().max() < 3e-4

    @pytest.mark.parametrize('learns', (False, True))
    def test_when(self, learns):
        half = torch.zeros(1, dtype=torch.bfloat16)
        assert performer.all_half(half, half) and not performer.all_half(half, half.float())
        learning = half.clone().requires_grad_(learns)
        assert performer.all_half(half, learning) is not learns
        with torch.no_grad():
            assert performer.all_half(half, learning)
            assert not performer.all_half(half, half.expand(255))

    def test_a_gpu_without_flash_attention(self, monkeypatch):
        """Of before Ampere, or of another maker, whose bfloat16 takes the way of float32."""
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        for capability, has in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
            monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device, found=capability: found)
            assert compat.has_flash_attention(torch.device('cuda')) is has
        assert not compat.has_flash_attention(torch.device('mps'))

    @pytest.mark.cuda
    @pytest.mark.parametrize('dim', (48, 192))
    def test_half_precision(self, dim):
        attention = create_attention('performer', dim, 3, num_features=61, qkv_bias=True).bfloat16()
        x = torch.randn(2, 96, dim).bfloat16()
        expected = reference(copy.deepcopy(attention).double(), x.double())
        with torch.no_grad():
            y = attention.cuda()(x.cuda(), self.grid).double().cpu()
        assert (y - expected).norm() < 1e-2 * expected.norm()


class TestInBlocks:
    """92 keys in blocks of 5, the last one smaller."""

    grid = PatchGrid(7, 13, 1)

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        monkeypatch.setattr(performer, 'KEYS_OF_BLOCK', 5)

    def build(self, **arguments):
        return randomised(create_attention('performer', 12, 3, dtype=torch.float64, num_features=21, **arguments))

    @pytest.mark.parametrize('arguments', [dict(qkv_bias=True), EVERYTHING], ids=['plain', 'norms'])
    def test_against_equations(self, arguments):
        attention = self.build(**arguments)
        x = torch.randn(2, 92, 12, dtype=torch.float64, requires_grad=True)
        assert_same(attention(x, self.grid), reference(attention, x), [x, *attention.parameters()], 1e-9)

    def test_scores_far_apart(self):
        """Blocks whose largest scores differ by hundreds."""
        q, k, v = (torch.randn(2, 3, 92, 4, dtype=torch.float64) for _ in range(3))
        k *= torch.linspace(0, 30, 92, dtype=torch.float64)[:, None]
        w = orthogonal_features(21, 4)
        y = attend_features(q, k, v, w, 0.5, True)
        features_q, features_k = (positive_features(x / 2**0.5, w) for x in (q.flatten(0, 2), k.flatten(0, 2)))
        kernel = features_q.unflatten(0, (6, 92)) @ features_k.unflatten(0, (6, 92)).mT
        expected = kernel / kernel.sum(dim=2, keepdim=True) @ v.flatten(0, 1)
        assert torch.allclose(y.flatten(0, 1), expected, atol=1e-9)

    def test_gradients_of_gradients(self):
        k, v = (torch.randn(2, 3, 11, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
        q, w = torch.randn(2, 3, 11, 2, dtype=torch.float64), orthogonal_features(21, 2)
        assert torch.autograd.gradgradcheck(lambda k, v: attend_features(q, k, v, w, 0.7, False), (k, v))

    def test_features_of_keys_are_not_kept(self, monkeypatch):
        def largest_kept():
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
                attention(x, self.grid)
            return max(sizes)

        attention, x = self.build(), torch.randn(2, 92, 12, dtype=torch.float64)
        assert largest_kept() < 2 * 3 * 21 * 92
        monkeypatch.setattr(performer, 'KEYS_OF_BLOCK', 92)
        assert largest_kept() == 2 * 3 * 21 * 92

    def test_autocast(self):
        attention, x = self.build().float(), torch.randn(2, 92, 12)
        y = attention(x, self.grid)
        with torch.autocast('cpu', torch.bfloat16):
            autocast = attention(x, self.grid)
        parameters = list(attention.parameters())
        assert autocast.dtype == torch.bfloat16
        assert_same(y, reference(attention, x), parameters, 1e-4)
        assert_same(autocast.float(), reference(attention, x), parameters, 5e-2)


class TestAgainstThePackage:
    """`performer-pytorch`, our features its projection matrix. It adds an epsilon of 1e-4 to each feature, of which the
    largest is 1: with that, weights are a little more even than ours; without, we agree to the last bits."""

    def pair(self):
        pytest.importorskip('performer_pytorch')
        from performer_pytorch import SelfAttention

        theirs = randomised(SelfAttention(24, heads=2, dim_head=12, qkv_bias=True)).double().eval()
        ours = create_attention('performer', 24, 2, qkv_bias=True, dtype=torch.float64).eval()
        three = (theirs.to_q, theirs.to_k, theirs.to_v)
        with torch.no_grad():
            for layer in three[:2]:
                layer.weight.mul_(0.25)
        ours.load_state_dict(
            {
                'qkv.weight': torch.cat([layer.weight for layer in three]),
                'qkv.bias': torch.cat([layer.bias for layer in three]),
                **{f'proj.{name}': p for name, p in theirs.to_out.named_parameters()},
                'features': theirs.fast_attention.projection_matrix,
            }
        )
        return ours, theirs, three

    def compare(self, tolerance):
        ours, theirs, three = self.pair()
        x = torch.randn(2, 92, 24, dtype=torch.float64, requires_grad=True)
        y, expected = ours(x, PatchGrid(7, 13, 1)), theirs(x)
        of_x, of_weight = gradients(y, [x, ours.qkv.weight])
        theirs_of_x, *of_three = gradients(expected, [x, *(layer.weight for layer in three)])
        for actual, wanted in ((y, expected), (of_x, theirs_of_x), (of_weight, torch.cat(of_three))):
            assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()

    def test_as_it_comes(self):
        self.compare(1e-2)

    def test_without_its_epsilon(self, monkeypatch):
        module = pytest.importorskip('performer_pytorch.performer_pytorch')
        theirs = module.softmax_kernel
        monkeypatch.setattr(module, 'softmax_kernel', lambda *args, **kwargs: theirs(*args, **kwargs, eps=0.0))
        self.compare(1e-9)

    def test_default_number_of_features(self):
        package = pytest.importorskip('performer_pytorch')
        for dim in (12, 32, 64, 80):
            ours = create_attention('performer', dim, 1).options['num_features']
            assert ours == package.FastAttention(dim).nb_features


class TestFeatures:
    def test_orthogonal_within_blocks(self):
        w = create_attention('performer', 48, 3, num_features=40, dtype=torch.float64).features
        assert w.shape == (40, 16)
        for block in w.split(16):
            gram = block @ block.T
            off_diagonal = gram - gram.diagonal().diag()
            assert off_diagonal.abs().max() <= 1e-12 * gram.max()
        between = w[:16] @ w[16:32].T
        assert between.abs().max() > 1  # blocks are independent

    def test_rows_are_normal_vectors(self):
        """Chi-distributed norms, and directions that favour no side: what makes the estimate unbiased."""
        dim, n = 16, 16 * 20_000
        w = orthogonal_features(n, dim)
        squares = w.square().sum(dim=1)
        assert abs(squares.mean() - dim) < 5 * (2 * dim / n) ** 0.5
        assert abs(squares.var() / (2 * dim) - 1) < 0.05
        assert w.mean(dim=0).abs().max() < 5 / n**0.5
        assert (w.T @ w / n - torch.eye(dim)).abs().max() < 5 * (2 / n) ** 0.5

    def test_estimate_of_the_kernel(self):
        """Unbiased, and better than with independent features, whose relative mean squared error is (e^‖x+y‖² − 1) / r
        (the paper's lemma 2): by a fifth for r = D = 16 and ‖x + y‖ = 1."""
        dim, draws = 16, 20_000
        attention = create_attention('performer', dim, 1, num_features=dim * draws, dtype=torch.float64)
        z = nn.functional.normalize(torch.randn(8, dim, dtype=torch.float64))
        x = torch.randn(8, dim, dtype=torch.float64)
        y = z - x
        products = positive_features(x, attention.features) * positive_features(y, attention.features)
        estimates = products.unflatten(1, (draws, dim)).sum(dim=2) * draws
        error = estimates / (x * y).sum(dim=1).exp()[:, None] - 1
        assert (error.mean(dim=1).abs() < 5 * error.std(dim=1) / draws**0.5).all()
        assert error.square().mean() < 0.85 * (math.e - 1) / dim

    def test_weights_are_positive(self):
        """Whatever the features: the estimated softmax matrix has no negative entry, and its rows sum to 1. With sines
        and cosines of the same projections, the other unbiased estimate, a third of the entries are negative."""
        n = 32
        q, k = 2 * torch.randn(2, 1, 1, n, n, dtype=torch.float64)
        w = orthogonal_features(8, n)
        matrix = attend_features(q, k, torch.eye(n, dtype=torch.float64)[None, None], w, n**-0.5, True)
        assert matrix.min() >= 0
        assert torch.allclose(matrix.sum(dim=-1), torch.ones(1, 1, n, dtype=torch.float64))
        angles_q, angles_k = (x[0, 0] / n**0.25 @ w.T for x in (q, k))
        assert (torch.cos(angles_q[:, None] - angles_k).mean(dim=-1) < 0).float().mean() > 0.3

    def test_small_kernel_values_are_exact(self):
        """The error vanishes with the kernel, where it matters that a weight be small: for opposite q and k, positive
        features give exp(−‖x‖²) at any draw; sines and cosines only on average."""
        x = torch.randn(5, 16, dtype=torch.float64)
        w = create_attention('performer', 16, 1, num_features=3, dtype=torch.float64).features
        small = (positive_features(x, w) * positive_features(-x, w)).sum(dim=1)
        assert torch.allclose(small, torch.exp(-x.square().sum(dim=1)), rtol=1e-12)

    def test_redrawn_by_a_call_only(self):
        attention = create_attention('performer', 48, 3)
        grid, x = PatchGrid(7, 13, 1), torch.randn(2, 92, 48)
        first, features = attention(x, grid), attention.features.clone()
        for _ in range(3):  # training, evaluation, whatever torch's random state
            torch.manual_seed(_)
            attention.train()(x, grid).sum().backward()
            assert torch.equal(attention.eval()(x, grid), first)
        held = attention.features
        attention.redraw_features()
        assert attention.features is held and not torch.equal(held, features)
        assert not torch.equal(attention(x, grid), first)

    def test_draws_come_from_torch(self):
        def build():
            torch.manual_seed(3)
            return create_attention('performer', 48, 3)

        a, b = build(), build()
        assert torch.equal(a.features, b.features)
        for attention in (a, b):
            torch.manual_seed(5)
            attention.redraw_features()
        assert torch.equal(a.features, b.features)
        state = torch.get_rng_state()
        for attention in (a, b):
            attention.redraw_features(torch.Generator().manual_seed(7))
        assert torch.equal(a.features, b.features) and torch.equal(torch.get_rng_state(), state)

    def test_redrawn_in_a_model(self):
        model = nn.Sequential(
            create_attention('performer', 48, 3), create_attention('performer', 48, 3), nn.Linear(3, 3)
        )
        before = [attention.features.clone() for attention in model[:2]]
        redraw_features(model, torch.Generator().manual_seed(0))
        after = [attention.features for attention in model[:2]]
        assert not any(torch.equal(a, b) for a in after for b in before) and not torch.equal(*after)
        with pytest.raises(ValueError, match="Linear has no attention 'performer'"):
            redraw_features(model[2])


def test_error_against_exact_attention_falls_as_one_over_the_root_of_features():
    exact = Attention(32, 2, qkv_bias=True, dtype=torch.float64)
    with torch.no_grad():
        exact.qkv.weight[:64] *= 0.4  # ‖q̂ + k̂‖ about 1; the variance grows as its exponential
        x = torch.randn(4, 25, 32, dtype=torch.float64)
        counts, errors = [64, 256, 1024, 4096], []
        for num_features in counts:
            attention = swap_attention(exact, 'performer', num_features=num_features)
            squares = []
            for _ in range(100):
                squares.append((attention(x, PatchGrid(5, 5)) - exact(x)).square().mean())
                attention.redraw_features()
            errors.append(torch.stack(squares).mean().sqrt())
    steps = torch.stack(errors).log().diff() / math.log(4)
    assert ((steps > -0.6) & (steps < -0.4)).all()


class TestStability:
    grid = PatchGrid(64, 64, 1)

    @pytest.mark.parametrize('scale', [1.0, 4.0, 30.0])
    def test_bfloat16_of_large_logits(self, scale):
        """What is rounded is the input and the result, not what stands between: exponentials, and sums over N keys."""
        q, k, v = (torch.randn(1, 2, 4097, 64).mul(s).bfloat16() for s in (scale, scale, 1.0))
        w = orthogonal_features(266, 64).float()
        y = attend_features(q, k, v, w, 1 / 8, True)
        expected = attend_features(q.double(), k.double(), v.double(), w.double(), 1 / 8, False)
        assert y.dtype == torch.bfloat16
        assert (y - expected).abs().max() <= 1e-2 * expected.abs().max()
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(attend_features(q, k, v, w, 1 / 8, True), y)

    def test_bfloat16(self):
        attention, x = create_attention('performer', 128, 2, qkv_bias=True), torch.randn(1, 4097, 128)
        with torch.no_grad():
            expected = attention(x, self.grid)
            with torch.autocast('cpu', torch.bfloat16):
                autocast = attention(x, self.grid)
            whole = attention.to(torch.bfloat16)(x.bfloat16(), self.grid)
        for y in (autocast, whole):
            assert y.dtype == torch.bfloat16
            assert (y - expected).abs().max() <= 2e-2 * expected.abs().max()

    @pytest.mark.parametrize('scale', [0.0, 1.0, 10.0, 100.0])
    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
    def test_gradients_are_finite(self, scale, dtype):
        attention = create_attention('performer', 128, 2, qkv_bias=True)
        with torch.no_grad():
            attention.qkv.weight[:256] *= scale
        x = torch.randn(1, 4097, 128, requires_grad=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = attention(x, self.grid)
        y.float().square().mean().backward()
        assert y.isfinite().all()
        assert all(t.grad.isfinite().all() for t in (x, *attention.parameters()))

    @pytest.mark.parametrize('fused', [True, False])
    def test_no_feature_is_lost(self, fused):
        """A query may live on features that are small for all keys: with one maximum for all features, as usual, they
        would vanish (here, as e⁻¹³⁰), and the denominator with them, or an epsilon would take their place."""
        w = torch.tensor([[10.0, 0.0], [0.0, 10.0]])
        q, k = torch.tensor([[[[0.0, 20.0]]]]), torch.tensor([[[[10.0, -3.0], [10.0, -2.9]]]])
        v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
        y = attend_features(q, k, v, w, 1.0, fused)
        scores = torch.tensor([-30.0 - (100 + 9) / 2, -29.0 - (100 + 8.41) / 2])
        assert torch.allclose(y[0, 0, 0], scores.softmax(0), atol=1e-4)

    def test_queries_and_keys_of_no_content_take_the_mean(self):
        v = torch.randn(1, 2, 92, 16)
        y = attend_features(torch.zeros_like(v), torch.zeros_like(v), v, orthogonal_features(44, 16), 0.25, True)
        assert torch.allclose(y, v.mean(dim=2, keepdim=True).expand_as(v), atol=1e-6)


class TestDropout:
    grid = PatchGrid(7, 13, 1)

    def test_noise_is_that_of_exact_attention(self):
        exact = Attention(64, 4, attn_drop=0.1)
        attention = swap_attention(exact, 'performer', num_features=1024)
        x = torch.randn(1, 92, 64)
        with torch.no_grad():
            noise, usual = (
                torch.stack([run() for _ in range(100)]).std(0).mean()
                for run in (lambda: attention(x, self.grid), lambda: exact(x))
            )
        assert 0.7 * usual < noise < 1.3 * usual


class TestModule:
    grid = PatchGrid(7, 13, 1)
    x = torch.randn(2, 92, 12, generator=torch.Generator().manual_seed(0))

    def test_parameters_are_shared_and_left_alone(self):
        exact = Attention(12, 3, qkv_bias=True)
        attention = swap_attention(exact, 'performer', num_features=7)
        assert attention.qkv.weight is exact.qkv.weight
        assert {key: tuple(value.shape) for key, value in attention.added_state().items()} == {'features': (7, 4)}
        assert list(attention.parameters()) == list(exact.parameters())
        back = swap_attention(attention, 'full')
        assert list(back.state_dict()) == list(exact.state_dict()) and not hasattr(back, 'features')
        again = swap_attention(attention, 'performer', num_features=5)
        assert again.features.shape == (5, 4) and attention.features.shape == (7, 4)

    @pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_features_have_the_dtype_and_device_of_the_weights(self, dtype):
        exact = Attention(12, 3, dtype=dtype)
        torch.manual_seed(0)
        features = swap_attention(exact, 'performer').features
        assert features.dtype == dtype
        torch.manual_seed(0)
        assert torch.equal(features, orthogonal_features(*features.shape).to(dtype))
        assert swap_attention(exact.to('meta'), 'performer').features.is_meta

    def test_checkpoint_round_trip(self, tmp_path):
        attention = create_attention('performer', 12, 3)
        torch.save(attention.state_dict(), tmp_path / 'attention.pth')
        loaded = create_attention('performer', 12, 3)
        assert not torch.equal(loaded.features, attention.features)
        loaded.load_state_dict(torch.load(tmp_path / 'attention.pth'))
        attention.train(), loaded.train()
        assert torch.equal(loaded(self.x, self.grid), attention(self.x, self.grid))

    def test_from_meta(self):
        attention = create_attention('performer', 12, 3)
        with torch.device('meta'):
            state = torch.get_rng_state()
            empty = create_attention('performer', 12, 3)
            assert empty.features.is_meta and torch.equal(torch.get_rng_state(), state)
        empty.redraw_features()
        assert empty(self.x.to('meta'), self.grid).shape == self.x.shape
        for loaded, assign in ((copy.deepcopy(empty), True), (empty.to_empty(device='cpu'), False)):
            loaded.load_state_dict(attention.state_dict(), assign=assign)
            assert torch.equal(loaded(self.x, self.grid), attention(self.x, self.grid))

    def test_under_a_default_device(self):
        with torch.device('cpu'):
            assert create_attention('performer', 12, 3).features.abs().min() > 0

    def test_copies(self):
        attention = create_attention('performer', 12, 3)
        for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
            assert torch.equal(copied(self.x, self.grid), attention(self.x, self.grid))
            copied.redraw_features()
            assert not torch.equal(copied(self.x, self.grid), attention(self.x, self.grid))

    @pytest.mark.compiled
    def test_compiled_code_sees_redrawn_features(self):
        torch.compiler.reset()
        attention = create_attention('performer', 12, 3)
        compiled = torch.compile(attention, fullgraph=True, backend='aot_eager')
        for _ in range(2):
            with torch.autocast('cpu', torch.bfloat16):
                assert torch.equal(compiled(self.x, self.grid), attention(self.x, self.grid))
            assert torch.allclose(compiled(self.x, self.grid), attention(self.x, self.grid), atol=1e-6)
            attention.redraw_features()

    def test_options_rebuild_it(self):
        assert create_attention('performer', 768, 12).options == dict(num_features=266)
        attention = create_attention('performer', 12, 3, num_features=9)
        assert create_attention('performer', 12, 3, **attention.options).features.shape == (9, 4)
        assert create_attention('performer', 12, 12).options == dict(num_features=1)  # log 1 = 0

    def test_repr_tells_the_truth(self):
        assert 'num_features=9' in repr(create_attention('performer', 12, 3, num_features=9))

    def test_every_query_sees_all_keys(self):
        attention = create_attention('performer', 12, 3, dtype=torch.float64)
        assert attention.num_attended(self.grid) == 92
        x = self.x[:1].double().requires_grad_()
        y = attention(x, self.grid)
        for n in (0, 1, 91):
            assert torch.autograd.grad(y[0, n].sum(), x, retain_graph=True)[0].abs().sum(-1).min() > 0

    def test_tokens_have_no_order(self):
        """Prefix tokens are tokens like the others."""
        attention = create_attention('performer', 12, 3)
        order = torch.randperm(92)
        assert torch.allclose(attention(self.x[:, order], self.grid), attention(self.x, self.grid)[:, order], atol=1e-6)

    def test_flops(self):
        """Scores and sums of the keys, with a column each for ‖k̂‖² and the number of keys; the same of the queries, in
        heads of the next multiple of 4."""
        n, r, heads, dim = 92, 7, 3, 4
        attention = create_attention('performer', 12, heads, num_features=r)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn = attention

            def forward(self, x):
                return self.attn(x.flatten(2).mT[:, :92], PatchGrid(7, 13, 1))

        counted = count_flops(Model(), (12, 1, 92)).by_role
        assert counted['attention products'] == heads * n * r * (2 * (dim + 1) + 2 * (dim + 4))
        assert counted['attention projections'] == 4 * n * 12 * 12

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            (dict(num_features=0), 'num_features=0'),
            (dict(num_features=-1), 'num_features=-1'),
            (dict(num_features=2.5), r'num_features=2\.5'),
            (dict(num_features=True), 'num_features=True'),
            (dict(num_features='64'), "num_features='64'"),
            (dict(nb_features=64), "no option 'nb_features'.*num_features"),
            (dict(num_heads=5), 'num_heads=5'),
        ],
        ids=str,
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            create_attention('performer', 12, **{'num_heads': 3, **options})


def test_features_after_to_empty():
    with torch.device('meta'):
        model = timm.create_model('vit_performer_tiny', img_size=32, patch_size=8, depth=2)
    model.to_empty(device='cpu')
    model.init_weights()
    for block in model.blocks:
        features = block.attn.features
        assert 0.8 < features.std() < 1.2
        gram = nn.functional.normalize(features[:64].double()) @ nn.functional.normalize(features[:64].double()).T
        assert torch.allclose(gram, torch.eye(64, dtype=torch.float64), atol=1e-5)
