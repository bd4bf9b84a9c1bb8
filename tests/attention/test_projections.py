"""What users put in the place of the projections: layers that are quantised, and adapters with no weight to read."""

import copy

import pytest
import timm
import torch
from torch import nn

from vit_efficient import PatchGrid, convert, create_attention

MECHANISMS = [
    ('full', {}),
    *(('dct', {'place': place, 'domain': domain}) for place in ('x', 'qkv', 'kv') for domain in ('space', 'frequency')),
    ('dct', {'domain': 'frequency', 'learned': True}),
    ('dct1d', {'local': 3}),
    *(('linformer', {'grid_size': (6, 6), 'num_tokens': 9, 'sharing': sharing}) for sharing in ('none', 'key-value')),
    ('pool', {}),
    ('pool', {'summary': 'local'}),
    ('subsample', {}),
    ('combiner', {'window_size': 3, 'cell_size': 2}),
    ('combiner', {'pattern': 'axial'}),
    ('monarch', {}),
    ('nystrom', {}),
    ('performer', {}),
    ('treeformer_tc', {'tree_height': 2}),
    ('treeformer_tf', {'tree_height': 2}),
    ('window', {'window_size': 3}),
]
IDS = [' '.join([name, *map(str, options.values())]) for name, options in MECHANISMS]
pytestmark = pytest.mark.filterwarnings('ignore')  # PyTorch's, on where its quantisation moves to


class Adapter(nn.Module):
    """A linear layer with a product of low rank and a bias beside it, as LoRA."""

    def __init__(self, linear):
        super().__init__()
        self.base = linear
        self.a = nn.Parameter(torch.randn(linear.in_features, 2) / 8)
        self.b = nn.Parameter(torch.randn(2, linear.out_features) / 8)
        self.c = nn.Parameter(torch.randn(linear.out_features) / 8)

    def forward(self, x):
        return self.base(x) + x @ self.a @ self.b + self.c

    def merged(self):
        linear = nn.Linear(self.base.in_features, self.base.out_features)
        with torch.no_grad():
            linear.weight.copy_(self.base.weight + (self.a @ self.b).T)
            linear.bias.copy_(self.c if self.base.bias is None else self.base.bias + self.c)
        return linear


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize(('name', 'options'), MECHANISMS, ids=IDS)
def test_replaced_projections_count_in_full(name, options, bias):
    attention = create_attention(name, 24, 2, qkv_bias=bias, **options).eval()
    nn.init.normal_(attention.proj.bias)
    grid, x = PatchGrid(6, 6, 1), torch.randn(2, 37, 24)
    with torch.no_grad():
        adapted, merged = copy.deepcopy(attention), copy.deepcopy(attention)
        for layer in ('qkv', 'proj'):
            setattr(adapted, layer, Adapter(getattr(attention, layer)))
            setattr(merged, layer, getattr(adapted, layer).merged())
        assert torch.allclose(adapted(x, grid), merged(x, grid), atol=1e-5)
        if not name.startswith('treeformer'):  # whose leaves may be others
            found, expected = quantised(attention)(x, grid), attention(x, grid)
            assert (found - expected).abs().max() < 0.06 * expected.abs().max()


@pytest.mark.parametrize(('name', 'options'), MECHANISMS, ids=IDS)
def test_models_with_replaced_projections_are_converted(name, options):
    model = timm.create_model('vit_tiny_patch16_224', img_size=96, embed_dim=24, num_heads=2, depth=1).eval()
    adapted, x = copy.deepcopy(model), torch.randn(1, 3, 96, 96)
    adapted.blocks[0].attn.qkv = Adapter(adapted.blocks[0].attn.qkv)
    for changed in (quantised(model), adapted):
        qkv = changed.blocks[0].attn.qkv
        convert(changed, name, **options)
        assert changed.blocks[0].attn.qkv is qkv
        with torch.no_grad():
            assert changed(x).isfinite().all()
