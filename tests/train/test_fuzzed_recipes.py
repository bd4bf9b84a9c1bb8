"""Recipes with random damage: each is taken, or refused in one line that names the key."""

import copy
import math
import random
from contextlib import nullcontext

import pytest
import yaml

from tests.data.trees import write_tree
from tests.train.recipes import ALL, load_any, tiny_recipe
from tests.train.test_trainer import same
from vit_efficient.train import load_recipe, run
from vit_efficient.train.recipe import to_yaml
from vit_efficient.train.run_folder import RunFolder
from vit_efficient.train.trainer import Trainer
from vit_efficient.utils.errors import UserError
from vit_efficient_cli import main

pytestmark = pytest.mark.once

ODD = (
    *(None, True, -1, 0, 1.5, 10**12, 10**400, -math.inf, math.inf, math.nan),
    *('', 'fast', '1e-3', 'é\n', '${seed}', '${nothing}', '${', '???', '0x'),
    *([], [None], ['a'], [math.nan], [[1]], {}, {'a': 1}, {1: 2}, {None: None}, {'a': {'b': '${nothing}'}}),
)
BROKEN = (
    *('{', '}', '[', ': :', '\t', '- ', '"', "'", '\0', '? [1]'),
    *('&a [*a]', '*b', '!!int x', '!!timestamp x', '!!python/name:os.system'),
)


def sections(tree, path=''):
    """Every mapping and list of a recipe, with its dotted key."""
    yield path, tree
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, (dict, list)):
            yield from sections(value, f'{path}[{key}]' if isinstance(tree, list) else f'{path}.{key}'.lstrip('.'))


def damage(draw, tree):
    """Changes one value in place, or adds a key; its dotted key."""
    path, section = draw.choice([(path, section) for path, section in sections(tree) if section])
    key = draw.choice(list(section) if isinstance(section, dict) else range(len(section)))
    full = f'{path}[{key}]' if isinstance(section, list) else f'{path}.{key}'.lstrip('.')
    if isinstance(section, dict) and draw.random() < 0.3:
        section[f'{key}x'] = section.pop(key)
        return full + 'x'
    section[key] = draw.choice(ODD)
    return full


def resolved(draw):
    """A recipe of the repository, with stages and sizes if it has none."""
    tree = yaml.safe_load(to_yaml(load_any(draw.choice(ALL))))
    if tree['task'] == 'classification' and tree['data']['decode'] != 'coefficients':
        tree['data']['schedule'] = tree['data']['schedule'] or [{'epoch': 0, 'img_size': [16, 16]}]
    if not tree['stages']:
        tree['sched'].update(epochs=3, warmup_epochs=0.0)
        tree['stages'] = [{'epochs': 2}, {'epochs': 1, 'attention': 'dct', 'layers': [-1]}]
    return tree


def refusal(read):
    """The message, None if there is none; anything but a UserError of one line fails."""
    try:
        read()
    except ValueError as error:
        assert type(error) is UserError, repr(error)
        assert '\n' not in str(error) and len(str(error)) < 1000, str(error)
        return str(error)


def test_damaged_values_are_refused_by_key(tmp_path):
    draw = random.Random(0)
    trees = [resolved(draw) for _ in range(10)]
    path = tmp_path / 'fuzzed.yaml'
    refused = 0
    for number in range(120):
        tree = copy.deepcopy(trees[number % 10])
        key = damage(draw, tree)
        path.write_text(yaml.safe_dump(tree, allow_unicode=True))
        message = refusal(lambda: load_recipe(path))
        if message is not None:
            refused += 1
            # Where values contradict each other the message may begin with the other one.
            name = key.rpartition('.')[2].partition('[')[0]
            contradicts = not name.endswith('x') and (name in message or message.startswith('distill has options'))
            assert key in message or contradicts, (key, message)
    assert refused > 60


def test_broken_yaml_is_refused_by_line(tmp_path):
    draw = random.Random(0)
    path = tmp_path / 'fuzzed.yaml'
    refused = 0
    for _ in range(50):
        text = draw.choice(ALL).read_text()
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice(BROKEN) + text[place + draw.choice((0, 0, 1, 5)) :]
        path.write_text(text)
        (tmp_path / 'base.yaml').write_text('seed: 1')
        message = refusal(lambda: load_recipe(path))
        if message is not None:
            refused += 1
            assert str(path) in message or str(tmp_path) in message or 'model.name' in message, (text, message)
    assert refused > 25


def write_nothing(monkeypatch):
    """Ends a run where its folder would be opened."""
    monkeypatch.setattr(RunFolder, 'open', lambda *_: nullcontext())
    monkeypatch.setattr(Trainer, 'fit', lambda _: {})


