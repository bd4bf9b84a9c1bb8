"""Batches of images of several sizes: lists of images, and NaFlex batches. Each image has what it would have alone."""

import copy
import warnings

import pytest
import timm
import torch
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import Patchify
from timm.layers import DropPath
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vit_efficient
from vit_efficient.benchmark.peak_memory import peak_in_child
from vit_efficient.flops import count_flops
from vit_efficient.grid import PackedGrids, PatchGrid
from vit_efficient.models.naflex import grid_sizes

SMALL = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8, num_classes=5)
LISTS = {
    'vit_tiny_patch16_224': dict(dynamic_img_size=True),
    'deit_tiny_distilled_patch16_224': dict(dynamic_img_size=True),
    'vit_small_patch16_dinov3': {},
    'vit_small_patch16_rope_mixed_224': dict(dynamic_img_size=True),
    'naflexvit_base_patch16_gap': {},
}
NAFLEX = {
    'naflexvit_base_patch16_gap': {},
    'naflexvit_base_patch16_par_gap': {},
    'naflexvit_base_patch16_parfac_gap': {},
    'naflexvit_base_patch16_map': dict(attn_pool_num_heads=2),
    'naflexvit_base_patch16_siglip': dict(attn_pool_num_heads=2),
    'vit_small_patch16_dinov3': dict(use_naflex=True),
    'eva02_base_patch14_224': dict(use_naflex=True),
    'vit_small_patch16_rope_mixed_224': dict(use_naflex=True),
}
SIZES = ((64, 64), (56, 104), (8, 72), (64, 64), (104, 56), (16, 16))
MECHANISMS = {
    'full': ('full', {}),
    'dct-x': ('dct', {}),
    'pool-kv': ('pool', {}),
    'pool-block': ('pool', dict(place='block')),
    'merge-kv': ('merge', {}),
    'merge-block': ('merge', dict(place='block')),
    'subsample-qkv': ('subsample', dict(place='qkv')),
    'window': ('window', dict(window_size=3)),
    'combiner': ('combiner', dict(window_size=3, cell_size=2)),
    'monarch': ('monarch', {}),
    'nystrom': ('nystrom', dict(num_landmarks=4)),
    'treeformer_tf': ('treeformer_tf', dict(tree_height=1)),
}


def build(name, **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double()


def images(sizes=SIZES):
    """Of float32's numbers, which the collator keeps."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator).double() for size in sizes]


def naflex_batch(batch):
    """By timm's own collator, which pads to 96 patches."""
    found = NaFlexCollator(96)([(Patchify(8)(image), 0) for image in batch])[0]
    return {key: t.double() if key == 'patches' else t for key, t in found.items()}


def gradients(output, model):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def assert_close(actual, expected, tolerance=1e-9):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6)


def cases(names):
    """All mechanisms of the first model; of the others exact attention and two more."""
    first, *others = names
    return [(first, m) for m in MECHANISMS] + [(name, m) for name in others for m in ('full', 'dct-x', 'pool-block')]


@pytest.mark.parametrize('name, mechanism', cases(LISTS))
def test_a_list_of_images(name, mechanism):
    attention, options = MECHANISMS[mechanism]
    model = vit_efficient.convert(build(name, **LISTS[name]), attention, **options)
    batch = images()
    y, alone = model(batch), torch.cat([model(image[None]) for image in batch])
    assert_close(y, alone)
    for ours, theirs in zip(gradients(y, model), gradients(alone, model), strict=True):
        assert_close(ours, theirs, 1e-6)  # embeddings are resized in float32
    features = model.forward_features(batch)
    for tokens, image in zip(features, batch, strict=True):
        assert_close(tokens, model.forward_features(image[None])[0])


