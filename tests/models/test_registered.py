"""The models that timm knows by name follow the register of attentions."""

import textwrap

import pytest
import timm
import torch

from tests.processes import run_python
from vit_efficient.models import SIZES

# A user's own package: it knows nothing of timm, of FLOPs or of files.
MEAN = '''
import torch
from vit_efficient import register_attention
from vit_efficient.attention import GridAttention


@register_attention('mean')
class MeanAttention(GridAttention):
    """Every token is given the mean of the values, weighed."""

    def configure(self, *, weight: float = 1.0):
        self.weight = weight

    @property
    def options(self):
        return dict(weight=self.weight)

    def forward(self, x, grid, attn_mask=None, is_causal=False):
        v = self.qkv(x).chunk(3, dim=-1)[2]
        rows = torch.full((x.shape[1], x.shape[1]), self.weight / x.shape[1], device=x.device, dtype=x.dtype)
        return self.proj(rows @ v)

    def num_attended(self, grid):
        return grid.num_tokens
'''
USE = """
import sys
import timm
import torch
import vit_efficient

assert not timm.list_models('vit_mean_*')
import mean

sizes = ('tiny', 'small', 'base', 'large')
assert set(timm.list_models('vit_mean_*')) == {f'vit_mean_{size}' for size in sizes}
assert timm.get_pretrained_cfg('vit_mean_base').input_size == (3, 224, 224)
small = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
model = timm.create_model('vit_mean_tiny', attention_kwargs=dict(weight=0.5), **small).eval()
x = torch.randn(2, 3, 32, 32)
y = model(x)
assert y.shape == (2, 3)

role = vit_efficient.count_flops(model, (3, 32, 32)).by_role
n, d = 17, 16
assert role['attention products'] == 2 * n * n * d, role
assert role['attention projections'] == 2 * 4 * n * d * d, role
assert role['transform'] == 0 and role['mlp'] == 2 * 8 * n * d * d

vit_efficient.save_model(model, 'saved')
loaded = timm.create_model('local-dir:saved', pretrained=True).eval()
assert loaded.attention_spec() == [('mean', dict(weight=0.5))] * 2
assert torch.equal(loaded(x), y)

from vit_efficient.models import create_from_spec
from vit_efficient.utils.options import parse_spec

model = create_from_spec(*parse_spec('vit_mean_tiny:weight=1/4,depth=1'))
assert model.attention_spec() == [('mean', dict(weight=0.25))]
from vit_efficient_cli import main

command = ['table', 'flops', '--models', 'vit_full_tiny', 'vit_mean_tiny:weight=1/4', '--img-sizes', '64']
assert main(command) == 0
print('done')
"""


@pytest.mark.subprocess
def test_an_attention_of_the_user_is_a_model_of_timm(tmp_path):
    """Registered after the package is imported: built, counted, saved and read back like those that it comes with."""
    (tmp_path / 'mean.py').write_text(MEAN)
    (tmp_path / 'use.py').write_text(textwrap.dedent(USE))
    run = run_python('use.py', folder=tmp_path)
    assert run.stdout.splitlines()[-1] == 'done' and '| vit_mean_tiny:weight=1/4 ' in run.stdout


@pytest.mark.parametrize('size', SIZES)
def test_entry_points_say_what_they_are(size):
    entry = timm.models.model_entrypoint(f'vit_dct_{size}_dctpatch32')
    assert (
        entry.__name__ == f'vit_dct_{size}_dctpatch32'
        and f"ViT-{size.capitalize()}/32 with attention 'dct'" in entry.__doc__
    )


@pytest.mark.parametrize('name', timm.list_models('vit_*_tiny*', module='registered'))
def test_configs_name_layers_that_there_are(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    state = model.state_dict()
    assert f'{model.default_cfg["first_conv"]}.weight' in state and f'{model.default_cfg["classifier"]}.weight' in state
