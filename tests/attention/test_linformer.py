"""Linformer against its equations, against a public implementation, at its limit, and as the image size changes."""

import copy
import json
import pickle

import pytest
import timm
import torch
from timm.layers import Attention
from timm.optim import create_optimizer_v2
from torch import nn

import vit_efficient
from vit_efficient import PatchGrid, create_attention, dct
from vit_efficient.attention import swap_attention
from vit_efficient.compress.budget import Budget, kept_grid
from vit_efficient.compress.learned import SHARING
from vit_efficient.compress.maps import Maps, follow

from .reference import cells, linformer
from .test_compressed import EVERYTHING, assert_same, randomised

SMALL = dict(embed_dim=32, depth=3, num_heads=2, num_classes=5, img_size=64, patch_size=8)


def build(options=None, **arguments):
    torch.manual_seed(0)
    return timm.create_model('vit_linformer_tiny', attention_kwargs=options or {}, **{**SMALL, **arguments}).eval()


def weight_of(compress, part, head):
    """The weight of one head's keys or values, whatever is shared."""
    weight = (compress.down if part == 'k' else compress.ways_down[1]).weight
    return weight[head if weight.shape[0] > 1 else 0]


def project_linear(compress):
    return lambda part, head, patches: weight_of(compress, part, head).flatten(1) @ patches


def project_conv(compress, height, width):
    """Kernel and stride alike, written out: the sum over the patches under the kernel, zeros beyond the grid."""

    def project(part, head, patches):
        weight = weight_of(compress, part, head)  # (D, y, x)
        rows, columns = weight.shape[1:]
        kept = []
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                total = torch.zeros(patches.shape[1], dtype=torch.float64)
                for y in range(min(rows, height - top)):
                    for x in range(min(columns, width - left)):
                        total = total + weight[:, y, x] * patches[(top + y) * width + left + x]
                kept.append(total)
        return torch.stack(kept)

    return project


def project_cells(compress, height, width, largest):
    groups = cells(height, width, kept_grid(height, width, compress.budget))

    def project(part, head, patches):
        return torch.stack([patches[g].amax(0) if largest else patches[g].mean(0) for g in groups])

    return project


def check(grid, project_with, batch=2, **options):
    attention = randomised(
        create_attention('linformer', 12, 3, grid_size=(grid.height, grid.width), dtype=torch.float64, **options)
    )
    x = torch.randn(batch, grid.num_tokens, 12, dtype=torch.float64, requires_grad=True)
    for general in (False, True):
        if general:
            attention.fused_attn = False
            attention.compress.commutes = False
        expected = linformer(attention, x, grid.prefix, project_with(attention.compress))
        assert_same(attention(x, grid), expected, [x, *attention.parameters()], 1e-9)


class TestAgainstEquations:
    @pytest.mark.parametrize('sharing', SHARING)
    @pytest.mark.parametrize('prefix', (0, 5))
    @pytest.mark.parametrize('grid', ((7, 13), (1, 9)))
    def test_linear(self, sharing, grid, prefix):
        check(PatchGrid(*grid, prefix), project_linear, sharing=sharing, num_tokens=8, qkv_bias=True)

    @pytest.mark.parametrize('sharing', ('none', 'headwise'))
    @pytest.mark.parametrize('extra', [EVERYTHING, dict(gated=True), dict(proj_bias=False)])
    def test_linear_with_norms_and_gates(self, sharing, extra):
        check(PatchGrid(7, 13, 1), project_linear, batch=1, sharing=sharing, num_tokens=8, **extra)

    @pytest.mark.parametrize('sharing', SHARING)
    @pytest.mark.parametrize('prefix', (0, 5))
    @pytest.mark.parametrize('grid', ((7, 13), (8, 4)))
    def test_conv(self, sharing, grid, prefix):
        check(
            PatchGrid(*grid, prefix),
            lambda compress: project_conv(compress, *grid),
            **dict(projection='conv', sharing=sharing, keep_ratio=0.2, qkv_bias=True),
        )

    @pytest.mark.parametrize('projection', ('mean', 'max'))
    @pytest.mark.parametrize('prefix', (0, 5))
    @pytest.mark.parametrize('grid', ((7, 13), (8, 4)))
    def test_mean_and_max(self, projection, grid, prefix):
        check(
            PatchGrid(*grid, prefix),
            lambda compress: project_cells(compress, *grid, projection == 'max'),
            **dict(projection=projection, keep_ratio=0.2, qkv_bias=True),
        )

    @pytest.mark.parametrize('projection', ('mean', 'max', 'conv'))
    @pytest.mark.parametrize('num_tokens', (7, 9))
    def test_one_dimensional(self, projection, num_tokens):
        def project_with(compress):
            if projection == 'conv':
                return project_conv(compress, 1, 91)
            return project_cells(compress, 1, 91, projection == 'max')

        check(PatchGrid(7, 13, 1), project_with, projection=projection, num_tokens=num_tokens, axes='1d')


