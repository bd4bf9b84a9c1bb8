"""What a timm user does with a model, done with every registered mechanism."""

import copy
import functools
import pickle
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor

import vit_efficient
from tests.threads import at_once
from vit_efficient.models import SIZES

MECHANISMS = vit_efficient.list_attentions()
SMALL = dict(embed_dim=32, depth=2, num_heads=2, num_classes=5, img_size=64, patch_size=8)
HAVE_STATE = {'linformer', 'performer', 'treeformer_tc', 'treeformer_tf'}  # with their default options
VARIANTS = [
    ('full', {}),
    ('dct', {}),
    ('dct', dict(domain='frequency', place='qkv', local=3)),
    ('dct', dict(place='kv', keep_ratio=0.1)),
    ('dct', dict(place='block', keep_ratio=0.1)),
    ('dct', dict(place='block', domain='frequency')),
    ('dct', dict(learned=True)),
    ('dct', dict(learned=True, domain='frequency', place='kv')),
    ('dct1d', dict(num_tokens=9)),
    ('linformer', dict(num_tokens=9)),
    ('linformer', dict(num_tokens=9, sharing='layerwise')),
    ('linformer', dict(keep_ratio=0.1, sharing='none', projection='conv')),
    ('linformer', dict(num_tokens=(3, 2), projection='max')),
    ('pool', {}),
    ('subsample', dict(place='x', keep_ratio=0.1)),
    ('pool', dict(place='block')),
    ('pool', dict(summary='local')),
    ('pool', dict(summary='medoid')),
    ('combiner', dict(window_size=3, cell_size=2)),
    ('combiner', dict(window_size=2, cell_size=1, reach=1, summary='max')),
    ('combiner', dict(pattern='axial')),
    ('monarch', {}),
    ('monarch', dict(block_size=3, steps=2)),
    ('merge', {}),
    ('merge', dict(place='x', keep_ratio=0.1)),
    ('merge', dict(place='block', local_first=True)),
    ('nystrom', dict(num_landmarks=(3, 2), residual_kernel=3)),
    ('nystrom', dict(num_landmarks=(2, 3), pinv='exact')),
    ('performer', {}),
    ('window', dict(window_size=3)),
    ('treeformer_tc', dict(tree_height=3)),
]
FIXED_SIZE = ('monarch', 'local', 'medoid')  # of which no graph leaves the image size open
NO_GRAPH = [  # what they do depends on the data
    ('treeformer_tf', dict(tree_height=2)),
    ('treeformer_tf', dict(tree_height=3, num_leaves=2)),
]


def one_of_each(name, options):
    """The arguments of a model of as few blocks as there are different ones: graphs grow with each."""
    return dict(name=name, options=options, depth=2 if options.get('sharing') == 'layerwise' else 1)


def build(name='dct', options=None, **arguments):
    torch.manual_seed(0)
    return timm.create_model(f'vit_{name}_tiny', attention_kwargs=options or {}, **{**SMALL, **arguments}).eval()


def name_of(variant):
    return '-'.join([variant[0], *map(str, variant[1].values())])


@pytest.fixture(params=VARIANTS + NO_GRAPH, ids=name_of)
def variant(request):
    return request.param


@pytest.fixture(params=VARIANTS, ids=name_of)
def graph_variant(request):
    return request.param


def added_keys(model):
    """The entries of the state dict that plain timm models do not have."""
    layers = [block.attn.added_state(f'blocks.{i}.attn.') for i, block in enumerate(model.blocks)]
    return {key for added in layers for key in added} | {key for key in model.state_dict() if key.startswith('shared.')}


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance


@functools.cache
def plain_shapes(size):
    return {k: v.shape for k, v in timm.create_model(f'vit_{size}_patch16_224').state_dict().items()}


