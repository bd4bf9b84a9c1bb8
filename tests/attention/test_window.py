"""Window attention against its definition, against Swin's, and against exact attention at its limit."""

import copy
import json
import pickle

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

import vit_efficient
from vit_efficient import PatchGrid, create_attention
from vit_efficient.attention import layer_options, swap_attention, window
from vit_efficient.attention.windows import Permutation
from vit_efficient.utils import device

from .test_compressed import EVERYTHING, assert_same, gradients, randomised

GRIDS = ((7, 13), (1, 9), (6, 4), (8, 8))
WINDOWS = (3, 4, (2, 5))
SMALL = dict(embed_dim=32, depth=4, num_heads=2, num_classes=5, img_size=64, patch_size=8)


def window_along(position: int, length: int, side: int, shift: bool) -> int:
    """The number of the window that holds a position of an axis."""
    if side >= length:
        return 0
    first = side // 2 if shift else side
    return 0 if position < first else 1 + (position - first) // side


def windows_of(grid: PatchGrid, window_size, shift: bool) -> list[tuple[int, int]]:
    """The window of each patch, in row-major order."""
    sides = window_size if isinstance(window_size, tuple) else (window_size, window_size)
    return [
        (window_along(row, grid.height, sides[0], shift), window_along(column, grid.width, sides[1], shift))
        for row in range(grid.height)
        for column in range(grid.width)
    ]


def visible(grid: PatchGrid, window_size, shift: bool) -> torch.Tensor:
    """(N, N): whether a query, the row, sees a key, the column."""
    windows = windows_of(grid, window_size, shift)
    sees = torch.zeros(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    for query in range(grid.num_tokens):
        for key in range(grid.num_tokens):
            either_is_prefix = query < grid.prefix or key < grid.prefix
            sees[query, key] = either_is_prefix or windows[query - grid.prefix] == windows[key - grid.prefix]
    return sees


def reference(attention, x, sees):
    """Softmax attention over the keys that a query sees, an image and a head at a time."""
    dim = attention.head_dim
    images = []
    for image in x:
        qkv = attention.qkv(image)
        heads = []
        for head in range(attention.num_heads):
            q, k, v = (qkv[:, (part * attention.num_heads + head) * dim :][:, :dim] for part in range(3))
            scores = attention.q_norm(q) @ attention.k_norm(k).T / dim**0.5
            weights = torch.where(sees, torch.exp(scores - scores.max()), 0)
            heads.append(weights / weights.sum(dim=1, keepdim=True) @ v)
        y = attention.norm(torch.cat(heads, dim=1))
        if attention.gate is not None:
            y = y * torch.sigmoid(attention.gate(image))
        images.append(attention.proj(y))
    return torch.stack(images)


def check(attention, grid, batch=2):
    x = torch.randn(batch, grid.num_tokens, 12, dtype=torch.float64, requires_grad=True)
    expected = reference(attention, x, visible(grid, attention.window, attention.shift))
    assert_same(attention(x, grid), expected, [x, *attention.parameters()], 1e-9)


@pytest.mark.parametrize('prefix', (0, 5))
@pytest.mark.parametrize('shift', (False, True))
@pytest.mark.parametrize('window_size', WINDOWS)
def test_on_gpu(monkeypatch, window_size, shift, prefix):
    """What GPUs do, on the CPU: gradients are gathered, and those of gradients too."""
    monkeypatch.setattr(device, 'HOSTS', ())
    options = dict(window_size=window_size, shift=shift, qkv_bias=True, dtype=torch.float64)
    check(randomised(create_attention('window', 12, 3, **options)), PatchGrid(7, 13, prefix), batch=1)
    order = torch.randperm(5)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: Permutation.apply(x, order, order.argsort()).square(), x)
    assert torch.equal(Permutation.apply(x, order, order.argsort()), x[:, order])

    def summed(x):
        return Permutation.apply(x, order, order.argsort()).square().sum()

    assert torch.allclose(torch.func.grad(summed)(x), 2 * x)
    assert torch.allclose(torch.func.vmap(summed)(x[:, None]), x.square().sum(dim=(1, 2)))
    assert torch.allclose(torch.func.jvp(summed, (x,), (x,))[1], 2 * x.square().sum())


