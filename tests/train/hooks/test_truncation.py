"""A run that learns its truncations: they cost what the recipe says, and are hard when it ends."""

import json
import os
import signal

import pytest
import timm
import torch

from tests.data.trees import write_tree
from tests.train.recipes import TINY, tiny_recipe
from tests.train.test_trainer import assert_same_run
from vit_efficient.models.truncation import has_windows
from vit_efficient.train import Interrupted, load_model, train, trainer
from vit_efficient.train.config import ModelConfig, StageConfig
from vit_efficient.train.hooks.truncation import LearnedTruncation
from vit_efficient.train.trainer import Trainer


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp('data'))


LEARNED = {'learned': True, 'keep_ratio': 1.0}


def learning_recipe(data, output, penalty=0.0, budget=0.0, **options):
    config = tiny_recipe(data, output, **options)
    args = dict(patch_embed='dct', patch_window=True, attention_kwargs=LEARNED)
    config.model = ModelConfig('vit_dct_tiny', {**TINY, **args})
    config.truncation.penalty, config.truncation.budget = penalty, budget
    return config


def shares(folder):
    state = torch.load(folder / 'checkpoint.pt', weights_only=True)['model']
    return {name: value for name, value in state.items() if name.endswith('window.share')}


def test_what_is_learned_is_frozen_and_reported(data, tmp_path, caplog):
    result = train(learning_recipe(data, tmp_path / 'run', penalty=30.0, budget=0.3))
    kept = result['truncation']['kept']
    assert set(kept) == {'patch_embed', 'blocks.0.attn', 'blocks.1.attn'}
    assert set(result['truncation']['learned']) >= {'top1'}
    assert 'truncations frozen: top-1' in caplog.text
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').open()]
    assert lines[-1]['kind'] == 'frozen' and lines[-1]['top1'] == result['top1']
    assert lines[-2]['kind'] == 'val' and lines[-2]['top1'] == result['truncation']['learned']['top1']
    model = load_model(tmp_path / 'run')
    assert model.patch_embed.window is None
    assert [list(pair) for pair in model.patch_embed.truncation] == [list(pair) for pair in kept['patch_embed']]
    assert model.blocks[0].attn.options['num_tokens'] == list(kept['blocks.0.attn'])
    assert result['parameters'] == sum(p.numel() for p in model.parameters())


def test_the_penalty_stops_at_the_budget(data, tmp_path):
    free, dear, budgeted = tmp_path / 'free', tmp_path / 'dear', tmp_path / 'budgeted'
    for folder, penalty, budget in ((free, 0, 0), (dear, 100, 0), (budgeted, 100, 0.95)):
        config = learning_recipe(data, folder, penalty=float(penalty), budget=budget)
        config.optim.opt, config.optim.lr, config.optim.momentum = 'sgd', 6e-4, 0.0
        train(config)
    mean = {folder: sum(share.mean() for share in shares(folder).values()) for folder in (free, dear, budgeted)}
    assert mean[dear] < mean[budgeted] - 0.05 and mean[dear] < mean[free] - 0.05


