"""Stages that prune: what is 0 stays 0, however a run is split, interrupted or shared out."""

import json
import os
import signal

import pytest
import timm
import torch

from tests.data.trees import write_tree
from tests.processes import run_python, torchrun
from tests.train.recipes import TINY
from tests.train.test_masks import mask_recipe
from tests.train.test_scale import assert_close, save, state_of
from tests.train.test_stages import lines_of, staged_recipe
from tests.train.test_trainer import assert_same_run, fail
from vit_efficient.prune import by_role, densities
from vit_efficient.train import Interrupted, load_model, load_recipe, train, trainer
from vit_efficient.train.checkpoint import load_checkpoint
from vit_efficient.train.config import StageConfig
from vit_efficient.train.hooks.pruning import Pruning
from vit_efficient.train.recipe import to_yaml
from vit_efficient.train.rules import validate
from vit_efficient.train.state import TrainState
from vit_efficient.train.trainer import Trainer

STAGES = [StageConfig(1), StageConfig(1, prune=0.5), StageConfig(1), StageConfig(1, prune=0.2)]
WEIGHTS = 4032  # of linear layers and convolutions, but for the head


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp('data'))


def recipe(data, output, stages=STAGES, **options):
    """Four epochs of six updates, with an average of weights, weight decay and momentum."""
    config = staged_recipe(data, output, stages, **options)
    config.optim.weight_decay = 0.3
    return config


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """The run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp('run') / 'whole'
    train(recipe(data, folder))
    return folder


def masks_of(state):
    return state['tensors']['pruning']


def assert_pruned(state):
    for name, kept in masks_of(state).items():
        for weights in (state['model'], state['ema'] or state['model']):
            assert (weights[f'{name}.weight'][~kept] == 0).all()
            assert (weights[f'{name}.weight'][kept] != 0).all()


def test_what_stages_prune_stays_pruned(data, whole):
    result = json.loads((whole / 'result.json').read_text())
    assert [line['stage'] for line in result['pruning']] == [1, 3]
    assert [line['roles']['all'] * WEIGHTS for line in result['pruning']] == pytest.approx([2016, 1613])
    state = load_checkpoint(whole / 'checkpoint.pt')
    assert sum(kept.sum().item() for kept in masks_of(state).values()) == 1613
    assert set(masks_of(state)) == {name.partition(', ')[0] for name in result['pruning'][1]['layers']}
    assert_pruned(state)
    # A line after each evaluation once there are masks.
    lines = lines_of(whole, 'pruning')
    assert [(line['epoch'], round(line['all'], 3)) for line in lines] == [(1, 0.5), (2, 0.5), (3, 0.4)]
    assert {'q', 'k', 'v', 'proj', 'mlp', 'patch embedding'} <= set(lines[0])
    model = timm.create_model(f'local-dir:{whole}/model', pretrained=True)
    assert {each.name: each.density for each in densities(model) if each.role != 'head'} == result['pruning'][1][
        'layers'
    ]


@pytest.mark.parametrize(
    ('opt', 'args'),
    [('sgd', {'momentum': 0.9}), ('adamw', {}), ('lamb', {}), ('muon', {}), ('adafactorbv', {})],
)
def test_masks_hold_through_every_optimiser(data, tmp_path, opt, args):
    config = recipe(data, tmp_path / 'run', [StageConfig(1, prune=0.7), StageConfig(1, prune=0.5)], grad_accum=2)
    config.optim.opt, config.optim.args, config.clip_grad = opt, args, 1.0
    config.data.batch_size = 2
    config.loss.cutmix = 0.0
    train(config)
    state = load_checkpoint(tmp_path / 'run/checkpoint.pt')
    assert sum(kept.sum().item() for kept in masks_of(state).values()) == 605
    assert_pruned(state)


def test_gradients_of_what_is_pruned_reach_no_norm_and_no_momentum(data, tmp_path, monkeypatch):
    norms = []
    norm_of = TrainState.gradient_norm

    def looking(state):
        for name, kept in state.experiment.hooks[-1].masks.kept.items():
            assert (state.model.get_submodule(name).weight.grad[~kept] == 0).all()
        norms.append(norm_of(state).item())
        return norm_of(state)

    monkeypatch.setattr(TrainState, 'gradient_norm', looking)
    train(recipe(data, tmp_path / 'run', [StageConfig(1, prune=0.7)]))
    assert len(norms) == 6
    state = load_checkpoint(tmp_path / 'run/checkpoint.pt')
    zeros = sum(
        (each == 0).sum().item() for entry in state['optimizer']['state'].values() for each in [entry['exp_avg']]
    )
    assert zeros >= 0.7 * WEIGHTS


def go_on_after(data, output, stages, stop, monkeypatch):
    """Trains until the power is off, in the update after `stop`; and then to the end."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        iterate, done = trainer.iterate, iter(range(24))
        patch.setattr(trainer, 'iterate', lambda *args: (fail() if next(done) == stop else b for b in iterate(*args)))
        train(recipe(data, output, stages, checkpoint_steps=1))
    assert load_checkpoint(output / 'checkpoint.pt')['progress']['updates'] == stop
    train(recipe(data, output, stages, checkpoint_steps=1, resume='auto'))


