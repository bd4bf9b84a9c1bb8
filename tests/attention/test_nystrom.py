"""Nyström attention against its equations and a public implementation, at its exact limit, and where it is delicate."""

import copy
import itertools
import math
import pickle

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn

import vit_efficient
from vit_efficient import PatchGrid, count_flops, create_attention
from vit_efficient.attention import swap_attention
from vit_efficient.attention.nystrom import iterative_pinv, unmix
from vit_efficient.compress.budget import Budget, kept_grid

from .test_compressed import EVERYTHING, assert_same, gradients, randomised

OPTIONS = [
    dict(num_landmarks=7),
    dict(num_landmarks=(1, 4), pinv_iterations=3, residual_kernel=3),
    dict(num_landmarks=4, pinv='exact'),
    dict(num_landmarks=(1, 3), pinv='exact', residual_kernel=(1, 5)),
]


def tokens(batch, grid, channels, dtype=torch.float32):
    """Noise on structure that spans several patches, as images have: of noise alone, means would leave nothing."""
    structure = torch.randn(batch, channels, min(6, grid.height), min(6, grid.width), dtype=dtype)
    patches = nn.functional.interpolate(structure, size=(grid.height, grid.width), mode='bilinear').flatten(2).mT
    prefix = torch.randn(batch, grid.prefix, channels, dtype=dtype)
    return torch.cat([prefix, 2 * patches + torch.randn_like(patches)], dim=1)


def softmax_rows(q, k):
    scores = q @ k.T / math.sqrt(q.shape[1])
    weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
    return weights / weights.sum(dim=1, keepdim=True)


def newton(a, iterations):
    """Z₀ = Aᵀ / (‖A‖₁ ‖A‖∞), Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z)))"""
    one = torch.eye(len(a), dtype=a.dtype)
    z = a.T / (torch.linalg.matrix_norm(a, 1) * torch.linalg.matrix_norm(a, math.inf))
    for _ in range(iterations):
        z = 0.25 * z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z)))
    return z


