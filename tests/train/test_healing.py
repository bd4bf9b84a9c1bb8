"""Healing as training: stages, resumption, processes, what is saved and told, and what is refused."""

import copy
import json
import math
import os
import shlex
import shutil
import signal
import tarfile

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import ParallelScalingBlock

from tests.data.trees import write_tree
from tests.processes import run_python, torchrun
from tests.train.recipes import TINY
from tests.train.test_scale import assert_close
from tests.train.test_trainer import assert_same_run, fail, stop_after
from vit_efficient import convert, save_model
from vit_efficient.data import EvalTransform, Preprocessing, SizeConfig, to_array
from vit_efficient.data.sources.unlabelled import UnlabelledImages
from vit_efficient.healing import Teacher, tokens_after
from vit_efficient.models import load_model
from vit_efficient.report.curves import plot_curves
from vit_efficient.report.healing import healed_table, healing_table
from vit_efficient.train import Config, Interrupted, healing, run_folder, train, trainer
from vit_efficient.train.checkpoint import load_checkpoint
from vit_efficient.train.config import (
    EmaConfig,
    HealConfig,
    ModelConfig,
    OptimConfig,
    SchedConfig,
    StageConfig,
)
from vit_efficient.train.hooks import healing as hook
from vit_efficient.train.recipe import load_recipe, to_yaml
from vit_efficient.train.run_folder import RunFolder
from vit_efficient.utils.errors import UserError

