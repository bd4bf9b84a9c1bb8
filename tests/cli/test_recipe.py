import csv
import io
import json

import pytest

from vit_efficient.cli import main
from vit_efficient.train import config

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    rows = [
        dict(key='optim.lr', type='float', default=1e-3, range='above 0', resume=False, help='Learning rate.'),
        dict(key='data.workers', type='int', default=4, range='at least 0', resume=True, help='Loader processes.'),
        dict(
            key='clip_grad', type='float?', default=None, range='above 0', resume=False, help='Largest norm | or none'
        ),
    ]
    monkeypatch.setattr(config, 'describe_keys', lambda: rows, raising=False)


def test_keys_as_a_table(capsys):
    assert main(['recipe', 'keys']) == 0
    head, rule, lr, workers, clip = capsys.readouterr().out.splitlines()
    assert ':' not in rule
    cells = [
        [cell.strip() for cell in line.replace(r'\|', 'or').split('|')[1:-1]] for line in (head, lr, workers, clip)
    ]
    assert cells == [
        ['key', 'type', 'default', 'range', 'may change on resumption', 'meaning'],
        ['optim.lr', 'float', '0.001', 'above 0', 'no', 'Learning rate.'],
        ['data.workers', 'int', '4', 'at least 0', 'yes', 'Loader processes.'],
        ['clip_grad', 'float?', 'null', 'above 0', 'no', 'Largest norm or or none'],
    ]


def test_keys_for_programs(capsys):
    assert main(['recipe', 'keys', '--format', 'json']) == 0
    assert json.loads(capsys.readouterr().out) == config.describe_keys()
    assert main(['recipe', 'keys', '--format', 'csv']) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row['key'] for row in rows] == ['optim.lr', 'data.workers', 'clip_grad'] and rows[2]['default'] == 'null'


@pytest.mark.parametrize(('word', 'found'), [('LR', ['optim.lr']), ('processes', ['data.workers'])])
def test_keys_by_a_word_in_their_name_or_meaning(word, found, capsys):
    assert main(['recipe', 'keys', '--like', word, '--format', 'json']) == 0
    assert [row['key'] for row in json.loads(capsys.readouterr().out)] == found


def test_a_word_that_no_key_has(capsys):
    assert main(['recipe', 'keys', '--like', 'clip_gard']) == 2
    assert "no key has 'clip_gard' in its name or meaning; did you mean clip_grad?" in capsys.readouterr().err