def with_landmarks(x, grid, h, w):
    """Prefix tokens, then the mean of each cell: rows ⌊i H / h⌋ to ⌊(i + 1) H / h⌋, columns likewise."""
    patches = x[grid.prefix :].unflatten(0, (grid.height, grid.width))
    cells = [
        patches[i * grid.height // h : (i + 1) * grid.height // h, j * grid.width // w : (j + 1) * grid.width // w]
        for i in range(h)
        for j in range(w)
    ]
    return torch.stack([*x[: grid.prefix], *(cell.mean(dim=(0, 1)) for cell in cells)])


def convolved(v, kernel, grid):
    """The values over the patch grid with zeros around; nothing at the prefix tokens."""
    rows, columns = kernel.shape
    result = torch.zeros_like(v)
    for y in range(grid.height):
        for x in range(grid.width):
            for i in range(rows):
                for j in range(columns):
                    row, column = y + i - rows // 2, x + j - columns // 2
                    if 0 <= row < grid.height and 0 <= column < grid.width:
                        result[grid.prefix + y * grid.width + x] += (
                            kernel[i, j] * v[grid.prefix + row * grid.width + column]
                        )
    return result


def reference(attention, x, grid):
    """The paper's equations, per image and head, with every matrix written out; `attention` lends its parameters."""
    options, dim, heads = attention.options, attention.head_dim, attention.num_heads
    landmarks = options['num_landmarks']
    h, w = kept_grid(grid.height, grid.width, Budget(num_tokens=landmarks))
    images = []
    for image in x:
        qkv = nn.functional.linear(image, attention.qkv.weight, attention.qkv.bias)
        outputs = []
        for head in range(heads):
            q, k, v = (qkv[:, (part * heads + head) * dim :][:, :dim] for part in range(3))
            q, k = attention.q_norm(q), attention.k_norm(k)
            few_q, few_k = with_landmarks(q, grid, h, w), with_landmarks(k, grid, h, w)
            a = softmax_rows(few_q, few_k)
            inverse = torch.linalg.inv(a) if options['pinv'] == 'exact' else newton(a, options['pinv_iterations'])
            y = softmax_rows(q, few_k) @ inverse @ softmax_rows(few_q, k) @ v
            if attention.local is not None:
                y = y + convolved(v, attention.local.weight[head, 0], grid)
            outputs.append(y)
        y = attention.norm(torch.cat(outputs, dim=1))
        if attention.gate is not None:
            y = y * torch.sigmoid(attention.gate(image))
        images.append(attention.proj(y))
    return torch.stack(images)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
class TestAgainstEquations:
    def check(self, attention, grid, batch=2):
        x = tokens(batch, grid, 24, torch.float64).requires_grad_()
        assert_same(attention(x, grid), reference(attention, x, grid), [x, *attention.parameters()], 1e-9)

    def build(self, options, **arguments):
        attention = randomised(create_attention('nystrom', 24, 2, dtype=torch.float64, **options, **arguments))
        if options.get('pinv') == 'exact':  # keys like queries, so that A is far from singular
            with torch.no_grad():
                for q, k in (p.chunk(3)[:2] for p in attention.qkv.parameters()):
                    k.copy_(q)
                for q, k in zip(attention.q_norm.parameters(), attention.k_norm.parameters(), strict=True):
                    k.copy_(q.mul_(5))
        return attention

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

    def test_other_head_size(self, options):
        self.check(self.build(options, attn_head_dim=5), PatchGrid(6, 4))


class TestAgainstThePackage:
    """`nystrom-attention`: landmarks of a sequence, which is a grid of one row; a convolution along it. It takes the
    norms of the first iterate over all images and heads, where we, and the paper, have one matrix."""

    def pair(self, heads, landmarks, iterations, **options):
        package = pytest.importorskip('nystrom_attention')
        theirs = package.NystromAttention(
            24, dim_head=12, heads=heads, num_landmarks=landmarks, pinv_iterations=iterations, **options
        )
        theirs = randomised(theirs).double().eval()
        kernel = theirs.res_conv.kernel_size[0] if options.get('residual', True) else 0
        ours = create_attention(
            'nystrom',
            24,
            heads,
            attn_head_dim=12,
            num_landmarks=(1, landmarks),
            pinv_iterations=iterations,
            residual_kernel=(1, kernel) if kernel else 0,
            dtype=torch.float64,
        ).eval()
        state = {'qkv.weight': theirs.to_qkv.weight}
        state |= {f'proj.{name}': p for name, p in theirs.to_out[0].named_parameters()}
        if kernel:
            state['local.weight'] = theirs.res_conv.weight.mT
        ours.load_state_dict(state)
        return ours, theirs

    @pytest.mark.parametrize('options', [{}, dict(residual_conv_kernel=5), dict(residual=False)], ids=str)
    def test_one_matrix(self, options):
        ours, theirs = self.pair(heads=1, landmarks=8, iterations=6, **options)
        x = torch.randn(1, 72, 24, dtype=torch.float64, requires_grad=True)
        assert_same(ours(x, PatchGrid(1, 72)), theirs(x), [x], 1e-9)
        for name, theirs_of_it in (('qkv', theirs.to_qkv), ('proj', theirs.to_out[0])):
            actual, expected = (
                gradients(y, [layer.weight])[0]
                for y, layer in ((ours(x, PatchGrid(1, 72)), getattr(ours, name)), (theirs(x), theirs_of_it))
            )
            assert (actual - expected).abs().max() <= 1e-9 * expected.abs().max()

    def test_batches_and_heads_when_converged(self):
        ours, theirs = self.pair(heads=2, landmarks=8, iterations=30)
        x = 2 * torch.randn(2, 72, 24, dtype=torch.float64, requires_grad=True)
        assert_same(ours(x, PatchGrid(1, 72)), theirs(x), [x], 1e-9)


@pytest.mark.parametrize('grid', ((4, 5), (1, 9)))
@pytest.mark.parametrize('prefix', (0, 1, 5))
@pytest.mark.parametrize('extra', [{}, EVERYTHING], ids=['plain', 'norms-and-gate'])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-6), (torch.float32, 1e-3)], ids=str)
def test_every_token_a_landmark_is_exact_attention(grid, prefix, extra, dtype, tolerance):
    """In float32 the error is its epsilon times the condition of A, which is 10³ to 10⁴ here."""
    exact = Attention(48, 4, qkv_bias=True, dtype=dtype, **extra)
    attention = swap_attention(exact, 'nystrom', num_landmarks=grid[0] * grid[1], pinv='exact')
    grid = PatchGrid(*grid, prefix)
    x = 3 * torch.randn(2, grid.num_tokens, 48, dtype=dtype)
    assert (attention(x, grid) - exact(x)).abs().max() <= tolerance * exact(x).abs().max()


