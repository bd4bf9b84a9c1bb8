"""Combiner against its definition, in loops; against exact attention where it is exact; and what it costs."""

import math

import pytest
import timm
import torch

from vit_efficient import PatchGrid, create_attention
from vit_efficient.attention import layer_options
from vit_efficient.attention.combiner import CombinerAttention, axial, cells, chunks
from vit_efficient.attention.combiner.summaries import SUMMARIES, Summaries, summarise
from vit_efficient.utils import device
from vit_efficient.utils.errors import UserError

from .test_compressed import EVERYTHING, gradients, randomised
from .test_monarch import Largest
from .test_window import window_along

GRIDS = ((7, 13), (1, 9), (6, 4), (8, 8))
CUTS = ((4, 2), (3, 3), (4, 3), ((2, 5), (1, 2)), (5, (3, 2)))


def pair(sides) -> tuple[int, int]:
    return sides if isinstance(sides, tuple) else (sides, sides)


def cell_along(position: int, length: int, side: int, cell: int, shift: bool) -> int:
    """The number, in its window, of the cell that holds a position of an axis: they are cut from whole windows."""
    if side >= length:
        return position // cell
    before = side - side // 2 if shift and side > 1 else 0
    return (position + before) % side // cell


def sets_of(grid: PatchGrid, window_size, cell_size, shift: bool) -> list[tuple[tuple, tuple]]:
    """The window and the cell of each patch, in row-major order."""
    sets = []
    for row in range(grid.height):
        for column in range(grid.width):
            axes = list(zip((row, column), (grid.height, grid.width), pair(window_size), pair(cell_size), strict=True))
            window = tuple(window_along(at, length, side, shift) for at, length, side, _ in axes)
            sets.append((window, (window, tuple(cell_along(*of_axis, shift) for of_axis in axes))))
    return sets


def summary_of(patches, q, k, v, scale, summary, count):
    """Key, value and bias of a cell, by the equations: q, k and v of a head, (N, D)."""
    ks, vs = [k[j] for j in patches], [v[j] for j in patches]
    mean_k = sum(ks) / len(ks)
    if summary == 'mean':
        return mean_k, sum(vs) / len(vs), math.log(len(ks)) if count else 0
    if summary == 'max':
        query = torch.stack([q[j] for j in patches]).amax(0)
    else:
        query = sum(q[j] for j in patches) / len(ks)
    scores = [scale * (query @ kj) for kj in ks]
    most = max(s.item() for s in scores)
    total = sum(torch.exp(s - most) for s in scores)
    weights = [torch.exp(s - most) / total for s in scores]
    value = sum(p * vj for p, vj in zip(weights, vs, strict=True))
    if summary == 'tangent':
        key = sum(p * kj for p, kj in zip(weights, ks, strict=True))
        touching = torch.log(total) + most - scale * (query @ key)
        return key, value, touching if count else 0
    key = torch.stack(ks).amax(0) if summary == 'max' else mean_k
    return key, value, math.log(len(ks)) if count else 0


def cells_seen(attention: CombinerAttention, grid: PatchGrid) -> list[tuple[list[int], list[list[int]]]]:
    """Of each patch the patches that it sees one by one, and the sets of those that it sees as one."""
    sets = sets_of(grid, attention.window, attention.cell, attention.shift)
    cells, windows = {}, {}
    for j, (window, cell) in enumerate(sets):
        cells.setdefault(cell, []).append(j)
        windows.setdefault(window, []).append(j)
    seen = []
    for own, _ in sets:
        near = windows[own]
        apart = {window: max(abs(a - b) for a, b in zip(own, window, strict=True)) for window in windows}
        far = {window for window in windows if attention.reach is not None and apart[window] > attention.reach}
        others = [cells[cell] for cell in cells if cell[0] != own and cell[0] not in far]
        seen.append((near, others + [windows[window] for window in far]))
    return seen


