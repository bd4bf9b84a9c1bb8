"""A package outside this repository: an attention, a compressor and a training hook, used as ours are."""

import json

import pytest

from tests.data.trees import write_tree
from tests.processes import run_python
from tests.train.recipes import TINY, tiny_recipe
from vit_efficient.train.recipe import to_yaml

CLI = ('-m', 'vit_efficient')
PLUGIN = '''
import torch
from torch import nn

from vit_efficient.attention import GridAttention, register_attention
from vit_efficient.attention.compressed import CompressedAttention
from vit_efficient.compress import Compressor, register_compressor
from vit_efficient.train import TrainingHook, register_hook


class Gates(nn.Module):
    """Scales the values: two activations meet in it."""

    flop_role = 'attention products'

    def forward(self, v, means):
        return v @ torch.eye(means.shape[-1], device=v.device).expand(len(v), -1, -1) + means


@register_attention('plugged_mean', scale=1.0)
class MeanAttention(GridAttention):
    """Every token reads the mean of all values."""

    def configure(self, *, scale: float = 1.0):
        self.factor = scale
        self.gates = Gates()

    @property
    def options(self):
        return dict(scale=self.factor)

    def forward(self, x, grid, attn_mask=None, is_causal=False):
        v = self.qkv(x).chunk(3, dim=-1)[2]
        return self.proj_drop(self.proj(self.factor * self.gates(v, v.mean(dim=1, keepdim=True))))

    def num_attended(self, grid):
        return grid.num_tokens


class FirstRows(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, x, grid, state=None):
        return x.unflatten(-2, (grid.height, grid.width))[..., : self.rows, :, :].flatten(-3, -2), None


@register_compressor('plugged_rows')
class RowsCompressor(Compressor):
    """Keeps the keys and values of the first rows."""

    def __init__(self, rows: int = 1):
        super().__init__()
        self.down, self.up = FirstRows(rows), None

    @property
    def options(self):
        return dict(rows=self.down.rows)

    def num_kept(self, grid):
        return self.down.rows * grid.width


register_attention('plugged_rows', compressor='plugged_rows', place='kv')(CompressedAttention)


@register_hook('plugged_norm')
class WeightNorm(TrainingHook):
    """Adds the norm of the head to the loss, counts steps, and logs both."""

    def __init__(self, strength: float):
        super().__init__()
        self.strength, self.memory = strength, {'steps': 0}

    def penalty(self, state, images, logits, loss):
        return loss + self.strength * state.model.head.weight.norm()

    def after_step(self, state):
        self.memory['steps'] += 1

    def measure(self, trainer):
        return {'norm': trainer.state.model.head.weight.norm().item(), 'steps': self.memory['steps']}

    def result(self):
        return {'plugged_norm': self.memory}
'''

USE = """
import json, sys
import timm, torch
import vit_efficient
import plugged

assert {'plugged_mean', 'plugged_rows'} <= set(vit_efficient.list_attentions())
x = torch.randn(2, 3, 32, 48)
for name, kwargs in (('plugged_mean', dict(scale=0.5)), ('plugged_rows', dict(rows=2))):
    assert timm.is_model(f'vit_{name}_base')
    model = timm.create_model(f'vit_{name}_tiny', img_size=(32, 48), depth=2, attention_kwargs=kwargs).eval()
    vit_efficient.save_model(model, name)
    again = timm.create_model(f'local-dir:{name}', pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    assert again.attention_spec() == model.attention_spec() and again.attention_spec()[0][1].items() >= kwargs.items()
    converted = vit_efficient.convert(timm.create_model('vit_tiny_patch16_224', img_size=(32, 48)), name, **kwargs)
    assert converted.eval()(x).shape == (2, 1000)
    meta, traced = (vit_efficient.count_flops(model, (3, 32, 48), engine=engine) for engine in ('meta', 'fvcore'))
    assert meta.by_role == traced.by_role
    print(json.dumps([name, meta.by_role, vit_efficient.kept_tokens(model)]))
"""


@pytest.fixture(scope='module')
def plugged(tmp_path_factory):
    folder = tmp_path_factory.mktemp('plugin')
    (folder / 'plugged.py').write_text(PLUGIN)
    return folder


@pytest.mark.subprocess
def test_it_is_registered_counted_saved_and_loaded(plugged):
    (plugged / 'use.py').write_text(USE)
    counts = {
        name: (roles, kept)
        for name, roles, kept in map(json.loads, run_python('use.py', folder=plugged).stdout.splitlines())
    }
    tokens, dim, patches = 7, 192, 6
    roles, kept = counts['plugged_mean']
    assert kept == [tokens, tokens]
    assert roles['attention projections'] == 2 * tokens * dim * (3 * dim + dim)
    assert roles['attention products'] == 2 * tokens * dim * dim  # the module says so
    roles, kept = counts['plugged_rows']
    assert kept == [1 + patches, 1 + patches]  # both rows that there are
    assert roles['attention products'] == 2 * 2 * tokens * tokens * dim


@pytest.mark.subprocess
def test_it_is_trained_resumed_and_evaluated(plugged, tmp_path):
    data = write_tree(tmp_path / 'data')
    config = tiny_recipe(data, tmp_path / 'run', plugins=['plugged'], hooks={'plugged_norm': {'strength': 0.01}})
    config.model.name, config.model.args = 'vit_plugged_rows_tiny', {**TINY, 'attention_kwargs': {'rows': 2}}
    (plugged / 'recipe.yaml').write_text(to_yaml(config))
    run_python(*CLI, 'train', 'recipe.yaml', 'checkpoint_steps=5', folder=plugged)
    result = json.loads((tmp_path / 'run/result.json').read_text())
    assert result['plugged_norm'] == {'steps': 12}
    lines = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').open()]
    assert [line['steps'] for line in lines if line['kind'] == 'plugged_norm'] == [6, 12]
    # The run knows its plug-in: a process that is told nothing of it measures the saved model.
    said = run_python(*CLI, 'evaluate', str(tmp_path / 'run'), '--data', f'{data}/val', folder=plugged).stdout
    assert f'top-1 {result["top1"]:.2f} %' in said
    # What a hook remembers goes on with the run.
    for name in ('result.json', 'checkpoint.pt'):
        (tmp_path / 'run' / name).unlink()
    run_python(
        *CLI, 'train', 'recipe.yaml', 'checkpoint_steps=5', 'checkpoint_keep=9', 'resume=restart', folder=plugged
    )
    for name in ('result.json', 'checkpoint.pt', 'checkpoint-12.pt'):
        (tmp_path / 'run' / name).unlink()
    run_python(*CLI, 'train', 'recipe.yaml', 'checkpoint_steps=5', 'resume=auto', folder=plugged)
    again = json.loads((tmp_path / 'run/result.json').read_text())
    assert again['plugged_norm'] == {'steps': 12} and again['top1'] == result['top1']


@pytest.mark.subprocess
def test_a_hook_that_is_not_there_is_named(plugged, tmp_path):
    config = tiny_recipe(write_tree(tmp_path / 'data'), tmp_path / 'run', hooks={'plugged_nrom': {}})
    config.plugins = ['plugged']
    (plugged / 'wrong.yaml').write_text(to_yaml(config))
    done = run_python(*CLI, 'train', 'wrong.yaml', folder=plugged, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "has no option 'plugged_nrom'; did you mean plugged_norm?" in done.stderr
    assert not (tmp_path / 'run').exists()