def test_what_only_training_can_tell_is_one_line_too(tmp_path, monkeypatch, capsys):
    """Arguments of models, optimisers and schedules."""
    write_nothing(monkeypatch)
    path = tmp_path / 'fuzzed.yaml'
    draw = random.Random(0)
    config = tiny_recipe(write_tree(tmp_path / 'data'), tmp_path / 'run')
    config.model.args['attention_kwargs'] = {'keep_ratio': 0.25}
    config.optim.args, config.sched.args = {'betas': [0.9, 0.99]}, {'cycle_limit': 1}
    statuses = []
    for _ in range(20):
        tree = yaml.safe_load(to_yaml(config))
        section = draw.choice([tree['model'], tree['model'], tree['optim'], tree['sched']])
        damage(draw, section['args'])
        path.write_text(yaml.safe_dump(tree, allow_unicode=True))
        statuses.append(main(['train', str(path)]))
        output = capsys.readouterr()
        lines = output.err.splitlines()
        assert statuses[-1] == 0 or (len(lines) == 1 and 'error: ' in lines[0]), output.err
    assert statuses.count(2) > 10


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp('recipe')
    path = folder / 'tiny.yaml'
    config = tiny_recipe(write_tree(folder / 'data'), folder / 'run')
    path.write_text(to_yaml(config))
    config.model.args = {}
    path.with_name('plain.yaml').write_text(to_yaml(config))
    return path


@pytest.mark.parametrize(
    'arguments, message',
    [
        ('optim.args={betas: [0.9]}', "optim.opt=adamw with optim.args={'betas': [0.9]}: "),
        ('optim.args={betas: [2, 2]}', "with optim.args={'betas': [2, 2]}: "),
        ('optim.args={fused: true, foreach: true}', "with optim.args={'fused': True, 'foreach': True}: "),
        ('optim.args={eps: abc}', "with optim.args={'eps': 'abc'}: "),
        ('optim.opt=adahessian', 'optim.opt=adahessian: '),
        ('optim.opt=lbfgs', 'optim.opt=lbfgs'),
        ('sched.sched=step | sched.args={decay_epochs: 0}', "sched.sched=step with sched.args={'decay_epochs': 0}: "),
        ('sched.sched=step | sched.args={decay_rate: abc}', "sched.sched=step with sched.args={'decay_rate': 'abc'}: "),
        (
            'sched.sched=step | sched.args={decay_epochs: 1, decay_rate: -1}',
            'the learning rate of update 6 would be -0.0',
        ),
        ('sched.args={cycle_mul: 0}', "sched.sched=cosine with sched.args={'cycle_mul': 0}: "),
        ('stages=[{epochs: 1, lr: 1e300},{epochs: 1}] | optim.args={betas: 3}', "optim.args={'betas': 3}"),
        ('model.args.drop_path_rate=2', 'model.args.drop_path_rate must be at least 0 and below 1, got 2'),
        ('model.args.drop_path_rate=-1', 'model.args.drop_path_rate must be at least 0 and below 1, got -1'),
        ('model.args.depth=0', "'depth': 0"),
        (
            'model.name=resnet10t | data.img_size=[32, 32] | data.batch_size=1 | loss={mixup: 0, cutmix: 0}',
            'model.name=resnet10t with model.args={} cannot be trained (data.batch_size=1): Expected more than 1 value',
        ),
        ('model.name=resnet10t | model.args.features_only=true', "model.args={'features_only': True}: "),
        (
            'model.name=pit_ti_224 | grad_checkpointing=true',
            'grad_checkpointing=true: model pit_ti_224 does not have',
        ),
        ('model.init_from=/etc/passwd', 'model.init_from=/etc/passwd: not a file of weights that timm can read ('),
        ('data.crop_pct=1e-9', 'data.crop_pct must be at least 0.1 and at most 1, got 1e-09'),
        ('data.augment.color_jitter=1.5', 'data.augment.color_jitter must be between 0 and 1, got 1.5'),
        ('data.mean=[nan,0,0]', 'data.mean must be numbers from -1e6 to 1e6, got [nan, 0.0, 0.0]'),
        ('data.mean=[1e300,0,0]', 'data.mean must be numbers from -1e6 to 1e6, got [1e+300, 0.0, 0.0]'),
        ('data.std=[1,nan,1]', 'data.std must be numbers from 1e-6 to 1e6, got [1.0, nan, 1.0]'),
        ('data.val_args={a: 1}', "data.val_args={'a': 1} are for"),
        ('threads=100000', 'threads must be from 1 to 1024, got 100000'),
        ('parallel=fsdp | channels_last=true', 'channels_last must be false for parallel=fsdp'),
    ],
)
def test_keys_whose_values_only_fail_later_are_named(recipe, capsys, arguments, message):
    before = sorted(recipe.parent.iterdir())
    if 'model.name' in arguments:
        recipe = recipe.with_name('plain.yaml')  # without arguments of ours
    assert main(['train', str(recipe), *arguments.split(' | ')]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count('\n') == 1
    assert sorted(recipe.parent.iterdir()) == before


@pytest.mark.parametrize('name', ['resnet10t', 'vit_dct_tiny'])
def test_what_is_tried_leaves_nothing_behind(tmp_path, monkeypatch, name):
    states = []
    preflight = run.preflight

    def watched(experiment, state):
        states.append(copy.deepcopy(state.model.state_dict()))
        preflight(experiment, state)
        states.append(state.model.state_dict())

    monkeypatch.setattr(run, 'preflight', watched)
    write_nothing(monkeypatch)
    config = tiny_recipe(write_tree(tmp_path / 'data'), tmp_path / 'run')
    if name == 'resnet10t':
        config.model.name, config.model.args, config.data.img_size = name, {}, [32, 32]
    run.train(config)
    assert same(*map(dict, states))