@pytest.mark.parametrize('sharing', ('headwise', 'key-value'))
def test_public_implementation(sharing):
    """The `linformer` package, its weights copied across. Where it shares E and F, values are its keys."""
    public = pytest.importorskip('linformer')
    theirs = public.LinformerSelfAttention(24, 91, k=10, heads=3, share_kv=sharing == 'key-value').double()
    ours = create_attention('linformer', 24, 3, grid_size=(7, 13), num_tokens=10, sharing=sharing, dtype=torch.float64)
    to_v = theirs.to_k if sharing == 'key-value' else theirs.to_v
    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([theirs.to_q.weight, theirs.to_k.weight, to_v.weight]))
        ours.proj.load_state_dict(theirs.to_out.state_dict())
        ours.compress.down.weight.copy_(theirs.proj_k.T.reshape(1, 10, 7, 13))
        if sharing == 'headwise':
            ours.compress.down_values.weight.copy_(theirs.proj_v.T.reshape(1, 10, 7, 13))
    x = torch.randn(2, 91, 24, dtype=torch.float64, requires_grad=True)
    assert_same(ours(x, PatchGrid(7, 13)), theirs(x), [x], 1e-9)


@pytest.mark.parametrize('sharing', SHARING)
@pytest.mark.parametrize('prefix', (0, 1, 5))
def test_identity_is_exact_attention(sharing, prefix):
    exact = Attention(48, 4, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    attention = swap_attention(exact, 'linformer', num_tokens=91, grid_size=(7, 13), sharing=sharing)
    for way in attention.compress.ways_down:
        way.weight.data.copy_(torch.eye(91).reshape(1, 91, 7, 13))
    grid = PatchGrid(7, 13, prefix)
    x = torch.randn(1, grid.num_tokens, 48, requires_grad=True)
    assert_same(attention(x, grid), exact(x), [x, *exact.parameters()], 1e-5)


class TestParameters:
    @pytest.mark.parametrize(
        ('sharing', 'times'), [('none', 2 * 3 * 2), ('headwise', 2 * 3), ('key-value', 3), ('layerwise', 1)]
    )
    @pytest.mark.parametrize(
        ('options', 'each'), [(dict(num_tokens=9), 9 * 64), (dict(projection='conv', num_tokens=(2, 2)), 16 * 16)]
    )
    def test_counts(self, sharing, times, options, each):
        """3 layers, 2 heads of 16 channels, 64 patches: k · N in a matrix, D · N / k in a convolution."""
        plain = timm.create_model('vit_tiny_patch16_224', **SMALL)
        model = build(dict(sharing=sharing, **options))
        added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
        assert added == times * each

    def test_mean_and_max_have_none(self):
        plain = timm.create_model('vit_tiny_patch16_224', **SMALL)
        for projection in ('mean', 'max'):
            assert list(build(dict(projection=projection)).state_dict()) == list(plain.state_dict())

    def test_defaults(self):
        """64 tokens; E and F shared by the heads; keys and values of independent patches keep their scale."""
        first, second = create_attention('linformer', 12, 3, grid_size=(16, 16)).compress.ways_down
        assert first.weight.shape == second.weight.shape == (1, 64, 16, 16) and first is not second
        assert first.weight.std().item() == pytest.approx(1 / 16, rel=0.05)

    def test_a_convolution_begins_as_the_mean(self):
        options = dict(grid_size=(8, 12), keep_ratio=0.25)
        conv = create_attention('linformer', 12, 3, projection='conv', **options)
        mean = create_attention('linformer', 12, 3, projection='mean', **options)
        mean.load_state_dict({k: v for k, v in conv.state_dict().items() if 'compress' not in k})
        x = torch.randn(1, 96, 12)
        assert torch.allclose(conv(x, PatchGrid(8, 12)), mean(x, PatchGrid(8, 12)), atol=1e-6)


class TestLayerwise:
    x = torch.randn(2, 3, 64, 64)

    def model(self, **arguments):
        return build(dict(num_tokens=9, sharing='layerwise'), **arguments)

    def test_one_matrix(self):
        model = self.model()
        assert [key for key in model.state_dict() if model.state_dict()[key].ndim == 4 and 'patch' not in key] == [
            'shared.weight'
        ]
        optimizer = create_optimizer_v2(model, 'adamw', lr=0.1, weight_decay=0.05, layer_decay=0.9)
        held = [p for group in optimizer.param_groups for p in group['params'] if p is model.shared.weight]
        assert len(held) == 1
        before = model(self.x)
        with torch.no_grad():
            model.shared.weight.add_(torch.randn_like(model.shared.weight))
        assert not torch.allclose(model(self.x), before, atol=1e-3)

    def test_all_layers_teach_it(self):
        """Its gradient is the sum of those that layers with a copy each would have."""
        shared, apart = self.model(), build(dict(num_tokens=9, sharing='key-value'))
        state = shared.state_dict()
        matrix = state.pop('shared.weight')
        apart.load_state_dict({**state, **{f'blocks.{i}.attn.compress.down.weight': matrix for i in range(3)}})
        for model in (shared, apart):
            model(self.x).square().sum().backward()
        total = sum(block.attn.compress.down.weight.grad for block in apart.blocks)
        assert (shared.shared.weight.grad - total).abs().max() < 1e-5 * total.abs().max()

    def test_copies_are_whole(self):
        model = self.model()
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(self.x), model(self.x))
            with torch.no_grad():
                copied.shared.weight.zero_()
            assert not torch.equal(copied(self.x), model(self.x))
            assert model.shared.weight.abs().max() > 0

    @pytest.mark.compiled
    def test_compiled(self):
        torch.compiler.reset()
        model = self.model()
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        assert torch.allclose(compiled(self.x), model(self.x), atol=1e-5)
        with torch.no_grad():
            model.shared.weight.mul_(-1)
        assert torch.allclose(compiled(self.x), model(self.x), atol=1e-5)

    def test_state_dict_round_trips(self, tmp_path):
        model = self.model()
        vit_efficient.save_model(model, tmp_path / 'model')
        loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
        assert torch.equal(loaded(self.x), model(self.x))
        with torch.device('meta'):
            other = self.model()
        other.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(other(self.x), model(self.x))

    def test_convert_there_and_back(self):
        model = timm.create_model('vit_tiny_patch16_224', **SMALL).eval()
        plain = copy.deepcopy(model)
        vit_efficient.convert(model, 'linformer', layers=[0, 2], sharing='layerwise', num_tokens=9)
        assert 'shared.weight' in model.state_dict()
        vit_efficient.convert(model, 'linformer', layers=[1], sharing='layerwise', num_tokens=9)
        assert len({id(block.attn.compress.down) for block in model.blocks}) == 1
        vit_efficient.convert(model, 'full')
        assert list(model.state_dict()) == list(plain.state_dict())
        assert torch.equal(model(self.x), plain(self.x))

    def test_a_trained_matrix_stays(self):
        """Whichever layers come to share it later."""
        model = timm.create_model('vit_tiny_patch16_224', **SMALL)
        options = dict(sharing='layerwise', num_tokens=9)
        vit_efficient.convert(model, 'linformer', layers=[1, 2], **options)
        trained = model.shared
        vit_efficient.convert(model, 'linformer', layers=[0], **options)
        assert model.shared is trained and model.blocks[0].attn.compress.down is trained

    def test_pruned_with_its_layers(self):
        model = timm.create_model('vit_tiny_patch16_224', **SMALL)
        vit_efficient.convert(model, 'linformer', layers=[2], sharing='layerwise', num_tokens=9)
        assert model.prune_intermediate_layers([1]) == [1]
        assert not hasattr(model, 'shared') and len(model.blocks) == 2
        model = self.model()
        model.prune_intermediate_layers([1])
        assert 'shared.weight' in model.state_dict()

    def test_alone(self):
        """An attention without a model owns its matrix."""
        attention = create_attention('linformer', 12, 3, grid_size=(7, 13), sharing='layerwise')
        assert set(attention.added_state()) == {'compress.down.weight'}

    def test_two_shapes(self):
        with pytest.raises(ValueError, match=r'blocks\.0\.attn and blocks\.1\.attn have one projection in common'):
            build(dict(num_tokens=[9, 8, 7], sharing='layerwise'))
        model = timm.create_model('vit_tiny_patch16_224', **SMALL)
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match=r'blocks\.0\.attn and blocks\.2\.attn have one projection in common'):
            vit_efficient.convert(
                model, [('linformer', dict(sharing='layerwise', num_tokens=k)) for k in (9, 8)], layers=[0, 2]
            )
        assert type(model) is type(before) and list(model.state_dict()) == list(before.state_dict())


