"""Compressors take tokens with any axes before them, and give what they give for a batch."""

import pytest
import torch

from vit_efficient import PatchGrid, create_attention
from vit_efficient.compress import get_compressor

LEARNED = dict(num_heads=2, head_dim=6, num_tokens=4)
COMPRESSORS = [
    ('dct', {}),
    ('dct', dict(axes='1d')),
    ('dct', dict(domain='frequency')),
    ('dct', dict(learned=True)),
    ('pool', {}),
    ('subsample', {}),
    ('learned', dict(**LEARNED, projection='linear')),
    ('learned', dict(**LEARNED, projection='linear', sharing='none')),
    ('learned', dict(**LEARNED, projection='mean')),
    ('learned', dict(**LEARNED, projection='mean', axes='1d')),
    ('learned', dict(**LEARNED, projection='max')),
    ('learned', dict(**LEARNED, projection='conv')),
    ('learned', dict(**LEARNED, projection='conv', sharing='none')),
]


@pytest.mark.parametrize(('name', 'options'), COMPRESSORS)
@pytest.mark.parametrize('grid', [PatchGrid(4, 8), PatchGrid(5, 7)])
def test_any_axes(name, options, grid):
    own = dict(grid_size=(grid.height, grid.width)) if name == 'learned' else {}
    compress = get_compressor(name)(**options, **own)
    x = torch.randn(3, 2, grid.num_patches, 6)
    y, _ = compress.down(x, grid)
    cases = [(x[0], y[0]), (x[None], y[None]), (x[:0], y[:0])]
    if options.get('sharing') == 'none':
        with pytest.raises(ValueError, match=r'each of 2 heads has a projection: .* got \(3[25], 6\)'):
            compress.down(x[0, 0], grid)
    else:
        cases.append((x[0, 0], y[0, 0]))
    for few, expected in cases:
        kept, state = compress.down(few, grid)
        torch.testing.assert_close(kept, expected)
        if compress.up is not None:
            assert compress.up(kept, grid, state).shape == few.shape


@pytest.mark.parametrize(
    'name', ['dct', 'pool', 'combiner', 'monarch', 'nystrom', 'performer', 'window', 'treeformer_tc', 'treeformer_tf']
)
@pytest.mark.parametrize('shape', [(9, 12), (1, 2, 9, 12)])
def test_attentions_take_one_batch(name, shape):
    with pytest.raises(ValueError, match=rf'{name}.* takes x as \(B, N, C\), got \({shape[0]}, '):
        create_attention(name, 12, 2)(torch.randn(shape), PatchGrid(2, 4, prefix=1))