@pytest.mark.parametrize('stop', [1, 7, 11, 13, 19, 23])
def test_going_on_inside_a_stage_gives_the_same_weights(data, whole, tmp_path, monkeypatch, stop):
    go_on_after(data, tmp_path / 'parts', STAGES, stop, monkeypatch)
    assert_same_run(whole, tmp_path / 'parts')


def test_going_on_in_a_first_stage_that_prunes_gives_the_same_weights(data, tmp_path, monkeypatch):
    stages = [StageConfig(1, prune=0.5), StageConfig(1, prune=0.5)]
    train(recipe(data, tmp_path / 'whole', stages))
    for stop in (2, 8):
        go_on_after(data, tmp_path / str(stop), stages, stop, monkeypatch)
        assert_same_run(tmp_path / 'whole', tmp_path / str(stop))


@pytest.mark.parametrize(
    'owner, moment',
    [(Trainer, 'evaluate'), (TrainState, 'enter_stage'), (Pruning, 'before_stage'), (Pruning, 'begin_stage')],
)
@pytest.mark.parametrize('how', ['power', signal.SIGTERM])
def test_going_on_between_stages_gives_the_same_weights(data, whole, tmp_path, monkeypatch, owner, moment, how):
    with monkeypatch.context() as patch, pytest.raises((Interrupted, RuntimeError)):
        unpatched, memory = getattr(owner, moment), []

        def stopping(self, *args):
            lines = lines_of(tmp_path / 'parts', 'val') if (tmp_path / 'parts/metrics.jsonl').exists() else []
            if len(lines) == 3 and not memory:  # the second stage that prunes comes next, or has come
                memory.append(True)
                fail() if how == 'power' else os.kill(os.getpid(), how)
            return unpatched(self, *args)

        patch.setattr(owner, moment, stopping)
        train(recipe(data, tmp_path / 'parts'))
    assert load_checkpoint(tmp_path / 'parts/checkpoint.pt')['progress']['updates'] in (18, 24)
    train(recipe(data, tmp_path / 'parts', resume='auto'))
    assert_same_run(whole, tmp_path / 'parts')


@pytest.mark.once
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.subprocess
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(data, tmp_path):
    def slow(name):
        config = recipe(data, tmp_path / name, resume='auto', checkpoint_steps=1)
        config.stages = [StageConfig(1, prune=0.2) for _ in range(6)]
        config.sched.epochs = 6
        return config

    train(slow('whole'))
    run_python('tests/train/killed.py', save(slow('killed')), '5')
    assert_same_run(tmp_path / 'whole', tmp_path / 'killed')
    model = 'model/model.safetensors'
    assert (tmp_path / 'whole' / model).read_bytes() == (tmp_path / 'killed' / model).read_bytes()