@pytest.mark.parametrize('name, mechanism', cases(NAFLEX))
def test_a_naflex_batch(name, mechanism):
    """Full attention is timm's own, of the patches that are no padding; others have what each image has alone."""
    attention, options = MECHANISMS[mechanism]
    timms = build(name, **NAFLEX[name])
    model = vit_efficient.convert(copy.deepcopy(timms), attention, **options)
    alone = [naflex_batch([image]) for image in images()]
    batch = naflex_batch(images())
    y = model(batch)
    expected = timms(batch) if attention == 'full' else torch.cat([model(image) for image in alone])
    assert_close(y, expected)
    reference = timms if attention == 'full' else model
    for ours, theirs in zip(gradients(y, model), gradients(expected, reference), strict=True):
        assert_close(ours, theirs, 1e-6)


def test_intermediates_of_a_list():
    """Maps of each image, also by timm's wrapper."""
    model = vit_efficient.convert(build('vit_small_patch16_dinov3'), 'dct')
    batch = images()
    for options in (dict(norm=True, return_prefix_tokens=True), dict(indices=[0], output_fmt='NLC')):
        final, features = model.forward_intermediates(batch, **options)
        for i, image in enumerate(batch):
            of_one, alone = model.forward_intermediates(image[None], **options)
            assert_close(final[i], of_one[0])
            for ours, theirs in zip(features, alone, strict=True):
                ours, theirs = (pair if isinstance(pair, tuple) else (pair,) for pair in (ours, theirs))
                for of_all, one in zip(ours, theirs, strict=True):
                    assert_close(of_all[i], one[0])
    wrapper = vit_efficient.convert(build('vit_small_patch16_dinov3', features_only=True, out_indices=(0, 1)), 'dct')
    assert [tuple(m.shape) for m in wrapper(batch)[-1]] == [(32, h // 8, w // 8) for h, w in SIZES]


@pytest.mark.parametrize('name', NAFLEX)
def test_a_naflex_batch_of_one_size_is_images(name):
    model = vit_efficient.convert(build(name, **NAFLEX[name]), 'dct')
    batch = images([(56, 104)] * 2)
    assert_close(model(naflex_batch(batch)), model(torch.stack(batch)), 1e-6)  # embeddings are resized in float32


@pytest.mark.parametrize('name', NAFLEX)
def test_images_as_timm_has_them(name):
    timms = build(name, **NAFLEX[name])
    x = torch.stack(images([(56, 104)] * 2))
    for attention, options in (('full', {}), ('pool', dict(keep_ratio=1))):
        assert_close(vit_efficient.convert(copy.deepcopy(timms), attention, **options)(x), timms(x))


@pytest.mark.parametrize('name', ['naflexvit_base_patch16_gap', 'vit_small_patch16_rope_mixed_224'])
def test_intermediates(name):
    timms = build(name, **NAFLEX[name])
    model = vit_efficient.convert(copy.deepcopy(timms), 'full')
    batch, x = naflex_batch(images()), torch.stack(images([(56, 104)] * 2))
    valid = batch['patch_valid'][..., None]
    for options in (dict(norm=True), dict(indices=1, intermediates_only=True), dict(stop_early=True, indices=[0])):
        ours, theirs = (
            m.forward_intermediates(batch, output_fmt='NLC', output_dict=True, **options) for m in (model, timms)
        )
        assert ours.keys() == theirs.keys()
        for a, b in zip(ours['image_intermediates'], theirs['image_intermediates'], strict=True):
            assert_close(a * valid, b * valid)
            assert not (a * ~valid).any()
        ours, theirs = (m.forward_intermediates(x, return_prefix_tokens=True, **options) for m in (model, timms))
        ours, theirs = (found if options.get('intermediates_only') else found[1] for found in (ours, theirs))
        for a, b in zip(ours, theirs, strict=True):
            a, b = (pair if isinstance(pair, tuple) else (pair,) for pair in (a, b))
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(ValueError, match="must be 'NLC' of a NaFlex batch"):
        model.forward_intermediates(batch)


def test_saved_and_read_back(tmp_path):
    for name in ('naflexvit_base_patch16_gap', 'vit_small_patch16_dinov3'):
        model = vit_efficient.convert(build(name, **NAFLEX[name]).float(), 'pool', keep_ratio=0.3)
        vit_efficient.save_model(model, tmp_path / name)
        loaded = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).eval()
        batch = {key: t.float() if key == 'patches' else t for key, t in naflex_batch(images()).items()}
        assert torch.equal(loaded(batch), model(batch))
        assert type(loaded) is type(model)


def test_gradient_checkpointing():
    model = vit_efficient.convert(build('vit_small_patch16_rope_mixed_224', dynamic_img_size=True), 'pool')
    expected = gradients(model.train()(images()), model)
    model.set_grad_checkpointing()
    for a, b in zip(gradients(model(images()), model), expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize('options', [{}, dict(place='block')])
def test_drop_path_is_of_images(options):
    """What a block adds is dropped of some images, and kept whole, scaled up, of the others."""
    model = build('vit_tiny_patch16_224', dynamic_img_size=True)
    vit_efficient.convert(model, 'pool', **options)
    block = model.blocks[0]
    block.drop_path1, block.drop_path2 = DropPath(0.5), torch.nn.Identity()
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.zero_()
    x, batch, _ = model._embed_list(images(), None, False)
    added = [t - t0 for t, t0 in zip(batch.unpack(block.eval()(x, batch.grids)), batch.unpack(x), strict=True)]
    kinds = set()
    for _ in range(8):
        found = batch.unpack(block.train()(x, batch.grids) - x)
        kept = [bool(t.abs().max() > 0) for t in found]
        kinds.add(tuple(kept))
        for t, once, is_kept in zip(found, added, kept, strict=True):
            assert_close(t, 2 * once if is_kept else 0 * once)
    assert len(kinds) > 2


def test_errors():
    model = vit_efficient.convert(build('naflexvit_base_patch16_gap'), 'pool')
    batch = naflex_batch(images())
    with pytest.raises(ValueError, match='attn_mask cannot be had with a NaFlex batch'):
        model(batch | {'attn_mask': torch.ones(1)})
    holes = copy.deepcopy(batch)
    holes['patch_valid'][1, 5] = False
    with pytest.raises(ValueError, match='image 1 of the batch are not a whole grid of 7 × 13'):
        model(holes)
    outside = copy.deepcopy(batch)
    outside['patch_coord'][1, -1] = torch.tensor([9, 9])
    with pytest.raises(ValueError, match='image 1 of the batch are not a whole grid of 7 × 13'):
        model(outside)
    with pytest.raises(ValueError, match='patch_coord must hold integers.*got torch.float32'):
        model(batch | {'patch_coord': batch['patch_coord'].float()})
    with pytest.raises(ValueError, match='is_causal=True cannot be had with a NaFlex batch'):
        model.forward_features(batch['patches'], batch['patch_coord'], batch['patch_valid'], is_causal=True)
    with pytest.raises(ValueError, match=r'blocks\.0: learned=True needs a model that is built for one image size'):
        vit_efficient.convert(build('naflexvit_base_patch16_gap'), 'dct', learned=True)
    with pytest.raises(ValueError, match='leave set_input_size out'):
        model.set_input_size((64, 64))
    with pytest.raises(ValueError, match='cannot convert the patch embedding of a NaFlexVit|EfficientNaFlexVit'):
        vit_efficient.convert_patch_embed(model)
    with pytest.raises(ValueError, match="patch_drop_rate=0.5: attention 'pool'"):
        vit_efficient.convert(build('naflexvit_base_patch16_gap', patch_drop_rate=0.5), 'pool')
    vit = vit_efficient.convert(build('vit_tiny_patch16_224', dynamic_img_size=True), 'pool')
    for wrong in ([], [torch.zeros(1, 3, 8, 8)], ['image']):
        with pytest.raises(ValueError, match='a list of images must hold tensors'):
            vit(wrong)
    with pytest.raises(ValueError, match='cannot have attn_mask'):
        vit(images(), is_causal=True)
    with pytest.raises(ValueError, match='image height 60 is not a multiple'):
        vit(images([(64, 64), (60, 64)]))


def test_tokens_of_a_list():
    """A head that does not pool returns those of each image."""
    model = vit_efficient.convert(build('vit_tiny_patch16_224', dynamic_img_size=True), 'pool')
    model.reset_classifier(0, '')
    found = model(images())
    for tokens, image in zip(found, images(), strict=True):
        assert_close(tokens, model(image[None])[0])


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'vit_small_patch16_dinov3', 'naflexvit_base_patch16_gap'])
def test_patch_dropout_of_a_list(name):
    """It would be of no whole number of tokens for each image."""
    model = vit_efficient.convert(build(name, patch_drop_rate=0.4, **LISTS[name]), 'full')
    assert model(images()).shape == (6, 5)
    with pytest.raises(ValueError, match='patch_drop_rate=0.4: a list of images'):
        model.train()(images())