def test_iteration_leads_to_the_pseudo_inverse():
    """Of the third order at least: errors of matrices that were brought near are cubed."""
    a = (3 * torch.randn(5, 8, 8, dtype=torch.float64)).softmax(-1)
    errors = [torch.linalg.matrix_norm(torch.eye(8) - a @ iterative_pinv(a, n), 2).max().item() for n in range(1, 40)]
    assert errors[-1] < 1e-9
    pairs = [(e, after) for e, after in itertools.pairwise(errors) if e < 0.1 and after > 1e-12]
    assert pairs and all(after < 2 * e**3 for e, after in pairs)
    assert torch.allclose(iterative_pinv(a, 40), torch.linalg.pinv(a), rtol=1e-6)


def test_a_matrix_does_not_see_the_others():
    """The scale of the first iterate is that of each matrix, so that an image's result is not its batch's."""
    attention = create_attention('nystrom', 12, 3, num_landmarks=6)
    grid, x = PatchGrid(7, 13, 1), torch.randn(3, 92, 12)
    x[2] *= 20
    assert torch.allclose(attention(x, grid)[:1], attention(x[:1], grid), atol=1e-6)


class TestStability:
    """Where all is rounded to 8 bits, and where A can hardly be inverted."""

    grid = PatchGrid(64, 64, 1)

    def attention(self, scale=1.0, **options):
        attention = create_attention('nystrom', 128, 2, qkv_bias=True, **options)
        with torch.no_grad():
            attention.qkv.weight[:256] *= scale
        return attention

    @pytest.mark.parametrize('pinv', ['iterative', 'exact'])
    def test_bfloat16(self, pinv):
        attention, x = self.attention(pinv=pinv), tokens(1, self.grid, 128)
        with torch.no_grad():
            if pinv == 'exact':  # of which bfloat16 keeps the singular values that it can tell from noise
                kept = torch.finfo(torch.bfloat16).eps
                patched = pytest.MonkeyPatch()
                exact = torch.linalg.pinv
                with patched.context() as patch:
                    patch.setattr(torch.linalg, 'pinv', lambda a, rtol: exact(a, rtol=kept))
                    expected = attention(x, self.grid)
            else:
                expected = attention(x, self.grid)
            with torch.autocast('cpu', torch.bfloat16):
                autocast = attention(x, self.grid)
            whole = attention.to(torch.bfloat16)(x.bfloat16(), self.grid)
        for y in (autocast, whole):
            assert y.dtype == torch.bfloat16
            assert (y - expected).abs().max() <= 2e-2 * expected.abs().max()

    @pytest.mark.parametrize('pinv', ['iterative', 'exact'])
    @pytest.mark.parametrize('scale', [0.0, 0.01, 1.0, 10.0, 100.0])
    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
    def test_gradients_are_finite(self, pinv, scale, dtype):
        """From even rows (scale 0: rank 1) over hardly any structure to one-hot rows."""
        attention = self.attention(scale, pinv=pinv, num_landmarks=16)
        x = tokens(1, self.grid, 128).requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = attention(x, self.grid)
        y.float().square().mean().backward()
        assert y.isfinite().all()
        assert all(t.grad.isfinite().all() for t in (x, *attention.parameters()))

    @pytest.mark.parametrize('pinv', ['iterative', 'exact'])
    def test_queries_and_keys_of_no_content_take_the_mean(self, pinv):
        attention, x = self.attention(0.0, pinv=pinv), tokens(1, self.grid, 128)
        with torch.no_grad():
            attention.qkv.bias[:256] = 0
            attention.proj.weight.copy_(torch.eye(128))
            attention.proj.bias.zero_()
            y = attention(x, self.grid)
            mean = (x @ attention.qkv.weight[256:].T + attention.qkv.bias[256:]).mean(dim=1, keepdim=True)
        assert torch.allclose(y, mean.expand_as(y), atol=1e-5)

    @pytest.mark.parametrize('iterations', [6, None])
    def test_autocast_leaves_the_inverse_alone(self, iterations):
        landmarks = torch.randn(3, 1, 2, 32, 32).bfloat16()
        with torch.autocast('cpu', torch.bfloat16):
            y = unmix(*landmarks, 0.2, iterations)
        assert torch.equal(y, unmix(*landmarks, 0.2, iterations))

    def test_the_exact_inverse_of_rounded_numbers_is_cut_off(self):
        """Singular values that bfloat16 cannot tell from zero do not come back as thousands."""
        q, k = torch.randn(2, 1, 1, 32, 32).bfloat16()
        inverse, rounded = (
            torch.linalg.matrix_norm(unmix(q.to(dtype), k.to(dtype), torch.eye(32, dtype=dtype), 0.03, None).float(), 2)
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert inverse > 1000 and rounded < 1 / torch.finfo(torch.bfloat16).eps


class TestDropout:
    grid = PatchGrid(7, 13, 1)

    def test_noise_is_that_of_exact_attention(self):
        """Dropping before A⁺ would have it amplified: 3 times this for these queries and keys."""
        exact = Attention(64, 4, attn_drop=0.1)
        with torch.no_grad():
            exact.qkv.weight[:128] *= 2
        attention = swap_attention(exact, 'nystrom', num_landmarks=(7, 13))
        x = torch.randn(1, 92, 64)
        with torch.no_grad():
            noise, usual = (
                torch.stack([run() for _ in range(100)]).std(0).mean()
                for run in (lambda: attention(x, self.grid), lambda: exact(x))
            )
        assert 0.7 * usual < noise < 1.3 * usual

    def test_residual_is_whole(self):
        attention = create_attention('nystrom', 12, 3, attn_drop=1.0, residual_kernel=1, dtype=torch.float64)
        nn.init.ones_(attention.local.weight)
        x = torch.randn(2, 92, 12, dtype=torch.float64)
        values = x @ attention.qkv.weight[24:].T
        values[:, :1] = 0
        assert torch.allclose(attention(x, self.grid), attention.proj(values))


class TestModule:
    grid = PatchGrid(7, 13, 1)
    x = torch.randn(2, 92, 12, generator=torch.Generator().manual_seed(0))

    def test_parameters_are_shared_and_left_alone(self):
        exact = Attention(12, 3, qkv_bias=True)
        attention = swap_attention(exact, 'nystrom', residual_kernel=(3, 5))
        assert attention.qkv.weight is exact.qkv.weight
        assert {key: tuple(value.shape) for key, value in attention.added_state().items()} == {
            'local.weight': (3, 1, 3, 5)
        }
        assert not swap_attention(exact, 'nystrom').added_state()
        back = swap_attention(attention, 'full')
        assert list(back.state_dict()) == list(exact.state_dict())
        assert not hasattr(back, 'landmarks') and not hasattr(back, 'pinv')

    def test_residual_starts_at_nothing_and_learns(self):
        plain = create_attention('nystrom', 12, 3)
        residual = swap_attention(plain, 'nystrom', residual_kernel=3)
        assert torch.equal(residual(self.x, self.grid), plain(self.x, self.grid))
        residual(self.x, self.grid).square().sum().backward()
        assert residual.local.weight.grad.abs().min() > 0

    def test_options_rebuild_it(self):
        for options in OPTIONS:
            attention = create_attention('nystrom', 12, 3, **options)
            assert create_attention('nystrom', 12, 3, **attention.options).options == attention.options
        assert create_attention('nystrom', 12, 3).options == dict(
            num_landmarks=64, pinv='iterative', pinv_iterations=6, residual_kernel=0
        )

    def test_copies(self):
        attention = create_attention('nystrom', 12, 3, residual_kernel=3)
        nn.init.normal_(attention.local.weight)
        for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
            assert torch.equal(copied(self.x, self.grid), attention(self.x, self.grid))

    def test_from_meta(self):
        attention = create_attention('nystrom', 12, 3, residual_kernel=3)
        with torch.device('meta'):
            empty = create_attention('nystrom', 12, 3, residual_kernel=3)
        assert empty(self.x.to('meta'), self.grid).shape == self.x.shape
        for loaded, assign in ((copy.deepcopy(empty), True), (empty.to_empty(device='cpu'), False)):
            loaded.load_state_dict(attention.state_dict(), assign=assign)
            assert torch.equal(loaded(self.x, self.grid), attention(self.x, self.grid))

    @pytest.mark.compiled
    def test_compiled_under_autocast(self):
        torch.compiler.reset()
        attention = create_attention('nystrom', 12, 3)
        compiled = torch.compile(attention, fullgraph=True, backend='aot_eager')
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(compiled(self.x, self.grid), attention(self.x, self.grid))

    def test_repr_tells_the_truth(self):
        text = repr(create_attention('nystrom', 12, 3, num_landmarks=(3, 4), pinv='exact', residual_kernel=3))
        assert "pinv='exact'" in text and 'num_landmarks=(3, 4)' in text and 'iterations' not in text
        assert '(local): ValueMixing(3, 3, kernel_size=(3, 3)' in text
        assert 'pinv_iterations=6' in repr(create_attention('nystrom', 12, 3))

    def test_every_query_sees_all_keys(self):
        attention = create_attention('nystrom', 12, 3, num_landmarks=4)
        assert attention.num_attended(self.grid) == 92
        # Of the tokens, none is without influence on any other.
        x = self.x[:1].double().requires_grad_()
        y = attention.double()(x, self.grid)
        for n in (0, 1, 50, 91):
            assert torch.autograd.grad(y[0, n].sum(), x, retain_graph=True)[0].abs().sum(-1).min() > 0

    def test_flops(self):
        """The two softmax factors, A, and four products for each iteration: by hand."""
        n, m, heads, dim = 92, 1 + 10, 3, 4
        attention = create_attention('nystrom', 12, heads, num_landmarks=(2, 5), pinv_iterations=6)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn = attention

            def forward(self, x):
                return self.attn(x.flatten(2).mT[:, :92], PatchGrid(7, 13, 1))

        counted = count_flops(Model(), (12, 1, 92)).by_role
        products = 4 * n * m * dim + m * m * dim + 6 * 4 * m**3 + m * m * dim
        assert counted['attention products'] == heads * products
        assert counted['attention projections'] == 4 * n * 12 * 12

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            (dict(num_landmarks=0), 'num_landmarks=0'),
            (dict(num_landmarks=-3), 'num_landmarks=-3'),
            (dict(num_landmarks=2.5), r'num_landmarks=2\.5'),
            (dict(num_landmarks=True), 'num_landmarks=True'),
            (dict(num_landmarks=None), 'num_landmarks=None'),
            (dict(num_landmarks='64'), "num_landmarks='64'"),
            (dict(residual_kernel=False), 'residual_kernel=False'),
            (dict(residual_kernel=0.0), 'residual_kernel=0.0'),
            (dict(num_landmarks=(3, 0)), r'num_landmarks=\(3, 0\)'),
            (dict(num_landmarks=(3, 4, 5)), r'num_landmarks=\(3, 4, 5\)'),
            (dict(pinv='svd'), "pinv='svd'"),
            (dict(pinv_iterations=0), 'pinv_iterations=0'),
            (dict(pinv_iterations=1.5), r'pinv_iterations=1\.5'),
            (dict(pinv='exact', pinv_iterations=6), "pinv='exact'.*pinv_iterations=6"),
            (dict(residual_kernel=2), 'residual_kernel=2'),
            (dict(residual_kernel=-1), 'residual_kernel=-1'),
            (dict(residual_kernel=True), 'residual_kernel=True'),
            (dict(residual_kernel='3'), "residual_kernel='3'"),
            (dict(residual_kernel=(3, 4)), r'residual_kernel=\(3, 4\)'),
            (dict(residual_kernel=(3, 3, 3)), r'residual_kernel=\(3, 3, 3\)'),
            (dict(landmarks=4), "no option 'landmarks'.*num_landmarks"),
            (dict(num_heads=5), 'num_heads=5'),
        ],
        ids=str,
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            create_attention('nystrom', 12, **{'num_heads': 3, **options})

    def test_bad_calls(self):
        with pytest.raises(ValueError, match=r'num_landmarks=\(4, 4\).*2 × 5'):
            create_attention('nystrom', 12, 3, num_landmarks=(4, 4))(torch.randn(1, 10, 12), PatchGrid(2, 5))

    def test_a_size_with_too_few_patches_is_refused(self):
        """Before anything of the model is changed."""
        args = dict(patch_size=4, embed_dim=24, depth=2, num_heads=2, img_size=32)
        model = timm.create_model('vit_nystrom_tiny', **args, attention_kwargs=dict(num_landmarks=(8, 8)))
        with pytest.raises(ValueError, match=r'num_landmarks=\(8, 8\).*4 × 4'):
            model.set_input_size((16, 16))
        assert model.patch_embed.grid_size == (8, 8) and model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
        with pytest.raises(ValueError, match='4 × 4'):
            vit_efficient.kept_tokens(model, 16)