@pytest.fixture(params=[False, True], ids=['numbers', 'symbols'])
def padded(request, monkeypatch):
    """Both ways of computing: by window order, and, as for sizes that are symbols, padded and masked."""
    if request.param:
        monkeypatch.setattr(window, 'are_numbers', lambda *sizes: False)


@pytest.mark.usefixtures('padded')
@pytest.mark.parametrize('shift', [False, True])
class TestAgainstDefinition:
    @pytest.mark.parametrize('prefix', (0, 1, 5))
    @pytest.mark.parametrize('window_size', WINDOWS)
    @pytest.mark.parametrize('grid', GRIDS)
    def test_plain(self, grid, window_size, shift, prefix):
        options = dict(window_size=window_size, shift=shift, qkv_bias=True, dtype=torch.float64)
        check(randomised(create_attention('window', 12, 3, **options)), PatchGrid(*grid, prefix))

    @pytest.mark.parametrize('fused', [True, False])
    @pytest.mark.parametrize(
        'extra', [EVERYTHING, dict(proj_bias=False), dict(gated=True), dict(attn_head_dim=6, qkv_bias=True)]
    )
    @pytest.mark.parametrize('prefix', (0, 5))
    def test_options_of_timm(self, shift, prefix, extra, fused):
        options = dict(window_size=4, shift=shift, dtype=torch.float64, **extra)
        attention = randomised(create_attention('window', 12, 3, **options))
        attention.fused_attn = fused
        check(attention, PatchGrid(7, 13, prefix), batch=1)

    @pytest.mark.parametrize('window_size', (1, 2, (1, 9), (12, 1), (6, 12)))
    @pytest.mark.parametrize('prefix', (0, 1))
    def test_extreme_windows(self, shift, window_size, prefix):
        options = dict(window_size=window_size, shift=shift, qkv_bias=True, dtype=torch.float64)
        attention = randomised(create_attention('window', 12, 3, **options))
        attention.fused_attn = prefix == 1  # without a key at all, fused attention would say 0 and hide it
        check(attention, PatchGrid(7, 13, prefix))


