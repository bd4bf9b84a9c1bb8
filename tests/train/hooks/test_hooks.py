"""The interface of training hooks: their options, order, memory and names."""

import json

import numpy as np
import pytest

from tests.data.trees import write_tree
from tests.train.recipes import tiny_recipe
from vit_efficient.train import TrainingHook, register_hook, train
from vit_efficient.train.distributed import Processes
from vit_efficient.train.experiment import Experiment
from vit_efficient.train.hooks import HOOKS
from vit_efficient.utils.errors import UserError


class Counting(TrainingHook):
    """Remembers in a number of NumPy how many steps there were."""

    def __init__(self, step: int = 1):
        super().__init__()
        self.step, self.memory = step, {'count': np.int64(0)}

    def after_step(self, state):
        self.memory['count'] = np.int64(self.memory['count'] + self.step)

    def measure(self, trainer):
        return {'count': np.float32(self.memory['count'])}

    def result(self):
        return {'counting': self.memory}


@pytest.fixture
def data(tmp_path):
    return write_tree(tmp_path / 'data')


@pytest.fixture
def registered(monkeypatch):
    """Registers hooks, for a test."""
    monkeypatch.setattr('vit_efficient.train.hooks.HOOKS', dict(HOOKS))
    return lambda name, cls: register_hook(name)(type(cls.__name__, (cls,), {}))


def test_numbers_of_numpy_are_numbers(data, tmp_path, registered):
    registered('counting', Counting)
    result = train(tiny_recipe(data, tmp_path / 'run', hooks={'counting': {'step': 2}}))
    assert result['counting'] == {'count': 24}
    (tmp_path / 'run/result.json').unlink()
    config = tiny_recipe(data, tmp_path / 'run', hooks={'counting': {'step': 2}}, resume='auto')
    assert train(config)['counting'] == {'count': 24}
    lines = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').open()]
    assert [line['count'] for line in lines if line['kind'] == 'counting'] == [12, 24]


@pytest.mark.parametrize(
    ('hooks', 'message'),
    [
        ({'countign': {}}, "hooks has no option 'countign'; did you mean counting"),
        ({'counting': {'stpe': 1}}, "the training hook 'counting' has no option 'stpe'; did you mean step"),
        ({'counting': 3}, 'hooks.counting must be a mapping of options to values, got 3'),
        ({'leaves': {'images': 3}}, "hooks has no option 'leaves'"),
        ({'of_objects': None}, "the memory of the training hook 'of_objects' must be of types that JSON has"),
        ({'without_memory': {}}, "'without_memory' has no memory; let its __init__ call super"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(data, tmp_path, registered, hooks, message):
    registered('counting', Counting)
    registered(
        'of_objects', type('OfObjects', (Counting,), {'memory': property(lambda _: {'f': print}, lambda *_: None)})
    )
    registered('without_memory', type('WithoutMemory', (TrainingHook,), {'__init__': lambda self: None}))
    with pytest.raises(UserError, match=message):
        train(tiny_recipe(data, tmp_path / 'run', hooks=hooks))
    assert not (tmp_path / 'run').exists()


def test_a_hook_that_is_named_without_options_is_there(data, tmp_path, registered):
    registered('counting', Counting)
    assert train(tiny_recipe(data, tmp_path / 'run', hooks={'counting': None}))['counting'] == {'count': 12}


def test_ours_are_called_first_whatever_was_registered_when(data, tmp_path, registered):
    for name in ('a_second', 'a_first'):
        registered(name, Counting)
    config = tiny_recipe(data, tmp_path / 'run', hooks={'a_second': {}, 'a_first': {}})
    experiment = Experiment.build(config, Processes())
    assert [hook.name for hook in experiment.hooks] == ['leaves', 'a_first', 'a_second']


def test_names_of_metrics_are_taken(registered):
    for name in ('val', 'train', 'leaves'):
        with pytest.raises(UserError, match='that kind|registered already'):
            registered(name, Counting)
