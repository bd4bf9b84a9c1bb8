"""The DCT against scipy, by matrix product and by FFT, and in every mode that PyTorch has."""

import copy
import pickle

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.threads import at_once
from vit_efficient import dct
from vit_efficient.dct import bases, transforms

SIZES = st.integers(1, 40)


@pytest.fixture(params=['product', 'fft'])
def method(request, monkeypatch):
    least = 1 if request.param == 'fft' else 10**9
    monkeypatch.setattr(transforms, 'FFT_FROM', dict.fromkeys(transforms.FFT_FROM, least))
    bases.memo.clear()  # of plans by other constants
    yield request.param
    bases.memo.clear()


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def padded(x, shape):
    return np.pad(x, [(0, s - n) for n, s in zip(x.shape, shape, strict=True)])


class TestAgainstScipy:
    @settings(deadline=None, max_examples=60)
    @given(SIZES, SIZES, st.data())
    def test_2d(self, height, width, data):
        h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        x = np.random.default_rng(height * 100 + width).normal(size=(2, height, width))
        expected = scipy.fft.dctn(x, axes=(1, 2), norm='ortho')
        y = dct.dct2(torch.from_numpy(x), (h, w))
        assert relative_error(y, expected[:, :h, :w]) <= 1e-12
        back = scipy.fft.idctn(padded(expected[:, :h, :w], x.shape), axes=(1, 2), norm='ortho')
        assert relative_error(dct.idct2(y, (height, width)), back) <= 1e-12
        assert relative_error(dct.truncate(torch.from_numpy(x), (h, w)), back) <= 1e-12

    @pytest.mark.parametrize('n', [1, 2, 3, 4, 7, 64, 255, 256, 1000])
    @pytest.mark.parametrize('dim', [0, 1, -1])
    def test_1d(self, method, n, dim):
        shape = [3, 4, 5]
        shape[dim] = n
        x = np.random.default_rng(n).normal(size=shape)
        expected = scipy.fft.dct(x, axis=dim, norm='ortho')
        for m in {1, (n + 3) // 4, n // 2 + 1 if n > 1 else 1, n}:
            kept = np.take(expected, range(m), dim)
            y = dct.dct(torch.from_numpy(x), m, dim)
            assert relative_error(y, kept) <= 1e-12
            shape_m = list(x.shape)
            back = scipy.fft.idct(padded(kept, shape_m), axis=dim, norm='ortho')
            assert relative_error(dct.idct(y, n, dim), back) <= 1e-12

    def test_matrix_is_orthonormal(self):
        matrix = dct.dct_matrix(37, dtype=torch.float64)
        assert torch.allclose(matrix @ matrix.T, torch.eye(37, dtype=torch.float64), atol=1e-14)
        assert torch.equal(dct.dct_matrix(37, 5, dtype=torch.float64), matrix[:5])

    def test_long_basis_is_exact(self):
        """At n = 65,536 a phase computed in floating point would be off by 1e-11."""
        row = dct.dct_matrix(65536, 4, dtype=torch.float64)[3]
        unit = np.zeros(65536)
        unit[3] = 1
        assert np.abs(row.numpy() - scipy.fft.idct(unit, norm='ortho')).max() <= 1e-15


class TestResample:
    @settings(deadline=None, max_examples=60)
    @given(SIZES, SIZES, SIZES, SIZES)
    def test_is_truncated_or_padded_dct(self, height, width, h, w):
        x = np.random.default_rng(height * 100 + width).normal(size=(2, height, width))
        coefficients = scipy.fft.dctn(x, axes=(1, 2), norm='ortho')[:, :h, :w]
        gain = np.sqrt(h * w / (height * width))
        expected = scipy.fft.idctn(padded(coefficients, (2, h, w)), axes=(1, 2), norm='ortho') * gain
        assert relative_error(dct.resample(torch.from_numpy(x), (h, w)), expected) <= 1e-12

    def test_constant_keeps_its_value(self, method):
        for size in [(1, 1), (3, 20), (7, 13), (64, 5)]:
            y = dct.resample(torch.full((7, 13), 2.5, dtype=torch.float64), size)
            assert torch.allclose(y, torch.full(size, 2.5, dtype=torch.float64), atol=1e-13)

    def test_down_undoes_up(self, method):
        x = torch.randn(7, 13, dtype=torch.float64)
        assert torch.allclose(dct.resample(dct.resample(x, (20, 31)), (7, 13)), x, atol=1e-12)


def test_parseval():
    x = torch.randn(3, 16, 12, dtype=torch.float64)
    assert torch.allclose(dct.dct2(x).square().sum(), x.square().sum())
    assert torch.allclose(dct.truncate(x, (4, 5)).square().sum(), dct.dct2(x, (4, 5)).square().sum())


@pytest.mark.parametrize('dims', [(-3, -2), (0, 2)])
def test_axes(dims):
    x = torch.randn(6, 7, 8, dtype=torch.float64)
    moved = x.movedim(dims, (-2, -1))
    assert torch.allclose(dct.dct2(x, (3, 4), dims).movedim(dims, (-2, -1)), dct.dct2(moved, (3, 4)))


@pytest.mark.parametrize(
    'function', [lambda x: dct.dct(x, 3, 1), lambda x: dct.idct(x, 9, 1), lambda x: dct.resample(x, 4, 1)]
)
def test_gradcheck(method, function):
    x = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_long_axis_needs_no_basis():
    """A basis for 65,536 × 16,384 would have 2³⁰ entries."""
    before = bases.memo.bytes
    x = torch.randn(65536, 2, dtype=torch.float64)
    y = dct.dct(x, 16384, 0)
    assert relative_error(y, scipy.fft.dct(x.numpy(), axis=0, norm='ortho')[:16384]) <= 1e-12
    assert bases.memo.bytes - before < 2**22


class Resize(nn.Module):
    def forward(self, x):
        y = dct.dct2(x, (5, 4)) + dct.resample(x, (5, 4))
        return dct.idct2(y, (x.shape[-2], x.shape[-1]))


class TestModes:
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtype(self, dtype, method):
        y = Resize()(self.x.to(dtype))
        assert y.dtype == dtype
        tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-6)
        assert torch.allclose(y.double(), Resize()(self.x.double()), atol=tolerance)

    def test_autocast(self, method):
        with torch.autocast('cpu', torch.bfloat16):
            y = Resize()(self.x)
            assert y.dtype == torch.bfloat16
            assert Resize()(self.x.double()).dtype == torch.float64
        assert torch.allclose(y.float(), Resize()(self.x), atol=3e-2)

    def test_inference_mode_and_back(self):
        bases.memo.clear()
        with torch.inference_mode():
            expected = Resize()(self.x)
        x = self.x.clone().requires_grad_()
        y = Resize()(x)
        y.sum().backward()
        assert torch.equal(y, expected.clone()) and x.grad.isfinite().all()

    def test_bases_are_built_once(self, monkeypatch):
        Resize()(self.x)
        monkeypatch.setattr(transforms, '_cosines', None)
        Resize()(self.x)
        bases.memo.plans.clear()
        monkeypatch.setattr(transforms, '_plan', None)
        with pytest.raises(TypeError):
            Resize()(self.x)

    def test_memo_is_bounded(self, monkeypatch):
        monkeypatch.setattr(bases, 'MEMO_BYTES', 10_000)
        memo = bases.Memo()
        for n in range(100):
            memo.get((n,), lambda: torch.zeros(100), torch.device('cpu'))
        assert memo.bytes == sum(t.nbytes for t in memo.tensors.values()) <= 10_000
        assert (99,) in memo.tensors and (0,) not in memo.tensors

    def test_graphs(self, monkeypatch):
        """A basis that is built while a CUDA graph is captured is not kept; one that is read then is never dropped."""
        memo = bases.Memo()
        capturing = []
        monkeypatch.setattr(bases, 'is_capturing', lambda device: bool(capturing))
        monkeypatch.setattr(bases, 'MEMO_BYTES', 1000)

        def get(n):
            return memo.get((n,), lambda: torch.zeros(100), self.x.device)

        kept = get(0)
        capturing.append(True)
        assert get(0) is kept and get(1) is not get(1) and set(memo.tensors) == {(0,)}
        capturing.clear()
        for n in range(2, 9):
            get(n)
        assert (0,) not in memo.tensors and memo.captured == {(0,): kept}

    def test_plans_are_not_used_in_a_capture(self, monkeypatch):
        """Else nobody would know that a graph reads their bases."""
        expected = Resize()(self.x)
        for module in (bases, transforms):
            monkeypatch.setattr(module, 'is_capturing', lambda device: True)
        monkeypatch.setattr(bases.memo, 'plans', None)
        monkeypatch.setattr(bases.memo, 'captured', {})
        assert torch.equal(Resize()(self.x), expected) and bases.memo.captured

    def test_plans_go_with_their_bases(self, monkeypatch):
        bases.memo.clear()
        monkeypatch.setattr(bases, 'MEMO_BYTES', 100)
        Resize()(self.x)
        assert len(bases.memo.plans) <= 1
        monkeypatch.setattr(bases, 'MEMO_PLANS', 3)
        for n in range(2, 9):
            dct.dct(self.x, n, 1)
        assert len(bases.memo.plans) <= 3
        bases.memo.clear()

    def test_sizes_that_are_equal_and_no_integers(self):
        x = torch.randn(4)
        dct.dct(x, 1)
        dct.dct(x, 2)
        for size in (2.0, True):
            with pytest.raises(ValueError, match='size must be an integer|size=True'):
                dct.dct(x, size)

    @pytest.mark.parametrize('function', [Resize(), lambda x: dct.dct(x, 3, 1)])
    @pytest.mark.compiled
    def test_compiled_under_autocast(self, function, monkeypatch):
        """One dtype and one way, compiled or not; and bases are not built in each call."""
        monkeypatch.setattr(transforms, 'FFT_FROM', {torch.float32: 1, torch.bfloat16: 10**9})
        torch.compiler.reset()
        bases.memo.clear()
        compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
        with torch.autocast('cpu', torch.bfloat16):
            for _ in range(2):
                y, expected = compiled(self.x), function(self.x)
                assert y.dtype == expected.dtype == torch.bfloat16
                torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
            monkeypatch.setattr(torch, 'cos', None)
            compiled(self.x)
        bases.memo.clear()

    @pytest.mark.parametrize(('on_gpu', 'kept'), [(False, 8192), (True, 16384)])
    def test_fft_in_half_precision_begins_later_on_gpus(self, on_gpu, kept, monkeypatch):
        monkeypatch.setattr(transforms, 'on_gpu', lambda x: on_gpu)
        ways = []
        monkeypatch.setattr(transforms, 'basis', lambda *args: torch.zeros(1, 1))
        monkeypatch.setattr(transforms, 'LARGEST_BASIS', 2**40)
        for m in (kept - 1, kept):
            step = transforms._step(self.x.bfloat16(), 'dct', 1, 65536, m, 4, torch.bfloat16)
            ways.append(step[-1] is None)
        assert ways == [False, True]

    @pytest.mark.compiled
    def test_compile(self):
        torch.compiler.reset()
        model = torch.compile(Resize(), fullgraph=True, backend='aot_eager')
        assert torch.allclose(model(self.x), Resize()(self.x), atol=1e-6)

    def test_fx(self):
        traced = torch.fx.symbolic_trace(Resize())
        for shape in [(2, 9, 8), (1, 7, 13)]:
            x = torch.randn(shape)
            assert torch.equal(traced(x), Resize()(x))

    @pytest.mark.compiled
    def test_export(self):
        program = torch.export.export(Resize(), (self.x,))
        assert torch.allclose(program.module()(self.x), Resize()(self.x), atol=1e-6)

    def test_jit_trace_without_warnings(self, recwarn):
        traced = torch.jit.trace(Resize(), self.x)
        assert torch.allclose(traced(self.x), Resize()(self.x))
        assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]

    def test_meta(self):
        assert Resize()(self.x.to('meta')).shape == (2, 9, 8)
        Resize()(self.x)  # what was built on meta must not be used here
        assert Resize()(self.x).isfinite().all()

    def test_fake(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        Resize()(self.x)
        with FakeTensorMode() as mode:
            assert Resize()(mode.from_tensor(self.x)).shape == (2, 9, 8)

    def test_vmap(self):
        mapped = torch.func.vmap(Resize())(self.x)
        assert torch.allclose(mapped, torch.stack([Resize()(x) for x in self.x]), atol=1e-6)

    def test_transforms_of_torch_func_leave_nothing_behind(self):
        bases.memo.clear()
        torch.func.hessian(lambda t: dct.dct(t, 3).square().sum())(torch.randn(8))
        assert torch.allclose(torch.func.grad(lambda t: dct.dct(t, 3)[0])(torch.randn(8)), torch.full((8,), 8**-0.5))

    def test_copies(self):
        model = nn.Sequential(Resize())
        expected = model(self.x)
        for copied in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            model.to(torch.bfloat16).to(torch.float32),
        ):
            assert torch.equal(copied(self.x), expected)

    def test_threads(self):
        sizes = [(5, 9), (9, 5)]
        inputs = [torch.randn(2, *size) for size in sizes]
        expected = [Resize()(x) for x in inputs]
        wrong = []

        def work(i):
            for _ in range(100):
                if not torch.equal(Resize()(inputs[i]), expected[i]):
                    wrong.append(i)

        at_once(lambda: work(0), lambda: work(1))
        assert not wrong


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: dct.dct(torch.zeros(4, dtype=torch.int64)), 'x.dtype=torch.int64'),
        (lambda: dct.dct(torch.zeros(4), 0), 'size=0'),
        (lambda: dct.dct(torch.zeros(4), 5), 'size=5'),
        (lambda: dct.dct(torch.zeros(4), 2.5), 'size must be an integer'),
        (lambda: dct.dct(torch.zeros(4), np.float32(2)), 'size must be an integer'),
        (lambda: dct.dct(torch.zeros(4), torch.tensor(2)), 'size must be an integer'),
        (lambda: dct.idct(torch.zeros(4), 3), 'size=3'),
        (lambda: dct.resample(torch.zeros(4, 4), (0, 2)), 'size=0'),
        (lambda: dct.dct(torch.zeros(4), 2, dim=1), 'dim=1'),
        (lambda: dct.resample(torch.zeros(4, 4), 2), 'size=2'),
        (lambda: dct.dct2(torch.zeros(4, 4), (1, 2, 3)), 'pair'),
        (lambda: dct.dct_matrix(4, 5), 'm=5'),
        (lambda: dct.dct_matrix(0), 'n=0'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_plan_skips_no_check():
    """That was made for other types, which are the same key."""
    dct.dct(torch.randn(2, 8), 4, dim=1)
    with pytest.raises(TypeError):
        dct.dct(torch.randn(2, 8), 4, dim=1.0)
    with torch.autocast('cpu', torch.bfloat16):
        dct.dct(torch.randn(2, 8), 4)
        with pytest.raises(ValueError, match='floating-point'):
            dct.dct(torch.ones(2, 8, dtype=torch.int64), 4)
