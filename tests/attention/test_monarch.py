"""Monarch attention against its equations in loops, at its exact limits, and where it is delicate."""

import math
from itertools import chain

import pytest
import torch
from timm.layers import Attention, DiffAttention
from torch import nn

from vit_efficient import PatchGrid, create_attention
from vit_efficient.attention import swap_attention
from vit_efficient.attention.monarch import attend_in_blocks, blocks_of
from vit_efficient.utils.compat import OperatorMode

from .reference import softmax_attention
from .test_compressed import EVERYTHING, assert_same, randomised


def layout(grid, size):
    """The tokens at the places of each block; None where there is none."""
    row = [*range(grid.width)]
    parts = -(-grid.width // size)
    length = -(-grid.width // parts)
    rows = [[grid.prefix + y * grid.width + x for x in row] for y in range(grid.height)]
    if parts > 1:
        blocks = [row[start : start + length] for row in rows for start in range(0, grid.width, length)]
    else:
        many = min(size // grid.width, grid.height)
        length = many * grid.width
        blocks = [[*chain(*rows[start : start + many])] for start in range(0, grid.height, many)]
    return [block + [None] * (length - len(block)) for block in blocks]


def monarch(q, k, v, grid, size, steps):
    """The paper's updates, a row of R or of L after the other; q, k (N, D) and v (N, E) of one head.

    In the first step a place that has no token has the query of the block before.
    """
    scale, prefix, blocks, places = 1 / math.sqrt(q.shape[1]), grid.prefix, layout(grid, size), []
    rows_of_l, rows_of_r = {}, {}
    tokens = [[token for token in block if token is not None] for block in blocks]
    for step in range(steps):
        places = range(len(blocks[0]))
        for b, block in enumerate(blocks):
            for j in places:
                here = [a for a in range(len(blocks)) if blocks[a][j] is not None]
                if step == 0:
                    alpha, c = q[block[j] if block[j] is not None else blocks[b - 1][j]], 1
                else:
                    alpha = sum(rows_of_l[a, j][prefix + b] * q[blocks[a][j]] for a in here)
                    c = sum(rows_of_l[a, j][prefix + b] for a in here)
                rows_of_r[b, j] = torch.softmax(scale * (k[tokens[b]] @ alpha) / c, dim=0)
        for j in places:
            of_blocks = [rows_of_r[b, j] for b in range(len(blocks))]
            alpha = torch.stack([*k[:prefix], *(r @ k[of] for r, of in zip(of_blocks, tokens, strict=True))])
            c = torch.stack([*q.new_zeros(prefix), *((r * r.log()).sum() for r in of_blocks)])
            for a, block in enumerate(blocks):
                if block[j] is not None:
                    rows_of_l[a, j] = torch.softmax(scale * (alpha @ q[block[j]]) - c, dim=0)
    outputs = dict(enumerate(softmax_attention(q[:prefix], k, v)))
    for j in places:
        read = torch.stack([*v[:prefix], *(rows_of_r[b, j] @ v[of] for b, of in enumerate(tokens))])
        outputs |= {block[j]: rows_of_l[a, j] @ read for a, block in enumerate(blocks) if block[j] is not None}
    return torch.stack([outputs[token] for token in range(len(q))])


def reference(attention, x, grid, size):
    """Per image and head; `attention` lends its parameters."""
    dim, heads, images = attention.head_dim, attention.num_heads, []
    for image in x:
        qkv = nn.functional.linear(image, attention.qkv.weight, attention.qkv.bias)
        outputs = []
        for head in range(heads):
            q, k, v = (qkv[:, (part * heads + head) * dim :][:, :dim] for part in range(3))
            outputs.append(monarch(attention.q_norm(q), attention.k_norm(k), v, grid, size, attention.steps))
        y = attention.norm(torch.cat(outputs, dim=1))
        if attention.gate is not None:
            y = y * torch.sigmoid(attention.gate(image))
        images.append(attention.proj(y))
    return torch.stack(images)


class TestAgainstEquations:
    def check(self, grid, batch, size, options, **arguments):
        attention = randomised(create_attention('monarch', 8, 2, dtype=torch.float64, **options, **arguments))
        x = torch.randn(batch, grid.num_tokens, 8, dtype=torch.float64, requires_grad=True)
        expected = reference(attention, x, grid, size)
        assert_same(attention(x, grid), expected, [x, *attention.parameters()], 1e-9)
        attention.fused_attn = False
        assert (attention(x, grid) - expected).abs().max() <= 1e-9 * expected.abs().max()

    @pytest.mark.parametrize('steps', [1, 2])
    @pytest.mark.parametrize('prefix, batch', [(0, 2), (1, 1), (5, 1)])
    @pytest.mark.parametrize('grid, size', [((7, 13), 5), ((8, 8), 4), ((1, 9), 2), ((9, 2), 2)])
    def test_by_default(self, grid, size, prefix, batch, steps):
        """Blocks have about half the root of the number of patches."""
        self.check(PatchGrid(*grid, prefix), batch, size, dict(steps=steps), qkv_bias=True)

    @pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 9, 10, 14, 15, 20])
    def test_sizes_of_blocks(self, size):
        self.check(PatchGrid(3, 5, 1), 1, size, dict(block_size=size, steps=3))

    @pytest.mark.parametrize('extra', [EVERYTHING, dict(gated=True)])
    def test_with_norms_and_gates(self, extra):
        self.check(PatchGrid(3, 5, 1), 1, 4, dict(block_size=4, steps=2), **extra)


def matrix(q, k, grid, block_size, steps=1):
    """The whole M: what it reads of the values of an identity."""
    v = torch.eye(q.shape[2], dtype=q.dtype).expand(*q.shape[:2], -1, -1)
    return attend_in_blocks(q, k, v, *grid, 0, block_size, steps, q.shape[3] ** -0.5, True)


@pytest.mark.parametrize('size', [4, 6])
def test_each_step_comes_nearer(size):
    """The sum of scores · M + entropy(M), which the softmax maximises, never falls, and stays below its largest."""
    q, k = 3 * torch.randn(2, 1, 1, 24, 8, dtype=torch.float64)
    scores, found = q @ k.mT / math.sqrt(8), []
    for steps in (1, 2, 3, 10, 11):
        m = matrix(q, k, (2, 12), size, steps)
        torch.testing.assert_close(m.sum(dim=-1), torch.ones(1, 1, 24, dtype=torch.float64))
        found.append((m * (scores - m.log())).sum().item())
    assert found == sorted(found) and found[1] - found[0] > 1e-2
    assert found[-1] < scores.logsumexp(dim=-1).sum()
    assert found[-1] - found[-2] < 0.1 * (found[1] - found[0])


class TestExactLimits:
    exact = Attention(48, 4, qkv_bias=True, dtype=torch.float64)

    def check(self, x, grid, **options):
        attention = swap_attention(self.exact, 'monarch', **options)
        torch.testing.assert_close(attention(x, grid), self.exact(x), rtol=0, atol=1e-12)

    @pytest.mark.parametrize('steps', [1, 2])
    @pytest.mark.parametrize('prefix', [0, 1, 5])
    @pytest.mark.parametrize('size', [1, 91, 100])
    def test_one_block_or_blocks_of_one_token(self, size, prefix, steps):
        grid = PatchGrid(7, 13, prefix)
        self.check(torch.randn(2, grid.num_tokens, 48).double(), grid, block_size=size, steps=steps)

    @pytest.mark.parametrize('along', ['block', 'place'])
    def test_equal_tokens(self, along):
        """Keys of a block that are equal, or queries at the same place of all blocks."""
        patches = torch.randn(2, 7, 2, 7, 48, dtype=torch.float64)
        patches = patches[:, :, :, :1] if along == 'block' else patches[:, :1, :1]
        patches = patches.expand(-1, 7, 2, 7, -1).flatten(2, 3)[:, :, :13]  # in blocks of 7, and of 6 after them
        x, grid = torch.cat([torch.randn(2, 2, 48).double(), patches.flatten(1, 2)], dim=1), PatchGrid(7, 13, 2)
        self.check(x, grid, block_size=7)
        with pytest.raises(AssertionError):
            self.check(x, grid, block_size=6)


@pytest.mark.parametrize('options', [{}, dict(block_size=9), dict(block_size=9, steps=2)])
def test_equal_values_are_read_as_they_are(options):
    q, k = 5 * torch.randn(2, 2, 3, 96, 8)
    how = options.get('block_size'), options.get('steps', 1)
    y = attend_in_blocks(q, k, torch.ones(2, 3, 96, 4), 7, 13, 5, *how, 1.0, True)
    torch.testing.assert_close(y, torch.ones_like(y))


def test_nearer_than_windows_of_the_same_cost():
    """On a smooth field, of patches that score 32 keys each."""
    grid, exact = PatchGrid(16, 16), Attention(48, 4)
    with torch.no_grad():
        exact.qkv.weight.mul_(2)
        x = nn.functional.interpolate(torch.randn(1, 48, 5, 5), size=(16, 16), mode='bicubic').flatten(2).mT
        expected = exact(x)
        errors = [
            (swap_attention(exact, name, **options)(x, grid) - expected).square().mean() / expected.var()
            for name, options in (('monarch', {}), ('monarch', dict(steps=2)), ('window', dict(window_size=(4, 8))))
        ]
    assert errors[1] < errors[0] < 0.25 * errors[2]


@pytest.mark.parametrize('differential', [False, True])
@pytest.mark.parametrize('prefix', [0, 2])
def test_gradients_by_differences(prefix, differential):
    arguments = dict(dtype=torch.float64)
    exact = DiffAttention(8, 2, **arguments) if differential else Attention(8, 2, **arguments)
    attention = swap_attention(randomised(exact), 'monarch', block_size=3, steps=2)
    grid = PatchGrid(2, 4, prefix)
    x = torch.randn(1, grid.num_tokens, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x, grid), x)


