"""What a run does without: a checkpoint that cannot be read, disks that are full, numbers that are not finite."""

import builtins
import errno
import json
import os
import shutil
import signal
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from tests.data.trees import write_tree
from tests.processes import taking, torchrun
from tests.train.recipes import ROOT, TINY, tiny_recipe, train_on_one_and_two_processes
from tests.train.test_trainer import assert_same_run, fail, same
from vit_efficient.data import EpochSampler
from vit_efficient.train import evaluate, experiment, load_model, run_folder, train, trainer
from vit_efficient.train.checkpoint import list_checkpoints, load_checkpoint, load_newest, save_checkpoint
from vit_efficient.train.config import LossConfig
from vit_efficient.train.log import MetricsLog
from vit_efficient.train.recipe import to_yaml
from vit_efficient.train.trainer import Trainer
from vit_efficient.utils import files
from vit_efficient_cli import main


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def stopped(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('stopped') / 'run'
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_at(patch, 2)
        train(tiny_recipe(data, folder, checkpoint_steps=1))
    return folder


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def updates(folder):
    return [load_checkpoint(path)['progress']['updates'] for path in list_checkpoints(folder)]


def stop_at(monkeypatch, update, action=fail):
    original = Trainer.update

    def stopping(trainer, chunk):
        return original(trainer, chunk) if trainer.state.progress.updates < update else action()

    monkeypatch.setattr(Trainer, 'update', stopping)


@pytest.mark.parametrize('resume', ['never', 'auto', 'restart'])
@pytest.mark.subprocess
def test_a_folder_is_of_one_run_at_a_time(data, tmp_path, resume):
    folder = tmp_path / 'run'
    folder.mkdir()
    with taking(folder / '.lock'), pytest.raises(ValueError, match='output=.*/run: another process trains there; wait'):
        train(tiny_recipe(data, folder, resume=resume))
    assert [path.name for path in folder.iterdir()] == ['.lock']
    assert train(tiny_recipe(data, folder, resume=resume))['steps'] == 12


def test_a_run_without_a_checkpoint_is_one_too(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_at(patch, 2)
        train(tiny_recipe(data, tmp_path / 'run'))
    before = (tmp_path / 'run/metrics.jsonl').read_text()
    with pytest.raises(ValueError, match='run holds a run already; resume=auto goes on'):
        train(tiny_recipe(data, tmp_path / 'run', seed=1))
    assert (tmp_path / 'run/metrics.jsonl').read_text() == before != ''
    assert train(tiny_recipe(data, tmp_path / 'run', seed=1, resume='auto'))['steps'] == 12


def test_other_files_are_another_run(data, stopped, tmp_path):
    other = shutil.copytree(data, tmp_path / 'data')
    folder = shutil.copytree(stopped, tmp_path / 'run')
    assert (moved := tiny_recipe(other, folder, resume='auto')) and train(moved)['steps'] == 12
    folder = shutil.copytree(stopped, tmp_path / 'again')
    (other / 'train/c1/3.png').rename(other / 'train/c1/30.png')
    with pytest.raises(ValueError, match='was written with training files=.*, this run has training files='):
        train(tiny_recipe(other, folder, resume='auto'))
    state = load_checkpoint(folder / 'checkpoint.pt')
    torch.save({**state, 'identity': {**state['identity'], 'training files': None}}, folder / 'checkpoint.pt')
    with pytest.raises(ValueError, match=r'training files=None, .*; an older version, .* did not tell them, or start'):
        train(tiny_recipe(other, folder, resume='auto'))


def state_at(number):
    weights = {'weight': torch.full((3,), number)}
    return {'identity': {}, 'progress': {'updates': number}, 'model': weights, 'optimizer': {}}


def test_the_last_checkpoints_are_kept(tmp_path):
    newest = tmp_path / 'checkpoint.pt'
    for number in (2, 4, 4, 6, 8):
        save_checkpoint(newest, state_at(number), keep=3)
    assert names(tmp_path) == ['checkpoint.pt', 'checkpoint-8.pt', 'checkpoint-6.pt', 'checkpoint-4.pt']
    assert updates(tmp_path) == [8, 8, 6, 4]
    # A run that has gone back writes what came after anew.
    save_checkpoint(newest, state_at(5), keep=3)
    assert updates(tmp_path) == [5, 5, 4]
    save_checkpoint(newest, state_at(6), keep=1)
    assert names(tmp_path) == ['checkpoint.pt']


def test_without_links_checkpoints_are_copied(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, 'Operation not permitted')

    monkeypatch.setattr(os, 'link', no_links)
    for number in (1, 2, 3):
        save_checkpoint(tmp_path / 'checkpoint.pt', state_at(number), keep=2)
    assert updates(tmp_path) == [3, 3, 2]


@pytest.mark.parametrize('gone', [False, True])
def test_a_run_goes_on_from_the_newest_checkpoint_that_can_be_read(data, tmp_path, monkeypatch, caplog, gone):
    train(tiny_recipe(data, tmp_path / 'whole'))
    config = tiny_recipe(data, tmp_path / 'parts', checkpoint_steps=2, checkpoint_keep=3)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_at(patch, 10)
        train(config)
    assert updates(tmp_path / 'parts') == [10, 10, 8, 6]
    for name in ('checkpoint.pt', 'checkpoint-10.pt'):
        path = tmp_path / 'parts' / name
        path.unlink() if gone else path.write_bytes(path.read_bytes()[:1000])
    caplog.clear()
    config.resume = 'auto'
    train(config)
    said = caplog.text
    line = f'{tmp_path}/parts/checkpoint.pt: not a readable checkpoint'
    assert (line in said) is not gone
    assert ('; going on from ' in said) is not gone
    if not gone:
        assert f'going on from {tmp_path}/parts/checkpoint-8.pt, update 8\n' in said
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.parametrize(
    'part, value, message',
    [
        ('progress', {'epoch': 0, 'updates': 3, 'momentum': 1}, "unexpected keyword argument 'momentum'"),
        ('model', {}, r'Missing key\(s\) in state_dict: "cls_token"'),
        ('optimizer', {'state': {}, 'param_groups': []}, 'different number of parameter groups'),
        ('optimizer', {}, "KeyError: 'state'"),
        ('identity', {'stages': 3}, "'int' object is not iterable"),
        ('ema', None, 'Missing key|NoneType'),
    ],
)
def test_what_is_not_a_state_of_the_run_is_named(data, stopped, tmp_path, part, value, message):
    folder = shutil.copytree(stopped, tmp_path / 'run')
    state = {**load_checkpoint(folder / 'checkpoint.pt'), part: value}
    save_checkpoint(folder / 'checkpoint.pt', state)
    with pytest.raises(ValueError, match=rf'run/checkpoint\.pt: not a state of this run \(.*{message}') as error:
        train(tiny_recipe(data, folder, resume='auto'))
    assert '\n' not in str(error.value)


def test_a_run_does_not_start_from_damaged_weights(data, stopped, tmp_path):
    source = shutil.copy(stopped / 'checkpoint.pt', tmp_path)
    with zipfile.ZipFile(source) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size if '/data/' in part.filename else 0)
    content = bytearray(Path(source).read_bytes())
    content[largest.header_offset + 300] ^= 1  # names and alignment come before, 64 bytes each
    Path(source).write_bytes(content)
    config = tiny_recipe(data, tmp_path / 'run')
    config.model.init_from = str(source)
    with pytest.raises(ValueError, match=rf'model\.init_from={source}: damaged \({largest.filename} is not'):
        train(config)


def test_checkpoints_none_of_which_can_be_read_are_named(data, tmp_path):
    config = tiny_recipe(data, tmp_path / 'run', checkpoint_steps=2, checkpoint_keep=2)
    config.sched.epochs = 1
    train(config)
    for path in list_checkpoints(tmp_path / 'run'):
        path.write_bytes(b'')
    config.resume = 'auto'
    message = r'checkpoint\.pt: not .*checkpoint-6\.pt: not .*checkpoint-4\.pt: not'
    with pytest.raises(ValueError, match=message) as error:
        train(config)
    assert '\n' not in str(error.value) and str(error.value).endswith('; resume=restart starts anew')
    config.resume, config.checkpoint_keep = 'restart', 1
    train(config)
    assert names(tmp_path / 'run') == ['checkpoint.pt']


def test_the_best_model_is_kept(data, tmp_path, monkeypatch):
    accuracies = [30.0, 50.0, 50.0, 40.0]
    found = iter(accuracies)
    weights = []

    def judged(model, *args):
        evaluation = evaluate(model, *args)
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        object.__setattr__(evaluation, 'top1', next(found))
        return evaluation

    monkeypatch.setattr(trainer, 'evaluate', judged)
    config = tiny_recipe(data, tmp_path / 'run', checkpoint_best=True)
    config.sched.epochs = 4
    result = train(config)
    assert (result['top1'], result['best']['epoch'], result['best']['top1']) == (40, 1, 50)
    assert same(dict(load_model(tmp_path / 'run/best').state_dict()), weights[1])
    assert same(dict(load_model(tmp_path / 'run').state_dict()), weights[3])
    assert main(['evaluate', f'{tmp_path}/run/best', '--data', f'{data}/val', '--device', 'cpu']) == 0


@pytest.mark.distributed
def test_two_processes_keep_the_best_model_of_shared_weights(data, tmp_path):
    def recipe(output):
        config = tiny_recipe(data, output, parallel='fsdp', checkpoint_best=True, checkpoint_keep=2)
        config.model.args = dict(TINY)
        return config

    train_on_one_and_two_processes(recipe, tmp_path, batch_size=4)
    best = [json.loads((tmp_path / count / 'result.json').read_text())['best'] for count in '12']
    assert best[0] == best[1]
    ours, theirs = (load_model(tmp_path / count / 'best').state_dict() for count in '12')
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5)
    assert updates(tmp_path / '2') == [12, 12, 6]


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize('where', ['torch.save', 'os.replace', 'os.fsync'])
def test_a_full_disk_costs_no_checkpoint(data, tmp_path, monkeypatch, capsys, where):
    train(tiny_recipe(data, tmp_path / 'whole'))
    path = tmp_path / 'recipe.yaml'
    path.write_text(to_yaml(tiny_recipe(data, tmp_path / 'run', checkpoint_steps=2, checkpoint_keep=2)))
    save = run_folder.save_checkpoint
    with monkeypatch.context() as patch:

        def full(file, state, keep):
            if state['progress']['updates'] == 8:
                patch.setattr(where, no_space)
            save(file, state, keep)

        patch.setattr(run_folder, 'save_checkpoint', full)
        assert main(['train', str(path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f'vit-efficient train: error: {tmp_path}/run/checkpoint.pt: cannot be written: No space left on device; the '
        'checkpoint before is as it was, resume=auto goes on from it'
    )
    assert updates(tmp_path / 'run') == [6, 6, 4]
    assert main(['train', str(path), 'resume=auto']) == 0
    assert_same_run(tmp_path / 'whole', tmp_path / 'run')


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_what_the_system_says_of_a_full_disk_is_told(tmp_path, monkeypatch):
    opened = builtins.open
    monkeypatch.setattr(
        builtins, 'open', lambda path, *args: opened('/dev/full' if str(path).endswith('.tmp') else path, *args)
    )
    state = {**state_at(1), 'large': torch.zeros(1_000_000)}
    with pytest.raises(ValueError, match=r'checkpoint\.pt: cannot be written: No space left on device$'):
        save_checkpoint(tmp_path / 'checkpoint.pt', state)


def test_a_disk_that_fills_in_the_middle_of_a_checkpoint_is_told(tmp_path):
    resource = pytest.importorskip('resource')
    path = tmp_path / 'checkpoint.pt'
    save_checkpoint(path, state_at(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # Python ignores the signal that goes with it
    try:
        with pytest.raises(ValueError) as error:
            save_checkpoint(path, {**state_at(2), 'large': [torch.zeros(100_000) for _ in range(20)]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f'{path}: cannot be written: File too large; the checkpoint before is as it was, resume=auto goes on from it'
    )
    assert updates(tmp_path) == [1] and list(tmp_path.iterdir()) == [path]


def test_other_errors_of_pytorch_keep_their_traceback(tmp_path):
    with pytest.raises(RuntimeError, match='a bug'), files.writing(tmp_path):
        raise RuntimeError('a bug')


@pytest.mark.parametrize('name', ['metrics.jsonl', 'model', 'best', 'predictions.csv'])
def test_other_files_that_cannot_be_written_are_named(data, tmp_path, monkeypatch, capsys, name):
    train(tiny_recipe(data, tmp_path / 'whole', checkpoint_best=True))
    path = tmp_path / 'recipe.yaml'
    path.write_text(to_yaml(tiny_recipe(data, tmp_path / 'run', checkpoint_best=True)))
    with monkeypatch.context() as patch:
        if name == 'metrics.jsonl':
            patch.setattr(MetricsLog, 'append', no_space)
        elif name == 'predictions.csv':
            write = run_folder.write_text
            patch.setattr(
                run_folder, 'write_text', lambda file, text: (no_space if file.name == name else write)(file, text)
            )
        else:
            save = run_folder.save_model
            patch.setattr(run_folder, 'save_model', lambda *args: (no_space if args[1].name == name else save)(*args))
        assert main(['train', str(path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f'vit-efficient train: error: {tmp_path}/run')
    assert 'cannot be written: No space left on device' in last
    if name != 'metrics.jsonl':  # before the first checkpoint
        assert main(['train', str(path), 'resume=auto']) == 0
        assert_same_run(tmp_path / 'whole', tmp_path / 'run')


def test_too_little_room_is_found_before_training(data, tmp_path, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    config = tiny_recipe(data, tmp_path / 'run')
    config.sched.epochs = 1
    train(config)
    size = (tmp_path / 'run/checkpoint.pt').stat().st_size
    weights = sum(tensor.nbytes for tensor in load_model(tmp_path / 'run').state_dict().values())
    estimate = 4 * weights  # with their average, and two of Adam's

    def leave(free):
        monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(10**9, 10**9 - int(free), int(free)))

    config.output = str(tmp_path / 'new')
    leave(size)
    with pytest.raises(ValueError, match=r'new: 0 MB are free there, checkpoints take up to 0 MB .*set another output'):
        train(config)
    assert not (tmp_path / 'new').exists()
    leave((3 + 1) * estimate - 1)
    config.checkpoint_keep = 3
    with pytest.raises(ValueError, match=r'\(3 of about 0 MB, and one that is being written\)'):
        train(config)
    leave((3 + 1) * estimate)
    train(config)
    config.checkpoint_keep, config.resume = 1, 'restart'
    train(config)
    # A run that goes on, or is replaced, has a part of the room already.
    leave(1.2 * size)
    train(config)


def test_a_folder_that_cannot_be_written_is_found_before_training(data, tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(run_folder, 'write_text', read_only)
    with pytest.raises(ValueError, match='output=.*run: cannot write there: Read-only file system'):
        train(tiny_recipe(data, tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    'owner, where',
    [(experiment.data, 'create_dataset'), (run_folder, 'load_newest'), (experiment, 'describe_environment')],
)
def test_a_signal_before_the_first_update_is_one_line(
    data, stopped, tmp_path, monkeypatch, capsys, number, owner, where
):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    folder = shutil.copytree(stopped, tmp_path / 'run')
    before = (folder / 'checkpoint.pt').read_bytes()
    path = tmp_path / 'recipe.yaml'
    path.write_text(to_yaml(tiny_recipe(data, folder, resume='auto')))
    original = getattr(owner, where)

    def interrupted(*args):
        os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(owner, where, interrupted)
    assert main(['train', str(path)]) == {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
    line = capsys.readouterr().err.removesuffix('\n')
    if where == 'describe_environment':  # the folder is being written
        assert f'stopped by {number.name} after update 2; {folder}/checkpoint.pt is saved; resume=auto' in line
    else:
        assert line == f'vit-efficient train: stopped by {number.name} before an update; resume=auto goes on'
        assert (folder / 'checkpoint.pt').read_bytes() == before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def poison(monkeypatch, *numbers, gradient=False):
    """Makes the loss, or only its gradient, of these updates NaN, by an image of each."""
    update = Trainer.update

    def poisoned(trainer, chunk):
        if trainer.state.progress.updates not in numbers:
            return update(trainer, chunk)
        if not gradient:
            chunk[0][0] = chunk[0][0].float()
            chunk[0][0][1] = float('nan')
            return update(trainer, chunk)
        weight = trainer.state.model.head.weight
        handle = weight.register_hook(lambda gradient: gradient * float('inf'))
        try:
            return update(trainer, chunk)
        finally:
            handle.remove()

    monkeypatch.setattr(Trainer, 'update', poisoned)


def files_of(data, update, batch=4):
    """Of a batch of the first epoch."""
    sampler = EpochSampler(24, block=batch)
    indices = [index for _, index in sampler][batch * update : batch * (update + 1)]
    return [f'c{index // 8}/{index % 8}.png' for index in indices]


@pytest.mark.parametrize('gradient', [False, True])
@pytest.mark.parametrize('clip_grad', [None, 1.0])
def test_what_is_not_finite_never_reaches_the_weights(data, tmp_path, monkeypatch, gradient, clip_grad):
    config = tiny_recipe(data, tmp_path / 'run', checkpoint_steps=1, clip_grad=clip_grad)
    poison(monkeypatch, 2, gradient=gradient)
    what = 'the gradient is not finite' if gradient else 'the loss is nan'
    with pytest.raises(ValueError) as error:
        train(config)
    assert str(error.value) == (
        f'{what} at update 3 (epoch 1), images {", ".join(files_of(data, 2))}; the weights are unchanged; '
        'on_nonfinite=skip goes on without it'
    )
    state = load_checkpoint(tmp_path / 'run/checkpoint.pt')
    assert state['progress']['updates'] == 2
    assert all(tensor.isfinite().all() for tensor in state['model'].values())


@pytest.mark.parametrize('gradient', [False, True])
def test_updates_may_be_left_out(data, tmp_path, monkeypatch, caplog, gradient):
    config = tiny_recipe(data, tmp_path / 'whole', on_nonfinite='skip', checkpoint_steps=1)
    with monkeypatch.context() as patch:
        poison(patch, 2, 3, 7, gradient=gradient)
        result = train(config)
    said = caplog.text
    assert said.count('left out: the ') == 3 and ', '.join(files_of(data, 2)) in said
    assert (result['steps'], result['nonfinite']) == (12, 3)
    lines = list(map(json.loads, (tmp_path / 'whole/metrics.jsonl').open()))
    left_out = [(line['step'], line['updates']) for line in lines if line['kind'] == 'nonfinite']
    assert left_out == [(3, 1), (4, 2), (8, 3)]
    assert [line['nonfinite'] for line in lines if line['kind'] == 'val'] == [2, 1]
    assert [line['step'] for line in lines if line['kind'] == 'train'] == [1, 2, 5, 6, 7, 9, 10, 11, 12]
    losses = [line['loss'] for line in lines if line['kind'] == 'train']
    means = [line['train_loss'] for line in lines if line['kind'] == 'val']
    assert means == [pytest.approx(sum(part) / len(part)) for part in (losses[:4], losses[4:])]

    config.output = str(tmp_path / 'parts')
    poison(monkeypatch, 2, 3, 7, gradient=gradient)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_at(patch, 4)
        train(config)
    config.resume = 'auto'
    assert train(config)['nonfinite'] == 3
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


def test_an_epoch_without_an_update_has_no_loss(data, tmp_path, monkeypatch):
    poison(monkeypatch, *range(6))
    train(tiny_recipe(data, tmp_path / 'run', on_nonfinite='skip'))

    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON')

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / 'run/metrics.jsonl').open()]
    losses = [line['train_loss'] for line in lines if line['kind'] == 'val']
    assert losses[0] is None and losses[1] > 0


def test_too_many_in_a_row_end_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, 'MAX_NONFINITE', 3)
    poison(monkeypatch, 1, 2, 4, 5, 6)
    with pytest.raises(ValueError, match=r'at update 7 \(epoch 2\), images .*; with it, 3 updates in a row were left'):
        train(tiny_recipe(data, tmp_path / 'run', on_nonfinite='skip'))


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
@pytest.mark.distributed
def test_all_processes_leave_out_the_same_updates(data, tmp_path, parallel):
    """One process alone meets what is not finite; with it or without, all end with the same weights."""
    config = tiny_recipe(data, tmp_path / 'run', on_nonfinite='skip', parallel=parallel, clip_grad=1.0)
    config.model.args, config.loss = dict(TINY), LossConfig(0.1)
    config.optim.opt, config.data.batch_size = 'sgd', 2
    (tmp_path / 'recipe.yaml').write_text(to_yaml(config))
    ranks = torchrun('tests/train/poisoned.py', tmp_path / 'recipe.yaml')
    files = ', '.join(files_of(data, 3)[2:])
    assert f'left out: the loss is nan at update 4 (epoch 1), images {files}\n' in ranks[0].stderr + ranks[1].stderr
    result = json.loads((tmp_path / 'run/result.json').read_text())
    assert (result['steps'], result['nonfinite']) == (12, 1)
    command = result['environment']['command']
    assert command.startswith(f'cd {ROOT} && torchrun --nnodes 1 --nproc-per-node 2 tests/train/poisoned.py ')
    # One process that leaves out the same update.
    config.output, config.data.batch_size = str(tmp_path / 'one'), 4
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, 3)
        train(config)
    one, two = (load_newest(tmp_path / name)[1]['model'] for name in ('one', 'run'))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