@pytest.mark.distributed
def test_how_the_work_is_shared_changes_no_mask(tmp_path):
    data = write_tree(tmp_path / 'data', train=14, val=1)
    shares = {'one': {'grad_accum': 4}, 'ddp': {'grad_accum': 2}, 'fsdp': {'grad_accum': 2, 'parallel': 'fsdp'}}

    def make(name, share, **options):
        config = recipe(data, tmp_path / name, STAGES[:2] + STAGES[3:], resume='auto', clip_grad=0.5, **shares[share])
        config.model.args = {**TINY, 'global_pool': 'avg'}
        config.data.batch_size, config.loss.mixup, config.loss.cutmix = 2, 0.0, 0.0
        return save(config)

    script = 'tests/train/double.py'
    # Of 15 updates; the second stage begins after the fifth.
    run_python(script, make('one', 'one'), f'{make("begun", "one")}@7')
    torchrun(script, make('ddp', 'ddp'), make('fsdp', 'fsdp'), make('begun', 'fsdp'))
    one = state_of(tmp_path / 'one')
    assert one['progress']['updates'] == 15 and sum(k.sum().item() for k in masks_of(one).values()) == 1613
    for other in ('ddp', 'fsdp', 'begun'):
        state = state_of(tmp_path / other)
        assert_pruned(state)
        assert all(torch.equal(kept, masks_of(one)[name]) for name, kept in masks_of(state).items())
        assert_close(one, state, other)


def test_a_pruned_model_to_start_from(data, whole, tmp_path, caplog):
    """Its zeros learn again, which is said, unless a stage prunes; then they count as pruned."""

    def start(name, **stage):
        config = recipe(data, tmp_path / name, [StageConfig(1, **stage)])
        config.model.init_from = str(whole)
        return sum(each.left for each in densities(load_model_of(config)) if each.role != 'head')

    def load_model_of(config):
        train(config)
        return load_model(config.output)

    assert start('free') == WEIGHTS
    assert f'model.init_from={whole}: 59 % of the weights there are 0, and learn again; with prune=0' in caplog.text
    caplog.clear()
    assert start('held', prune=0.0) == 1613
    assert start('more', prune=0.5) == 1613 - 806
    assert 'learn again' not in caplog.text
    config = recipe(data, tmp_path / 'later', [StageConfig(1), StageConfig(1, prune=0.5)])
    config.model.init_from = str(whole)
    train(config)
    assert '59 % of the weights there are 0, and learn again' in caplog.text


def test_modules_that_stay_are_named_by_the_stage(data, tmp_path):
    pruned = [StageConfig(1, prune=0.5, prune_skip=[])]
    config = recipe(data, tmp_path / 'all', pruned)
    found = {each.name: each.density for each in densities(load_model(train_into(config)))}
    assert found['head'] < 1
    config = recipe(data, tmp_path / 'held', [StageConfig(1, prune=0.0, prune_skip=[])])
    config.model.init_from = str(tmp_path / 'all')
    assert {each.name: each.density for each in densities(load_model(train_into(config)))} == found


def train_into(config):
    train(config)
    return config.output


def test_a_longer_run_of_a_pruned_model_holds_its_zeros(data, whole):
    with pytest.raises(ValueError, match=r"'stages=\[\{epochs: 2, prune: 0\}\]'"):
        train(recipe(data, whole, [*STAGES, StageConfig(2)], resume='auto'))


def test_what_is_converted_first_may_be_pruned(data, tmp_path):
    result = train(recipe(data, tmp_path / 'run', [StageConfig(1, 'dct'), StageConfig(1, prune=0.5)]))
    assert result['attention'][0] == 'dct' and result['pruning'][0]['roles']['all'] == pytest.approx(0.5)


