"""Kept tokens on small grids, where the rotations of neighbours are more than half a turn apart."""

import math

import pytest
import timm
import torch
from torch.nn.functional import mse_loss

import vit_efficient
from tests.attention.rotations import means
from vit_efficient.attention.rotary import Rope, rope_of_kept
from vit_efficient.models.rope_steps import with_steps

SMALL = dict(embed_dim=64, depth=1, num_heads=2, patch_size=8, num_classes=3)
GRIDS = ((1, 9), (2, 2), (3, 5), (4, 4), (5, 5), (7, 13), (8, 8), (10, 10), (14, 14), (5, 64))
# Models, and the grid sides below which neighbours may be half a turn apart.
MODELS = {
    'vit_small_patch16_dinov3': 4,
    'eva02_base_patch14_448': 5.1,
    'vit_pe_core_tiny_patch16_384': 7.7,
    'vit_pe_spatial_tiny_patch16_512': 10.2,
    'vit_small_patch16_rope_224': 0,
}


def at_coordinates(rope, height, width, places):
    """The formulas of timm's modules, at any place, in float64: (places, 2 D)."""
    y, x = torch.tensor(places, dtype=torch.float64).unbind(1)
    if hasattr(rope, 'periods'):
        axes, bands = [2 * (y + 0.5) / height - 1, 2 * (x + 0.5) / width - 1], 2 * math.pi / rope.periods.double()
    else:
        axes, bands = [y + rope.grid_offset, x + rope.grid_offset], rope.bands.double()
        if rope.ref_feat_shape is not None:
            axes = [axes[0] / height * rope.ref_feat_shape[0], axes[1] / width * rope.ref_feat_shape[1]]
    axes = axes[::-1] if rope.grid_indexing == 'xy' else axes
    angles = torch.cat([axis[:, None] * bands for axis in axes], dim=-1)
    angles = angles.repeat(1, 2) if rope.rotate_half else angles.repeat_interleave(2, dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('name', MODELS)
def test_at_the_mean_coordinates_of_cells(name, grid):
    model = timm.create_model(name, img_size=(8 * grid[0], 8 * grid[1]), **SMALL)
    made = model.rope.get_embed(grid).double()
    every = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    assert (made - at_coordinates(model.rope, *grid, every)).abs().max() <= 1e-4  # timm's coordinates are float32
    rope = with_steps(made, model.rope, *grid)
    assert isinstance(rope, Rope) == (min(grid) <= MODELS[name])
    for kept in ((max(1, grid[0] // 2), grid[1] // 2), (max(1, grid[0] - 1), grid[1] - 1)):
        found = rope_of_kept(rope, *grid, kept, 'means')
        assert (found - at_coordinates(model.rope, *grid, means(*grid, kept))).abs().max() <= 1e-4


@pytest.mark.parametrize('side', [2, 4, 6, 8, 10, 16])
def test_with_drawn_coordinates(side):
    """Cells of 2 × 2 patches of DINOv3's lie where patches of a grid of half as many would, of the same draw."""
    rope = timm.create_model('vit_full_rope_tiny', img_size=8 * side, **SMALL).rope.train()
    rope.shift_coords, rope.jitter_coords, rope.rescale_coords = 0.3, 1.5, 2.0
    for seed in range(20):
        torch.manual_seed(seed)
        fine = with_steps(rope.get_embed((side, side)), rope, side, side)
        torch.manual_seed(seed)
        expected = rope.get_embed((side // 2, side // 2))
        found = rope_of_kept(fine, side, side, (side // 2, side // 2), 'means')
        assert (found - expected).abs().max() <= 1e-3


@pytest.mark.parametrize('name', ['vit_pe_core_tiny_patch16_384', 'vit_small_patch16_dinov3', 'naflex'])
@pytest.mark.parametrize(
    'attention', ['full', 'pool', 'dct', 'window', 'combiner', 'monarch', 'nystrom', 'performer', 'treeformer_tc']
)
def test_models_on_small_grids(name, attention):
    """Every mechanism takes what the model hands down there; a model that keeps all is timm's."""
    more = dict(use_naflex=True) if name == 'naflex' else dict(img_size=(32, 24), dynamic_img_size=True)
    entry = 'vit_small_patch16_dinov3' if name == 'naflex' else name
    more |= dict(attn_pool_num_heads=2) if 'pe_core' in name else {}
    model = timm.create_model(entry, **SMALL, **more).eval()
    x = torch.randn(2, 3, 32, 24)
    expected = model(x)
    vit_efficient.convert(model, attention)
    y = model(x)
    assert y.isfinite().all() and (attention != 'full' or torch.equal(y, expected))
    mse_loss(model.train()(x), torch.zeros_like(y)).backward()
    if attention == 'pool':
        converted = vit_efficient.convert(model.eval(), 'pool', keep_ratio=1, place='x')
        torch.testing.assert_close(converted(x), expected)
        several = [torch.randn(3, 32, 24), torch.randn(3, 64, 64)]
        assert converted(several).shape == (2, 3)
