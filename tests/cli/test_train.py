import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

from tests.data.trees import write_tree
from tests.train.recipes import TINY, tiny_recipe
from vit_efficient.models import save_model
from vit_efficient.train import Evaluation, load_recipe, train
from vit_efficient.train.build import create_model
from vit_efficient.train.checkpoint import load_checkpoint
from vit_efficient.train.recipe import to_yaml
from vit_efficient.train.trainer import Trainer
from vit_efficient_cli import main


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp('data'))


@pytest.fixture
def recipe(data, tmp_path):
    path = tmp_path / 'tiny.yaml'
    path.write_text(to_yaml(tiny_recipe(data, tmp_path / 'run')))
    return path


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained') / 'run'
    train(tiny_recipe(data, folder))
    return folder


def error_of(capsys, *argv):
    assert main([str(argument) for argument in argv]) == 2
    output = capsys.readouterr()
    assert output.out == ''
    lines = output.err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_train_and_evaluate(recipe, data, tmp_path, capsys):
    assert main(['train', str(recipe), 'sched.epochs=1']) == 0
    trained = capsys.readouterr().out
    assert trained.startswith('vit_dct_tiny: top-1 ')
    for folder in (tmp_path / 'run', tmp_path / 'run' / 'model'):
        assert main(['evaluate', str(folder), '--data', f'{data}/val', '--device', 'cpu']) == 0
        found = capsys.readouterr().out
        assert found.startswith('top-1 ')
        assert found.split()[1] == trained.split()[2]


@pytest.mark.parametrize('size', [(16, 16), (32, 32), (16, 32)])
def test_evaluation_is_at_the_size_of_training(size, recipe, data, tmp_path, capsys):
    """Of a model that takes any: from the folder of the run, of its models, and of one that has left its run."""
    options = ['model.args.dynamic_img_size=true', f'data.img_size={list(size)}', 'checkpoint_best=true']
    assert main(['train', str(recipe), 'sched.epochs=1', 'data.eval_batch_size=64', *options]) == 0
    result = json.loads((tmp_path / 'run/result.json').read_text())
    capsys.readouterr()
    shutil.copytree(tmp_path / 'run/model', tmp_path / 'alone')
    for folder in ('run', 'run/model', 'run/best', 'alone'):
        assert main(['evaluate', str(tmp_path / folder), '--data', f'{data}/val', '--device', 'cpu']) == 0
        metrics = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
        expected = f'loss {next(line["loss"] for line in metrics if line["kind"] == "val"):.4f}'
        assert expected in (out := capsys.readouterr().out) and f'top-1 {result["top1"]:.2f}' in out


def test_exports_are_of_the_size_of_training(recipe, tmp_path, capsys):
    options = ['model.args.dynamic_img_size=true', 'data.img_size=[16,32]']
    assert main(['train', str(recipe), 'sched.epochs=1', *options]) == 0
    shutil.copytree(tmp_path / 'run/model', tmp_path / 'alone')
    capsys.readouterr()
    for folder in ('run', 'alone'):
        for more, size in (([], '3×16×32'), (['--img-size', '24', '32'], '3×24×32')):
            assert main(['export', str(tmp_path / folder), '--out', str(tmp_path / 'vit.pt2'), *more]) == 0
            assert size in capsys.readouterr().out


def test_evaluate_goes_by_the_recipe_of_the_run(recipe, data, tmp_path, capsys, monkeypatch):
    """Whichever of its models is given, and from wherever."""
    assert main(['train', str(recipe), 'sched.epochs=1', 'data.on_error=skip', 'checkpoint_best=true']) == 0
    capsys.readouterr()
    val = tmp_path / 'val'
    shutil.copytree(data / 'val', val)
    (val / 'c0/broken.png').write_text('Not an image.')
    for folder in ('', 'model', 'best'):
        monkeypatch.chdir(tmp_path / 'run' / folder)
        for name in (tmp_path / 'run' / folder, '.'):
            assert main(['evaluate', str(name), '--data', str(val), '--device', 'cpu']) == 0
            assert 'skipped 1 images' in capsys.readouterr().out
    (tmp_path / 'run').rename(tmp_path / 'best')  # a run's folder may have any name
    assert main(['evaluate', str(tmp_path / 'best'), '--data', str(val), '--device', 'cpu']) == 0


@pytest.mark.parametrize(('options', 'amp'), [([], 'bf16'), (['--amp', 'none'], 'none')])
def test_evaluate_computes_as_the_run_did(trained, data, tmp_path, monkeypatch, options, amp):
    folder = shutil.copytree(trained, tmp_path / 'run')
    path = folder / 'recipe.yaml'
    path.write_text(path.read_text().replace('amp: none', 'amp: bf16'))
    found = []

    def evaluate(model, loader, team, amp, task, keep=None):
        found.append(amp)
        return Evaluation(0.0, 1, 1.0, (), [], top1=0.0)

    monkeypatch.setattr('vit_efficient.report.evaluation.evaluate', evaluate)
    assert main(['evaluate', str(folder), '--data', f'{data}/val', '--device', 'cpu', *options]) == 0
    assert found == [amp]


