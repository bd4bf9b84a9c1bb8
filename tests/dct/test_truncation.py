"""Truncation against scipy block by block, JPEG's table, and the energies that Parseval promises."""

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vit_efficient import dct

# ITU-T T.81 (JPEG), Figure 5: the place of each coefficient in the zigzag order.
JPEG = [
    [0, 1, 5, 6, 14, 15, 27, 28],
    [2, 4, 7, 13, 16, 26, 29, 42],
    [3, 8, 12, 17, 25, 30, 41, 43],
    [9, 11, 18, 24, 31, 40, 44, 53],
    [10, 19, 23, 32, 39, 45, 52, 54],
    [20, 22, 33, 38, 46, 51, 55, 60],
    [21, 34, 37, 47, 50, 56, 59, 61],
    [35, 36, 48, 49, 57, 58, 62, 63],
]
SIDES = st.integers(1, 20)


def walk(height, width):
    """The zigzag order, one step at a time."""
    i = j = 0
    up = True
    for _ in range(height * width):
        yield i * width + j
        ahead = (i - 1, j + 1) if up else (i + 1, j - 1)
        if 0 <= ahead[0] < height and 0 <= ahead[1] < width:
            i, j = ahead
            continue
        along_edge = (i, j + 1) if up else (i + 1, j)
        inside = along_edge[0] < height and along_edge[1] < width
        i, j = along_edge if inside else ((i + 1, j) if up else (i, j + 1))
        up = not up


def reference(x, keep):
    """Blocks of x (…, p, q) by scipy, without what `keep` (p, q) drops; and their energies, kept and in all."""
    coefficients = scipy.fft.dctn(x, axes=(-2, -1), norm='ortho')
    kept = coefficients * keep
    return scipy.fft.idctn(kept, axes=(-2, -1), norm='ortho'), np.square(kept).sum(), np.square(coefficients).sum()


@st.composite
def cases(draw):
    """Block, options, and the mask of what they keep."""
    height, width = draw(SIDES), draw(SIDES)
    keep = np.zeros((height, width), bool)
    kind = draw(st.sampled_from(['size', 'square', 'zigzag']))
    count = draw(st.integers(1, height * width))
    if kind == 'size':
        h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
        keep[:h, :w] = True
        return (height, width), {'size': (h, w)}, keep
    if kind == 'zigzag':
        keep.flat[list(walk(height, width))[:count]] = True
    else:
        h, w, _ = dct.kept_coefficients(height, width, count=count)
        assert h * w <= count
        keep[:h, :w] = True
    share = {'count': count} if draw(st.booleans()) else {'ratio': count / (height * width)}
    return (height, width), {**share, 'order': kind}, keep


