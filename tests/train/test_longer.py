"""A line for each epoch, where a run goes on, and runs that are to be longer than they were."""

import logging
import re
import shlex

import pytest

from tests.data.trees import write_tree
from tests.train.recipes import tiny_recipe
from tests.train.test_trainer import assert_same_run, fail, stop_after
from vit_efficient.train import load_model, train
from vit_efficient.train.recipe import to_yaml
from vit_efficient.train.run_folder import RunFolder
from vit_efficient.train.trainer import Trainer
from vit_efficient_cli import main


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp('data'))


def recipe(data, output, epochs, **options):
    config = tiny_recipe(data, output, **options)
    config.sched.sched, config.sched.epochs = 'none', epochs
    return config


def test_each_epoch_has_a_line_and_a_run_says_where_it_goes_on(data, tmp_path, caplog, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        update = Trainer.update
        patch.setattr(
            Trainer, 'update', lambda self, _: fail() if self.state.progress.updates == 9 else update(self, _)
        )
        train(recipe(data, tmp_path / 'run', 3, eval_every=3, checkpoint_steps=1))
    said = [record.message for record in caplog.records if record.levelno == logging.INFO]
    assert [line.partition(':')[0] for line in said if line.startswith('epoch')] == ['epoch 1/3']
    assert not any('going on' in line for line in said)
    caplog.clear()
    train(recipe(data, tmp_path / 'run', 3, eval_every=3, checkpoint_steps=1, resume='auto'))
    said = [record.message for record in caplog.records]
    assert f'going on in epoch 2/3, after update 9, with what is in {tmp_path}/run' in said
    second, third = (line for line in said if line.startswith('epoch'))
    assert re.fullmatch(r'epoch 2/3: train loss \d\.\d{3}, \d+ s, about \S+ to go', second)
    assert re.match(r'epoch 3/3: train loss \d\.\d{3}, val loss \d\.\d{3}, top-1', third)


def test_a_run_that_stops_at_the_end_of_an_epoch_goes_on_there(data, tmp_path, caplog, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        patch.setattr('vit_efficient.train.trainer.evaluate', lambda *_: fail())
        train(recipe(data, tmp_path / 'run', 2))
    caplog.clear()
    train(recipe(data, tmp_path / 'run', 2, resume='auto'))
    said = [record.message for record in caplog.records]
    start = said.index(f'going on at the end of epoch 1/2, after update 6, with what is in {tmp_path}/run')
    assert said[start + 1].startswith('epoch 1/2: ')


@pytest.mark.parametrize(
    ('batch_size', 'repeats', 'line'),
    [
        (4, 1, 'each epoch shows 24 of 24 training images'),
        (10, 1, 'each epoch shows 20 of 24 training images; the others, which change from epoch to epoch, fill no up'),
        (10, 3, 'each epoch shows 7 of 24 training images, 3 times each'),
    ],
)
def test_a_run_says_how_many_images_an_epoch_shows(data, tmp_path, caplog, batch_size, repeats, line):
    config = recipe(data, tmp_path / 'run', 1)
    config.data.batch_size, config.data.repeats = batch_size, repeats
    train(config)
    assert any(record.message.startswith(line) for record in caplog.records)


def test_a_run_without_a_schedule_is_lengthened(data, tmp_path, monkeypatch):
    train(recipe(data, tmp_path / 'long', 3))
    train(recipe(data, tmp_path / 'run', 1))
    # Interrupted on its way, it is a run that has not finished.
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_after(patch, 2, fail)
        train(recipe(data, tmp_path / 'run', 3, resume='auto', checkpoint_steps=1))
    assert not RunFolder(tmp_path / 'run').is_finished
    result = train(recipe(data, tmp_path / 'run', 3, resume='auto'))
    assert (result['epochs'], result['steps']) == (3, 18)
    assert_same_run(tmp_path / 'long', tmp_path / 'run')
    with pytest.raises(ValueError, match=r'was written with sched.epochs=3, this run has sched.epochs=2; set it back'):
        train(recipe(data, tmp_path / 'run', 2, resume='auto'))


def told(recipe, overrides, capsys):
    """The command that the error of a run names, which is to be longer than it was."""
    capsys.readouterr()
    assert main(['train', str(recipe), *overrides]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    return shlex.split(error[error.index('vit-efficient train ', error.index('from its weights')) :])


@pytest.mark.parametrize(
    ('given', 'longer', 'keys'),
    [
        ([], 5, []),
        (
            [
                'sched.warmup_epochs=2',
                'model.args.dynamic_img_size=true',
                'data.schedule=[{epoch: 0, img_size: [8, 8]}, {epoch: 1, img_size: [12, 16]}]',
            ],
            3,
            ['sched.warmup_epochs=0', 'data.schedule=[{epoch: 0, img_size: [12, 16]}]'],
        ),
    ],
)
def test_a_schedule_that_cannot_be_lengthened_names_the_command_that_goes_on(
    data, tmp_path, capsys, given, longer, keys
):
    config = tiny_recipe(data, tmp_path / 'a run', resume='auto')
    (tmp_path / 'recipe.yaml').write_text(to_yaml(config))
    overridden = ['optim.lr=0.002', 'model.args.depth=1', *given]
    assert main(['train', str(tmp_path / 'recipe.yaml'), *overridden]) == 0
    command = told(tmp_path / 'recipe.yaml', [*overridden, f'sched.epochs={longer}'], capsys)
    start = [f'model.init_from={tmp_path}/a run', f'output={tmp_path}/a run-longer', f'sched.epochs={longer - 2}']
    assert command[3:] == start + keys
    assert main(command[1:]) == 0
    result, config = RunFolder(tmp_path / 'a run-longer').result, RunFolder(tmp_path / 'a run-longer').config
    assert (result['epochs'], config.optim.lr, config.model.args['depth']) == (longer - 2, 0.002, 1)


def test_a_run_that_has_not_finished_is_to_finish_first(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_after(patch, 1, fail)
        train(tiny_recipe(data, tmp_path / 'run', checkpoint_steps=1))
    config = tiny_recipe(data, tmp_path / 'run', resume='auto')
    config.sched.epochs = 5
    with pytest.raises(ValueError, match=r'with sched.epochs=2, .* set it back, and let the run finish; then') as error:
        train(config)
    assert 'vit-efficient train' not in str(error.value)


@pytest.mark.parametrize(
    ('model', 'last', 'attention', 'keys'),
    [
        (['model.name=vit_full_tiny'], 'attention: pool', 'pool', ['model.name=vit_full_tiny', 'model.attention=pool']),
        (
            ['model.name=vit_dct_tiny', 'model.args.attention_kwargs.keep_ratio=0.5'],
            'attention: dct',
            'dct',
            ['model.name=vit_dct_tiny', 'model.args.attention_kwargs={keep_ratio: 0.25}'],
        ),
        (
            ['model.name=vit_tiny_patch16_224', 'model.attention=dct', 'model.layers=[0]'],
            'attention: pool, attention_kwargs: {keep_ratio: 0.5}',
            'pool',
            [
                'model.name=vit_tiny_patch16_224',
                'model.attention=pool',
                'model.attention_kwargs={keep_ratio: 0.5}',
                'model.layers=null',
            ],
        ),
    ],
)
def test_stages_that_cannot_be_lengthened_name_the_command_that_goes_on(
    data, tmp_path, capsys, model, last, attention, keys
):
    (tmp_path / 'recipe.yaml').write_text(to_yaml(tiny_recipe(data, tmp_path / 'run', resume='auto')))
    arguments = ['train', str(tmp_path / 'recipe.yaml'), *model, 'sched.warmup_epochs=0']
    assert main([*arguments, f'stages=[{{epochs: 1}}, {{epochs: 1, {last}}}]']) == 0
    stages = f'stages=[{{epochs: 1}}, {{epochs: 2, {last}}}]'
    command = told(tmp_path / 'recipe.yaml', [*arguments[2:], 'sched.epochs=3', stages], capsys)
    start = [f'model.init_from={tmp_path}/run', f'output={tmp_path}/run-longer', 'sched.epochs=1', 'stages=[]']
    assert command[3:] == start + keys
    assert main(command[1:]) == 0
    model = load_model(tmp_path / 'run-longer')
    assert model.attention_spec() == load_model(tmp_path / 'run').attention_spec()
    assert model.attention_spec()[0][0] == attention


def test_stages_are_not_left_out_of_a_run_without_a_schedule(data, tmp_path, capsys):
    (tmp_path / 'recipe.yaml').write_text(to_yaml(tiny_recipe(data, tmp_path / 'run', resume='auto')))
    changes = ['sched.sched=none', 'sched.warmup_epochs=0']
    stages = 'stages=[{epochs: 1}, {epochs: 1, attention: pool}]'
    assert main(['train', str(tmp_path / 'recipe.yaml'), *changes, stages]) == 0
    command = told(tmp_path / 'recipe.yaml', [*changes, 'sched.epochs=3', 'stages=[]'], capsys)
    assert main(command[1:]) == 0
    longer, run = (load_model(tmp_path / name) for name in ('run-longer', 'run'))
    assert longer.attention_spec() == run.attention_spec()


def test_a_truncation_that_was_learned_goes_on_as_a_hard_one(data, tmp_path, capsys):
    config = tiny_recipe(data, tmp_path / 'run', resume='auto')
    config.model.args |= {'patch_embed': 'dct', 'patch_window': True, 'attention_kwargs': {'learned': True}}
    config.sched.warmup_epochs, config.truncation.penalty, config.truncation.budget = 0, 1.0, 0.1
    (tmp_path / 'recipe.yaml').write_text(to_yaml(config))
    assert main(['train', str(tmp_path / 'recipe.yaml')]) == 0
    command = told(tmp_path / 'recipe.yaml', ['sched.epochs=3'], capsys)
    assert main(command[1:]) == 0
    longer, run = (load_model(tmp_path / name) for name in ('run-longer', 'run'))
    assert longer.attention_spec() == run.attention_spec()
    assert longer.patch_embed.options == run.patch_embed.options