class TestRegistry:
    def test_names(self):
        def names(mechanism, *variants):
            return {f'vit_{mechanism}_{variant.format(size)}' for size in SIZES for variant in variants}

        assert set(timm.list_models('vit_dct_*')) == names('dct', '{}', 'rope_{}', '{}_dctpatch32')
        assert set(timm.list_models('vit_pool_*')) == names('pool', '{}', 'rope_{}')
        for mechanism in MECHANISMS:
            for size in SIZES:
                assert timm.is_model(f'vit_{mechanism}_{size}')
                config = timm.get_pretrained_cfg(f'vit_{mechanism}_{size}')
                assert config.input_size == (3, 224, 224) and config.classifier == 'head'

    @pytest.mark.parametrize('size', SIZES)
    @pytest.mark.parametrize('mechanism', MECHANISMS)
    def test_parameters_are_those_of_timm(self, mechanism, size):
        with torch.device('meta'):
            ours = timm.create_model(f'vit_{mechanism}_{size}')
            theirs = plain_shapes(size)
        added = added_keys(ours)
        assert bool(added) == (mechanism in HAVE_STATE)
        assert {k: v.shape for k, v in ours.state_dict().items() if k not in added} == theirs
        assert ours(torch.zeros(1, 3, 224, 224, device='meta')).shape == (1, 1000)

    def test_no_pretrained_weights(self):
        with pytest.raises(RuntimeError, match=r'No pretrained weights exist for vit_dct_tiny.*convert'):
            timm.create_model('vit_dct_tiny', pretrained=True)

    @pytest.mark.subprocess
    def test_import_is_light(self):
        code = 'import timm, sys; before = set(sys.modules); import vit_efficient; print(*set(sys.modules) - before)'
        imported = subprocess.check_output([sys.executable, '-c', code], text=True).split()
        assert not {'albumentations', 'fvcore', 'matplotlib', 'omegaconf', 'tensorboard', 'cv2'} & set(imported)


class TestCheckpoints:
    def test_plain_vit_loads_strictly(self, variant):
        theirs = timm.create_model('vit_tiny_patch16_224', **SMALL)
        state = theirs.state_dict()
        ours = build(*variant)
        added = added_keys(ours)
        missing, unexpected = ours.load_state_dict(state, strict=not added)
        assert set(missing) == added and not unexpected

    def test_plain_vit_loads_through_timm(self, variant, tmp_path):
        """What the mechanism adds is filled in, patch and position embeddings follow the image size."""
        theirs = timm.create_model('vit_tiny_patch16_224', **SMALL).eval()
        torch.save(theirs.state_dict(), tmp_path / 'vit.pth')
        name, options = variant
        arguments = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'vit.pth'), num_classes=5))
        ours = build(name, options, **arguments)
        assert torch.equal(ours.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)
        larger = build(name, options, **arguments, **{'img_size': 96})
        assert larger.pos_embed.shape == (1, 145, 32)
        if name == 'full':
            x = torch.randn(2, 3, 64, 64)
            assert torch.equal(ours(x), theirs(x))

    def test_nothing_truncated_is_the_plain_vit(self):
        theirs = timm.create_model('vit_tiny_patch16_224', **SMALL, reg_tokens=4).eval()
        x = torch.randn(2, 3, 64, 64)
        for place in ('x', 'qkv', 'kv'):
            ours = build('dct', dict(keep_ratio=1, domain='space', place=place), reg_tokens=4)
            ours.load_state_dict(theirs.state_dict())
            assert close(ours(x), theirs(x))

    def test_layer_scale_of_deit3(self):
        from vit_efficient.models.checkpoints import checkpoint_filter_fn

        model = build(init_values=1e-5)
        state = {
            k.replace('ls1.gamma', 'gamma_1').replace('ls2.gamma', 'gamma_2'): v for k, v in model.state_dict().items()
        }
        model.load_state_dict(checkpoint_filter_fn(state, model))