class TestZigzag:
    def test_is_jpegs(self):
        assert torch.equal(dct.zigzag(8, 8).argsort().view(8, 8), torch.tensor(JPEG))

    @given(SIDES, SIDES)
    def test_is_a_walk(self, height, width):
        order = dct.zigzag(height, width)
        assert order.dtype == torch.int64
        assert order.tolist() == list(walk(height, width))

    @given(SIDES, SIDES)
    def test_the_box_of_the_first_ones(self, height, width):
        order = dct.zigzag(height, width)
        rows, columns = (order // width).cummax(0).values + 1, (order % width).cummax(0).values + 1
        for count in range(1, height * width + 1):
            h, w, kept = dct.kept_coefficients(height, width, count=count, order='zigzag')
            assert kept == count
            assert rows[count - 1] <= h <= rows[count - 1] + 1 and columns[count - 1] <= w <= columns[count - 1] + 1


class TestAgainstScipy:
    @settings(deadline=None, max_examples=60)
    @given(cases(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([(-2, -1), (-1, -2), (0, 2)]))
    def test_blocks(self, case, down, across, dims):
        (p, q), options, keep = case
        blocks = np.random.default_rng(p * 100 + q).normal(size=(2, down, across, p, q))
        expected, kept, total = reference(blocks, keep)

        def images(blocks):
            image = blocks.transpose(0, 1, 3, 2, 4).reshape(2, down * p, across * q)
            return np.moveaxis(image, (1, 2), dims)

        x = torch.from_numpy(images(blocks))
        y = dct.truncate(x, dims=dims, block=(p, q), **options)
        assert np.abs(y.numpy() - images(expected)).max() <= 1e-12 * np.abs(blocks).max()
        # One basis for all blocks: to truncate again changes nothing.
        assert torch.allclose(dct.truncate(y, dims=dims, block=(p, q), **options), y, rtol=0, atol=1e-13)
        share = dct.kept_energy(x, dims=dims, block=(p, q), **options)
        assert share.shape == (2,) and share.dtype == torch.float64
        assert torch.allclose(share, y.square().sum(dims) / x.square().sum(dims), rtol=0, atol=1e-13)
        assert (share * x.square().sum(dims)).sum().item() == pytest.approx(kept)
        assert x.square().sum().item() == pytest.approx(total)

    @settings(deadline=None, max_examples=40)
    @given(cases())
    def test_whole_images_are_one_block(self, case):
        sides, options, keep = case
        x = np.random.default_rng(sides[0] * 100 + sides[1]).normal(size=(3, *sides))
        expected, kept, total = reference(x, keep)
        y = dct.truncate(x, **options)
        assert np.abs(y - expected).max() <= 1e-12 * np.abs(x).max()
        assert np.average(dct.kept_energy(x, **options), weights=np.square(x).sum((1, 2))) == pytest.approx(
            kept / total
        )


@pytest.mark.parametrize('order', ['square', 'zigzag'])
@pytest.mark.parametrize('block', [None, 4, (4, 6)])
class TestOptions:
    def test_nothing_truncated(self, order, block):
        x = torch.randn(2, 12, 12, dtype=torch.float64)
        assert torch.allclose(dct.truncate(x, block=block, ratio=1, order=order), x, atol=1e-13)
        assert torch.allclose(dct.kept_energy(x, block=block, ratio=1, order=order), torch.ones(2).double(), atol=1e-14)

    def test_gradcheck(self, order, block):
        x = torch.randn(1, 12, 12, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: dct.truncate(x, block=block, ratio=0.3, order=order), x)
        assert torch.autograd.gradcheck(lambda x: dct.kept_energy(x, block=block, ratio=0.3, order=order), x)

    @pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64', '>f4'])
    def test_arrays(self, order, block, dtype):
        x = np.random.default_rng(0).normal(size=(2, 12, 12)).astype(dtype)
        x.flags.writeable = False
        y = dct.truncate(x[::-1], block=block, ratio=1 / 4, order=order)
        expected = dct.truncate(torch.from_numpy(x.astype('f8')), block=block, ratio=1 / 4, order=order).numpy()
        assert type(y) is np.ndarray and y.dtype == x.dtype
        assert np.allclose(y[::-1], expected, atol={2: 1e-2, 4: 1e-6, 8: 1e-13}[x.dtype.itemsize])
        share = dct.kept_energy(x, block=block, ratio=1 / 4, order=order)
        assert type(share) is np.ndarray and share.dtype == np.float64 and share.shape == (2,)

    def test_torch_func(self, order, block):
        def truncate(x):
            return dct.truncate(x, block=block, ratio=0.3, order=order)

        def energy(x):
            return dct.kept_energy(x, block=block, ratio=0.3, order=order)

        x = torch.randn(2, 12, 24)
        assert torch.allclose(torch.func.vmap(truncate)(x), truncate(x), atol=1e-6)
        assert torch.allclose(torch.func.vmap(energy)(x), energy(x), atol=1e-6)
        gradient = torch.func.grad(lambda x: truncate(x).square().sum())(x)
        assert torch.allclose(gradient, 2 * truncate(x), atol=1e-5)

    @pytest.mark.compiled
    def test_traces(self, order, block, recwarn):
        class Truncate(nn.Module):
            def forward(self, x):
                return dct.truncate(x, block=block, ratio=0.3, order=order)

        x = torch.randn(2, 12, 24)
        traced = torch.fx.symbolic_trace(Truncate())
        assert torch.equal(traced(x), Truncate()(x))
        assert torch.equal(traced(x.mT), Truncate()(x.mT))
        assert torch.allclose(torch.jit.trace(Truncate(), x)(x), Truncate()(x))
        assert torch.allclose(torch.export.export(Truncate(), (x,)).module()(x), Truncate()(x), atol=1e-6)
        assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]
        assert Truncate()(x.to('meta')).shape == x.shape

    def test_one_pixel(self, order, block):
        x = torch.tensor([[3.0]])
        assert torch.allclose(dct.truncate(x, ratio=1e-3, order=order), x)
        assert dct.kept_energy(x, ratio=1e-3, order=order) == 1

    def test_of_zeros_all_is_kept(self, order, block):
        x = torch.zeros(2, 12, 12, requires_grad=True)
        share = dct.kept_energy(x, block=block, ratio=0.1, order=order)
        assert torch.equal(share, torch.ones(2).double())
        share.sum().backward()
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize(('block', 'order'), [(None, 'zigzag'), ((4, 6), 'square')])
@pytest.mark.compiled
def test_compile(block, order):
    def both(x):
        options = dict(block=block, ratio=0.3, order=order)
        return dct.truncate(x, **options), dct.kept_energy(x, **options)

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend='aot_eager')
    for sides in ((12, 24), (24, 36), (36, 12)):  # from the second on, sizes are symbols
        x = torch.randn(2, *sides)
        for found, expected in zip(compiled(x), both(x), strict=True):
            assert torch.allclose(found, expected, atol=1e-6)