STAGES = [
    StageConfig(1, heal='align', lr=1e-2, warmup_epochs=0),
    StageConfig(2, heal='recover', warmup_epochs=0.5),
    StageConfig(1, heal='refine', lr=1e-4, warmup_epochs=0),
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """24 images to learn from in three folders, six to validate on; and a pretrained model, its classifier included."""
    root = write_tree(tmp_path_factory.mktemp('healing'))
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', **TINY, num_classes=3, dynamic_img_size=True, init_values=1.0)
    for block in model.blocks:  # so that much hangs on which patches are attended to
        block.attn.qkv.weight.data.mul_(20)
        block.attn.proj.weight.data.mul_(5)
    save_model(model, root / 'pretrained')
    return root


def recipe(folder, output, **options) -> Config:
    config = Config(
        task='features',
        model=ModelConfig(
            'vit_tiny_patch16_224',
            {'dynamic_img_size': True},
            init_from=str(folder / 'pretrained'),
            attention='dct',
            attention_kwargs={'keep_ratio': 0.25},
        ),
        optim=OptimConfig(lr=1e-3, weight_decay=0.0),
        sched=SchedConfig(epochs=4),
        stages=[StageConfig(**vars(stage)) for stage in STAGES],
        output=str(output),
        device='cpu',
        threads=1,
        log_every=1,
        clip_grad=1.0,
    )
    data = config.data
    data.train, data.val, data.batch_size, data.workers = f'{folder}/train', f'{folder}/val', 4, 0
    data.schedule = [SizeConfig(0, [16, 16]), SizeConfig(3, [20, 24])]
    data.img_size = [20, 24]
    data.augment.rand_ops, data.augment.erasing = 0, 0.0
    for key, value in options.items():
        section, _, name = key.rpartition('.')
        setattr(getattr(config, section) if section else config, name, value)
    return config


def test_a_run_heals_step_by_step_and_says_so(folder, tmp_path):
    config = recipe(folder, tmp_path / 'run', heal=HealConfig(solve=12, blocks=[0]))
    result = train(config)
    lines = result['healing']
    assert [line['features'] for line in lines] == ['swapped', 'solved', 'aligned', 'recovered', 'refined']
    assert [line['images'] for line in lines] == [0, 12, 36, 84, 108]
    assert [line['hours'] for line in lines] == sorted(line['hours'] for line in lines) and lines[1]['hours'] > 0
    assert lines[-1]['centred_cosine'] > lines[0]['centred_cosine'] + 0.05
    assert lines[1]['centred_cosine'] > lines[0]['centred_cosine']
    assert all(len(line['after_blocks']) == 2 and 0 <= line['neighbours'] <= 1 for line in lines)
    assert len(result['solved']) == 4
    solved = timm.create_model(f'local-dir:{tmp_path}/run/solved', pretrained=True).eval()
    swapped = convert(load_model(folder / 'pretrained', img_size=(20, 24)), 'dct', keep_ratio=0.25).state_dict()
    changed = {name for name, value in solved.state_dict().items() if not torch.equal(value, swapped[name])}
    changed -= {'pos_embed'}  # resized another way
    assert changed and all('.attn.proj.' in name or '.mlp.fc2.' in name for name in changed)
    assert result['centred_cosine'] == lines[-1]['centred_cosine']

    model = timm.create_model(f'local-dir:{tmp_path}/run/model', pretrained=True).eval()
    assert model.attention_spec()[0][0] == 'dct' and model.num_classes == 3
    # The classifier is the one that it came with.
    teacher = load_model(folder / 'pretrained')
    assert torch.equal(model.head.weight, teacher.head.weight)
    rows = (tmp_path / 'run/predictions.csv').read_text().splitlines()
    assert rows[0] == 'index,file,centred_cosine,patch_cosine,prefix_cosine,neighbours' and len(rows) == 7
    kinds = [json.loads(line)['kind'] for line in (tmp_path / 'run/metrics.jsonl').open()]
    assert kinds.count('val') == 4 and kinds.count('train') == 24


def test_training_that_makes_it_worse_is_told(folder, tmp_path, caplog):
    stages = [StageConfig(1, heal='refine', warmup_epochs=0)]
    options = {'stages': stages, 'data.schedule': [], 'sched.epochs': 1, 'sched.warmup_epochs': 0}
    for lr, worse in ((1e-9, False), (0.3, True)):
        config = recipe(folder, tmp_path / f'{lr}', heal=HealConfig(solve=12), **options)
        config.optim.lr = lr
        with caplog.at_level('INFO'):
            *_, solved, refined = train(config)['healing']
        told = [line for line in caplog.messages if 'nearer to the teacher' in line]
        assert (refined['centred_cosine'] < solved['centred_cosine']) == worse == bool(told)
    (line,) = told
    before = f'centred cosine {solved["centred_cosine"]:.4f}'
    assert line.startswith(f'solved after 12 images was nearer to the teacher than refined after 36: {before}')
    assert line.endswith(f'it is in {tmp_path}/0.3/solved')

    caplog.clear()
    config = recipe(folder, tmp_path / 'nan', heal=HealConfig(solve=12), on_nonfinite='skip', **options)
    config.optim.lr = 1e12
    with caplog.at_level('INFO'):
        *_, refined_from, refined = train(config)['healing']
    assert math.isnan(refined['centred_cosine']) and math.isnan(refined['neighbours'])
    (line,) = [line for line in caplog.messages if 'nearer to the teacher' in line]
    assert line.endswith(f', now nan; it is in {tmp_path}/nan/solved')
    # JSON has no NaN.
    written = (tmp_path / 'nan/result.json').read_text(encoding='utf-8')
    lines = json.loads(written, parse_constant=pytest.fail)['healing']
    assert lines[-1]['centred_cosine'] is None and lines[-2]['centred_cosine'] == refined_from['centred_cosine']
    (row,) = healed_table([tmp_path / 'nan']).rows
    assert row['centred_cosine'] is None is row['given_back'] and row['solved'] == refined_from['centred_cosine']


def test_least_squares_alone_are_a_run(folder, tmp_path, monkeypatch):
    """They give what a run that trains begins with, and go on where they were stopped."""
    alone = {'heal': HealConfig(solve=12), 'stages': [], 'data.schedule': [], 'sched.epochs': 0}
    alone |= {'sched.warmup_epochs': 0}
    train(recipe(folder, tmp_path / 'trained', heal=HealConfig(solve=12)))
    result = train(recipe(folder, tmp_path / 'run', **alone))
    assert [(line['features'], line['images']) for line in result['healing']] == [('swapped', 0), ('solved', 12)]
    assert result['steps'] == result['epochs'] == 0 and len(result['solved']) == 4
    assert result['centred_cosine'] == result['healing'][-1]['centred_cosine'] > result['healing'][0]['centred_cosine']
    assert not (tmp_path / 'run/solved').exists() and len((tmp_path / 'run/predictions.csv').open().readlines()) == 7
    same, expected = (load_file(tmp_path / name / 'model.safetensors') for name in ('run/model', 'trained/solved'))
    assert same.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in same.items())
    assert train(recipe(folder, tmp_path / 'run', **alone, resume='auto')) == result
    with pytest.raises(UserError, match='metrics.jsonl is empty: the run had no epochs'):
        plot_curves([tmp_path / 'run'], tmp_path / 'curves.png')

    calls, measure = [], healing.evaluate_features

    def stopped(*args):
        calls.append(len(calls))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer, 'evaluate_features', stopped)
        train(recipe(folder, tmp_path / 'stopped', **alone))
    train(recipe(folder, tmp_path / 'stopped', **alone, resume='auto'))
    again = load_file(tmp_path / 'stopped/model/model.safetensors')
    assert all(torch.equal(value, expected[name]) for name, value in again.items())

    with pytest.raises(UserError, match='sched.epochs must be at least 1, got 0: .*; got task=features, heal.solve=0'):
        train(recipe(folder, tmp_path / 'none', **{**alone, 'heal': HealConfig()}))
    with pytest.raises(UserError, match=r'sched.epochs=0 trains nothing: set stages=\[\] and data.schedule=\[\]'):
        train(recipe(folder, tmp_path / 'staged', **{'heal': HealConfig(solve=12), 'sched.epochs': 0}))
    with pytest.raises(UserError, match='written with sched.epochs=0, this run has sched.epochs=2') as refused:
        train(recipe(folder, tmp_path / 'run', **{**alone, 'sched.epochs': 2}, resume='auto'))
    command = shlex.split(str(refused.value).partition('for the epochs added: ')[2])
    assert command[:2] == ['vit-efficient', 'train']
    longer = train(load_recipe(command[2], [*command[3:], f'output={tmp_path}/longer']))
    assert longer['healing'][0]['centred_cosine'] == pytest.approx(result['centred_cosine'], abs=1e-5)