class TestNonUniform:
    @pytest.mark.parametrize(
        ('num_tokens', 'expected'),
        [([9, 6, 4], [9, 6, 4]), (dict(first=16, last=4), [16, 10, 4]), (dict(first=5, last=5), [5, 5, 5])],
    )
    def test_per_layer(self, num_tokens, expected, tmp_path):
        model = build(dict(num_tokens=num_tokens))
        assert vit_efficient.kept_tokens(model) == [1 + k for k in expected]
        vit_efficient.save_model(model, tmp_path)
        json.loads((tmp_path / 'config.json').read_text())
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))

    def test_a_convolution_may_leave_fewer(self):
        """20 tokens are (4, 5) of 8 × 8 patches: kernels of (2, 2), rounded up, leave 16."""
        model = build(dict(projection='conv', num_tokens=20))
        x = torch.randn(1, 3, 64, 64)
        keys = model.blocks[0].attn._compressed_projections(model.patch_embed(x), PatchGrid(8, 8))[1]
        assert keys.numel() == 16 * 32 and vit_efficient.kept_tokens(model) == [17] * 3

    def test_pairs_and_lists(self):
        assert vit_efficient.kept_tokens(build(dict(projection='mean', num_tokens=[(2, 3), 4, (1, 1)]))) == [7, 5, 2]
        assert vit_efficient.kept_tokens(build(dict(projection='mean', num_tokens=[2, 3]))) == [7, 7, 7]
        assert vit_efficient.kept_tokens(build(dict(num_tokens=[2, 3]), depth=2)) == [3, 4]
        rows = dict(projection='mean', axes='1d', num_tokens=[2, 3])
        assert vit_efficient.kept_tokens(build(rows, depth=2)) == [3, 4]

    def test_convert_counts_the_blocks_of_the_model(self):
        model = vit_efficient.convert(
            timm.create_model('vit_tiny_patch16_224', **SMALL), 'linformer', layers=[2], num_tokens=[9, 6, 4]
        )
        assert vit_efficient.kept_tokens(model) == [65, 65, 5]

    @pytest.mark.parametrize(
        ('num_tokens', 'message'),
        [
            ([9, 6], 'lists 2 blocks, there are 3'),
            (dict(first=9), 'first and last'),
            (dict(first=9, last=0), 'first and last'),
            ([9, 6, 0], 'num_tokens=0'),
        ],
    )
    def test_errors(self, num_tokens, message):
        with pytest.raises(ValueError, match=message):
            build(dict(num_tokens=num_tokens))