def test_the_last_line_of_a_run_tells_its_attention_and_weights(trained, recipe, tmp_path, capsys):
    options = ['sched.epochs=1', f'model.init_from={trained}', f'output={tmp_path}/next']
    assert main(['train', str(recipe), *options]) == 0
    line = capsys.readouterr().out
    assert f' s, with dct, from {trained}; see {tmp_path}/next' in line
    result = json.loads((tmp_path / 'next/result.json').read_text())
    assert (result['attention'][0], result['started_from']) == ('dct', str(trained))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['optim.lrr=1'], 'command line: unknown key optim.lrr; did you mean optim.lr?'),
        (['optim.lr=-1'], 'optim.lr must be above 0, got -1.0'),
        (['model.args.attention_kwargs={keep_ratio: 0}'], 'keep_ratio'),
        (['data.train=nothing'], 'nothing: no such data folder'),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(recipe, tmp_path, capsys, arguments, message):
    assert message in error_of(capsys, 'train', recipe, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['tiny.yaml']


def test_a_missing_recipe(recipe, tmp_path, capsys):
    line = error_of(capsys, 'train', 'nothing.yaml')
    assert 'nothing.yaml: no such recipe; `vit-efficient recipe list` shows those that come' in line
    line = error_of(capsys, 'train', tmp_path / 'tinny.yaml')
    assert 'tinny.yaml: no such recipe; did you mean' in line and 'tiny.yaml?' in line


def test_evaluate_names_what_does_not_fit(trained, data, tmp_path, capsys):
    assert 'there is no config.json' in error_of(capsys, 'evaluate', tmp_path, '--data', data / 'val')
    assert 'no such run or model folder' in error_of(capsys, 'evaluate', tmp_path / 'x', '--data', data / 'val')
    assert 'no such data folder' in error_of(capsys, 'evaluate', trained, '--data', tmp_path / 'x')
    other = write_tree(tmp_path / 'other', classes=4) / 'val'
    assert "unexpected ['c3']" in error_of(capsys, 'evaluate', trained, '--data', other)
    assert '--batch-size' in error_of(capsys, 'evaluate', trained, '--data', data / 'val', '--batch-size', 0)


def test_of_a_run_that_is_not_done_the_best_model_is_named(recipe, tmp_path, capsys):
    config = load_recipe(recipe, ['checkpoint_best=true'])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, 'finish', lambda *_: os.kill(os.getpid(), signal.SIGINT))
        train(config)
    run = tmp_path / 'run'
    for command in (['evaluate', run, '--data', tmp_path], ['export', run, '--out', tmp_path / 'vit.onnx']):
        assert f'saved no model; go on with it, or take the best model so far, {run}/best' in error_of(capsys, *command)


def test_that_classes_without_names_are_taken_in_order_is_said(data, tmp_path, caplog):
    save_model(timm.create_model('vit_dct_tiny', **TINY, num_classes=5), tmp_path)
    assert main(['evaluate', str(tmp_path), '--data', f'{data}/val', '--device', 'cpu']) == 0
    assert 'does not name its 5 classes: the first 3 are taken for those of the data, c0 … c2' in caplog.text


def test_evaluate_refuses_the_weights_of_another_model(trained, data, tmp_path, capsys):
    folder = tmp_path / 'model'
    folder.mkdir()
    config = (trained / 'model/config.json').read_text()
    (folder / 'config.json').write_text(config.replace('"embed_dim": 12', '"embed_dim": 16'))
    (folder / 'model.safetensors').write_bytes((trained / 'model/model.safetensors').read_bytes())
    assert 'cannot load its weights into vit_dct_tiny' in error_of(capsys, 'evaluate', folder, '--data', data / 'val')


def test_fine_tuning_starts_from_a_model_folder(trained, recipe, tmp_path, capsys):
    start = f'model.init_from={trained}'
    assert main(['train', str(recipe), 'sched.epochs=1', start]) == 0
    capsys.readouterr()
    again = [f'output={tmp_path}/again', f'{start}/model']
    line = error_of(capsys, 'train', recipe, *again, 'model.args.attention_kwargs={keep_ratio: 0.5}')
    assert 'the recipe says attention=' in line
    assert "'keep_ratio': 0.5" in line
    line = error_of(capsys, 'train', recipe, *again, 'model.name=vit_full_tiny')
    assert "architecture='vit_dct_tiny', the recipe says architecture='vit_full_tiny'" in line
    weights = f'{start}/model/model.safetensors'
    assert main(['train', str(recipe), 'sched.epochs=1', f'output={tmp_path}/file', weights]) == 0
    capsys.readouterr()
    line = error_of(capsys, 'train', recipe, f'output={tmp_path}/no', weights, 'model.args.depth=3')
    assert 'was saved with depth=2, the recipe says depth=3; make them equal: model.args.depth=2' in line
    assert not (tmp_path / 'no').exists()