class TestImageSizes:
    def test_not_square(self, variant):
        assert build(*variant, img_size=(56, 104))(torch.randn(2, 3, 56, 104)).shape == (2, 5)

    def test_dynamic(self, variant):
        model, fixed = build(*variant, dynamic_img_size=True), build(*variant)
        x = torch.randn(2, 3, 64, 64)
        assert close(model(x), fixed(x))
        wide, tall = model(torch.randn(1, 3, 56, 104)), model(torch.randn(1, 3, 104, 56))
        assert wide.isfinite().all() and tall.isfinite().all()
        assert torch.equal(model(x), model(x))

    def test_dynamic_with_padding(self, variant):
        model = build(*variant, dynamic_img_size=True, dynamic_img_pad=True)
        x = torch.randn(1, 3, 50, 61)
        assert close(model(x), model(torch.nn.functional.pad(x, (0, 3, 0, 6))))

    def test_set_input_size(self, variant):
        model = build(*variant)
        model.set_input_size((56, 104))
        assert model(torch.randn(2, 3, 56, 104)).shape == (2, 5)
        model.set_input_size(patch_size=(4, 4))
        assert model(torch.randn(2, 3, 56, 104)).shape == (2, 5)

    def test_sizes_of_numpy(self, tmp_path):
        one, other = np.int64(64), np.int64(40)
        model = build(img_size=(one, one), patch_size=(np.int64(8), np.int64(8)))
        model.set_input_size((one, other), np.int64(8))
        vit_efficient.save_model(model, tmp_path)  # as JSON, which has plain integers
        assert vit_efficient.models.load_model(tmp_path).patch_embed.img_size == (64, 40)
        model.set_input_size(other)
        assert vit_efficient.kept_tokens(model) == vit_efficient.kept_tokens(model, other) == [1 + 4, 1 + 4]
        wrong = np.int64(41)
        for use in (build, lambda img_size: vit_efficient.kept_tokens(model, img_size), model.set_input_size):
            with pytest.raises(vit_efficient.utils.errors.UserError, match='height 41 is not a multiple'):
                use(img_size=(wrong, other))

    @pytest.mark.parametrize('size', [64.0, True, -64, np.int64(-64), 0, (64, 64, 3), '64', torch.tensor(64)])
    def test_sizes_that_are_none(self, size):
        model = build()
        for use in (model.set_input_size, lambda img_size: vit_efficient.kept_tokens(model, img_size)):
            with pytest.raises(
                vit_efficient.utils.errors.UserError, match='img_size must be a positive integer or a p'
            ):
                use(img_size=size)

    def test_kept_tokens(self):
        assert vit_efficient.kept_tokens(build('full')) == [65, 65]
        assert vit_efficient.kept_tokens(build('dct', dict(keep_ratio=1 / 4))) == [17, 17]
        assert vit_efficient.kept_tokens(build('dct', dict(keep_ratio=1 / 4)), img_size=(56, 104)) == [1 + 21] * 2

    @pytest.mark.parametrize('size', [(60, 64), (64, 60)])
    def test_patches_must_divide(self, size):
        with pytest.raises(ValueError, match='60 is not a multiple of the patch size 8'):
            build(img_size=size)
        with pytest.raises(ValueError, match='60 is not a multiple of the patch size 8'):
            build(dynamic_img_size=True)(torch.randn(1, 3, *size))
        with pytest.raises(ValueError, match='60 is not a multiple of the patch size 8'):
            build().set_input_size(size)

    @pytest.mark.parametrize('base', ['vit_full_tiny', 'vit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224'])
    def test_another_size_names_the_way_out(self, base):
        model = vit_efficient.convert(timm.create_model(base, **SMALL), 'dct')
        for run in (model, model.forward_intermediates):
            with pytest.raises(vit_efficient.utils.errors.UserError, match='width .* 72 .* 64; .* dynamic_img_size'):
                run(torch.randn(1, 3, 64, 72))