def test_what_is_said_of_features_is_so(folder, tmp_path):
    """Against tokens that are compared by hand."""
    config = recipe(
        folder, tmp_path / 'run', stages=[], **{'sched.epochs': 1, 'sched.warmup_epochs': 0, 'data.schedule': []}
    )
    result = train(config)
    model, teacher = load_model(tmp_path / 'run'), load_model(folder / 'pretrained', img_size=(20, 24))
    transform = EvalTransform(Preprocessing.of(model.eval(), config.data))
    images = UnlabelledImages(folder / 'val')
    cosines, centred = [], []
    for image, _ in images:
        pixels = transform(to_array(image, 3))[None]
        with torch.no_grad():
            a, b = (tokens_after(each.eval(), pixels)[0][0].double() for each in (teacher, model))
        mean = a[1:].mean(0)
        cosines.append(torch.cosine_similarity(a[1:], b[1:]).mean())
        centred.append(torch.cosine_similarity(a[1:] - mean, b[1:] - mean).mean())
    assert result['patch_cosine'] == pytest.approx(float(sum(cosines) / 6), abs=1e-6)
    assert result['centred_cosine'] == pytest.approx(float(sum(centred) / 6), abs=1e-6)


@pytest.mark.parametrize('stop', [2, 8, 20])  # in align, recover and refine
def test_a_run_that_was_killed_reaches_the_same_weights(folder, tmp_path, stop):
    options = {'checkpoint_steps': 1, 'heal': HealConfig(solve=8), 'ema': EmaConfig(0.9)}
    train(recipe(folder, tmp_path / 'whole', **options))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_after(patch, stop % 6, fail) if stop < 6 else _stop_at(patch, stop)
        train(recipe(folder, tmp_path / 'killed', **options))
    result = train(recipe(folder, tmp_path / 'killed', **options, resume='auto'))
    assert_same_run(tmp_path / 'whole', tmp_path / 'killed')
    assert len(result['healing']) == 5
    ours, theirs = (load_file(tmp_path / name / 'model/model.safetensors') for name in ('whole', 'killed'))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _stop_at(patch, update):
    from vit_efficient.train.trainer import Trainer

    take = Trainer.update

    def updating(trainer, chunk):
        if trainer.state.progress.updates == update:
            fail()
        return take(trainer, chunk)

    patch.setattr(Trainer, 'update', updating)