class TestStability:
    grid = PatchGrid(12, 10, 1)

    @pytest.mark.parametrize('fused', [True, False])
    @pytest.mark.parametrize('autocast', [False, True])
    @pytest.mark.parametrize('options', [{}, dict(block_size=7, steps=3)])
    @pytest.mark.parametrize('score', [0.0, 10.0, 1e4])
    def test_finite(self, score, options, autocast, fused):
        attention = create_attention('monarch', 48, 3, **options)
        attention.fused_attn = fused
        with torch.no_grad():
            attention.qkv.weight[:96] *= score**0.5 * 3
        x = torch.randn(2, 121, 48, requires_grad=True)
        if score:
            q, k, _ = attention.project(x)
            assert (q @ k.mT * attention.scale).abs().max() > score
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = attention(x, self.grid)
        y.float().square().mean().backward()
        assert y.isfinite().all()
        assert all(t.grad.isfinite().all() for t in (x, *attention.parameters()))

    @pytest.mark.parametrize('options', [{}, dict(block_size=7, steps=2)])
    def test_bfloat16(self, options):
        attention, x = create_attention('monarch', 48, 3, qkv_bias=True, **options), torch.randn(1, 121, 48)
        with torch.no_grad():
            expected = attention(x, self.grid)
            with torch.autocast('cpu', torch.bfloat16):
                autocast = attention(x, self.grid)
            whole = attention.to(torch.bfloat16)(x.bfloat16(), self.grid)
        for y in (autocast, whole):
            assert y.dtype == torch.bfloat16
            assert (y - expected).abs().max() <= 2e-2 * expected.abs().max()

    def test_autocast_leaves_the_scores_alone(self):
        qkv = torch.randn(3, 1, 2, 120, 16).bfloat16()
        with torch.autocast('cpu', torch.bfloat16):
            y = attend_in_blocks(*qkv, 12, 10, 0, 7, 2, 2.0, True)
        assert torch.equal(y, attend_in_blocks(*qkv, 12, 10, 0, 7, 2, 2.0, True))


