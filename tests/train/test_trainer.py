import csv
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

from tests.data.streams import stand_in_for_streams
from tests.data.trees import pixels, write_tree
from tests.train.recipes import TINY, tiny_recipe
from vit_efficient.data import EpochSampler, EvalTransform, ImageTree, Preprocessing, Samples, create_loader
from vit_efficient.models import compile_blocks
from vit_efficient.train import Interrupted, evaluate, load_model, train, trainer
from vit_efficient.train.checkpoint import load_checkpoint
from vit_efficient.train.config import LossConfig
from vit_efficient.train.log import MetricsLog
from vit_efficient.train.recipe import to_yaml


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp('data'))


def stop_after(monkeypatch, batches, action):
    """Lets the loader fail, or a signal arrive, before the given micro-batch."""
    iterate = trainer.iterate

    def stopping(*args):
        for number, batch in enumerate(iterate(*args)):
            if number == batches:
                action()
            yield batch

    monkeypatch.setattr(trainer, 'iterate', stopping)


def fail():
    raise RuntimeError('the power is off')


def same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def assert_same_run(one, other):
    states = [load_checkpoint(Path(folder) / 'checkpoint.pt') for folder in (one, other)]
    for state in states:
        del state['progress']['train_seconds']
        for line in state['hooks'].get('healing', {}).get('stages', []):
            del line['hours']
    assert same(*states)
    ours, theirs = (list(map(json.loads, (Path(folder) / 'metrics.jsonl').open())) for folder in (one, other))
    for line in ours + theirs:
        line.pop('images_per_second', None)
        line.pop('train_seconds', None)
    assert ours == theirs


def near(text):
    return pytest.approx(float(text), abs=1e-6)


def test_a_run_leaves_everything_behind(data, tmp_path):
    config = tiny_recipe(data, tmp_path / 'run')
    result = train(config)
    folder = tmp_path / 'run'
    assert json.loads((folder / 'result.json').read_text()) == result
    assert result['steps'] == 12
    assert (result['train_images'], result['val_images']) == (24, 6)
    assert result['attention'][0] == 'dct' and result['attention'][1]['keep_ratio'] == 0.25
    assert result['started_from'] is None
    assert result['environment'] == json.loads((folder / 'environment.json').read_text())
    assert (folder / 'recipe.yaml').read_text() == to_yaml(config)
    assert list((folder / 'tensorboard').iterdir())
    kinds = [json.loads(line)['kind'] for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert kinds == (['train'] * 6 + ['val']) * 2

    rows = list(csv.DictReader((folder / 'predictions.csv').open()))
    assert [row['file'] for row in rows] == [f'c{label}/{number}.png' for label in range(3) for number in range(2)]
    right = sum(row['label'] == row['predicted'] for row in rows)
    assert result['top1'] == pytest.approx(100 * right / 6)

    model = load_model(folder)
    assert model.pretrained_cfg['label_names'] == ['c0', 'c1', 'c2']
    samples = Samples(ImageTree(data / 'val'), EvalTransform(Preprocessing.of(model)), 3, 3)
    found = evaluate(model, create_loader(samples, EpochSampler(6, shuffle=False), 4))
    assert found.predictions == [
        (int(r['index']), int(r['label']), int(r['predicted']), near(r['probability']), near(r['label_probability']))
        for r in rows
    ]
    assert found.top5 is None and 'top5' not in result  # of three classes
    # What is saved is what was evaluated: the average of the weights.
    state = load_checkpoint(folder / 'checkpoint.pt')
    assert same(dict(model.state_dict()), dict(state['ema']))
    assert not same(dict(state['ema']), dict(state['model']))


@pytest.mark.parametrize('grad_accum', [1, 2])
@pytest.mark.parametrize('stop', [2, 4])
def test_going_on_mid_epoch_gives_the_same_weights(data, tmp_path, monkeypatch, grad_accum, stop):
    options = {'grad_accum': grad_accum, 'clip_grad': 1.0}
    train(tiny_recipe(data, tmp_path / 'whole', **options))
    options['checkpoint_steps'] = 1
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_after(patch, stop, fail)
        train(tiny_recipe(data, tmp_path / 'parts', **options))
    assert load_checkpoint(tmp_path / 'parts/checkpoint.pt')['progress']['updates'] == stop // grad_accum
    # Neither what else is drawn nor loader processes make a difference.
    np.random.rand(3), torch.rand(3)
    config = tiny_recipe(data, tmp_path / 'parts', resume='auto', **options)
    config.data.workers = 1
    result = train(config)
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')
    assert train(config) == result


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint(data, tmp_path, monkeypatch, number):
    handler = signal.getsignal(number)
    train(tiny_recipe(data, tmp_path / 'whole'))
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=rf'{number.name} after update 3; \S+ is sav'):
        stop_after(patch, 3, lambda: os.kill(os.getpid(), number))
        train(tiny_recipe(data, tmp_path / 'parts'))
    assert signal.getsignal(number) == handler
    assert not (tmp_path / 'parts/result.json').exists()
    train(tiny_recipe(data, tmp_path / 'parts', resume='auto'))
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