@pytest.mark.parametrize('place', ['load', 'folder', 'save'])
def test_a_stop_does_not_cut_least_squares_in_two(folder, tmp_path, monkeypatch, place):
    """A signal while their weights are being loaded, or saved, which then goes on or is done again."""
    options = {'heal': HealConfig(solve=8), 'ema': EmaConfig(0.9)}
    train(recipe(folder, tmp_path / 'whole', **options))
    name = 'load_model_state' if place == 'load' else 'save_model'
    where = {'load': hook.sharding, 'folder': RunFolder, 'save': run_folder}[place]
    function = getattr(where, name)

    def stopped(*args, **kwargs):
        monkeypatch.setattr(where, name, function)
        if place == 'folder':  # before anything is written
            os.kill(os.getpid(), signal.SIGTERM)
        function(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(where, name, stopped)
    with pytest.raises(Interrupted):
        train(recipe(folder, tmp_path / 'killed', **options))
    result = train(recipe(folder, tmp_path / 'killed', **options, resume='auto'))
    assert_same_run(tmp_path / 'whole', tmp_path / 'killed')
    assert [line['features'] for line in result['healing']][1:3] == ['solved', 'aligned']
    for saved in ('model', 'solved'):
        ours, theirs = (load_file(tmp_path / each / saved / 'model.safetensors') for each in ('whole', 'killed'))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_least_squares_are_kept_where_their_model_cannot_be_saved(folder, tmp_path, monkeypatch):
    config = recipe(folder, tmp_path / 'run', heal=HealConfig(solve=8), resume='auto')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/solved').write_text('')
    with pytest.raises(UserError, match='solved: cannot be written: .*; resume=auto saves it, and goes on with'):
        train(config)
    (tmp_path / 'run/solved').unlink()
    monkeypatch.setattr(hook, 'solve', fail)  # it is not done again
    assert len(train(config)['healing']) == 5 and (tmp_path / 'run/solved/model.safetensors').exists()


def test_what_was_swapped_since_is_not_compared(folder, tmp_path, caplog):
    """Other options of the same layers, too."""
    stages = [
        StageConfig(1, heal='recover', warmup_epochs=0),
        StageConfig(1, heal='recover', warmup_epochs=0, attention='dct', attention_kwargs={'keep_ratio': 0.05}),
    ]
    config = recipe(folder, tmp_path / 'run', stages=stages, **{'sched.epochs': 2, 'data.schedule': []})
    config.sched.warmup_epochs, config.optim.lr, config.model.attention_kwargs = 0, 1e-9, {'keep_ratio': 0.75}
    with caplog.at_level('INFO'):
        result = train(config)
    assert [len(line['converted']) for line in result['healing']] == [1, 1, 1]
    assert result['healing'][1]['converted'] != result['healing'][2]['converted']
    assert result['healing'][1]['centred_cosine'] > result['healing'][2]['centred_cosine']
    assert not any('nearer to the teacher' in line for line in caplog.messages)
    assert [row['given_back'] is None for row in healing_table(result).rows] == [True, True, False, True]


def test_images_that_least_squares_cannot_read_are_named(folder, tmp_path, caplog):
    broken = shutil.copytree(folder / 'train', tmp_path / 'broken')
    for path in sorted(broken.rglob('*.png'))[:3]:
        path.write_bytes(b'')
    alone = {'stages': [], 'data.schedule': [], 'sched.epochs': 0, 'sched.warmup_epochs': 0}
    config = recipe(folder, tmp_path / 'run', heal=HealConfig(solve=30), **alone, **{'data.on_error': 'skip'})
    config.data.train = str(broken)
    with caplog.at_level('INFO'):
        result = train(config)
    assert sum(line.startswith('skipped, training: ') for line in caplog.messages) == result['train_skipped'] == 3
    assert len((tmp_path / 'run/skipped.txt').read_text().splitlines()) == 3


def test_what_least_squares_cannot_have_is_told_before(folder, tmp_path):
    config = recipe(folder, tmp_path / 'run', heal=HealConfig(solve=8, teacher=str(tmp_path / 'nowhere')))
    with pytest.raises(UserError, match='^heal.teacher=.*/nowhere: .*: no such model folder'):
        train(config)
    (tmp_path / 'one').mkdir()
    shutil.copy(next((folder / 'train').rglob('*.png')), tmp_path / 'one')
    alone = {'stages': [], 'data.schedule': [], 'sched.epochs': 0, 'sched.warmup_epochs': 0}
    config = recipe(
        folder, tmp_path / 'run', heal=HealConfig(solve=8), **alone, **{'data.train': str(tmp_path / 'one')}
    )
    with pytest.raises(UserError, match='heal.solve needs two photographs at least, .*, got 1; give more, or set'):
        train(config)


def test_a_teacher_is_known_by_its_attentions_too():
    model = timm.create_model('vit_tiny_patch16_224', **TINY)
    exact = Teacher(copy.deepcopy(model))
    assert Teacher(copy.deepcopy(model)).digest == Teacher(convert(copy.deepcopy(model), 'full')).digest == exact.digest
    swapped = [Teacher(convert(copy.deepcopy(model), 'pool', keep_ratio=ratio)).digest for ratio in (0.25, 0.5)]
    assert len({exact.digest, *swapped}) == 3


@pytest.mark.distributed
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_processes_compute_what_one_does(folder, tmp_path, parallel):
    """In float64, in all stages, after least squares, with tokens of blocks: nothing but rounding differs."""
    paths = {}
    for share, grad_accum in (('one', 4), ('two', 2)):
        heal = HealConfig(solve=8, blocks=[0, -1])
        config = recipe(folder, tmp_path / share, grad_accum=grad_accum, parallel=parallel, heal=heal)
        config.data.batch_size = 1
        paths[share] = tmp_path / f'{share}.yaml'
        paths[share].write_text(to_yaml(config))
    run_python('tests/train/double.py', str(paths['one']))
    torchrun('tests/train/double.py', str(paths['two']))
    one, two = (load_checkpoint(tmp_path / share / 'checkpoint.pt') for share in paths)
    assert one['progress']['updates'] == 24
    for name in ('model', 'optimizer'):
        assert_close(one[name], two[name], name)
    ours, theirs = (json.loads((tmp_path / share / 'result.json').read_text()) for share in paths)
    for before, after in zip(ours['healing'], theirs['healing'], strict=True):
        for name in ('centred_cosine', 'patch_cosine', 'patch_low', 'prefix_cosine', 'neighbours', 'loss'):
            assert before[name] == pytest.approx(after[name], abs=1e-9), (before['features'], name)


def test_low_rank_updates_are_merged_when_saved(folder, tmp_path):
    result = train(recipe(folder, tmp_path / 'run', heal=HealConfig(lora=2), checkpoint_best=True, checkpoint_every=1))
    names = load_file(folder / 'pretrained/model.safetensors').keys()
    for name in ('model', 'best'):
        assert load_file(tmp_path / 'run' / name / 'model.safetensors').keys() == names
    assert result['healing'][-1]['centred_cosine'] > result['healing'][0]['centred_cosine']
    state = load_checkpoint(tmp_path / 'run/checkpoint.pt')['model']
    assert any('parametrizations' in name for name in state)
    config = recipe(folder, tmp_path / 'other')
    config.model.init_from = str(tmp_path / 'run/checkpoint.pt')
    with pytest.raises(UserError, match='run with heal.lora, whose updates lie apart'):
        train(config)


def test_least_squares_see_what_training_would_draw(folder, tmp_path, monkeypatch):
    """Training images, of the final size, more than there are drawn again; not those of validation."""
    seen, numbers, solve = [], [], hook.solve

    def watched(ours, theirs, images, *rest):
        images = list(images)
        seen.extend(images)
        numbers[:] = rest[-1]
        return solve(ours, theirs, images, *rest)

    monkeypatch.setattr(hook, 'solve', watched)
    found = {}
    for drawn in (False, True):
        seen.clear()
        config = recipe(folder, tmp_path / f'{drawn}', heal=HealConfig(solve=40), stages=[], **{'sched.epochs': 1})
        config.sched.warmup_epochs, config.data.schedule = 0, [SizeConfig(0, [16, 16])]
        if not drawn:
            augment = config.data.augment
            augment.crop_scale, augment.color_jitter, augment.hflip = None, 0.0, 0.0
        train(config)
        found[drawn] = torch.stack(seen)
    assert found[True].shape == found[False].shape == (40, 3, 20, 24)
    config.data.crop_pct = 1.0
    transform = EvalTransform(Preprocessing.of(load_model(tmp_path / 'False'), config.data))
    of_training = torch.stack([transform(to_array(image, 3)) for image, _ in UnlabelledImages(folder / 'train')])
    torch.testing.assert_close(found[False][:24], of_training, rtol=0, atol=0.05)
    assert not any(torch.equal(a, b) for a in found[True][:24] for b in found[True][24:])
    # Photographs are told by their number, those that are drawn again too.
    assert numbers == [*range(24), *range(16)]
    broken = shutil.copytree(folder / 'train', tmp_path / 'broken')
    for path in sorted(broken.rglob('*.png'))[:4]:
        path.write_bytes(b'')
    config.data.train, config.data.on_error, config.output = str(broken), 'skip', str(tmp_path / 'skipped')
    train(config)
    assert numbers == 2 * [*range(4, 24)]


def test_stages_may_convert_layer_after_layer(folder, tmp_path):
    stages = [
        StageConfig(1, 'dct', {'keep_ratio': 0.25}, [1], warmup_epochs=0, heal='align'),
        StageConfig(1, 'dct', {'keep_ratio': 0.25}, [0], warmup_epochs=0, heal='align'),
        StageConfig(2, warmup_epochs=0),
    ]
    config = recipe(folder, tmp_path / 'run', stages=stages)
    config.model.attention, config.model.attention_kwargs = '', {}
    result = train(config)
    assert [line['features'] for line in result['healing']] == ['swapped', 'aligned', 'aligned', 'recovered']
    assert [name for name, _ in load_model(tmp_path / 'run').attention_spec()] == ['dct', 'dct']
    assert result['healing'][0]['centred_cosine'] < 0.999  # of the first stage as it begins


def test_another_teacher_may_be_named(folder, tmp_path):
    """As where a healed model is healed once more."""
    train(recipe(folder, tmp_path / 'first'))
    config = recipe(folder, tmp_path / 'second', heal=HealConfig(teacher=str(folder / 'pretrained')))
    config.model.init_from = str(tmp_path / 'first')
    first = json.loads((tmp_path / 'first/result.json').read_text())['healing'][-1]
    again = train(config)['healing'][0]
    assert again['centred_cosine'] == pytest.approx(first['centred_cosine'], abs=1e-6)
    config.heal.teacher, config.output = '', str(tmp_path / 'third')
    with pytest.raises(UserError, match='heal.teacher must name the model to learn from'):
        train(config)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'model.attention': '', 'model.attention_kwargs': {}},
            'is the one that it is to learn from; set model.attention',
        ),
        ({'heal': HealConfig(blocks=[2])}, r'heal.blocks: the model has blocks 0 … 1, got 2'),
        ({'heal': HealConfig(lora=13)}, 'heal.lora=13 is above the width of all layers, 12'),
        ({'heal': HealConfig(teacher='nowhere')}, 'nowhere: no such model folder'),
        (
            {'heal': HealConfig(prefix=0.0, patch=0.0, centred=0.0, smooth=0.0)},
            'heal: one of prefix, patch, centred and smooth must be above 0',
        ),
        ({'loss.mixup': 0.5}, 'loss.mixup must be 0.0 for task=features'),
        ({'distill.teacher': 'any'}, "task must be classification with distill.teacher, got 'features'"),
        (
            {'distill.teacher': 'any', 'distill.weight': 0.0, 'distill.outputs': 1.0},
            'distill.teacher must be  for task=features, which has no labels',
        ),
        ({'heal': HealConfig(blocks=[0.5])}, 'heal.blocks: the model has blocks 0 … 1, got 0.5'),
        (
            {'heal': HealConfig(teacher_size=[18, 16]), 'stages': [StageConfig(4, warmup_epochs=0)]},
            r'heal.teacher_size=.18, 16.: the teacher does not take such images',
        ),
        ({'heal': HealConfig(teacher_size=[16, 16], solve=8)}, 'heal.teacher_size: least squares and align compare'),
        ({'heal': HealConfig(teacher_size=[16, 16])}, 'heal.teacher_size: least squares and align compare'),
        ({'heal': HealConfig(solve=7)}, 'heal.solve needs 8 images at least, got 7'),
        (
            {'stages': [StageConfig(3), StageConfig(1, 'full', heal='align')], 'sched.warmup_epochs': 0},
            r'stages.1..heal=align: the attentions',
        ),
        ({'model.head': 'linear'}, 'model.head=linear is for task=segmentation, got task=features'),
        ({'task': 'classification'}, 'stages.0..heal is for task=features'),
        ({'data.train': 'nowhere'}, 'data.train: nowhere: no such folder of images'),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(recipe(folder, tmp_path / 'run', **options))
    assert not (tmp_path / 'run').exists()