def axes_seen(attention: CombinerAttention, grid: PatchGrid) -> list[tuple[list[int], list[list[int]]]]:
    """The same of the axial pattern: its row and column, and of each other column what is not in its row."""
    places = [(row, column) for row in range(grid.height) for column in range(grid.width)]
    if attention.transpose:
        places = [(column, row) for row, column in places]
    seen = []
    for row, column in places:
        near = [j for j, (r, c) in enumerate(places) if r == row or c == column]
        others = sorted({c for _, c in places} - {column})
        sets = [[j for j, (r, c) in enumerate(places) if c == other and r != row] for other in others]
        seen.append((near, [patches for patches in sets if patches]))
    return seen


def reference(attention: CombinerAttention, x, grid):
    seen = (axes_seen if attention.pattern == 'axial' else cells_seen)(attention, grid)
    images = []
    for image in x:
        q, k, v = (t[0] for t in attention.project(image[None]))
        heads = []
        for head in range(q.shape[0]):
            patches = (t[head, grid.prefix :] for t in (q, k, v))
            args = (*patches, attention.scale, attention.summary, attention.count_bias)
            known = {}
            outputs = []
            for i in range(grid.num_tokens):
                keys = [
                    (k[head, j], v[head, j], 0) for j in range(grid.prefix if i >= grid.prefix else grid.num_tokens)
                ]
                if i >= grid.prefix:
                    near, sets = seen[i - grid.prefix]
                    keys += [(k[head, grid.prefix + j], v[head, grid.prefix + j], 0) for j in near]
                    for patches in map(tuple, sets):
                        if patches not in known:
                            known[patches] = summary_of(patches, *args)
                        keys.append(known[patches])
                scores = torch.stack([attention.scale * (q[head, i] @ key) + bias for key, _, bias in keys])
                outputs.append(scores.softmax(0) @ torch.stack([value for _, value, _ in keys]))
            heads.append(torch.stack(outputs))
        y = attention.norm(torch.cat(heads, dim=-1))
        if attention.gate is not None:
            y = y * torch.sigmoid(attention.gate(image))
        images.append(attention.proj(y))
    return torch.stack(images)


def build(seed: int = 0, **options) -> CombinerAttention:
    torch.manual_seed(seed)
    return randomised(create_attention('combiner', 8, 2, **{'qkv_bias': True, 'dtype': torch.float64, **options}))


def inputs(grid, batch=1):
    return torch.randn(batch, grid.num_tokens, 8, dtype=torch.float64, requires_grad=True)


def check(attention, grid, batch=1):
    """Cells both ways: in the order of windows, and, as for sizes that are symbols, padded and masked."""
    x = inputs(grid, batch)
    given = [x, *attention.parameters()]
    expected = reference(attention, x, grid)
    wanted = [expected, *gradients(expected, given)]
    for padded in (False, True) if attention.pattern == 'cells' else (False,):
        with pytest.MonkeyPatch.context() as patch:
            if padded:
                patch.setattr(cells, 'are_numbers', lambda *sizes: False)
            y = attention(x, grid)
        for actual, one in zip([y, *gradients(y, given)], wanted, strict=True):
            assert (actual - one).abs().max() <= 1e-12 * one.abs().max().clamp(min=1e-3), padded


class TestAgainstLoops:
    @pytest.mark.parametrize('summary', SUMMARIES)
    @pytest.mark.parametrize(('window_size', 'cell_size', 'shift'), [(4, 2, False), (3, 3, True), (4, 3, True)])
    def test_summaries(self, window_size, cell_size, shift, summary):
        options = dict(window_size=window_size, cell_size=cell_size, summary=summary, shift=shift)
        check(build(**options), PatchGrid(5, 9, prefix=1))

    @pytest.mark.parametrize('grid', GRIDS)
    @pytest.mark.parametrize(
        ('window_size', 'cell_size', 'prefix'), [(*cut, 5 * (i % 2)) for i, cut in enumerate(CUTS)]
    )
    def test_grids(self, grid, window_size, cell_size, prefix):
        options = dict(window_size=window_size, cell_size=cell_size, shift=prefix == 0)
        check(build(**options), PatchGrid(*grid, prefix), batch=2 if grid == (6, 4) else 1)

    @pytest.mark.parametrize('reach', [0, 1, 2, 7])
    @pytest.mark.parametrize(('grid', 'window_size'), [((5, 9), 2), ((7, 4), 2), ((1, 9), (4, 2)), ((9, 4), (2, 4))])
    def test_windows_beyond_reach(self, grid, window_size, reach):
        options = dict(window_size=window_size, reach=reach, shift=grid[0] > 5)
        options |= dict(cell_size=2) if reach else {}
        check(build(**options), PatchGrid(*grid, prefix=1), batch=2 if grid[0] == 1 else 1)

    @pytest.mark.parametrize('summary', SUMMARIES)
    def test_without_counts(self, summary):
        check(build(window_size=4, cell_size=2, summary=summary, count_bias=False), PatchGrid(6, 7, prefix=1))

    @pytest.mark.parametrize('fused', [True, False])
    def test_options_of_timm(self, fused):
        attention = build(window_size=4, cell_size=2, **EVERYTHING)
        attention.fused_attn = fused
        check(attention, PatchGrid(7, 5, prefix=2), batch=2)