def test_the_loader_leaves_signals_to_the_run(data, tmp_path, monkeypatch):
    """Schedulers send them to every process; while the run saves its checkpoint, its loader must not fail."""

    def terminate():
        loaders = multiprocessing.active_children()
        assert len(loaders) == 2
        subprocess.run(['kill', *(str(process.pid) for process in loaders)], check=True)
        time.sleep(0.5)

    config = tiny_recipe(data, tmp_path / 'run')
    config.data.workers, config.sched.epochs = 2, 1
    monkeypatch.setattr('vit_efficient.data.batches.available_cores', lambda: 2)
    stop_after(monkeypatch, 3, terminate)
    assert train(config)['steps'] == 6
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize('kind', ['train', 'val'])
def test_a_signal_does_not_cut_a_line_of_the_log(data, tmp_path, monkeypatch, kind):
    """TensorBoard's writer is another thread; a queue that is left half filled would stop it, and the run, for good."""
    write = MetricsLog.write

    def signalled(self, this_kind, epoch, step, values):
        if this_kind == kind:
            os.kill(os.getpid(), signal.SIGTERM)
        write(self, this_kind, epoch, step, values)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(MetricsLog, 'write', signalled)
        train(tiny_recipe(data, tmp_path / 'run'))
    last = json.loads((tmp_path / 'run/metrics.jsonl').read_text().splitlines()[-1])
    assert (last['kind'], last['step']) == (kind, 1 if kind == 'train' else 6)


def test_an_interrupted_evaluation_is_made_up_for(data, tmp_path, monkeypatch):
    train(tiny_recipe(data, tmp_path / 'whole'))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        patch.setattr(trainer, 'evaluate', lambda *_: fail())
        train(tiny_recipe(data, tmp_path / 'parts'))
    train(tiny_recipe(data, tmp_path / 'parts', resume='auto'))
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


def test_a_run_is_neither_overwritten_nor_mixed_with_another(data, tmp_path):
    config = tiny_recipe(data, tmp_path / 'run')
    config.sched.epochs = 1
    train(config)
    before = {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}
    with pytest.raises(ValueError, match=r'run holds a run already; resume=auto goes on'):
        train(config)
    changes = [
        ('seed=1', lambda c: setattr(c, 'seed', 1), 'seed=0, this run has seed=1'),
        ('name', lambda c: setattr(c.model, 'name', 'vit_full_tiny'), "name='vit_dct_tiny', .*='vit_full_tiny'"),
        ('ratio', lambda c: c.model.args.update(attention_kwargs={'keep_ratio': 0.5}), "'keep_ratio': 0.5"),
        ('batch', lambda c: setattr(c.data, 'batch_size', 2), r'× processes=4, this run has .*=2; set grad_accum=2,'),
        ('data', lambda c: setattr(c.data, 'train', f'{data}/val'), 'training images=24, .*training images=6'),
    ]
    for _, change, message in changes:
        other = tiny_recipe(data, tmp_path / 'run', resume='auto')
        other.sched.epochs = 1
        change(other)
        with pytest.raises(ValueError, match=message) as error:
            train(other)
        assert 'output=' in str(error.value)
    assert before == {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}
    (tmp_path / 'run/checkpoint.pt').unlink()
    config.resume = 'auto'
    with pytest.raises(ValueError, match='holds a result and no checkpoint'):
        train(config)
    config.resume, config.seed = 'restart', 1
    assert train(config)['seed'] == 1


@pytest.mark.parametrize('key', ['seed', 'sched.epochs', 'classes'])
def test_another_run_is_told_apart_before_anything_is_built_or_opened(data, tmp_path, monkeypatch, key):
    config = tiny_recipe(data, tmp_path / 'run', resume='auto')
    train(config)

    def refuse(*_):
        raise AssertionError('too early')

    monkeypatch.setattr('vit_efficient.train.experiment.create_model', refuse)
    if key == 'classes':
        config.data.train = str(write_tree(tmp_path / 'two', classes=2) / 'train')
    else:
        monkeypatch.setattr('vit_efficient.data.create_dataset', refuse, raising=False)
    config.sched.epochs += key == 'sched.epochs'
    config.seed += key == 'seed'
    with pytest.raises(ValueError, match=f'was written with {"training images" if key == "classes" else key}='):
        train(config)