def test_a_budget_keeps_the_blocks_aspect():
    assert dct.kept_coefficients(16, 16, ratio=1 / 4) == (8, 8, 64)
    assert dct.kept_coefficients(480, 640, ratio=1 / 16) == (120, 160, 120 * 160)
    assert dct.kept_coefficients(8, 8, count=10) == (3, 3, 9)
    assert dct.kept_coefficients(8, 8, count=10, order='zigzag') == (4, 4, 10)
    assert dct.kept_coefficients(8, 8, ratio=np.float32(1e-3)) == (1, 1, 1)


def test_energies_of_integers():
    x = torch.randint(0, 256, (2, 8, 8), dtype=torch.uint8)
    assert torch.equal(dct.kept_energy(x, (3, 3)), dct.kept_energy(x.double(), (3, 3)))
    assert np.array_equal(dct.kept_energy(x.numpy(), (3, 3)), dct.kept_energy(x, (3, 3)))


IMAGE = torch.zeros(2, 12, 15)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: dct.truncate(IMAGE), 'give one of size, count and ratio, got none'),
        (lambda: dct.truncate(IMAGE, (2, 2), ratio=0.5), r"give one .*\{'size': \(2, 2\), 'ratio': 0.5\}"),
        (lambda: dct.truncate(IMAGE, (13, 2)), r'from 1 to the 12 × 15 of the image or block, got size=\(13, 2\)'),
        (lambda: dct.truncate(IMAGE, (0, 2)), r'size=\(0, 2\)'),
        (lambda: dct.truncate(IMAGE, (2.0, 2)), r'size=\(2.0, 2\)'),
        (lambda: dct.truncate(IMAGE[:, :0], ratio=0.5), 'at least 1 × 1 pixels, got 0 × 15'),
        (lambda: dct.truncate(IMAGE[:, :0], ratio=0.5, block=3), 'do not divide an image of 0 × 15'),
        (lambda: dct.truncate(IMAGE, 2), 'size must be a pair'),
        (lambda: dct.truncate(IMAGE, (4, 4), block=3), r'the 3 × 3 of the image or block, got size=\(4, 4\)'),
        (lambda: dct.truncate(IMAGE, block=3, count=10), 'the 3 × 3 of the image or block, got count=10'),
        (lambda: dct.truncate(IMAGE, count=0), 'count=0'),
        (lambda: dct.truncate(IMAGE, count=True), 'count=True'),
        (lambda: dct.truncate(IMAGE, ratio=0), 'ratio=0'),
        (lambda: dct.truncate(IMAGE, ratio=1.5), '0 < ratio ≤ 1, got ratio=1.5'),
        (lambda: dct.truncate(IMAGE, ratio='1/4'), "ratio='1/4'"),
        (lambda: dct.truncate(IMAGE, ratio=float('nan')), 'ratio=nan'),
        (lambda: dct.truncate(IMAGE, ratio=0.5, order='spiral'), "order must be one of square, zigzag, got .*'spiral'"),
        (lambda: dct.truncate(IMAGE, (2, 2), order='zigzag'), 'give count or ratio'),
        (lambda: dct.truncate(IMAGE, ratio=0.5, block=5), 'blocks of 5 × 5 do not divide an image of 12 × 15; pad it'),
        (lambda: dct.truncate(IMAGE, ratio=0.5, block=16), 'blocks of 16 × 16 do not divide'),
        (lambda: dct.truncate(IMAGE, ratio=0.5, block=0), 'block=0'),
        (lambda: dct.truncate(IMAGE, ratio=0.5, block=(3, 3, 2)), r'block=\(3, 3, 2\)'),
        (lambda: dct.truncate(IMAGE, ratio=0.5, dims=(0, 3)), r'axes of a tensor of 3 axes, got dims=\(0, 3\)'),
        (lambda: dct.truncate(IMAGE, ratio=0.5, dims=(-1, 2)), 'two axes'),
        (lambda: dct.truncate(IMAGE.int(), ratio=0.5), 'x.dtype=torch.int32'),
        (lambda: dct.truncate(IMAGE.byte().numpy(), ratio=0.5), 'x.dtype=uint8'),
        (lambda: dct.kept_energy(IMAGE.cfloat(), ratio=0.5), 'x.dtype=torch.complex64'),
        (lambda: dct.kept_energy(IMAGE.bool().numpy(), ratio=0.5), 'x.dtype=bool'),
        (lambda: dct.zigzag(0, 8), 'height=0'),
        (lambda: dct.zigzag(8, 2.5), 'width=2.5'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
