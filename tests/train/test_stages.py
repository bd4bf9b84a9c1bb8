"""A run in stages: exact attention, trees in the last layer, trees in all, and softmax inside their leaves."""

import copy
import json
import os
import re
import signal

import pytest
import torch

from tests.data.trees import write_tree
from tests.train.recipes import TINY, tiny_recipe
from tests.train.test_trainer import assert_same_run, fail
from vit_efficient.train import Interrupted, load_model, load_recipe, train, trainer
from vit_efficient.train.checkpoint import load_checkpoint
from vit_efficient.train.config import ModelConfig, StageConfig
from vit_efficient.train.hooks.leaves import LeafOccupancy
from vit_efficient.train.recipe import to_yaml
from vit_efficient.train.rules import validate
from vit_efficient.train.state import TrainState
from vit_efficient.train.trainer import Trainer

TREES = {'tree_height': 2}
STAGES = [
    StageConfig(1),
    StageConfig(1, 'treeformer_tc', TREES, layers=[-1]),
    StageConfig(1, 'treeformer_tc', TREES, layers=[0], lr=2e-3),
    StageConfig(1, 'treeformer_tf', TREES, warmup_epochs=0.5),
]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp('data'))


def staged_recipe(data, output, stages=STAGES, **options):
    """Four epochs of six updates."""
    config = tiny_recipe(data, output, **options)
    config.model = ModelConfig('vit_full_tiny', {**TINY, 'drop_path_rate': 0.2, 'global_pool': 'avg'})
    config.sched.epochs, config.sched.warmup_epochs = sum(stage.epochs for stage in stages), 0
    config.stages = stages
    return config


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """The run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp('run') / 'whole'
    train(staged_recipe(data, folder))
    return folder


def attentions(model):
    return [block.attn.mechanism for block in model.blocks]


def lines_of(folder, kind):
    return [line for line in map(json.loads, (folder / 'metrics.jsonl').open()) if line['kind'] == kind]


def test_a_run_goes_through_its_stages(data, tmp_path, caplog, monkeypatch):
    seen = []
    evaluate = trainer.evaluate
    monkeypatch.setattr(
        trainer, 'evaluate', lambda model, *args: seen.append(attentions(model)) or evaluate(model, *args)
    )
    result = train(staged_recipe(data, tmp_path / 'run', eval_every=9))
    tc, tf = 'treeformer_tc', 'treeformer_tf'
    assert seen == [['full', 'full'], ['full', tc], [tc, tc], [tf, tf]]
    val = lines_of(tmp_path / 'run', 'val')
    assert [line['stage'] for line in val] == [0, 1, 2, 3]
    assert [stage['top1'] for stage in result['stages']] == [line['top1'] for line in val]
    assert result['top1'] == result['stages'][-1]['top1']
    said = re.findall(r'stage \S+: .*', caplog.text)
    assert said == [
        'stage 1/4: as built',
        'stage 2/4: treeformer_tc in layers -1',
        'stage 3/4: treeformer_tc in layers 0',
        'stage 4/4: treeformer_tf',
    ]
    # Each stage has its schedule and its learning rate; the last one begins with a warm-up.
    rates = [line['lr'] for line in lines_of(tmp_path / 'run', 'train')]
    assert len(rates) == 24
    assert max(rates[:12]) <= 1e-3 < max(rates[12:18]) <= 2e-3
    assert rates[5] < 1e-4 > rates[11]
    assert rates[18] < rates[19] > rates[20]
    # What the trees hold is logged for the layers that have some.
    leaves = lines_of(tmp_path / 'run', 'leaves')
    assert [len(line) for line in leaves] == [3 + 3, 3 + 6, 3 + 6]
    assert all(0 <= line['block1/entropy'] <= 2 for line in leaves)

    model = load_model(tmp_path / 'run')
    assert attentions(model) == [tf, tf]
    state = load_checkpoint(tmp_path / 'run/checkpoint.pt')
    assert all(torch.equal(value, state['ema'][key]) for key, value in model.state_dict().items())
    assert train(load_recipe(tmp_path / 'run/recipe.yaml', ['resume=auto'])) == result


def test_trees_are_handed_over(data, tmp_path, monkeypatch):
    """From one stage to the next every weight goes on that both have, the trees of TC among them."""
    enter, pairs = TrainState.enter_stage, []

    def entering(state, number):
        before = copy.deepcopy(state.model.state_dict())
        enter(state, number)
        pairs.append((before, copy.deepcopy(state.model.state_dict())))

    monkeypatch.setattr(TrainState, 'enter_stage', entering)
    train(staged_recipe(data, tmp_path / 'run'))
    assert len(pairs) == 4
    for before, after in pairs:
        assert all(torch.equal(before[key], after[key]) for key in before.keys() & after.keys())
    before, after = pairs[-1]
    assert {'blocks.0.attn.tree.weight', 'blocks.1.attn.tree.bias'} < set(after)
    assert set(before) - set(after) == {f'blocks.{layer}.attn.level_weight' for layer in (0, 1)}


@pytest.mark.parametrize('stop', range(1, 24, 4))
def test_going_on_inside_a_stage_gives_the_same_weights(data, whole, tmp_path, monkeypatch, stop):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        iterate, done = trainer.iterate, iter(range(24))
        patch.setattr(trainer, 'iterate', lambda *args: (fail() if next(done) == stop else b for b in iterate(*args)))
        train(staged_recipe(data, tmp_path / 'parts', checkpoint_steps=1))
    assert load_checkpoint(tmp_path / 'parts/checkpoint.pt')['progress']['updates'] == stop
    torch.rand(3)
    train(staged_recipe(data, tmp_path / 'parts', checkpoint_steps=1, resume='auto'))
    assert_same_run(whole, tmp_path / 'parts')


@pytest.mark.parametrize(
    'owner, moment', [(Trainer, 'evaluate'), (TrainState, 'enter_stage'), (LeafOccupancy, 'begin_stage')]
)
@pytest.mark.parametrize('how', ['power', signal.SIGTERM])
def test_going_on_between_stages_gives_the_same_weights(data, whole, tmp_path, monkeypatch, owner, moment, how):
    with monkeypatch.context() as patch, pytest.raises((Interrupted, RuntimeError)):
        unpatched = getattr(owner, moment)

        def stopping(self, *args):
            state = self if owner is TrainState else (args[0] if args else self).state
            if state.progress.updates == 12:
                fail() if how == 'power' else os.kill(os.getpid(), how)
            return unpatched(self, *args)

        patch.setattr(owner, moment, stopping)
        train(staged_recipe(data, tmp_path / 'parts'))
    assert load_checkpoint(tmp_path / 'parts/checkpoint.pt')['progress']['updates'] == 12
    train(staged_recipe(data, tmp_path / 'parts', resume='auto'))
    assert_same_run(whole, tmp_path / 'parts')


def test_a_first_stage_may_convert(data, tmp_path):
    train(staged_recipe(data, tmp_path / 'run', [StageConfig(1, 'dct', {'keep_ratio': 0.5})]))
    model = load_model(tmp_path / 'run')
    assert [block.attn.options['keep_ratio'] for block in model.blocks] == [0.5, 0.5]


@pytest.mark.parametrize(
    ('stages', 'message'),
    [
        ([StageConfig(1), StageConfig(1, 'treeformer')], r"stages\[1\]: .*'treeformer'"),
        ([StageConfig(1, 'treeformer_tc', {'height': 3})], r'stages\[0\]: .*height'),
        ([StageConfig(1, 'treeformer_tc', layers=[2])], r'stages\[0\]: layers: the model has blocks 0 … 1, got 2'),
    ],
)
def test_stages_that_the_model_does_not_take(data, tmp_path, stages, message):
    with pytest.raises(ValueError, match=message):
        train(staged_recipe(data, tmp_path / 'run', stages))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('stages', 'message'),
    [
        ([StageConfig(0)], r'stages\[0\].epochs must be at least 1, got 0'),
        ([StageConfig(1), StageConfig(1, lr=-1.0)], r'stages\[1\].lr must be above 0, got -1.0'),
        ([StageConfig(2, warmup_epochs=3)], r'stages\[0\].warmup_epochs must be from 0 to the 2 epochs .*got 3'),
        ([StageConfig(1, layers=[0])], r'stages\[0\] has attention_kwargs or layers, and no attention'),
        ([StageConfig(1), StageConfig(2)], 'sched.epochs must be 3, as all stages together have, got 2'),
    ],
)
def test_stages_out_of_range(data, tmp_path, stages, message):
    config = staged_recipe(data, tmp_path / 'run', stages)
    config.sched.epochs = 2
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_a_run_of_other_stages_is_not_gone_on_with(data, tmp_path):
    train(staged_recipe(data, tmp_path / 'run'))
    others = [*STAGES[:3], StageConfig(1)]
    with pytest.raises(ValueError, match='was written with stages='):
        train(staged_recipe(data, tmp_path / 'run', others, resume='auto'))


def test_stages_in_yaml(data, tmp_path):
    config = staged_recipe(data, tmp_path / 'run')
    (tmp_path / 'recipe.yaml').write_text(to_yaml(config))
    assert load_recipe(tmp_path / 'recipe.yaml').stages == config.stages
    override = 'stages=[{epochs: 3, attention: dct, layers: [1]}, {epochs: 1}]'
    stages = load_recipe(tmp_path / 'recipe.yaml', [override]).stages
    assert stages == [StageConfig(3, 'dct', layers=[1]), StageConfig(1)]
    with pytest.raises(ValueError, match='command line: unknown key .*epoch'):
        load_recipe(tmp_path / 'recipe.yaml', ['stages=[{epoch: 3}]'])
    with pytest.raises(
        ValueError, match='command line: .*stages must be a list of sections, .*; it is replaced as a whole'
    ):
        load_recipe(tmp_path / 'recipe.yaml', ['stages.1.lr=0.1'])


def test_a_checkpoint_of_stages_is_no_model_to_start_from(data, tmp_path):
    """Its recipe names the attention that the run began with."""
    train(staged_recipe(data, tmp_path / 'run', [StageConfig(1), StageConfig(1, 'dct')]))
    config = staged_recipe(data, tmp_path / 'next', [StageConfig(1)])
    config.model.init_from = str(tmp_path / 'run/checkpoint.pt')
    with pytest.raises(ValueError, match='a run whose stages change the model; give the folder'):
        train(config)