class Largest(OperatorMode):
    """Keeps the size of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        self.numbers = max([self.numbers, *(t.numel() for t in tensors)])
        return out


@pytest.mark.parametrize('grid, per_token', [((32, 32), 64), ((1, 1024), 64), ((512, 2), 64)])
def test_no_matrix_of_all_tokens(grid, per_token):
    attention, grid = create_attention('monarch', 12, 3, qkv_bias=True), PatchGrid(*grid)
    with Largest() as largest:
        attention(torch.randn(1, 1024, 12), grid).sum().backward()
    assert largest.numbers <= 1.1 * 3 * 1024 * (per_token + 12)
    assert attention.num_attended(grid) == 1024


@pytest.mark.parametrize(
    'sizes, expected',
    [
        ((36, 36, None), (36, 2, 1, 18)),
        ((37, 37, None), (37, 2, 1, 19)),
        ((7, 13, None), (7, 3, 1, 5)),
        ((1, 1, None), (1, 1, 1, 1)),
        ((1, 4096, None), (1, 128, 1, 32)),
        ((4096, 1, None), (128, 1, 32, 1)),
        ((7, 13, 13), (7, 1, 1, 13)),
        ((7, 13, 12), (7, 2, 1, 7)),
        ((7, 13, 25), (7, 1, 1, 13)),
        ((7, 13, 26), (4, 1, 2, 13)),
        ((7, 13, 1000), (1, 1, 7, 13)),
    ],
)
def test_blocks(sizes, expected):
    """As many down, across, their rows and columns."""
    assert blocks_of(*sizes) == expected


@pytest.mark.parametrize('options', [dict(block_size=0), dict(steps=0), dict(steps=1.5), dict(block_size=(2, 2))])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        create_attention('monarch', 12, 3, **options)
