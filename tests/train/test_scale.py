"""The same weights however the work is shared, and what happens to a run when one of its processes ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.data.trees import write_tree
from tests.processes import run_python, torchrun
from tests.train.recipes import ROOT, TINY, assert_same_predictions, tiny_recipe
from vit_efficient.train import distributed, load_model, train
from vit_efficient.train import run as running
from vit_efficient.train.checkpoint import load_checkpoint
from vit_efficient.train.config import EmaConfig, LossConfig, ModelConfig, StageConfig
from vit_efficient.train.distributed import Processes, has_unused_parameters
from vit_efficient.train.recipe import to_yaml

ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp('data'), train=14, val=1)


def recipe(data, output, **options):
    """Five epochs of five updates of eight images; three images to evaluate, which two processes share unevenly."""
    config = tiny_recipe(data, output, resume='auto', clip_grad=0.5, **options)
    config.sched.epochs = 5
    config.data.batch_size = 2
    return config


def plain(data, output, **options):
    config = recipe(data, output, loss=LossConfig(0.1), **options)
    config.model.args = dict(TINY)
    config.optim.opt, config.optim.lr, config.ema = 'sgd', 0.1, EmaConfig()
    return config


def staged(data, output, **options):
    config = recipe(data, output, **options)
    trees = {'tree_height': 2}
    config.stages = [StageConfig(2), StageConfig(2, 'treeformer_tc', trees), StageConfig(1, 'treeformer_tf', trees)]
    config.sched.warmup_epochs = 0
    return config


def save(config):
    path = Path(f'{config.output}.yaml')
    path.write_text(to_yaml(config))
    return str(path)


def state_of(folder):
    state = load_checkpoint(folder / 'checkpoint.pt')
    del state['progress']['train_seconds']
    return state


def assert_close(ours, theirs, path='state'):
    assert type(ours) is type(theirs), f'{path}: {ours}, {theirs}'
    if isinstance(ours, torch.Tensor):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-10, msg=lambda text: f'{path}: {text}')
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key, value in ours.items():
            assert_close(value, theirs[key], f'{path}.{key}')
    elif isinstance(ours, list):
        assert_close(dict(enumerate(ours)), dict(enumerate(theirs)), path)
    else:
        assert ours == (pytest.approx(theirs, abs=1e-10) if isinstance(ours, float) else theirs), path


@pytest.mark.compiled
@pytest.mark.distributed
def test_how_the_work_is_shared_changes_nothing_but_rounding(data, tmp_path):
    """With plain SGD, and with all that learns and draws; stopped here, and gone on with there."""
    makers = {'plain': plain, 'drawn': recipe, 'staged': staged}
    shares = {'one': {'grad_accum': 4}, 'ddp': {'grad_accum': 2}, 'fsdp': {'grad_accum': 2, 'parallel': 'fsdp'}}

    def recipes(share, *names, **options):
        return [
            save(makers[name](data, tmp_path / f'{name}-{folder}', **shares[share], **options))
            for name, folder in (full.split('-') for full in names)
        ]

    script = 'tests/train/double.py'
    # Mid-epoch: an epoch has five updates.
    stopped = recipes('one', 'drawn-begun_by_one')[0] + '@8'
    run_python(script, *recipes('one', 'plain-one', 'drawn-one', 'staged-one'), stopped)
    ranks = torchrun(
        script,
        *recipes('ddp', 'plain-ddp', grad_checkpointing=True, compile=True),
        *recipes('ddp', 'staged-ddp', grad_checkpointing=True),
        *recipes('fsdp', 'plain-fsdp', grad_checkpointing=True, compile=True),
        *recipes('fsdp', 'staged-fsdp', grad_checkpointing=True),
        *(f'{path}@8' for path in recipes('ddp', 'drawn-begun_by_ddp')),
        *(f'{path}@8' for path in recipes('fsdp', 'drawn-begun_by_fsdp')),
        *recipes('fsdp', 'drawn-begun_by_one'),
    )
    for how in ('ddp', 'fsdp'):
        assert (state := state_of(tmp_path / f'drawn-begun_by_{how}'))['progress']['updates'] == 8
        assert state['progress']['epoch'] == 1
    run_python(script, *recipes('one', 'drawn-begun_by_ddp', 'drawn-begun_by_fsdp'))

    for name, others in {
        'plain': ['ddp', 'fsdp'],
        'drawn': ['begun_by_one', 'begun_by_ddp', 'begun_by_fsdp'],
        'staged': ['ddp', 'fsdp'],
    }.items():
        one = state_of(tmp_path / f'{name}-one')
        assert one['progress']['updates'] == 25
        for other in others:
            assert_close(one, state_of(tmp_path / f'{name}-{other}'), f'{name}-{other}')
            assert_same_predictions(tmp_path / f'{name}-one', tmp_path / f'{name}-{other}')
            models = [load_model(tmp_path / f'{name}-{which}').state_dict() for which in ('one', other)]
            assert_close(dict(models[0]), dict(models[1]), f'{name}-{other}')

    line = '8 images per update: 2 per batch × 2 accumulated × 2 processes (FSDP); learning rate 0.1'
    assert sum(done.stderr.count(line) for done in ranks) == 1
    scale = json.loads((tmp_path / 'plain-fsdp/environment.json').read_text())['scale']
    assert scale == {
        'images_per_update': 8,
        'processes': 2,
        'batch_size': 2,
        'grad_accum': 2,
        'lr': 0.1,
        'updates_per_epoch': 5,
        'parallel': 'fsdp',
    }


@contextmanager
def started(config):
    """A run that has written its first checkpoint, and the ids of its processes by rank."""
    command = [*TORCHRUN, 'tools/train.py', save(config)]
    checkpoint = Path(config.output) / 'checkpoint.pt'
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.05)
        children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
        ranks = {}
        for child in map(int, children):
            variables = Path(f'/proc/{child}/environ').read_text().split('\0')
            ranks |= {int(value[5:]): child for value in variables if value.startswith('RANK=')}
        yield process, ranks
    finally:
        process.kill()


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='needs /proc')
@pytest.mark.distributed
@pytest.mark.subprocess
def test_the_end_of_one_process_is_the_end_of_the_run(data, tmp_path):
    config = recipe(data, tmp_path / 'run', parallel='fsdp', checkpoint_steps=1)
    config.sched.epochs, config.eval_every = 100_000, 100_000
    with started(config) as (torchrun, _):
        torchrun.send_signal(signal.SIGTERM)
        _, said = torchrun.communicate(timeout=60)
    assert torchrun.returncode
    updates = load_checkpoint(tmp_path / 'run/checkpoint.pt')['progress']['updates']
    assert said.count(f'stopped by SIGTERM after update {updates}; {tmp_path}/run/checkpoint.pt is saved') == 1

    with started(config) as (torchrun, ranks):
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        _, said = torchrun.communicate(timeout=60)
    assert torchrun.returncode
    assert time.monotonic() - killed < 60
    assert re.search(r'rank +: 1 (?s:.*)SIGKILL', said), said
    assert load_checkpoint(tmp_path / 'run/checkpoint.pt')['progress']['updates'] > updates


def test_parameters_without_gradient_are_found():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).train()
    images = torch.ones(1, 1, 2, 2)
    assert not has_unused_parameters(model, images)
    model.spare = nn.Parameter(torch.ones(3))
    model.forward = lambda images: model[1](model[0](images))
    assert has_unused_parameters(model, images)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    dtypes = []
    model.forward = lambda images: dtypes.append((logits := model[1](model[0](images))).dtype) or logits
    assert has_unused_parameters(model, images, amp='bf16')
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize('config, found', [('cpu:gloo,cuda:nccl', 'cpu'), ('cpu:gloo', 'cpu'), ('cuda:nccl', 'cuda')])
def test_what_runs_are_steered_by_stays_on_the_host(monkeypatch, config, found):
    monkeypatch.setattr(distributed.dist, 'get_backend_config', lambda: config)
    assert distributed.talking_device(torch.device('cuda', 1)).type == found


def test_gpus_talk_by_two_backends(monkeypatch):
    asked = []
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(distributed, 'choose_device', lambda *_, **__: torch.device('cuda', 0))
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    for name in ('get_rank', 'get_world_size', 'destroy_process_group'):
        monkeypatch.setattr(distributed.dist, name, lambda: 0)
    monkeypatch.setattr(distributed.dist, 'init_process_group', lambda backend, timeout: asked.append(backend))
    with distributed.processes():
        assert asked == ['cpu:gloo,cuda:nccl']


@pytest.mark.parametrize('variable', ['2', '1', None])
def test_a_process_group_that_is_there_is_used_whatever_the_environment_says(monkeypatch, variable):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    if variable:
        monkeypatch.setenv('WORLD_SIZE', variable)
    for name, value in (('is_initialized', True), ('get_rank', 1), ('get_world_size', 2)):
        monkeypatch.setattr(distributed.dist, name, lambda value=value: value)
    with distributed.processes('cpu') as team:
        assert (team.rank, team.world_size) == (1, 2)


def test_processes_of_another_launcher_keep_their_gpus(monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    for name, value in (('is_available', True), ('current_device', 3), ('set_device', None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name, value in (('is_initialized', True), ('get_rank', 1), ('get_world_size', 2)):
        monkeypatch.setattr(distributed.dist, name, lambda value=value: value)
    monkeypatch.setattr(distributed, 'choose_device', lambda _, local_rank: torch.device('cuda', local_rank))
    with distributed.processes() as team:
        assert team.device.index == 3


class Two(Processes):
    """The first of two processes, of which the other says what is given here."""

    def __init__(self, other=None):
        super().__init__(torch.device('cpu'), 0, 2)
        object.__setattr__(self, 'other', other)

    def gather(self, value):
        return [value, self.other]


def test_learned_truncations_are_not_shared_out(data, tmp_path, monkeypatch):
    monkeypatch.setattr(running, 'processes', lambda _: nullcontext(Two((False, False))))
    config = recipe(data, tmp_path / 'run', parallel='fsdp')
    config.model = ModelConfig('vit_dct_tiny', {**TINY, 'attention_kwargs': {'learned': True}})
    with pytest.raises(ValueError, match='parallel must be ddp for a model that learns truncations, got fsdp'):
        train(config)
    assert not (tmp_path / 'run').exists()


@pytest.mark.distributed
def test_optimisers_that_do_not_take_shared_weights_are_named(data, tmp_path):
    config = recipe(data, tmp_path / 'run', parallel='fsdp')
    config.optim.opt = 'adafactor'
    for done in torchrun('tools/train.py', save(config), check=False):
        assert done.returncode
        assert '\nvit-efficient train: error: optim.opt=adafactor, with parallel=fsdp: ' in f'\n{done.stderr}'
        assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'run').exists()


def test_a_folder_that_not_all_processes_see_is_an_error(data, tmp_path, monkeypatch):
    monkeypatch.setattr(running, 'processes', lambda _: nullcontext(Two((True, False))))
    with pytest.raises(ValueError, match='rank 0: output=.*: some processes find a run there and some do not'):
        train(recipe(data, tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_processes_keep_in_step():
    """One that has run out of batches is given blank images as long as the other has some."""
    shape = (torch.Size([3, 4, 4]), torch.float32)
    steps = Two(shape).in_step([(torch.ones(2, 3, 4, 4), 'labels')])
    assert next(steps)[1]
    (blank,), own = next(steps)
    assert (blank.shape, own) == ((1, 3, 4, 4), False)
    assert [own for _, own in Two().in_step([(torch.ones(1, 3, 4, 4),)] * 2)] == [True] * 2