@pytest.mark.parametrize(
    'loss', [LossConfig(0.0), LossConfig(bce=True), LossConfig(cutmix=1.0, bce=True), LossConfig(mixup=0.2)]
)
def test_losses_and_the_other_options(data, tmp_path, loss):
    config = tiny_recipe(data, tmp_path / 'run', loss=loss, amp='bf16', grad_checkpointing=True, eval_every=2)
    config.optim.layer_decay = 0.7
    config.ema.decay = 0.0
    config.sched.sched = 'step'
    assert train(config)['steps'] == 12


def test_a_model_learns(tmp_path):
    """Three plain grey levels are told apart after a few updates."""
    levels = [(np.full((16, 16), 40 + 80 * label, np.uint8), label) for label in range(3)] * 8
    config = tiny_recipe('', tmp_path / 'run', loss=LossConfig(0.0))
    config.model.args = {**TINY, 'num_classes': 3, 'in_chans': 1}
    config.sched.epochs = 10
    config.ema.decay = 0.0
    config.optim.lr = 5e-3
    augment = config.data.augment
    augment.rand_ops, augment.color_jitter, augment.erasing = 0, 0.0, 0.0
    assert train(config, levels, levels)['top1'] == 100


def test_training_on_five_channels_of_16_bits(tmp_path):
    images = [(pixels(i, (20, 24, 5), 'uint16'), i % 3) for i in range(12)]
    for image, label in images:
        folder = tmp_path / 'train' / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f'{image[0, 0, 0]}.npy', image)
    (tmp_path / 'val').symlink_to(tmp_path / 'train')
    config = tiny_recipe(tmp_path, tmp_path / 'run')
    config.model.args['in_chans'] = 5
    assert train(config)['val_images'] == 12
    config = tiny_recipe(tmp_path, tmp_path / 'rgb')
    with pytest.raises(ValueError, match=r'\.npy: it has 5 channels, the model takes 3'):
        train(config)


def test_bad_input_is_named_before_anything_is_written(data, tmp_path):
    empty = tmp_path / 'empty'
    empty.mkdir()
    (tmp_path / 'file').touch()
    four = write_tree(tmp_path / 'four', classes=4)

    def changed(key, value):
        config = tiny_recipe(data, tmp_path / 'run')
        *sections, name = key.split('.')
        section = config
        for item in sections:
            section = getattr(section, item)
        setattr(section, name, value)
        return config

    cases = [
        ('data.train', f'{data}/nothing', 'nothing: no such data folder'),
        ('data.val', str(empty), 'empty: the data folder is empty'),
        ('data.val', f'{four}/val', r"differ from those of the training set \(3\): missing \[\], unexpected \['c3'\]"),
        ('data.batch_size', 26, r'an update takes 26 images .* the training set has 24'),
        ('model.name', 'local-dir:mine', 'model.init_from=mine'),
        ('model.name', 'vit_nothing', "timm knows no model 'vit_nothing'"),
        ('model.args', {**TINY, 'attention_kwargs': {'keep_ratio': 1.5}}, 'keep_ratio'),
        ('model.args', {**TINY, 'depht': 2}, 'depht'),
        ('model.args', {**TINY, 'num_heads': 5}, 'num_heads'),
        ('model.args', {**TINY, 'img_size': 15}, '15'),
        ('model.args', {**TINY, 'num_classes': 2}, 'num_classes=2 is below the 3 classes'),
        ('model.init_from', str(tmp_path / 'nothing.pt'), 'nothing.pt'),
        ('model.init_from', str(empty), 'empty: not a model folder'),
        ('optim.opt', 'nothing', 'optim.opt=nothing'),
        ('optim.args', {'beta': 1}, 'optim.opt=adamw'),
        ('sched.sched', 'nothing', 'sched.sched'),
        ('sched.sched', 'plateau', 'sched.sched must be a schedule that needs no metric'),
        ('sched.args', {'cooldown_epochs': 3}, 'sched.args make a schedule of 5 epochs'),
        ('device', 'nothing', 'device=nothing'),
        ('device', 'meta', 'device=meta holds no numbers'),
        ('device', 'xpu:99', 'device=xpu:99: PyTorch finds no xpu:99 here'),
        (
            'data.img_size',
            [20, 20],
            r'vit_dct_tiny does not take images of 20×20 pixels and 3 channels \(data.img_size',
        ),
        ('model.args', {**TINY, 'attention_kwargs': {'num_tokens': [9, 9]}}, r'does not take images of 16×16 .*9'),
        ('model.args', {**TINY, 'in_chans': 5}, r'c0/0\.png: it has 3 channels, the model takes 5'),
        ('model.args', {**TINY, 'num_classes': 'three'}, "num_classes must be at least 1, got 'three'"),
        ('model.args', {**TINY, 'name': 'vit'}, 'vit_dct_tiny has no option .name.'),
        ('model.args', {**TINY, 'patch_size': 0}, 'timm cannot build vit_dct_tiny: '),
        ('sched.epochs', 0, r'sched\.epochs must be at least 1'),
        ('output', f'{tmp_path}/file/run', 'output=.*file/run: cannot write there: Not a directory'),
    ]
    for key, value, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            train(changed(key, value))
        assert '\n' not in str(error.value)
        assert not (tmp_path / 'run').exists()


