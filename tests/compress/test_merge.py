"""Token merging against a matcher in loops, and what it is in attentions and models."""

import copy

import pytest
import timm
import torch
from timm.layers import Attention
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import vit_efficient
from tests.attention import rotations
from tests.attention.reference import softmax_attention
from tests.attention.rotations import DIM, FAMILIES, HEADS, rope_at, turn
from tests.attention.test_compressed import EVERYTHING, assert_same, randomised
from tests.threads import at_once
from vit_efficient import PatchGrid, count_flops, create_attention
from vit_efficient.attention import functional, swap_attention
from vit_efficient.compress import get_compressor
from vit_efficient.compress import merge as merging

GRIDS = ((7, 13), (8, 8), (1, 9))


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def best_first(scores):
    """The numbers of the largest scores, of equal ones the first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def groups_in_loops(tokens, height, width, kept, local_first=False):
    """Lists of patches, by the rules one after the other: each list begins with the patch that others joined."""
    path = [
        row * width + (column if row % 2 == 0 else width - 1 - column)
        for row in range(height)
        for column in range(width)
    ]
    groups = [[patch] for patch in path]

    def mean(group):
        return tokens[group].mean(dim=0)

    if local_first:
        cells = [
            [row * width + column, row * width + column + 1, (row + 1) * width + column, (row + 1) * width + column + 1]
            for row in range(0, height - 1, 2)
            for column in range(0, width - 1, 2)
        ]
        alike = [sum(cosine(tokens[a], tokens[b]) for a in cell for b in cell if a < b) for cell in cells]
        for i in best_first(alike)[: (len(path) - kept) // 6]:
            groups = [group if group != cells[i][:1] else cells[i] for group in groups if group[0] not in cells[i][1:]]
    while len(groups) > kept:
        a, b = groups[::2], groups[1::2]
        scores = [[cosine(mean(one), mean(other)) for other in b] for one in a]
        nearest = [best_first(row)[0] for row in scores]
        count = min(len(groups) - kept, -(-len(groups) // 3))
        merged = best_first([row[i] for row, i in zip(scores, nearest, strict=True)])[:count]
        for i in merged:
            b[nearest[i]].extend(a[i])
        groups = [group for i, group in enumerate(groups) if i % 2 or i // 2 not in merged]
    return sorted(groups)


def matrices(groups, patches, prefix):
    """Down, up and how many each token stands for, the prefix tokens before."""
    down = torch.zeros(len(groups), patches, dtype=torch.float64)
    for i, group in enumerate(groups):
        down[i, group] = 1 / len(group)
    counts = torch.tensor([1.0] * prefix + [len(group) for group in groups], dtype=torch.float64)
    one = torch.eye(prefix, dtype=torch.float64)
    return torch.block_diag(one, down), torch.block_diag(one, (down > 0).double().T), counts


def means_of_places(groups, width):
    return [
        tuple(sum(axis) / len(group) for axis in zip(*(divmod(p, width) for p in group), strict=True))
        for group in groups
    ]


@pytest.mark.parametrize('local_first', [False, True])
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize(
    'options', [dict(keep_ratio=0.25), dict(num_tokens=7), dict(keep_ratio=0.8), dict(num_tokens=1)]
)
def test_against_loops(grid, options, local_first):
    """What is merged, the means, the way up, and gradients."""
    compress, grid = get_compressor('merge')(**options, local_first=local_first), PatchGrid(*grid)
    x = torch.randn(3, grid.num_patches, 6, dtype=torch.float64, requires_grad=True)
    y, groups = compress.down(x, grid)
    up = compress.up(compress.down(x, grid)[0], grid, groups)
    expected, gone_up = [], []
    for i, tokens in enumerate(x):
        found = groups_in_loops(tokens.detach(), grid.height, grid.width, compress.num_kept(grid), local_first)
        assert [sorted(group) for group in found] == [
            (groups.owner[i] == n).nonzero().flatten().tolist() for n in range(len(found))
        ]
        assert groups.sizes[i].tolist() == [len(group) for group in found]
        assert groups.order[i].tolist() == [patch for group in found for patch in sorted(group)]
        down, back, _ = matrices(found, grid.num_patches, 0)
        expected.append(down @ tokens)
        gone_up.append(back @ down @ tokens)
    assert_same(y, torch.stack(expected), [x], 1e-12)
    assert_same(up, torch.stack(gone_up), [x], 1e-12)
    # Values of heads follow, and one image alone has the same groups.
    v = torch.randn(3, 2, grid.num_patches, 5, dtype=torch.float64)
    kept, same = compress.down(v, grid, groups)
    assert same is groups
    torch.testing.assert_close(kept[:, 1], compress.down(v[:, 1], grid, groups)[0])
    torch.testing.assert_close(compress.up(kept, grid, groups)[1, 0], compress.up(kept[:, 0], grid, groups)[1])
    assert torch.equal(compress.down(x[1:2], grid)[1].owner, groups.owner[1:2])


def test_keys_of_all_heads_say():
    grid, k = PatchGrid(4, 6), torch.randn(2, 3, 24, 5)
    compress = get_compressor('merge')()
    torch.testing.assert_close(compress.down(k, grid)[1].owner, compress.down(k.mean(dim=1), grid)[1].owner)


@pytest.mark.parametrize('local_first', [False, True])
def test_equal_tokens(local_first):
    """Of pairs that are equally similar the first on the path are merged, every time; zeros are no NaN."""
    compress, grid = get_compressor('merge')(num_tokens=6, local_first=local_first), PatchGrid(4, 4)
    for x in (torch.ones(2, 16, 3), torch.zeros(2, 16, 3)):
        y, groups = compress.down(x, grid)
        assert torch.equal(y, x[:, :6]) and torch.equal(groups.owner[0], groups.owner[1])
    if local_first:  # the first cell; this one and others join patch 2, then this one and patch 8 patch 7
        expected = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 3, 4, 5]
    else:  # six patches join patch 1; then this one and others patch 3
        expected = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 3, 4, 5, 0]
    assert groups.owner[0].tolist() == expected


def test_in_chunks(monkeypatch):
    x, grid = torch.randn(2, 91, 6), PatchGrid(7, 13)
    compress = get_compressor('merge')()
    expected = compress.down(x, grid)[1]
    monkeypatch.setattr(merging, 'CHUNK_OF_HOST', 100)
    assert all(torch.equal(a, b) for a, b in zip(compress.down(x, grid)[1], expected, strict=True))


def slow(attention, x, grid, rope=None, angles=None):
    """The attention of each image by loops and matrices, in the equations of each place."""
    place, prefix, local_first = attention.place, grid.prefix, attention.compress.down.local_first
    fine = rotations.patches(grid.height, grid.width)

    def heads_of(tokens):
        qkv = tokens @ attention.qkv.weight.T
        qkv = qkv if attention.qkv.bias is None else qkv + attention.qkv.bias
        return qkv.unflatten(1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)

    images = []
    for image in x:
        kind = image[prefix:] if place in ('x', 'block') else heads_of(image)[1].mean(dim=0)[prefix:]
        found = groups_in_loops(kind.detach(), grid.height, grid.width, attention.compress.num_kept(grid), local_first)
        down, up, counts = matrices(found, grid.num_patches, prefix)
        coarse = means_of_places(found, grid.width)
        seen = down @ image if place in ('x', 'block') else image
        outputs = []
        for head, (q, k, v) in enumerate(heads_of(seen).transpose(0, 1)):
            if place in ('kv', 'qkv'):
                k, v = down @ k, down @ v
            q = down @ q if place == 'qkv' else q
            q, k = attention.q_norm(q), attention.k_norm(k)
            if angles is not None:
                q = turn(q, angles, head, fine if place == 'kv' else coarse, prefix, attention.rotate_half)
                k = turn(k, angles, head, coarse, prefix, attention.rotate_half)
            outputs.append(softmax_attention(q, k, v, counts if attention.compress.count_bias else None))
        y = torch.cat(outputs, dim=1)

        def gated(y, source):
            y = attention.norm(y)
            return y if attention.gate is None else y * torch.sigmoid(attention.gate(source))

        y = gated(y, seen) if place in ('x', 'block') else y
        y = up @ y if place != 'kv' else y
        y = gated(y, image) if place in ('kv', 'qkv') else y
        images.append(attention.proj(y))
    return torch.stack(images)


def whole(attention, x, grid, rope=None):
    """What the attention makes of all tokens, also where its block goes down and up."""
    if attention.place != 'block':
        return attention(x, grid, rope)
    y, state = attention.down(x, grid)
    return attention.up(attention(y, grid, rope, state=state), grid, state)


PLACES = ('kv', 'qkv', 'x', 'block')


@pytest.mark.parametrize('place', PLACES)
class TestAttention:
    @pytest.mark.parametrize('prefix', (0, 1, 5))
    @pytest.mark.parametrize('grid', GRIDS)
    @pytest.mark.parametrize('options', [{}, dict(count_bias=False, local_first=True, fused=False)], ids=str)
    def test_against_loops(self, place, grid, prefix, options):
        fused, grid = options.get('fused', True), PatchGrid(*grid, prefix)
        options = {name: value for name, value in options.items() if name != 'fused'}
        attention = create_attention('merge', 12, 3, qkv_bias=True, place=place, dtype=torch.float64, **options)
        randomised(attention).fused_attn = fused
        x = torch.randn(2, grid.num_tokens, 12, dtype=torch.float64, requires_grad=True)
        inputs = [x, *attention.parameters()]
        assert_same(whole(attention, x, grid), slow(attention, x, grid), inputs, 1e-9)

    def test_with_norms_and_a_gate(self, place):
        attention = randomised(create_attention('merge', 12, 3, place=place, dtype=torch.float64, **EVERYTHING))
        x, grid = torch.randn(1, 92, 12, dtype=torch.float64, requires_grad=True), PatchGrid(7, 13, 1)
        assert_same(whole(attention, x, grid), slow(attention, x, grid), [x, *attention.parameters()], 1e-9)

    @pytest.mark.parametrize('family', FAMILIES)
    @pytest.mark.parametrize('prefix', [0, 5])
    def test_rotary_positions(self, place, family, prefix):
        """Each token is turned at the mean coordinate of its patches."""
        grid, angles = PatchGrid(7, 13, prefix), FAMILIES[family](7, 13)
        attention = create_attention(
            'merge',
            HEADS * DIM,
            HEADS,
            place=place,
            qkv_bias=True,
            dtype=torch.float64,
            qk_norm=True,
            norm_layer=torch.nn.LayerNorm,
        )
        randomised(attention).rotate_half = family == 'dinov3'
        x = torch.randn(2, grid.num_tokens, HEADS * DIM, dtype=torch.float64)
        rope = rope_at(angles, rotations.patches(7, 13), family == 'dinov3')
        expected = slow(attention, x, grid, angles=angles)
        shapes = [rope, rope.expand(2, -1, -1, -1)]
        if family != 'mixed':
            shapes += [rope[0], rope[:1].expand(2, -1, -1, -1)]
        for given in shapes:
            assert (whole(attention, x, grid, given) - expected).abs().max() <= 1e-9

    @pytest.mark.parametrize('extra', [{}, EVERYTHING], ids=['plain', 'norms-and-gate'])
    @pytest.mark.parametrize('local_first', [False, True])
    def test_nothing_merged_is_exact_attention(self, place, extra, local_first):
        """Bit for bit, with rotary positions too."""
        exact = swap_attention(Attention(24, 3, qkv_bias=True, **extra), 'full')
        attention = swap_attention(exact, 'merge', keep_ratio=1, place=place, local_first=local_first)
        for size in (*GRIDS, (1, 1)):
            grid = PatchGrid(*size, 5)
            x, rope = torch.randn(2, grid.num_tokens, 24), torch.randn(grid.num_patches, 16)
            assert torch.equal(whole(attention, x, grid), exact(x, grid))
            assert torch.equal(whole(attention, x, grid, rope), exact(x, grid, rope))

    def test_twice_and_in_threads(self, place):
        attention = create_attention('merge', 12, 3, place=place)
        inputs = [(torch.randn(2, 5 + h * w, 12), PatchGrid(h, w, 5)) for h, w in GRIDS]
        expected, found = [whole(attention, *each) for each in inputs], []
        at_once(*[lambda: found.append([whole(attention, *each) for each in inputs])] * 3)
        assert len(found) == 3
        assert all(torch.equal(a, b) for each in found for a, b in zip(each, expected, strict=True))


def test_the_bias_is_a_channel_on_gpus(monkeypatch):
    attention = create_attention('merge', 48, 3, dtype=torch.float64)
    grid, x = PatchGrid(7, 13, 5), torch.randn(2, 96, 48, dtype=torch.float64)
    expected, seen = attention(x, grid), []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(functional, 'on_gpu', lambda x: True)
    monkeypatch.setattr(
        F, 'scaled_dot_product_attention', lambda *args, **kw: seen.append(kw['attn_mask']) or fused(*args, **kw)
    )
    assert (attention(x, grid) - expected).abs().max() <= 1e-12
    assert seen == [None]


def test_half_precision_does_not_decide():
    """Of tokens that bfloat16 holds exactly, the groups are those of float64."""
    x = torch.randn(2, 91, 24).bfloat16()
    compress, grid = get_compressor('merge')(), PatchGrid(7, 13)
    with torch.autocast('cpu', torch.bfloat16):
        owner = compress.down(x, grid)[1].owner
    assert torch.equal(owner, compress.down(x.double(), grid)[1].owner)


SMALL = dict(embed_dim=24, depth=2, num_heads=3, num_classes=5, patch_size=8, dynamic_img_size=True)


@pytest.mark.parametrize('place', PLACES)
def test_in_a_model(place):
    """Images of several sizes in one batch, and crops of two sizes checkpointed together, have what each has alone."""
    torch.manual_seed(0)
    options = dict(place=place, keep_ratio=0.3)
    model = timm.create_model('vit_merge_rope_tiny', img_size=64, **SMALL, attention_kwargs=options)
    model = randomised(model).double().eval()
    images = [torch.randn(3, *size, dtype=torch.float64) for size in ((56, 104), (64, 64), (56, 104), (8, 72))]
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-10, rtol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(alone.square().sum(), parameters)
    for use_reentrant in (True, False):
        crops = [image[None].requires_grad_() for image in images]
        y = torch.cat([checkpoint(model, crop, use_reentrant=use_reentrant) for crop in crops])
        y.square().sum().backward()
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
            parameter.grad = None


def test_converted():
    model = timm.create_model('vit_tiny_patch16_224', img_size=64, **{**SMALL, 'dynamic_img_size': False}).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    for place in PLACES:
        converted = vit_efficient.convert(copy.deepcopy(model), 'merge', keep_ratio=1, place=place)
        torch.testing.assert_close(converted(x), expected)


def test_flops_by_hand():
    """Of 4,096 patches the keys' means of 64 channels are compared, every second one with the others, in each round."""
    n, d, head = 4096, 192, 64
    for m, rounds in ((1024, (2048**2, 1365**2, 910**2, 606 * 607)), (3000, (2048**2,))):
        options = dict(num_tokens=m)
        model = timm.create_model(
            'vit_merge_tiny', img_size=1024, depth=1, class_token=False, global_pool='avg', attention_kwargs=options
        )
        count = count_flops(model, (3, 1024, 1024))
        matching = sum(rounds) * head
        assert count.by_module['blocks.0.attn.compress.down'] == count.by_role['transform']
        assert count.by_operator['bmm'] == matching
        assert matching < count.by_role['transform'] <= 1.05 * matching
        assert count.by_role['attention products'] == 2 * n * m * d


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_tokens=(3, 4)), r'num_tokens must be an integer.*\(3, 4\)'),
        (dict(count_bias=1), 'count_bias'),
        (dict(local_first='yes'), "local_first must be True or False, got local_first='yes'"),
        (dict(keep_ratio=0), 'keep_ratio=0'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_attention('merge', 12, 3, **options)


def test_no_relative_bias():
    model = timm.create_model('beit_base_patch16_224', img_size=64, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="'merge': the keys kept are mixtures of patches and no cells.*use 'pool'"):
        vit_efficient.convert(model, 'merge')


@pytest.mark.compiled
def test_open_sizes_need_a_ratio():
    model = timm.create_model('vit_merge_tiny', img_size=64, **SMALL, attention_kwargs=dict(num_tokens=9)).eval()
    side = {axis: 8 * torch.export.Dim(f'side{axis}', min=4, max=64) for axis in (2, 3)}
    with pytest.raises(Exception, match='num_tokens=9 needs a fixed image size; give keep_ratio'):
        torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(side,))