class TestAxial:
    @pytest.mark.parametrize('fused', [True, False])
    @pytest.mark.parametrize('count_bias', [True, False])
    @pytest.mark.parametrize('summary', SUMMARIES)
    def test_summaries(self, summary, count_bias, fused):
        attention = build(pattern='axial', summary=summary, count_bias=count_bias)
        attention.fused_attn = fused
        check(attention, PatchGrid(4, 5, prefix=1), batch=2)

    @pytest.mark.parametrize('transpose', [True, False])
    @pytest.mark.parametrize('grid', [(7, 13), (1, 9), (9, 1), (2, 3), (1, 1)])
    def test_grids(self, grid, transpose):
        check(build(pattern='axial', transpose=transpose), PatchGrid(*grid, prefix=5 * transpose))

    @pytest.mark.parametrize('summary', SUMMARIES)
    @pytest.mark.parametrize('grid', [(1, 5), (4, 6)])
    def test_sizes_that_are_symbols(self, monkeypatch, grid, summary):
        monkeypatch.setattr(axial, 'are_numbers', lambda *sizes: False)
        grid = PatchGrid(*grid)
        for count_bias in (True, False):
            attention, x = build(pattern='axial', summary=summary, count_bias=count_bias), inputs(grid)
            with torch.no_grad():
                assert torch.allclose(attention(x, grid), reference(attention, x, grid), atol=1e-13)

    @pytest.mark.parametrize('summary', SUMMARIES)
    def test_gradcheck(self, summary):
        attention, grid = build(pattern='axial', summary=summary), PatchGrid(3, 4, prefix=1)
        assert torch.autograd.gradcheck(lambda x: attention(x, grid), inputs(grid))

    def test_equal_rows_are_summarised_without_loss(self):
        attention, grid = build(pattern='axial'), PatchGrid(4, 6)
        x = torch.randn(2, 1, 6, 8, dtype=torch.float64).expand(-1, 4, -1, -1).flatten(1, 2)
        exact = create_attention('full', 8, 2, qkv_bias=True, dtype=torch.float64)
        exact.load_state_dict(attention.state_dict())
        assert torch.allclose(attention(x, grid), exact(x, grid), atol=1e-13)

    def test_num_attended(self):
        attention = build(pattern='axial')
        assert attention.num_attended(PatchGrid(7, 13, prefix=1)) == 1 + 13 + 6 + 12
        assert attention.num_attended(PatchGrid(1, 9, prefix=1)) == 10
        attention.transpose = True
        assert attention.num_attended(PatchGrid(7, 13)) == 7 + 12 + 6

    def test_rows_and_columns_change_places_in_a_model(self):
        of_layers = [layer_options('combiner', dict(pattern='axial'), layer, 4, (8, 8)) for layer in range(3)]
        assert [options['transpose'] for options in of_layers] == [False, True, False]
        assert build(**of_layers[1]).options == dict(
            pattern='axial', summary='tangent', count_bias=True, transpose=True
        )