def test_a_teacher_of_other_images_is_refused(folder, tmp_path):
    model = load_model(folder / 'pretrained')
    model.pretrained_cfg['mean'] = (0.4, 0.5, 0.5)
    save_model(model, tmp_path / 'other')
    config = recipe(folder, tmp_path / 'run', heal=HealConfig(teacher=str(tmp_path / 'other')))
    with pytest.raises(UserError, match=r'takes images of mean \[0.4, 0.5, 0.5\], .*: set data.mean=\[0.4, 0.5, 0.5\]'):
        train(config)
    config.data.mean = [0.4, 0.5, 0.5]
    train(config)


def test_attentions_without_weights_of_their_own_are_not_aligned(folder, tmp_path):
    models = [timm.create_model('vit_tiny_patch16_224', **TINY, block_fn=ParallelScalingBlock) for _ in range(2)]
    student = healing.Student(convert(models[0], 'pool', keep_ratio=0.25))
    task = healing.FeatureTask(teacher=Teacher(models[1]))
    with pytest.raises(UserError, match='a GridParallelScalingBlock have no weights of their own; take recover'):
        task.check_stage('stages[0]', StageConfig(1, heal='align'), student)


@pytest.mark.parametrize('place', ['memory', 'folder'])
def test_a_teacher_sees_each_image_once(folder, tmp_path, monkeypatch, place):
    """Its tokens are kept in half precision: the weights are nearly those without."""

    def still(name, **keys):
        config = recipe(folder, tmp_path / name, heal=HealConfig(blocks=[0]), **keys)
        config.stages, config.data.schedule, config.sched.warmup_epochs = [], [], 0
        config.data.augment.crop_scale, config.data.augment.hflip, config.data.augment.color_jitter = None, 0.0, 0.0
        return config

    train(still('plain'))
    seen = []
    tokens = Teacher.tokens
    monkeypatch.setattr(
        Teacher, 'tokens', lambda self, images, layers: seen.append(layers) or tokens(self, images, layers)
    )
    place = place if place == 'memory' else str(tmp_path / 'features')
    train(still('kept', **{'data.cache_features': place}))
    assert sum(layers == [0] for layers in seen) == 24
    ours, theirs = (load_checkpoint(tmp_path / name / 'checkpoint.pt')['model'] for name in ('plain', 'kept'))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)
    if place != 'memory':
        seen.clear()
        train(still('again', **{'data.cache_features': place}))
        assert not any(layers == [0] for layers in seen)
        assert_same_run(tmp_path / 'kept', tmp_path / 'again')
    with pytest.raises(UserError, match='stages must not align with data.cache_features'):
        config = still('aligned', **{'data.cache_features': place})
        config.stages = [StageConfig(4, heal='align', warmup_epochs=0)]
        train(config)
    with pytest.raises(UserError, match='data.augment.hflip must be 0.0 for data.cache_features'):
        config = still('flipped', **{'data.cache_features': place})
        config.data.augment.hflip = 0.5
        train(config)