def test_a_traced_naflexvit():
    model = vit_efficient.convert(build('naflexvit_base_patch16_gap'), 'pool')
    x = torch.stack(images([(56, 104)] * 2))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(model, x, check_trace=False)
    assert_close(traced(x), model(x))


def test_patch_dropout_of_full_attention():
    timms = build('naflexvit_base_patch16_gap', patch_drop_rate=0.5).train()
    model = vit_efficient.convert(copy.deepcopy(timms), 'full')
    x = torch.stack(images([(56, 104)] * 2))
    torch.manual_seed(1)
    expected = timms(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)


class Packed:
    """A layer that keeps 64 tokens of each of two images, in a process of its own."""

    def __init__(self, side, place):
        self.side, self.place = side, place

    def __call__(self):
        attention = vit_efficient.create_attention('pool', 32, 2, place=self.place, num_tokens=(8, 8))
        block = vit_efficient.models.GridBlock(32, 2).eval()
        block.attn = attention.eval()
        grids = PackedGrids(((PatchGrid(self.side, self.side), 1), (PatchGrid(self.side // 2, self.side), 1)))
        x = torch.randn(1, self.side**2 * 3 // 2, 32)
        return torch.no_grad()(lambda: block(x, grids))


@pytest.mark.subprocess
@pytest.mark.parametrize('place', ['kv', 'block'])
def test_memory_grows_with_the_patches(place):
    """Not with their square, and not with a number for each pair of a patch and a kept token of another image."""
    small, large = (peak_in_child(Packed(side, place)) for side in (128, 256))
    assert large <= 4.5 * small


@pytest.mark.parametrize('name', ['naflexvit_base_patch16_gap', 'naflexvit_base_patch16_siglip'])
@pytest.mark.parametrize('attention', ['full', 'dct'])
@pytest.mark.parametrize('size', [(56, 104), (128, 128)])
def test_flops_of_images(name, attention, size):
    model = vit_efficient.convert(build(name, **NAFLEX[name]), attention).requires_grad_(False)
    count = count_flops(model, (3, *size))
    x = torch.zeros(1, 3, *size, dtype=torch.float64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    assert count.products == counter.get_total_flops() / 2
    assert count.by_role['patch embedding'] == 32 * 3 * size[0] * size[1]


@pytest.mark.compiled
def test_images_compiled_and_exported():
    torch.compiler.reset()
    model = vit_efficient.convert(build('vit_small_patch16_dinov3', use_naflex=True).float(), 'dct')
    x = torch.stack(images([(56, 104)] * 2)).float()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_kept_tokens():
    model = vit_efficient.convert(build('naflexvit_base_patch16_gap'), 'pool')
    assert vit_efficient.models.kept_tokens(model, (64, 64)) == [4 + 16] * 2
    with pytest.raises(ValueError, match='img_size must be given'):
        vit_efficient.models.kept_tokens(model)


def test_sizes_of_a_batch():
    batch = naflex_batch(images())
    assert grid_sizes(batch['patch_coord'], batch['patch_valid']) == [(h // 8, w // 8) for h, w in SIZES]
    assert grid_sizes(naflex_batch(images(SIZES[:1]))['patch_coord'][:, :64], None) == [(8, 8)]