@pytest.mark.parametrize('reach', [None, 1])
def test_some_windows_at_a_time(monkeypatch, reach):
    """Chunks of windows, with and without gradients, on the CPU and as GPUs do it, say the same as all at once."""
    attention, grid = build(window_size=3, cell_size=2, reach=reach), PatchGrid(7, 13, prefix=1)
    x = inputs(grid, batch=2)
    whole = attention(x, grid)
    expected = gradients(whole, [x, *attention.parameters()])
    with torch.no_grad():
        without = attention(x, grid)
    for hosts in (device.HOSTS, ()):
        monkeypatch.setattr(device, 'HOSTS', hosts)
        for size in (1, 5000):
            for module in (cells, chunks):
                monkeypatch.setattr(module, 'CHUNK_OF_HOST', size)
            monkeypatch.setattr(chunks, 'CHUNK_OF_GPU', size)
            y = attention(x, grid)
            assert torch.allclose(y, whole, atol=1e-13)
            for actual, wanted in zip(gradients(y, [x, *attention.parameters()]), expected, strict=True):
                assert torch.allclose(actual, wanted, atol=1e-12)
            with torch.no_grad():
                assert torch.allclose(attention(x, grid), without, atol=1e-13)


class TestWindows:
    """`attend_windows`: PyTorch's kernel for CPUs, called directly, says what is written out, forward and backward."""

    def given(self, windows=5, prefix=2, values=4, bias=(2, 3), dtype=torch.float64):
        """Queries, keys and values of windows, those of the prefix, and summaries; the last window sees fewer."""
        shapes = [(2, windows, 3, 6, 4)] * 2 + [(2, windows, 3, 6, values)]
        shapes += [(2, 3, prefix, 4), (2, 3, prefix, values), (2, 3, 7, 4), (2, 3, 7, values), (*bias, 7)]
        tensors = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
        index = torch.randperm(7)[None, :5].repeat(windows, 1).int()
        index[-1, 3:] = -1
        return tensors, index

    def attend(self, tensors, index, fused, dtype=torch.float64):
        q, k, v, *kv_prefix, key, value, bias = (t.to(dtype) for t in tensors)
        how = (0.5, fused, 0.0)
        return torch.cat(chunks.attend_windows(q, k, v, kv_prefix, Summaries(key, value, bias), index, how), dim=1)

    @pytest.mark.parametrize('chunk', [1, 2**23])
    @pytest.mark.parametrize(
        'given', [{}, dict(prefix=0), dict(values=3), dict(values=6), dict(bias=(1, 1)), dict(windows=1)]
    )
    def test_gradients(self, given, chunk, monkeypatch):
        monkeypatch.setattr(chunks, 'CHUNK_OF_HOST', chunk)
        tensors, index = self.given(**given)
        y, expected = (self.attend(tensors, index, fused) for fused in (True, False))
        assert torch.allclose(y, expected, atol=1e-13)
        dy = torch.randn_like(y)
        for some in (tensors, tensors[:1], tensors[3:5], tensors[-1:]):  # not all of them may have gradients
            alone = [t if any(t is each for each in some) else t.detach() for t in tensors]
            for found, wanted in zip(
                *(torch.autograd.grad(self.attend(alone, index, fused), some, dy) for fused in (True, False)),
                strict=True,
            ):
                assert torch.allclose(found, wanted, atol=1e-12)

    def test_half_precision_is_summed_in_float32(self):
        """What many windows share has a gradient from each of them."""
        tensors, index = self.given(windows=500)
        dy = torch.ones(2, 3000, 3, 4, dtype=torch.float64)
        of_halves = torch.autograd.grad(self.attend(tensors, index, True, torch.bfloat16), tensors, dy.bfloat16())
        for found, wanted in zip(
            of_halves, torch.autograd.grad(self.attend(tensors, index, False), tensors, dy), strict=True
        ):
            assert (found - wanted).norm() <= 0.02 * wanted.norm() + 1e-3 * dy.norm()

    @pytest.mark.filterwarnings('ignore:There is a performance drop')
    @pytest.mark.parametrize('fused', [True, False])
    @pytest.mark.parametrize('which', range(8))
    def test_one_of_them_under_torch_func(self, which, fused, monkeypatch):
        monkeypatch.setattr(chunks, 'CHUNK_OF_HOST', 1)
        tensors, index = self.given()
        tensors = [t.detach() for t in tensors]
        several = torch.stack([tensors[which], 2 * tensors[which]])

        def of_one(t):
            return self.attend([*tensors[:which], t, *tensors[which + 1 :]], index, fused)

        assert torch.allclose(torch.func.vmap(of_one)(several), torch.stack([of_one(t) for t in several]), atol=1e-13)
        slopes = torch.func.vmap(torch.func.grad(lambda t: of_one(t).square().sum()))(several)
        for t, slope in zip(several, slopes, strict=True):
            t = t.clone().requires_grad_()
            [wanted] = torch.autograd.grad(of_one(t).square().sum(), t)
            assert torch.allclose(slope, wanted, atol=1e-11)

    @pytest.mark.parametrize('fused', [True, False])
    @pytest.mark.parametrize('needed', [range(8), [0], [3, 7]])
    def test_several_gradients_at_once(self, needed, fused):
        tensors, index = self.given()
        tensors = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors)]
        y = self.attend(tensors, index, fused)
        wanted = [t for t in tensors if t.requires_grad]
        dy = torch.randn(3, *y.shape, dtype=y.dtype)
        at_once = torch.autograd.grad(y, wanted, dy, is_grads_batched=True, retain_graph=True)
        alone = [torch.autograd.grad(y, wanted, each, retain_graph=True) for each in dy]
        for i, found in enumerate(at_once):
            assert torch.allclose(found, torch.stack([each[i] for each in alone]), atol=1e-11)

    def test_autocast_leaves_float64_alone(self):
        tensors, index = self.given()
        with torch.autocast('cpu', torch.bfloat16):
            y = self.attend(tensors, index, True)
        assert y.dtype == torch.float64 and torch.equal(y, self.attend(tensors, index, True))