def test_a_model_of_segmentation_is_pruned_but_for_its_head(tmp_path):
    config = mask_recipe(tmp_path / 'images', tmp_path / 'run')
    config.model.head = 'linear'
    config.stages, config.sched.warmup_epochs = [StageConfig(1), StageConfig(1, prune=0.5)], 0
    result = train(config)
    assert result['pruning'][0]['roles']['all'] == pytest.approx(0.5)
    assert_pruned(load_checkpoint(tmp_path / 'run/checkpoint.pt'))
    left = {each.role: each.density for each in by_role(densities(load_model(tmp_path / 'run')))}
    assert left['head'] == 1 and left['q'] < 1


def test_stages_in_yaml(data, tmp_path):
    config = recipe(data, tmp_path / 'run')
    (tmp_path / 'recipe.yaml').write_text(to_yaml(config))
    assert load_recipe(tmp_path / 'recipe.yaml').stages == STAGES
    stages = load_recipe(tmp_path / 'recipe.yaml', ['stages=[{epochs: 4, prune: 1/5, prune_method: erk}]']).stages
    assert stages == [StageConfig(4, prune=0.2, prune_method='erk')]


@pytest.mark.parametrize(
    ('stages', 'message'),
    [
        ([StageConfig(1, prune=1.0)], r'stages\[0\].prune must be at least 0 and below 1, got 1.0'),
        ([StageConfig(1, prune=0.5, prune_method='lmap')], r'stages\[0\].prune_method must be lamp, .*, got .lmap'),
        ([StageConfig(1, prune_method='erk')], r'stages\[0\] has prune_method=erk, and no prune; set both'),
        ([StageConfig(1, prune_skip=[])], r'stages\[0\] has prune_skip=\[\], and no prune; set both'),
        (
            [StageConfig(1), StageConfig(1, prune=0.5), StageConfig(1), StageConfig(1, 'dct')],
            r'stages\[3\].attention="dct" changes layers that stages\[1\] prunes, .* an earlier stage',
        ),
        ([StageConfig(1, 'dct', prune=0.5)], r'stages\[0\].attention="dct" changes layers that stages\[0\] prunes'),
        ([StageConfig(1, prune=0.5), StageConfig(1, freeze=True)], r'stages\[1\].freeze=true changes layers that'),
    ],
)
def test_stages_that_do_not_fit_are_named(data, tmp_path, stages, message):
    with pytest.raises(ValueError, match=message):
        validate(recipe(data, tmp_path / 'run', stages))


def test_a_model_of_which_only_the_head_learns_is_not_pruned(data, tmp_path):
    config = recipe(data, tmp_path / 'run', [StageConfig(1, prune=0.5)], task='segmentation')
    config.model.head, config.model.freeze = 'linear', True
    with pytest.raises(ValueError, match='stages must not change the model with model.freeze=true'):
        validate(config)


def test_what_cannot_be_pruned_is_named_before_anything_is_written(data, tmp_path):
    stages = [StageConfig(1), StageConfig(1, prune=0.9, prune_method='uniform+')]
    for last, message in (
        (StageConfig(1, prune=0.5), r"stages\[1\].prune: method='uniform\+' keeps 576 weights of the first and last"),
        (StageConfig(1, prune=0.9999), r'stages\[1\].prune: amount=0.9999: of 4032 weights .* none would be left'),
    ):
        with pytest.raises(ValueError, match=message):
            train(recipe(data, tmp_path / 'run', [*stages[:1], last] if last.prune > 0.9 else [*stages, last]))
    config = recipe(data, tmp_path / 'run', [StageConfig(1, prune=0.5)])
    config.task = 'features'
    config.loss.mixup = config.loss.cutmix = 0.0
    with pytest.raises(ValueError, match=r'stages\[0\].prune is for a task with labels, got task=features'):
        train(config)
    assert not (tmp_path / 'run').exists()