def freezing_recipe(data, output, **options):
    config = learning_recipe(data, output, penalty=30.0, budget=0.3, **options)
    config.sched.epochs, config.sched.warmup_epochs = 3, 0
    config.optim.lr = 0.1
    config.stages = [StageConfig(2), StageConfig(1, freeze=True)]
    return config


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """The run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp('run') / 'whole'
    train(freezing_recipe(data, folder))
    return folder


def test_a_stage_freezes_and_trains_on(data, tmp_path, caplog):
    result = train(freezing_recipe(data, tmp_path / 'run'))
    said = caplog.text
    assert 'stage 2/2: truncations frozen' in said and said.count('truncations frozen: top-1') == 1
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').open()]
    frozen = [line for line in lines if line['kind'] == 'frozen']
    assert [(line['epoch'], line['step']) for line in frozen] == [(1, 12)]
    truncation = result['truncation']
    assert truncation['frozen']['top1'] == frozen[0]['top1']
    assert 0 < truncation['cost'] < 0.5
    costs = [line['truncation_cost'] for line in lines if line['kind'] == 'val' and line['stage'] == 0]
    assert len(costs) == 2 and 1.5 > costs[0] > costs[1]
    model = load_model(tmp_path / 'run')
    assert not has_windows(model)
    assert [list(pair) for pair in model.patch_embed.truncation] == [
        list(pair) for pair in truncation['kept']['patch_embed']
    ]
    assert model.patch_embed.truncation[0] != (4, 4)


@pytest.mark.parametrize('patch', [True, False])
def test_what_freezing_costs_is_measured_on_what_is_frozen(data, tmp_path, monkeypatch, patch):
    """With an average of the weights, too: it has the sizes of the weights, and these are what a stage freezes."""
    measured = []
    evaluate = trainer.evaluate

    def spy(model, *args):
        evaluation = evaluate(model, *args)
        shares = [p.tolist() for name, p in model.named_parameters() if name.endswith('share')]
        measured.append((shares, evaluation.accuracies))
        return evaluation

    monkeypatch.setattr(trainer, 'evaluate', spy)
    config = freezing_recipe(data, tmp_path / 'run')
    config.ema.decay, config.eval_every = 0.999, 9
    if patch:
        config.model.args = {**TINY, 'patch_embed': 'dct', 'patch_window': True}
        config.model.name = 'vit_full_tiny'
    truncation = train(config)['truncation']
    (average, _), (raw, learned), (none, frozen), _ = measured
    assert average == raw and not none
    assert truncation['learned'] == learned and truncation['frozen'] == frozen
    if patch:
        assert learned == frozen


def test_sizes_are_learned_at_the_size_of_the_model(data, tmp_path):
    config = learning_recipe(data, tmp_path / 'run')
    config.model.args = {**config.model.args, 'dynamic_img_size': True}
    config.data.img_size = [24, 32]
    with pytest.raises(ValueError, match=r'trained at the size it is built for: .*\(16, 16\), data.img_size'):
        train(config)


def test_a_checkpoint_from_before_a_key_of_stages_goes_on(data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, 'finish', lambda *args: {})
        train(freezing_recipe(data, tmp_path / 'again'))
    path = tmp_path / 'again' / 'checkpoint.pt'
    state = torch.load(path, weights_only=True)
    for stage in state['identity']['stages']:
        del stage['warmup_epochs']
    torch.save(state, path)
    train(freezing_recipe(data, tmp_path / 'again', resume='auto'))
    assert_same_run(whole, tmp_path / 'again')


def test_a_checkpoint_of_a_run_that_freezes_is_no_model_to_start_from(data, whole, tmp_path):
    config = learning_recipe(data, tmp_path / 'other')
    config.model.init_from = str(whole / 'checkpoint.pt')
    with pytest.raises(ValueError, match='belongs to a run whose stages change the model'):
        train(config)


def test_sizes_learn_at_the_full_rate(data):
    from vit_efficient.train.config import OptimConfig
    from vit_efficient.train.optim import create_optimizer

    model = timm.create_model('vit_dct_tiny', **TINY, patch_embed='dct', patch_window=True, attention_kwargs=LEARNED)
    optimizer = create_optimizer(model, OptimConfig(layer_decay=0.5))
    scales = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    assert len(scales) == sum(1 for _ in model.parameters())
    for name, parameter in model.named_parameters():
        if name.endswith('share') or name.startswith(('patch_embed', 'blocks')):
            assert (scales[id(parameter)] == 1) == name.endswith('share')


@pytest.mark.parametrize('moment', ['learning', 'freezing', 'measured', 'trained on'])
def test_going_on_around_a_freeze_gives_the_same_weights(data, whole, tmp_path, monkeypatch, moment):
    owner, method, call = {
        'learning': (Trainer, 'update', 9),
        'freezing': (LearnedTruncation, 'begin_stage', 2),
        'measured': (Trainer, 'epoch', 3),
        'trained on': (Trainer, 'update', 15),
    }[moment]
    original, calls = getattr(owner, method), []

    def stop(self, *args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, stop)
        with pytest.raises(Interrupted):
            train(freezing_recipe(data, tmp_path / 'again'))
    train(freezing_recipe(data, tmp_path / 'again', resume='auto'))
    assert_same_run(whole, tmp_path / 'again')


def test_stages_that_cannot_freeze(data, tmp_path):
    for stages, message in (
        ([StageConfig(1, freeze=True), StageConfig(1)], r'stages\[0\].freeze must be false'),
        ([StageConfig(1), StageConfig(1, freeze=True), StageConfig(1, freeze=True)], 'freeze is for one stage'),
        ([StageConfig(1), StageConfig(1, freeze=True)], r'stages\[1\]: the model learns no truncation'),
        ([StageConfig(1), StageConfig(1, 'pool', freeze=True)], r'stages\[1\] has attention and freeze'),
        (
            [StageConfig(1, 'dct', LEARNED), StageConfig(1, freeze=True), StageConfig(1, 'dct', LEARNED)],
            r'stages\[2\] learns truncations again',
        ),
        ([StageConfig(1, 'dct', LEARNED), StageConfig(1, 'pool')], r'stages\[1\] takes away truncations'),
    ):
        config = tiny_recipe(data, tmp_path / 'run', stages=stages)
        config.sched.epochs, config.sched.warmup_epochs = len(stages), 0
        with pytest.raises(ValueError, match=message):
            train(config)
    assert not (tmp_path / 'run').exists()


def test_a_penalty_needs_something_that_learns(data, tmp_path):
    config = tiny_recipe(data, tmp_path / 'run')
    config.truncation.penalty = 1.0
    with pytest.raises(ValueError, match='truncation.penalty=1: the model learns no truncation'):
        train(config)
    assert not (tmp_path / 'run').exists()


def test_a_run_that_ends_while_it_is_measured_goes_on(data, tmp_path, monkeypatch):
    train(learning_recipe(data, tmp_path / 'whole', penalty=30.0))

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, 'finish', stop)
        with pytest.raises(KeyboardInterrupt):
            train(learning_recipe(data, tmp_path / 'again', penalty=30.0))
    train(learning_recipe(data, tmp_path / 'again', penalty=30.0, resume='auto'))
    assert_same_run(tmp_path / 'whole', tmp_path / 'again')


def test_with_an_average_of_weights(data, tmp_path):
    config = learning_recipe(data, tmp_path / 'run', penalty=30.0)
    config.ema.decay = 0.9
    train(config)
    model = timm.create_model(f'local-dir:{tmp_path / "run" / "model"}', pretrained=True)
    assert model.patch_embed.window is None


@pytest.mark.parametrize(
    'options', [dict(patch_color='ycbcr'), dict(patch_window=True), dict(patch_size=8, img_size=32)]
)
def test_weights_of_another_patch_embedding_are_refused(data, tmp_path, options):
    def recipe(output, **args):
        config = tiny_recipe(data, output)
        config.model = ModelConfig('vit_full_tiny', {**TINY, 'patch_embed': 'dct', 'patch_keep': 4, **args})
        return config

    train(recipe(tmp_path / 'run'))
    for source in ('run', 'run/model/model.safetensors', 'run/checkpoint.pt'):
        config = recipe(tmp_path / 'other', **options)
        config.model.init_from = str(tmp_path / source)
        with pytest.raises(ValueError, match='was saved with patch_embed='):
            train(config)