class TestExact:
    @pytest.mark.parametrize('summary', SUMMARIES)
    @pytest.mark.parametrize('options', [dict(window_size=13), dict(window_size=3, cell_size=1, shift=True)])
    def test_one_window_and_cells_of_one_patch(self, summary, options):
        attention, grid = build(summary=summary, **options), PatchGrid(7, 13, prefix=1)
        exact = create_attention('full', 8, 2, qkv_bias=True, dtype=torch.float64)
        exact.load_state_dict(attention.state_dict())
        x = inputs(grid)
        assert torch.allclose(attention(x, grid), exact(x, grid), atol=1e-13)

    @pytest.mark.parametrize('summary', SUMMARIES)
    def test_equal_keys(self, summary):
        """Patches of a cell that are equal are summarised without loss; so are all keys of a projection of zeros."""
        attention, grid = build(window_size=4, cell_size=2, summary=summary), PatchGrid(8, 12)
        x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
        x = x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1, 2)
        exact = create_attention('full', 8, 2, qkv_bias=True, dtype=torch.float64)
        exact.load_state_dict(attention.state_dict())
        assert torch.allclose(attention(x, grid), exact(x, grid), atol=1e-13)
        attention.count_bias = False
        assert not torch.allclose(attention(x, grid), exact(x, grid), atol=1e-3)

    @pytest.mark.parametrize('summary', SUMMARIES)
    @pytest.mark.parametrize('count_bias', [True, False])
    def test_weights_sum_to_one(self, summary, count_bias):
        """Of values that are 1, the expectation is 1."""
        attention = build(window_size=4, cell_size=3, summary=summary, count_bias=count_bias)
        with torch.no_grad():
            attention.qkv.weight[16:] = 0
            attention.qkv.bias[16:] = 1
            attention.proj.weight.copy_(torch.eye(8))
            attention.proj.bias.zero_()
        grid = PatchGrid(7, 13, prefix=1)
        assert torch.allclose(attention(inputs(grid, 2), grid), torch.ones((), dtype=torch.float64), atol=1e-13)