class TestAgainstSwin:
    """timm's Swin block, its position bias set to zero. It rolls the grid, pads it at the end, and masks what wrapped
    around. Padded tokens are not masked: where there are some, its windows see zeros of the input, ours end."""

    def swin(self, attention, grid, window_size, shift):
        sides = window_size if isinstance(window_size, tuple) else (window_size, window_size)
        shift_size = tuple(side // 2 for side in sides) if shift else 0
        block = SwinTransformerBlock(
            12, grid, num_heads=3, window_size=window_size, shift_size=shift_size, dtype=torch.float64
        )
        missing, unexpected = block.attn.load_state_dict(attention.state_dict(), strict=False)
        assert missing == ['relative_position_bias_table'] and not unexpected
        nn.init.zeros_(block.attn.relative_position_bias_table)
        return lambda x: block._attn(x.unflatten(1, grid)).flatten(1, 2)

    def attention(self, window_size, shift):
        options = dict(window_size=window_size, shift=shift, qkv_bias=True, dtype=torch.float64)
        return randomised(create_attention('window', 12, 3, **options))

    @pytest.mark.parametrize('shift', [False, True])
    @pytest.mark.parametrize(
        ('grid', 'window_size'), [((8, 8), 4), ((6, 9), 3), ((4, 15), (2, 5)), ((3, 8), 4), ((4, 4), 4), ((14, 14), 7)]
    )
    def test_windows_that_divide_the_grid(self, grid, window_size, shift):
        attention = self.attention(window_size, shift)
        x = torch.randn(2, grid[0] * grid[1], 12, dtype=torch.float64, requires_grad=True)
        expected = self.swin(attention, grid, window_size, shift)(x)
        assert_same(attention(x, PatchGrid(*grid)), expected, [x], 1e-9)

    @pytest.mark.parametrize(('grid', 'window_size'), [((7, 13), 3), ((9, 10), 4), ((7, 12), (2, 5))])
    def test_padding_is_what_differs(self, grid, window_size):
        """Without a shift: the grid padded by hand gives Swin's outputs, and whole windows are the same anyway."""
        attention = self.attention(window_size, False)
        x = torch.randn(2, *grid, 12, dtype=torch.float64)
        swin = self.swin(attention, grid, window_size, False)(x.flatten(1, 2)).unflatten(1, grid)
        h, w = window_size if isinstance(window_size, tuple) else (window_size, window_size)
        whole = tuple(-(-size // side) * side for size, side in zip(grid, (h, w), strict=True))
        x_padded = nn.functional.pad(x, (0, 0, 0, whole[1] - grid[1], 0, whole[0] - grid[0]))
        by_hand = attention(x_padded.flatten(1, 2), PatchGrid(*whole)).unflatten(1, whole)[:, : grid[0], : grid[1]]
        assert (by_hand - swin).abs().max() <= 1e-9 * swin.abs().max()

        ours = attention(x.flatten(1, 2), PatchGrid(*grid)).unflatten(1, grid)
        differs = (ours - swin).abs().amax(dim=(0, 3)) > 1e-9 * swin.abs().max()
        in_whole_windows = torch.zeros(grid, dtype=torch.bool)
        in_whole_windows[: grid[0] // h * h, : grid[1] // w * w] = True
        assert torch.equal(differs, ~in_whole_windows)

    @pytest.mark.parametrize(('grid', 'window_size'), [((7, 13), 3), ((9, 10), 4), ((7, 12), (2, 5))])
    def test_whole_shifted_windows(self, grid, window_size):
        """Inside the grid both agree. At the border timm, which pads after the roll, may join opposite sides."""
        attention = self.attention(window_size, True)
        x = torch.randn(2, grid[0] * grid[1], 12, dtype=torch.float64)
        swin = self.swin(attention, grid, window_size, True)(x)
        windows = windows_of(PatchGrid(*grid), window_size, True)
        area = window_size[0] * window_size[1] if isinstance(window_size, tuple) else window_size**2
        whole = torch.tensor([windows.count(name) == area for name in windows])
        assert whole.sum() >= area
        error = (attention(x, PatchGrid(*grid)) - swin).abs().amax(dim=(0, 2))
        assert error[whole].max() <= 1e-9 * swin.abs().max() and error[~whole].max() > 1e-3


@pytest.mark.parametrize('shift', [False, True])
@pytest.mark.parametrize('prefix', (0, 1, 5))
@pytest.mark.parametrize('extra', [{}, EVERYTHING], ids=['plain', 'norms-and-gate'])
@pytest.mark.parametrize(('grid', 'window_size'), [((7, 13), (7, 13)), ((7, 13), 20), ((1, 9), 9), ((6, 4), (9, 4))])
def test_one_window_is_exact_attention(grid, window_size, extra, prefix, shift):
    grid = PatchGrid(*grid, prefix)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        exact = Attention(48, 4, qkv_bias=True, dtype=dtype, **extra)
        attention = swap_attention(exact, 'window', window_size=window_size, shift=shift)
        x = torch.randn(1, grid.num_tokens, 48, dtype=dtype, requires_grad=True)
        # Adding the same to all keys changes nothing: that gradient is nothing but rounding.
        parameters = [p for name, p in exact.named_parameters() if name != 'k_norm.bias']
        assert_same(attention(x, grid), exact(x), [x, *parameters], tolerance)
        assert attention.num_attended(grid) == grid.num_tokens


class TestWhoSeesWhom:
    grid = PatchGrid(7, 13, 1)

    def changed_by(self, model, token):
        """The tokens whose output changes with the input of one."""
        x = torch.randn(1, self.grid.num_tokens, 12)
        other = x.clone()
        other[:, token] += 1
        changed = (model(x) != model(other)).any(dim=2)[0]
        return set(changed.nonzero().flatten().tolist())

    @pytest.mark.parametrize('shift', [False, True])
    @pytest.mark.parametrize('patch', (0, 12, 45, 86, 90))
    def test_the_window_and_the_prefix(self, patch, shift):
        attention = create_attention('window', 12, 3, window_size=4, shift=shift)
        windows = windows_of(self.grid, 4, shift)
        expected = {0} | {1 + i for i, name in enumerate(windows) if name == windows[patch]}
        assert self.changed_by(lambda x: attention(x, self.grid), 1 + patch) == expected

    def test_prefix_is_seen_by_all(self):
        attention = create_attention('window', 12, 3, window_size=4)
        assert self.changed_by(lambda x: attention(x, self.grid), 0) == set(range(self.grid.num_tokens))

    def test_two_layers_connect_neighbours(self):
        first, second = (create_attention('window', 12, 3, window_size=4, shift=shift) for shift in (False, True))
        self.grid = PatchGrid(7, 13)  # a prefix token would carry it everywhere
        changed = self.changed_by(lambda x: second(first(x, self.grid), self.grid), 0)
        one, two = windows_of(self.grid, 4, False), windows_of(self.grid, 4, True)
        reached = {two[i] for i, name in enumerate(one) if name == one[0]}
        assert changed == {i for i, name in enumerate(two) if name in reached}
        assert {one[i] for i in changed} == {(0, 0), (0, 1), (1, 0), (1, 1)}


class OnImage(nn.Module):
    """The attention of an image of tokens (B, H, W, C), the first of which is made the prefix too."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(torch.cat([x[:, 0, :1], x.flatten(1, 2)], dim=1), PatchGrid(*x.shape[1:3], prefix=1))


@pytest.mark.parametrize('shift', [False, True])
@pytest.mark.parametrize('window_size', (3, (2, 5), 8, 9))
class TestOpenSizes:
    """An example with one window may not fix their number."""

    sizes = ((8, 8), (7, 13), (13, 25), (9, 16), (64, 10))

    def model(self, window_size, shift):
        options = dict(window_size=window_size, shift=shift, qkv_bias=True, dtype=torch.float64)
        return OnImage(randomised(create_attention('window', 12, 3, **options)))

    @pytest.mark.parametrize('strict', [False, True])
    @pytest.mark.compiled
    def test_export(self, window_size, shift, strict):
        model = self.model(window_size, shift)
        sides = {i: torch.export.Dim(name, min=7, max=64) for i, name in ((1, 'height'), (2, 'width'))}
        x = torch.randn(2, 8, 8, 12, dtype=torch.float64)
        program = torch.export.export(model, (x,), dynamic_shapes={'x': sides}, strict=strict).module()
        for size in self.sizes:
            x = torch.randn(2, *size, 12, dtype=torch.float64)
            assert (program(x) - model(x)).abs().max() <= 1e-9

    @pytest.mark.compiled
    def test_compile(self, window_size, shift):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = self.model(window_size, shift)
        compiled = torch.compile(model, fullgraph=True, backend='eager')
        for size in self.sizes:
            x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
            assert_same(compiled(x), model(x), [x, *model.parameters()], 1e-9)
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2  # one of the first size, one of any


@pytest.mark.parametrize('shift', [False, True])
@pytest.mark.parametrize('fused', [True, False])
def test_bfloat16(shift, fused):
    attention = create_attention('window', 192, 3, window_size=4, shift=shift, qkv_bias=True)
    attention.fused_attn = fused
    grid, x = PatchGrid(14, 14, 1), torch.randn(2, 197, 192)
    expected = attention(x, grid)
    with torch.autocast('cpu', torch.bfloat16):
        y = attention(x, grid)
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() / expected.abs().max() <= 2e-2
    y = attention.to(torch.bfloat16)(x.bfloat16(), grid)
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() / expected.abs().max() <= 2e-2


@pytest.mark.parametrize('fused', [True, False])
def test_dropped_weights_are_scaled_up(fused):
    """As timm's: the mean over many draws is the output without dropout."""
    attention = create_attention('window', 12, 3, window_size=2, attn_drop=0.3, dtype=torch.float64)
    attention.fused_attn = fused
    grid, x = PatchGrid(4, 4, 1), torch.randn(1, 17, 12, dtype=torch.float64)
    mean = attention(x.expand(20_000, -1, -1), grid).mean(dim=0)
    expected = attention.eval()(x, grid)[0]
    assert (mean - expected).abs().max() <= 0.02 * expected.abs().max()


def test_gradients_are_those_of_one_image_at_a_time():
    attention = create_attention('window', 12, 3, window_size=4, shift=True, dtype=torch.float64)
    grid, x = PatchGrid(7, 13, 1), torch.randn(3, 92, 12, dtype=torch.float64, requires_grad=True)
    whole = gradients(attention(x, grid), [x])[0]
    apart = gradients(torch.cat([attention(image[None], grid) for image in x]), [x])[0]
    assert (whole - apart).abs().max() <= 1e-12


def test_copies():
    attention = create_attention('window', 12, 3, window_size=(2, 5), shift=True)
    grid, x = PatchGrid(7, 13), torch.randn(2, 91, 12)
    for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(copied(x, grid), attention(x, grid)) and copied.options == attention.options


def test_the_parameters_are_those_of_timm():
    exact = Attention(12, 3, qkv_bias=True)
    attention = swap_attention(exact, 'window')
    assert list(attention.state_dict()) == list(exact.state_dict()) and not attention.added_state()
    assert attention.qkv.weight is exact.qkv.weight
    back = swap_attention(attention, 'full')
    assert not hasattr(back, 'window_size') and not hasattr(back, 'shift')


def test_num_attended():
    attention = create_attention('window', 12, 3, window_size=(4, 9))
    assert attention.num_attended(PatchGrid(7, 13, 5)) == 5 + 36
    assert attention.num_attended(PatchGrid(3, 8, 1)) == 1 + 24


def test_options_and_repr_tell_the_truth():
    assert create_attention('window', 12, 3).options == dict(window_size=7, shift=False)
    attention = create_attention('window', 12, 3, window_size=[2, 5], shift=True)
    assert json.loads(json.dumps(attention.options)) == dict(window_size=[2, 5], shift=True) == attention.options
    assert create_attention('window', 12, 3, **attention.options).options == attention.options
    assert 'window_size=(2, 5), shift=True' in repr(attention)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(window_size=0), 'window_size=0'),
        (dict(window_size=-1), 'window_size=-1'),
        (dict(window_size=2.5), r'window_size=2\.5'),
        (dict(window_size=True), 'window_size=True'),
        (dict(window_size='7'), "window_size='7'"),
        (dict(window_size=None), 'window_size=None'),
        (dict(window_size=(7,)), r'window_size=\(7,\)'),
        (dict(window_size=(7, 0)), r'window_size=\(7, 0\)'),
        (dict(window_size=(2, 3, 4)), r'window_size=\(2, 3, 4\)'),
        (dict(shift=1), 'shift=1'),
        (dict(shift=None), 'shift=None'),
        (dict(window=7), r"no option 'window'; did you mean window_size\? \(it has window_size, shift\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_attention('window', 12, 3, **options)


class TestLayers:
    def test_options_of_a_layer(self):
        for layer in range(4):
            options = layer_options('window', dict(window_size=4), layer, 4, (8, 8))
            assert options == dict(window_size=4, shift=layer % 2 == 1)
            assert layer_options('window', dict(shift=False), layer, 4, (8, 8)) == dict(shift=False)
            assert layer_options('window', dict(shift=True), layer, 4, (8, 8)) == dict(shift=True)

    def test_model(self, tmp_path):
        model = timm.create_model('vit_window_tiny', attention_kwargs=dict(window_size=3), **SMALL).eval()
        assert model.attention_spec() == [
            ('window', dict(window_size=3, shift=shift)) for shift in (False, True, False, True)
        ]
        assert vit_efficient.kept_tokens(model) == [1 + 9] * 4
        vit_efficient.save_model(model, tmp_path)
        rebuilt = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        assert rebuilt.attention_spec() == model.attention_spec()
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(rebuilt(x), model(x))

    def test_shift_given(self):
        model = timm.create_model('vit_window_tiny', attention_kwargs=dict(shift=False), **SMALL)
        assert not any(block.attn.shift for block in model.blocks)

    def test_converted(self):
        """Layers are counted in the model, not among those converted."""
        model = timm.create_model('vit_tiny_patch16_224', **SMALL).eval()
        vit_efficient.convert(model, 'window', layers=[1, 2, 3], window_size=4)
        assert [getattr(block.attn, 'shift', None) for block in model.blocks] == [None, True, False, True]
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)

    def test_products(self):
        """Counted exactly: each patch's window and the prefix, and the prefix with all."""
        model = timm.create_model('vit_window_tiny', attention_kwargs=dict(window_size=4), **SMALL).eval()
        exact = timm.create_model('vit_full_tiny', **SMALL).eval()
        sees = [visible(PatchGrid(8, 8, 1), 4, shift).sum().item() for shift in (False, True, False, True)]
        difference = sum(2 * 32 * (65 * 65 - pairs) for pairs in sees)
        counts = [vit_efficient.count_flops(m, input_size=(3, 64, 64)).products for m in (exact, model)]
        assert counts[0] - counts[1] == difference