class TestImageSize:
    """Maps over the grid follow it: a model classifies an image and its enlargement alike."""

    @pytest.mark.parametrize('size', [(12, 20), (7, 13), (14, 26), (5, 4)])
    def test_sums_are_kept(self, size):
        maps = torch.randn(3, 9, 7, 13, dtype=torch.float64)
        assert torch.allclose(follow(maps, size).sum((-2, -1)), maps.sum((-2, -1)))

    def test_products_with_enlarged_images_are_kept(self):
        maps, image = torch.randn(9, 7, 13, dtype=torch.float64), torch.randn(7, 13, dtype=torch.float64)
        larger = follow(maps, (12, 20))
        assert torch.allclose((larger * dct.resample(image, (12, 20))).sum((-2, -1)), (maps * image).sum((-2, -1)))
        assert torch.allclose(follow(larger, (7, 13)), maps)

    @pytest.mark.parametrize('options', [dict(sharing=s) for s in SHARING] + [dict(projection='conv')], ids=str)
    def test_attention_of_enlarged_tokens(self, options):
        """Of tokens enlarged without new frequencies, all see what they saw: their outputs are those, enlarged."""
        attention = create_attention(
            'linformer', 12, 3, grid_size=(6, 8), num_tokens=12, qkv_bias=True, dtype=torch.float64, **options
        )
        randomised(attention)
        x = torch.randn(1, 48, 12, dtype=torch.float64)
        _, k, v, _ = attention._compressed_projections(x, PatchGrid(6, 8))
        larger = dct.resample(x.unflatten(1, (6, 8)), (12, 16), dims=(1, 2)).flatten(1, 2)
        grid = PatchGrid(12, 16)
        if options.get('projection') != 'conv':  # a convolution cuts windows out, which is not band-limited
            _, k_larger, v_larger, _ = attention._compressed_projections(larger, grid)
            assert torch.allclose(k_larger, k) and torch.allclose(v_larger, v)
        on_the_fly = attention(larger, grid)
        attention.set_grid_size(12, 16)
        assert torch.allclose(attention(larger, grid), on_the_fly)

    def test_a_turned_grid_of_as_many_patches(self):
        attention = create_attention('linformer', 12, 3, grid_size=(6, 8), num_tokens=5).double()
        x, grid = torch.randn(1, 48, 12, dtype=torch.float64), PatchGrid(8, 6)
        on_the_fly = attention(x, grid)
        before = attention(x, PatchGrid(6, 8))
        attention.set_grid_size(8, 6)
        assert torch.allclose(attention(x, grid), on_the_fly)
        assert not torch.allclose(on_the_fly, before)

    def test_frozen_maps_stay_frozen_and_keep_their_type(self):
        maps = create_attention('linformer', 12, 3, grid_size=(6, 8), num_tokens=5).bfloat16().compress.down
        maps.requires_grad_(False)
        maps.follow((9, 7))
        assert not maps.weight.requires_grad and maps.weight.dtype == torch.bfloat16
        assert maps.adapt(torch.randn(1, 5, 3, 4, dtype=torch.float16)).dtype == torch.float16

    @pytest.mark.parametrize('sharing', SHARING)
    def test_set_input_size(self, sharing):
        model, dynamic = (build(dict(num_tokens=9, sharing=sharing), dynamic_img_size=d) for d in (False, True))
        model.set_input_size((96, 128))
        maps = [m.weight for m in model.modules() if isinstance(m, Maps)]
        assert all(weight.shape[-2:] == (12, 16) and weight.requires_grad for weight in maps)
        x = torch.randn(2, 3, 96, 128)
        assert (model(x) - dynamic(x)).abs().max() < 1e-5

    @pytest.mark.parametrize('options', [dict(sharing=s) for s in SHARING] + [dict(projection='conv')], ids=str)
    def test_checkpoint_of_another_size(self, options, tmp_path):
        """What timm does for position embeddings is done for the maps."""
        small = build(dict(num_tokens=16, **options))
        torch.save(small.state_dict(), tmp_path / 'small.pth')
        overlay = dict(file=str(tmp_path / 'small.pth'), num_classes=5)
        large = build(dict(num_tokens=16, **options), img_size=96, pretrained=True, pretrained_cfg_overlay=overlay)
        small.set_input_size((96, 96))
        x = torch.randn(2, 3, 96, 96)
        assert (large(x) - small(x)).abs().max() < 1e-5

    def test_checkpoint_of_another_rank(self, tmp_path):
        torch.save(build(dict(num_tokens=16)).state_dict(), tmp_path / 'small.pth')
        overlay = dict(file=str(tmp_path / 'small.pth'), num_classes=5)
        with pytest.raises(ValueError, match=r'\(1, 16, 8, 8\).*\(1, 9, 8, 8\).*num_tokens'):
            build(dict(num_tokens=9), pretrained=True, pretrained_cfg_overlay=overlay)

    def test_checkpoint_of_other_sharing(self, tmp_path):
        torch.save(build(dict(num_tokens=9, sharing='key-value')).state_dict(), tmp_path / 'small.pth')
        overlay = dict(file=str(tmp_path / 'small.pth'), num_classes=5)
        with pytest.raises(ValueError, match="lacks blocks.0.attn.compress.down_values.weight.*sharing='key-value'"):
            build(dict(num_tokens=9), pretrained=True, pretrained_cfg_overlay=overlay)

    def test_resampled_in_float32_at_least(self):
        maps = torch.randn(3, 9, 8, 8)
        expected = follow(maps, (12, 10))
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(follow(maps, (12, 10)), expected)
        half = maps.bfloat16()
        assert torch.equal(follow(half, (12, 10)), follow(half.float(), (12, 10)).bfloat16())

    def test_a_size_that_is_refused_changes_nothing(self):
        model = build(dict(projection='conv', num_tokens=(6, 6)))
        x = torch.randn(1, 3, 64, 64)
        before = model(x)
        with pytest.raises(ValueError, match=r'num_tokens=\(6, 6\)'):
            model.set_input_size((32, 32))
        assert torch.equal(model(x), before)

    def test_saved_after_a_change_of_size(self, tmp_path):
        model = build(dict(keep_ratio=0.25))
        model.set_input_size((96, 96))
        vit_efficient.save_model(model, tmp_path)
        loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        x = torch.randn(1, 3, 96, 96)
        assert torch.equal(loaded(x), model(x)) and vit_efficient.kept_tokens(loaded) == [17] * 3


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(projection='median'), "projection='median'"),
        (dict(sharing='all'), "sharing='all'"),
        (dict(sharing='none', projection='mean'), "projection='mean' has no weights to share"),
        (dict(axes='1d'), "axes='1d'"),
        (dict(axes='3d', projection='mean'), "axes='3d'"),
        (dict(num_tokens=(3, 3)), r'num_tokens=\(3, 3\)'),
        (dict(num_tokens=(3, 3), projection='mean', axes='1d'), r'num_tokens=\(3, 3\)'),
        (dict(num_tokens=0), 'num_tokens=0'),
        (dict(num_tokens=3, keep_ratio=0.5), 'one of keep_ratio and num_tokens'),
        (dict(place='x'), "place='kv'.*place='x'"),
        (dict(place='qkv'), "place='qkv'"),
        (dict(grid_size=None), 'grid_size'),
        (dict(grid_size=5), 'grid_size=5'),
        (dict(grid_size=(5,)), r'grid_size=\(5,\)'),
        (dict(grid_size=(0, 4)), r'grid_size=\(0, 4\)'),
        (dict(rank=3), 'rank'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_attention('linformer', 12, 3, **{'grid_size': (7, 13), **options})


def test_options_rebuild_it():
    for options in (
        dict(num_tokens=5),
        dict(keep_ratio=0.1),
        dict(projection='conv', sharing='none', num_tokens=(2, 3)),
    ):
        attention = create_attention('linformer', 12, 3, grid_size=(7, 13), **options)
        again = create_attention('linformer', 12, 3, grid_size=(7, 13), **json.loads(json.dumps(attention.options)))
        again.load_state_dict(attention.state_dict())
        x = torch.randn(1, 91, 12)
        assert torch.equal(again(x, PatchGrid(7, 13)), attention(x, PatchGrid(7, 13)))


def test_repr_tells_the_truth():
    text = repr(create_attention('linformer', 12, 3, grid_size=(7, 13), num_tokens=5, sharing='key-value'))
    assert "projection='linear', sharing='key-value'" in text and 'grid_size=(7, 13)' in text and "place='kv'" in text


def test_budget_of_one_row_is_a_count():
    for tokens in (1, 7, 9, 91):
        assert kept_grid(1, 91, Budget(num_tokens=tokens)) == (1, tokens)
