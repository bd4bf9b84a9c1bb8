import pytest
import timm
import torch

from tests.data.trees import write_tree
from tests.train.recipes import TINY, tiny_recipe
from tests.train.test_trainer import assert_same_run, fail, stop_after
from vit_efficient.train import train
from vit_efficient.train.config import OptimConfig, SchedConfig
from vit_efficient.train.optim import create_optimizer, create_scheduler


@pytest.mark.parametrize('opt', ['adamw', 'sgd', 'lookahead_adam'])
@pytest.mark.parametrize('name', ['dct', 'treeformer_tc', 'treeformer_tf', 'linformer'])
def test_layers_decay_what_a_model_without_them_decays(name, opt):
    model = timm.create_model(f'vit_{name}_tiny', **TINY)
    decayed, rates = [], {}
    for layer_decay in (None, 0.5):
        groups = create_optimizer(model, OptimConfig(opt, layer_decay=layer_decay)).param_groups
        found = {id(p): group['weight_decay'] for group in groups for p in group['params']}
        assert all(group['params'] for group in groups) and len(found) == len(list(model.parameters()))
        decayed.append({name for name, p in model.named_parameters() if found[id(p)]})
        rates = {id(p): group.get('lr_scale') for group in groups for p in group['params']}
    assert decayed[0] == decayed[1] and not any(name.endswith('bias') for name in decayed[0])
    assert all(rates[id(p)] == 0.25 for p in model.blocks[0].parameters())
    every = create_optimizer(model, OptimConfig(layer_decay=0.5, args={'filter_bias_and_bn': False}))
    assert sum(len(group['params']) for group in every.param_groups if group['weight_decay']) > len(decayed[0])


def test_layers_have_their_rates_without_a_schedule_too(tmp_path, monkeypatch):
    """Those of the first update after the warm-up of a schedule; and they are scaled once, if a run goes on."""
    model, optim = timm.create_model('vit_dct_tiny', **TINY), OptimConfig(lr=0.1, layer_decay=0.5)
    rates = []
    for sched in (SchedConfig('none', 2, 0), SchedConfig('cosine', 2, 0)):
        optimizer = create_optimizer(model, optim)
        scheduler = create_scheduler(optimizer, sched, 5)
        if scheduler:
            scheduler.step_update(0)
        rates.append({id(p): group['lr'] for group in optimizer.param_groups for p in group['params']})
    assert rates[0] == rates[1]
    assert rates[0][id(model.head.weight)] == 0.1
    assert rates[0][id(model.blocks[0].attn.qkv.weight)] < rates[0][id(model.blocks[1].attn.qkv.weight)] < 0.1

    def recipe(output, **options):
        config = tiny_recipe(data, tmp_path / output, checkpoint_steps=1, **options)
        config.sched, config.optim.layer_decay = SchedConfig('none', 2, 0), 0.5
        return config

    data = write_tree(tmp_path / 'data')
    train(recipe('whole'))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_after(patch, 3, fail)
        train(recipe('parts'))
    train(recipe('parts', resume='auto'))
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')
    found = torch.load(tmp_path / 'parts/checkpoint.pt', weights_only=True)['optimizer']['param_groups']
    assert {group['lr'] / group['lr_scale'] for group in found} == {1e-3}