@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('options', [dict(window_size=3, cell_size=2, reach=1), dict(pattern='axial')])
def test_rotary_positions(monkeypatch, options, half):
    """Queries and keys are turned first, where they lie."""
    attention, grid = build(**options), PatchGrid(4, 7, prefix=1)
    attention.rotate_half = half
    rope = torch.randn(28, 8, dtype=torch.float64)
    x = inputs(grid)
    actual, project = attention(x, grid, rope), attention.project

    def turned(x):
        q, k, v = project(x)
        return *attention.rotate(q, k, rope, grid.prefix), v

    monkeypatch.setattr(attention, 'project', turned)
    assert torch.allclose(actual, reference(attention, x, grid), atol=1e-13)


def test_a_tangent_is_never_above_what_it_stands_for():
    """What the keys of a cell weigh together, log Σ exp(q·k_j), is met at the mean query and undercut elsewhere."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 1, 9, 4, dtype=torch.float64)
    key, _, bias = summarise(q, k, v, None, 0.5, 'tangent', True)

    def excess(query):
        return (0.5 * query @ k[0, 0, 0].T).logsumexp(-1) - (0.5 * query @ key[0, 0, 0] + bias[0, 0, 0])

    assert excess(q[0, 0, 0].mean(0)) == pytest.approx(0, abs=1e-14)
    assert (excess(5 * torch.randn(1000, 4, dtype=torch.float64)) >= 0).all()
    assert 0 <= bias <= math.log(9)


@pytest.mark.parametrize('summary', SUMMARIES)
def test_gradcheck(summary):
    attention, grid = build(window_size=2, cell_size=(1, 2), summary=summary), PatchGrid(3, 4, prefix=1)
    assert torch.autograd.gradcheck(lambda x: attention(x, grid), inputs(grid))


@pytest.mark.parametrize('summary', SUMMARIES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_large_scores_are_finite(summary, dtype):
    torch.manual_seed(0)
    attention = create_attention('combiner', 8, 2, window_size=3, cell_size=2, summary=summary).to(dtype)
    grid = PatchGrid(5, 7, prefix=1)
    x = (1e3 * torch.randn(2, grid.num_tokens, 8)).to(dtype).requires_grad_()
    q, k, _ = attention.project(x)
    assert (q @ k.mT).abs().max().item() * attention.scale > 1e4
    y = attention(x, grid)
    y.float().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_patches_of_a_cell_may_be_exchanged():
    attention, grid = build(window_size=4, cell_size=2), PatchGrid(8, 8)
    x = inputs(grid)
    patches = torch.arange(64).view(8, 8)
    order = patches.clone()
    order[2:4, 4:6] = patches[2:4, 4:6].flip(0, 1)
    order = order.flatten()
    assert torch.allclose(attention(x[:, order], grid), attention(x, grid)[:, order], atol=1e-13)


def test_windows_alternate_in_a_model():
    shifts = [layer_options('combiner', {}, layer, 4, (8, 8))['shift'] for layer in range(4)]
    assert shifts == [False, True, False, True]
    assert layer_options('combiner', {'shift': False}, 1, 4, (8, 8))['shift'] is False


def test_reach_of_the_whole_grid_changes_nothing():
    grid = PatchGrid(7, 13, prefix=1)
    x = inputs(grid)
    assert torch.allclose(build(window_size=3, reach=4)(x, grid), build(window_size=3)(x, grid), atol=1e-14)


def test_num_attended_with_reach():
    """At 9 × 9 windows of 4 × 4: the own one, 8 by their 4 cells, 72 whole."""
    grid = PatchGrid(36, 36, prefix=1)
    assert build(window_size=4, cell_size=2, reach=1).num_attended(grid) == 1 + 16 + 8 * 4 + 72
    assert build(window_size=4, reach=0).num_attended(grid) == 1 + 16 + 80
    assert build(window_size=(36, 4), cell_size=2, reach=1).num_attended(grid) == 1 + 144 + 2 * 36 + 6


@pytest.mark.parametrize('shift', [False, True])
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize(('window_size', 'cell_size'), CUTS)
def test_num_attended_within_reach_of_all(grid, window_size, cell_size, shift):
    options, grid = dict(window_size=window_size, shift=shift), PatchGrid(*grid, prefix=2)
    cells = dict(cell_size=cell_size)
    assert build(**options, **cells, reach=9).num_attended(grid) == build(**options, **cells).num_attended(grid)
    for reach in range(3):
        cells = dict(cell_size=1) if reach else {}
        assert build(**options, **cells, reach=reach).num_attended(grid) <= grid.num_tokens


@pytest.mark.compiled
@pytest.mark.parametrize('reach', [None, 1, 0])
def test_compiled_where_cells_are_of_one_size(reach):
    torch.compiler.reset()
    cells = {} if reach == 0 else dict(cell_size=2)
    attention, grid = build(window_size=2, **cells, reach=reach), PatchGrid(6, 8, prefix=1)
    compiled = torch.compile(attention, fullgraph=True, backend='eager')
    x = inputs(grid)
    assert torch.allclose(compiled(x, grid), attention(x, grid), atol=1e-13)


@pytest.mark.parametrize('shift', [False, True])
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize(('window_size', 'cell_size'), CUTS)
def test_num_attended(grid, window_size, cell_size, shift):
    attention = build(window_size=window_size, cell_size=cell_size, shift=shift)
    grid = PatchGrid(*grid, prefix=2)
    sets = sets_of(grid, window_size, cell_size, shift)
    cells = {cell for _, cell in sets}
    keys = []
    for own in {window for window, _ in sets}:
        near = sum(window == own for window, _ in sets)
        keys.append((near, 2 + near + sum(window != own for window, _ in cells)))
    largest = max(near for near, _ in keys)
    whole = math.prod(
        min(side, length) for side, length in zip(pair(window_size), (grid.height, grid.width), strict=True)
    )
    if largest == whole:  # else no window is whole
        assert attention.num_attended(grid) == max(n for near, n in keys if near == largest)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(window_size=0), 'window_size must be a positive integer or a pair'),
        (dict(cell_size=(2, 0)), 'cell_size must be a positive integer or a pair'),
        (dict(pattern='rows'), 'pattern must be one of cells, axial'),
        (dict(pattern='axial', window_size=4), 'window_size=4 is of another pattern'),
        (dict(transpose=False), 'transpose=False is of another pattern'),
        (dict(reach=0, cell_size=2), 'cell_size=2 has no effect with reach=0'),
        (dict(reach=-1), 'reach must be None or an integer of at least 0'),
        (dict(summary='median'), 'summary must be one of mean, local, tangent, max'),
        (dict(count_bias=1), 'count_bias must be True or False'),
        (dict(shift='yes'), 'shift must be True or False'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        create_attention('combiner', 8, 2, **options)


@pytest.mark.parametrize('options', [dict(window_size=8), dict(window_size=8, reach=1), dict(pattern='axial')])
def test_no_matrix_of_all_tokens(monkeypatch, options):
    """Nothing is larger than queries, keys and values with a few channels more, forward and backward."""
    monkeypatch.setattr(chunks, 'CHUNK_OF_HOST', 2**16)
    attention, grid = create_attention('combiner', 12, 3, qkv_bias=True, **options), PatchGrid(32, 32)
    with Largest() as largest:
        attention(torch.randn(1, 1024, 12), grid).sum().backward()
    assert largest.numbers <= 1.5 * 3 * 1024 * (12 + 3 * 4)


@pytest.mark.filterwarnings('ignore:There is a performance drop')
@pytest.mark.parametrize(
    'options', [{'window_size': 3, 'cell_size': 1}, {'window_size': 3, 'reach': 0}, {'pattern': 'axial'}], ids=str
)
def test_parameters_that_learn_under_vmap_and_traced(options):
    """Of a model as it is built, whose bias of summaries has a gradient that `torch.func` does not tell of."""
    model = timm.create_model(
        'vit_combiner_tiny', img_size=112, depth=1, embed_dim=12, num_heads=2, num_classes=3, attention_kwargs=options
    )
    model, x = model.double().eval(), torch.randn(2, 3, 112, 112, dtype=torch.float64)
    y = model(x)
    assert torch.allclose(torch.vmap(lambda image: model(image[None])[0])(x), y, atol=1e-12)
    assert torch.allclose(torch.jit.trace(model, x)(x), y, atol=1e-12)