def test_a_run_that_was_stopped_while_it_was_measured_is_not_solved_twice(folder, tmp_path, monkeypatch):
    """Measured are the swapped model, then what least squares have made of it: a signal comes in each of the two."""
    options = {'heal': HealConfig(solve=8)}
    train(recipe(folder, tmp_path / 'whole', **options))
    for number in (0, 1):
        calls, measure = [], healing.evaluate_features

        def stopped(*args, number=number, calls=calls, measure=measure):
            calls.append(len(calls))
            if len(calls) - 1 == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return measure(*args)

        output = tmp_path / f'stopped{number}'
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(trainer, 'evaluate_features', stopped)
            train(recipe(folder, output, **options))
        train(recipe(folder, output, **options, resume='auto'))
        assert_same_run(tmp_path / 'whole', output)


def test_a_teacher_that_has_changed_is_another_run(folder, tmp_path):
    shutil.copytree(folder / 'pretrained', tmp_path / 'pretrained')
    config = recipe(folder, tmp_path / 'run', heal=HealConfig(teacher=str(tmp_path / 'pretrained')), checkpoint_steps=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        _stop_at(patch, 8)
        train(config)
    changed = load_model(tmp_path / 'pretrained')
    changed.norm.bias.data += 1
    save_model(changed, tmp_path / 'pretrained')
    config.resume = 'auto'
    with pytest.raises(UserError, match='pretrained has other weights, or attentions, than when'):
        train(config)


def test_shards_need_no_labels(folder, tmp_path):
    for split in ('train', 'val'):
        with tarfile.open(tmp_path / f'{split}.tar', 'w') as archive:
            for number, path in enumerate(sorted((folder / split).rglob('*.png'))):
                archive.add(path, f'{number:04}.png')
    config = recipe(folder, tmp_path / 'run', stages=[], **{'sched.epochs': 1, 'sched.warmup_epochs': 0})
    config.data.schedule, config.data.train = [], f'{tmp_path}/train.tar'
    assert train(config)['val_images'] == 6  # those of a folder, beside shards
    config.data.val, config.output = f'{tmp_path}/val.tar', str(tmp_path / 'both')
    result = train(config)
    assert (result['train_images'], result['val_images']) == (24, 6)


@pytest.mark.distributed
def test_low_rank_updates_align_in_several_processes(folder, tmp_path):
    """Only those of attentions learn there, which is what DDP has to be told."""
    config = recipe(folder, tmp_path / 'run', heal=HealConfig(lora=2))
    config.data.batch_size = 2
    (tmp_path / 'recipe.yaml').write_text(to_yaml(config))
    torchrun('tools/train.py', tmp_path / 'recipe.yaml')
    assert len(json.loads((tmp_path / 'run/result.json').read_text())['healing']) == 4


def test_what_an_attention_adds_learns_beside_low_rank_updates(folder, tmp_path):
    config = recipe(folder, tmp_path / 'run', heal=HealConfig(lora=2))
    config.model.attention = 'linformer'
    train(config)
    before = convert(load_model(folder / 'pretrained', img_size=(20, 24)), 'linformer', keep_ratio=0.25).state_dict()
    after = load_model(tmp_path / 'run').state_dict()
    for name in ('blocks.0.attn.compress.down.weight', 'blocks.0.attn.qkv.weight'):
        assert not torch.equal(before[name], after[name])
    assert torch.equal(before['blocks.0.mlp.fc1.bias'], after['blocks.0.mlp.fc1.bias'])