class TestFeatures:
    x = torch.randn(2, 3, 56, 104)

    def test_forward_intermediates_as_timm(self):
        """Every argument, against timm's own method on the same weights."""
        arguments = {**SMALL, 'img_size': (56, 104), 'reg_tokens': 2}
        theirs = timm.create_model('vit_tiny_patch16_224', **arguments).eval()
        ours = build('full', **{k: v for k, v in arguments.items() if k not in SMALL}, img_size=(56, 104))
        ours.load_state_dict(theirs.state_dict())
        for options in (
            {},
            dict(indices=1, norm=True),
            dict(indices=[0], stop_early=True, intermediates_only=True),
            dict(return_prefix_tokens=True, output_fmt='NLC'),
            dict(output_dict=True, return_prefix_tokens=True),
            dict(output_dict=True, intermediates_only=True),
        ):
            a, b = ours.forward_intermediates(self.x, **options), theirs.forward_intermediates(self.x, **options)
            a, b = (torch.utils._pytree.tree_flatten_with_path(t)[0] for t in (a, b))
            assert [path for path, _ in a] == [path for path, _ in b]
            assert all(torch.equal(t, u) for (_, t), (_, u) in zip(a, b, strict=True))
        with pytest.raises(ValueError, match="output_fmt='CHW'"):
            ours.forward_intermediates(self.x, output_fmt='CHW')

    def test_intermediates(self, variant):
        model = build(*variant, img_size=(56, 104))
        final, features = model.forward_intermediates(self.x, indices=2)
        assert torch.equal(final, model.forward_features(self.x))
        assert [f.shape for f in features] == [(2, 32, 7, 13)] * 2
        layers = model.get_intermediate_layers(self.x, n=[1], reshape=True, return_prefix_tokens=True, norm=True)
        assert layers[0][0].shape == (2, 32, 7, 13) and layers[0][1].shape == (2, 1, 32)
        assert torch.equal(layers[0][0].flatten(2).mT, final[:, 1:])

    def test_features_only(self, variant):
        model = build(*variant, img_size=(56, 104), features_only=True, out_indices=(0, 1))
        assert [f.shape for f in model(self.x)] == [(2, 32, 7, 13)] * 2
        assert model.feature_info.channels() == [32, 32]

    def test_fx(self, variant):
        model = build(*variant, dynamic_img_size=True)
        extractor = create_feature_extractor(model, {'blocks.0': 'block', 'head': 'logits'})
        for size in ((56, 104), (104, 56), (64, 64)):
            x = torch.randn(2, 3, *size)
            out = extractor(x)
            assert torch.equal(out['logits'], model(x))
            assert out['block'].shape == (2, size[0] * size[1] // 64 + 1, 32)

    def test_fx_without_gradients(self, variant):
        """Bit for bit: where evaluation has operations of its own, the graph has them too."""
        model = build(*variant)
        extractor = create_feature_extractor(model, ['head'])
        x = torch.randn(2, 3, 64, 64)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert torch.equal(extractor(x)['head'], model(x))

    @pytest.mark.parametrize('trace', [torch.fx.symbolic_trace, lambda m: torchvision_extractor(m, ['head'])])
    def test_fx_by_other_tracers(self, variant, trace):
        """Leaves must hold without timm's list of them, which torch.fx and torchvision do not know."""
        model = build(*variant)
        x = torch.randn(2, 3, 64, 64)
        traced = trace(model)(x)
        assert torch.equal(traced['head'] if isinstance(traced, dict) else traced, model(x))

    def test_fx_pickles(self, variant):
        extractor = create_feature_extractor(build(*variant), ['head'])
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(pickle.loads(pickle.dumps(extractor))(x)['head'], extractor(x)['head'])


class TestHeads:
    def test_reset_classifier(self, variant):
        model = build(*variant)
        x = torch.randn(2, 3, 64, 64)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        model.reset_classifier(0, 'avg')
        assert model(x).shape == (2, 32)

    @pytest.mark.parametrize(
        'options',
        [
            dict(num_classes=0),
            dict(in_chans=5),
            dict(in_chans=1),
            dict(global_pool='avg'),
            dict(global_pool='map'),
            dict(global_pool='avg', class_token=False),
            dict(reg_tokens=4),
            dict(reg_tokens=4, no_embed_class=True, init_values=1e-5, qk_norm=True, pre_norm=True),
            dict(drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5, drop_rate=0.5, pos_drop_rate=0.5),
            dict(pos_embed='none'),
            dict(qkv_bias=False, proj_bias=False, scale_attn_norm=True, scale_mlp_norm=True),
        ],
        ids=str,
    )
    def test_options(self, variant, options):
        model = build(*variant, **options)
        x = torch.randn(2, options.get('in_chans', 3), 64, 64)
        assert model(x).shape == (2, options.get('num_classes', 5) or 32)
        model.train()(x).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class TestModes:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def test_copies(self, variant):
        model = build(*variant)
        expected = model(self.x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(self.x), expected)

    def test_from_meta(self, variant):
        with torch.device('meta'):
            model = timm.create_model(f'vit_{variant[0]}_tiny', attention_kwargs=variant[1], **SMALL).eval()
        reference = build(*variant)
        assigned = copy.deepcopy(model)
        assigned.load_state_dict(reference.state_dict(), assign=True)
        emptied = model.to_empty(device='cpu')
        emptied.load_state_dict(reference.state_dict())
        for loaded in (assigned, emptied):
            assert torch.equal(loaded(self.x), reference(self.x))

    def test_bfloat16(self, variant):
        model = build(*variant)
        expected = model(self.x)
        with torch.autocast('cpu', torch.bfloat16):
            assert close(model(self.x), expected, 2e-2 * expected.abs().max())
        assert model.to(torch.bfloat16)(self.x.bfloat16()).dtype == torch.bfloat16
        model.float().load_state_dict(build(*variant).state_dict())
        assert torch.equal(model(self.x), expected)

    @pytest.mark.compiled
    def test_compile_without_breaks(self, graph_variant):
        """A graph for each size, as timm's models; the second is begun with symbols for its sizes."""
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = build(**one_of_each(*graph_variant), dynamic_img_size=True)
        compiled = torch.compile(model, fullgraph=True, backend='eager')
        for graphs, size in enumerate(((64, 64), (56, 104)), 1):
            x = torch.randn(2, 3, *size)
            assert close(compiled(x), model(x))
            assert torch._dynamo.utils.counters['stats']['unique_graphs'] == graphs

    @pytest.mark.compiled
    def test_compiled_training_step(self, graph_variant):
        torch.compiler.reset()
        model = build(**one_of_each(*graph_variant)).train()
        torch.compile(model, fullgraph=True, backend='aot_eager')(self.x).square().sum().backward()
        compiled = [p.grad for p in model.parameters()]
        model.zero_grad()
        model(self.x).square().sum().backward()
        assert all(close(a, p.grad, 1e-4) for a, p in zip(compiled, model.parameters(), strict=True))

    @pytest.mark.compiled
    def test_export(self, graph_variant):
        model = build(**one_of_each(*graph_variant))
        assert close(torch.export.export(model, (self.x,)).module()(self.x), model(self.x))

    @pytest.mark.compiled
    def test_export_with_open_image_size(self, graph_variant):
        model = build(**one_of_each(*graph_variant), dynamic_img_size=True)
        height, width = (torch.export.Dim(name, min=7, max=64) for name in ('height', 'width'))
        name, options = graph_variant
        if not {name, options.get('summary')}.isdisjoint(FIXED_SIZE):
            with pytest.raises(ValueError, match='needs a fixed image size'):
                torch.export.export(model, (self.x,), dynamic_shapes={'x': {2: 8 * height, 3: 8 * width}})
            return
        program = torch.export.export(model, (self.x,), dynamic_shapes={'x': {2: 8 * height, 3: 8 * width}})
        for size in ((64, 64), (56, 104), (104, 200)):
            x = torch.randn(2, 3, *size)
            assert close(program.module()(x), model(x))

    def test_jit_trace(self, graph_variant):
        model = build(*graph_variant)
        traced = torch.jit.trace(model, self.x, check_trace=False)
        assert close(traced(self.x), model(self.x), 1e-6)
        assert close(traced(self.x[:1]), model(self.x[:1]), 1e-6)

    @pytest.mark.parametrize('variant', NO_GRAPH, ids=name_of)
    @pytest.mark.compiled
    def test_no_graph(self, variant):
        model = build(*variant)
        for make in (
            lambda: torch.jit.trace(model, self.x, check_trace=False),
            lambda: torch.export.export(model, (self.x,)),
            lambda: torch.compile(model, fullgraph=True, backend='aot_eager')(self.x),
        ):
            torch.compiler.reset()
            with pytest.raises(Exception, match=f"'{variant[0]}' .* cannot be compiled as one graph, traced or export"):
                make()
        torch.compiler.reset()
        assert close(torch.compile(model, backend='aot_eager')(self.x), model(self.x))

    def test_inference_mode_and_back(self, variant):
        model = build(*variant)
        with torch.inference_mode():
            model(torch.randn(1, 3, 64, 64))
        model.train()(self.x).sum().backward()


class TestTwoSizesAtOnce:
    """The grid is a value that goes down with the tokens: nothing is shared that another size could change."""

    @pytest.mark.parametrize('reentrant', [False, True])
    def test_two_crops_under_checkpointing(self, variant, reentrant, monkeypatch):
        def step(model):
            torch.manual_seed(0)
            crops = [torch.randn(2, 3, *size, requires_grad=True) for size in ((56, 104), (104, 56))]
            sum(model(crop).square().sum() * (i + 1) for i, crop in enumerate(crops)).backward()
            return [p.grad for p in model.parameters()] + [crop.grad for crop in crops]

        model = build(*variant, dynamic_img_size=True).train()
        expected = step(model)
        model.zero_grad()
        model.set_grad_checkpointing()
        calls = []

        def counted(function, *args, **kwargs):
            calls.append(function)
            return checkpoint(function, *args, **kwargs, use_reentrant=reentrant)

        monkeypatch.setattr('vit_efficient.models.forward.checkpoint', counted)
        for actual, wanted in zip(step(model), expected, strict=True):
            assert close(actual, wanted, 1e-6 * wanted.abs().max())
        assert len(calls) == 2 * len(model.blocks)

    def test_two_threads(self, variant):
        model = build(*variant, dynamic_img_size=True)
        crops = [torch.randn(1, 3, *size) for size in ((56, 104), (104, 56))]
        with torch.no_grad():
            expected = [model(crop) for crop in crops]
        wrong = []

        def work(i):
            with torch.no_grad():
                for _ in range(50):
                    if not torch.equal(model(crops[i]), expected[i]):
                        wrong.append(i)

        at_once(lambda: work(0), lambda: work(1))
        assert not wrong


class TestPerLayer:
    def test_list(self):
        model = timm.create_model('vit_full_tiny', attention=['full', ('dct', dict(keep_ratio=0.1))], **SMALL)
        assert vit_efficient.kept_tokens(model) == [65, 1 + 4]
        assert [type(b.attn).__name__ for b in model.blocks] == ['FullAttention', 'CompressedAttention']

    @pytest.mark.parametrize(
        ('arguments', 'message'),
        [
            (dict(attention=['full']), 'lists 1 layers.*2'),
            (dict(attention=['full', 'dct'], attention_kwargs=dict(keep_ratio=0.5)), 'attention_kwargs'),
            (dict(attention=['full', ('dct', 3)]), 'a layer is'),
            (dict(attention='dtc'), "unknown attention 'dtc'"),
            (dict(attention='dct', attention_kwargs=dict(keep_ratio=0)), 'keep_ratio=0'),
            (dict(attention='full', attention_kwargs=dict(keep_ratio=0.5)), "no option 'keep_ratio'"),
            (dict(num_heads=3), 'num_heads=3'),
            (dict(attention=5), 'got 5'),
        ],
    )
    def test_bad_specifications(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            timm.create_model('vit_full_tiny', **{**SMALL, **arguments})


class TestWhatCannotWork:
    def test_patch_dropout(self):
        with pytest.raises(ValueError, match=r"patch_drop_rate=0\.5.*'dct'"):
            build('dct', patch_drop_rate=0.5)
        assert build('full', patch_drop_rate=0.5).train()(torch.randn(2, 3, 64, 64)).shape == (2, 5)

    @pytest.mark.parametrize('argument', [dict(is_causal=True), dict(attn_mask=torch.zeros(65, 65))], ids=str)
    def test_masks(self, argument):
        x = torch.randn(2, 3, 64, 64)
        with pytest.raises(ValueError, match="'dct'.*'full'"):
            build('dct')(x, **argument)
        theirs = timm.create_model('vit_tiny_patch16_224', **SMALL).eval()
        ours = build('full')
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours(x, **argument), theirs(x, **argument))