@pytest.mark.parametrize('source', ['', 'checkpoint.pt', 'model/model.safetensors'])
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('model.args.attention_kwargs={keep_ratio: 0.5}', "'keep_ratio': 0.5"),
        ('model.args.num_heads=4', 'was saved with num_heads=2, the recipe says num_heads=4; make them equal'),
        ('model.name=vit_full_tiny', "architecture='vit_dct_tiny', the recipe says architecture='vit_full_tiny'"),
    ],
)
def test_weights_of_another_attention_are_refused(trained, recipe, tmp_path, capsys, source, change, message):
    line = error_of(capsys, 'train', recipe, f'output={tmp_path}/no', f'model.init_from={trained / source}', change)
    assert message in line
    assert not (tmp_path / 'no').exists()


def test_a_hand_written_config_tells_the_attention_too(trained, recipe, tmp_path, capsys):
    folder = tmp_path / 'model'
    shutil.copytree(trained / 'model', folder)
    saved = json.loads((folder / 'config.json').read_text())
    start = ['sched.epochs=1', f'model.init_from={folder}', f'output={tmp_path}/out', 'resume=restart']
    ratio = ['model.args.attention_kwargs={keep_ratio: 0.5}']
    for attention in ({'attention': 'dct', 'attention_kwargs': {'keep_ratio': 0.5}}, {'attention': 'dct'}, {}):
        for key in ('attention', 'attention_kwargs'):
            saved['model_args'].pop(key, None)
        saved['model_args'].update(attention)
        (folder / 'config.json').write_text(json.dumps(saved))
        equal, other = (ratio, []) if 'attention_kwargs' in attention else ([], ratio)
        assert 'was saved with attention=' in error_of(capsys, 'train', recipe, *start, *other)
        assert main(['train', str(recipe), *start, *equal]) == 0
        capsys.readouterr()
    saved['model_args'] = [1]
    (folder / 'config.json').write_text(json.dumps(saved))
    assert 'model_args must be a mapping, got [1]' in error_of(capsys, 'train', recipe, *start)


def test_a_saved_keep_ratio_may_be_said_again(data, recipe, tmp_path):
    ratio = 'model.args.attention_kwargs={keep_ratio: 0.5}'
    assert main(['train', str(recipe), 'sched.epochs=1', ratio]) == 0
    start = [f'model.init_from={tmp_path}/run', f'output={tmp_path}/again', 'sched.epochs=1']
    assert main(['train', str(recipe), *start, ratio]) == 0
    assert 'keep_ratio": 0.5' in (tmp_path / 'again/model/config.json').read_text()


def test_a_checkpoint_gives_its_average_of_weights(trained, data):
    state = load_checkpoint(trained / 'checkpoint.pt')
    config = tiny_recipe(data, 'unused')
    config.model.init_from = str(trained / 'checkpoint.pt')
    weights = create_model(config, ['c0', 'c1', 'c2'])
    assert all(torch.equal(tensor, state['ema'][name]) for name, tensor in weights.state_dict().items())
    assert not all(torch.equal(tensor, state['model'][name]) for name, tensor in weights.state_dict().items())
    assert not weights.pretrained_cfg.get('state_dict')


@pytest.mark.parametrize('content', [b'', b'text', {}])
def test_a_file_without_weights_is_named(recipe, tmp_path, capsys, content):
    path = tmp_path / 'weights.pt'
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert f'model.init_from={path}: ' in error_of(capsys, 'train', recipe, f'model.init_from={path}')
    assert not (tmp_path / 'run').exists()


def test_evaluate_refuses_a_device_that_is_not_there(trained, data, capsys):
    for device in ('meta', 'xpu:99'):
        line = error_of(capsys, 'evaluate', trained, '--data', data / 'val', '--device', device)
        assert f'device={device}' in line


@pytest.mark.subprocess
def test_sigterm_ends_with_one_line(recipe, tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, 'tools/train.py', str(recipe), 'sched.epochs=100000', 'eval_every=100000']
    environment = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        # The checkpoint appears after the first epoch, when the handler is in place for long.
        while process.poll() is None and not (tmp_path / 'run/checkpoint.pt').exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75
    assert errors.splitlines()[-1].endswith('checkpoint.pt is saved; resume=auto goes on')
    assert 'Traceback' not in errors
