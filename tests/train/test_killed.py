import json
import os
import subprocess
import sys

import pytest

from tests.data.trees import write_tree
from tests.train.recipes import ROOT, tiny_recipe
from tests.train.test_trainer import assert_same_run
from vit_efficient.train import train
from vit_efficient.train.recipe import to_yaml

pytestmark = pytest.mark.once

KILLS = 20


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.subprocess
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(tmp_path):
    data = write_tree(tmp_path / 'data')

    def recipe(name):
        config = tiny_recipe(data, tmp_path / name, resume='auto', checkpoint_steps=1, checkpoint_best=True)
        config.sched.epochs, config.eval_every = 30, 3
        return config

    train(recipe('whole'))
    (tmp_path / 'killed.yaml').write_text(to_yaml(recipe('killed')))
    command = [sys.executable, 'tests/train/killed.py', str(tmp_path / 'killed.yaml'), str(KILLS)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen['kills'] == KILLS and seen['while writing'] > 0
    assert seen['updates'] == sorted(seen['updates']) and len(set(seen['updates'])) > KILLS // 2
    assert_same_run(tmp_path / 'whole', tmp_path / 'killed')
    for name in ('model/model.safetensors', 'best/model.safetensors', 'predictions.csv'):
        assert (tmp_path / 'whole' / name).read_bytes() == (tmp_path / 'killed' / name).read_bytes()
    assert not list((tmp_path / 'killed').rglob('*.tmp'))
