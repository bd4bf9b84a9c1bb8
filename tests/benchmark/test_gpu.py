"""The script for a GPU, on the CPU: that it runs, and that it says so where something is wrong."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'recipes/benchmarks/gpu.py'


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location('gpu', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(folder):
    return [json.loads(line) for line in (folder / 'rows.jsonl').read_text().splitlines()]


@pytest.mark.compiled
@pytest.mark.subprocess
def test_all_parts_run_tiny(tmp_path):
    command = [sys.executable, str(SCRIPT), '--out', str(tmp_path), '--device', 'cpu', '--tiny']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'NO_ALBUMENTATIONS_UPDATE': '1'}
    budget = ['--budget', '3000', '--stretch', '15']  # beside other tests
    done = subprocess.run([*command, *budget], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    rows = rows_of(tmp_path)
    found = {row['what'] for row in rows}
    assert found >= {'environment', 'right', 'layer', 'model', 'train', 'compiled'}
    kinds = [row['kind'] for row in rows if row['what'] == 'right']
    assert kinds.count('float32') == kinds.count('autocast') >= 60
    summary = (tmp_path / 'summary.md').read_text()
    assert '0 rows beyond their limit' in summary and 'failed or cut short: 0' in summary


def _good(part):
    part.row('sdpa', n=1)


def _wrong(part):
    part.row('right', kind='float32', errors={'eval': 1.0}, beyond=['eval'])


def _raises(part):
    raise ZeroDivisionError('by nought')


def _case_fails(part):
    with part.case('model', px=64):
        raise ValueError('of this case')
    part.row('model', px=128)


def _late(part):
    part.row('model', px=64)
    with part.case('model', 1e9):
        raise AssertionError('there is no time for it')


def _hangs(part):
    time.sleep(600)


def _dies(part):
    os._exit(9)


@pytest.mark.parametrize(
    'function, said',
    [
        (_wrong, '"beyond": ["eval"]'),
        (_raises, 'ZeroDivisionError: by nought'),
        (_case_fails, 'ValueError: of this case'),
        (_late, 'out of time'),
        (_hangs, 'killed'),
        (_dies, 'ended with 9'),
    ],
)
def test_what_is_wrong_is_said(script, tmp_path, monkeypatch, capfd, function, said):
    """In the summary and by the exit status; the next part runs."""
    seconds = -14 if function is _hangs else 20
    monkeypatch.setattr(script, 'PARTS', {'first': (seconds, function), 'second': (20, _good)})
    assert script.main(['--out', str(tmp_path), '--device', 'cpu', '--tiny', '--budget', '1e6']) == 1
    assert said in capfd.readouterr().out
    assert said in (tmp_path / 'summary.md').read_text()
    assert rows_of(tmp_path)[-1]['part'] == 'second'


def test_good_parts_are_good(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, 'PARTS', {'first': (20, _good)})
    assert script.main(['--out', str(tmp_path), '--device', 'cpu', '--budget', '1e6']) == 0


def test_what_is_not_begun_is_said(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, 'PARTS', {'first': (20, _good), 'second': (20, _good)})
    assert script.main(['--out', str(tmp_path), '--device', 'cpu', '--budget', '0']) == 1
    assert [row['failed'] for row in rows_of(tmp_path)] == ['not begun: out of time'] * 2