def test_a_corrupt_image_is_named(tmp_path):
    data = write_tree(tmp_path / 'data')
    Image.fromarray(pixels(0, (9, 9, 3))).save(data / 'train/c1/3.png')
    damaged = (data / 'train/c1/3.png').read_bytes()[:-30]
    (data / 'train/c1/3.png').write_bytes(damaged)
    with pytest.raises(ValueError, match=r'train/c1/3\.png: not a readable image'):
        train(tiny_recipe(data, tmp_path / 'run'))
    assert not (tmp_path / 'run/result.json').exists()


@pytest.mark.parametrize('stop', [0, 1])
def test_a_run_without_an_update_leaves_no_folder(data, tmp_path, monkeypatch, stop):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_after(patch, stop, fail)
        train(tiny_recipe(data, tmp_path / 'run'))
    assert (tmp_path / 'run').exists() == bool(stop)
    # Never one that was there before.
    (tmp_path / 'mine').mkdir()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_after(patch, stop, fail)
        train(tiny_recipe(data, tmp_path / 'mine'))
    assert (tmp_path / 'mine').exists()


def test_the_trial_leaves_the_model_trainable(data, tmp_path):
    config = tiny_recipe(data, tmp_path / 'run')
    config.model.args['dynamic_img_size'] = True
    config.data.img_size = [18, 20]
    with pytest.raises(ValueError, match='does not take images of 18×20 .* height 18 is not a multiple'):
        train(config)
    assert not (tmp_path / 'run').exists()
    config.data.img_size, config.sched.epochs = [20, 12], 1
    assert train(config)['steps'] == 6


@pytest.mark.parametrize('content', ['', '{}', '3', '{"top1": '])
def test_a_damaged_result_is_named_and_made_again(data, tmp_path, content):
    config = tiny_recipe(data, tmp_path / 'run', resume='auto')
    config.sched.epochs = 1
    result = train(config)
    path = tmp_path / 'run/result.json'
    path.write_text(content)
    with pytest.raises(ValueError, match=r'result\.json: not a readable result; delete it'):
        train(config)
    path.unlink()
    assert train(config)['top1'] == result['top1']


def test_what_is_copied_ahead_is_not_part_of_the_run(tmp_path, monkeypatch):
    """As on a GPU: interrupted while batches wait on it, with images that are skipped, and gone on with."""
    data = write_tree(tmp_path, train=7)
    (data / 'train/c1/text.png').write_text('Not an image.')

    def config(name, **options):
        config = tiny_recipe(data, tmp_path / name, grad_accum=2, **options)
        config.data.on_error, config.data.batch_size = 'skip', 2
        return config

    train(config('here'))
    calls = stand_in_for_streams(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(config('ahead'))
    assert 'wait' in calls
    assert load_checkpoint(tmp_path / 'ahead/checkpoint.pt')['progress']['updates'] == 4
    train(config('ahead', resume='auto'))
    assert_same_run(tmp_path / 'here', tmp_path / 'ahead')


@pytest.mark.parametrize('grad_checkpointing', [False, True])
@pytest.mark.compiled
def test_what_is_compiled_computes_and_logs_the_same(data, tmp_path, monkeypatch, grad_checkpointing):
    """Training, evaluation, the average of weights, and the leaves of trees, which are seen from outside of a block."""

    def config(name, **options):
        config = tiny_recipe(data, tmp_path / name, loss=LossConfig(0.1), **options)
        config.model.name, config.model.args = (
            'vit_treeformer_tc_tiny',
            {**TINY, 'attention_kwargs': {'tree_height': 2}},
        )
        return config

    torch.compiler.reset()
    compiler = CompileCounterWithBackend('aot_eager')
    monkeypatch.setattr('vit_efficient.train.state.compile_blocks', partial(compile_blocks, backend=compiler))
    train(config('written'))
    assert compiler.frame_count == 0
    train(config('compiled', compile=True, grad_checkpointing=grad_checkpointing))
    assert 2 <= compiler.frame_count <= 4
    assert_same_run(tmp_path / 'written', tmp_path / 'compiled')
