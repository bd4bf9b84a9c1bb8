"""recipes/finetune.yaml from start to end: a pretrained ViT, converted, trained on a folder, evaluated and exported."""

import json
import re

import pytest
import timm
import torch
from timm.models import save_for_hf

from tests.data.trees import write_tree
from tests.train.recipes import ROOT
from vit_efficient.report.evaluation import SavedModel
from vit_efficient.train import load_model
from vit_efficient_cli import main

RECIPE = str(ROOT / 'recipes/finetune.yaml')
# A size that runs in seconds, of a model that is as small.
SMALL = ['model.args.img_size=32', 'sched.epochs=2', 'data.batch_size=4', 'data.workers=0', 'device=cpu', 'threads=1']


@pytest.mark.parametrize(
    ('name', 'args', 'more'),
    [
        ('vit_tiny_patch16_224', {'patch_size': 8}, ['model.args.patch_size=8']),
        ('vit_small_patch14_dinov2', {'img_size': 28}, ['model.args.img_size=56']),
    ],
)
@pytest.mark.parametrize('way', ['pretrained', 'folder'])
def test_five_commands(tmp_path, monkeypatch, capsys, name, args, more, way):
    args = {**args, 'embed_dim': 24, 'depth': 2, 'num_heads': 2}
    plain = timm.create_model(name, **args)
    save_for_hf(plain, tmp_path / 'hub', model_args=args, safe_serialization=True)
    keys = [f'model.name={name}', *SMALL, *more, *(f'model.args.{key}={args[key]}' for key in ('embed_dim', 'depth'))]
    keys.append('model.args.num_heads=2')
    if way == 'folder':
        keys.append(f'model.init_from={tmp_path}/hub')
    else:  # timm's cache of downloads, in the place of the network
        monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', lambda *_, **__: dict(plain.state_dict()))
        monkeypatch.setattr('timm.models._builder.load_custom_from_hf', lambda *_, **__: None)
    data, run = write_tree(tmp_path / 'photos'), tmp_path / 'mine'
    paths = [f'data.train={data}/train', f'data.val={data}/val', f'output={run}']
    assert main(['train', RECIPE, *keys, *paths]) == 0
    out, err = capsys.readouterr()
    top1 = float(re.search(r'top-1 ([\d.]+) %', out)[1])
    if way == 'folder':
        assert 'no effect' not in err

    assert main(['evaluate', str(run), '--data', f'{data}/val', '--device', 'cpu', '--amp', 'bf16']) == 0
    assert float(re.search(r'top-1 ([\d.]+) %', capsys.readouterr().out)[1]) == pytest.approx(top1, abs=0.01)
    assert main(['export', str(run), '--out', str(tmp_path / 'mine.pt2')]) == 0
    assert (tmp_path / 'mine.pt2').exists()

    saved = SavedModel(run)
    assert [attention for attention, _ in saved.model.attention_spec()] == ['dct', 'dct']
    assert {options['keep_ratio'] for _, options in saved.model.attention_spec()} == {0.25}
    assert saved.preprocessing.mean == plain.pretrained_cfg['mean']
    assert saved.preprocessing.input_size[1:] == ((56, 56) if 'dinov2' in name else (32, 32))
    again = timm.create_model(f'local-dir:{run}/model', pretrained=True).eval()
    x = torch.randn(1, *saved.input_shape)
    assert torch.equal(again(x), load_model(run).eval()(x))

    # It starts from the pretrained weights, and low layers learn slowly.
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert lines[-1]['epoch'] == 1
    before, after = plain.state_dict(), again.state_dict()
    moved = [(after[key] - before[key]).abs().mean() for key in ('patch_embed.proj.weight', 'blocks.1.mlp.fc2.weight')]
    assert 0 < moved[0] < 1e-3 and moved[1] < 1e-3
