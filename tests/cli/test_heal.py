"""`vit-efficient heal` and `vit-efficient features`: a model that one has, one's own images, and no recipe."""

import json

import pytest
import timm
import torch
from PIL import Image

from tests.data.trees import pixels
from vit_efficient import save_model
from vit_efficient.models import load_model
from vit_efficient.train import load_recipe
from vit_efficient_cli import main

pytestmark = pytest.mark.once
SHORT = ['sched.epochs=2', 'stages=[{epochs: 1}, {epochs: 1, heal: refine}]', 'sched.warmup_epochs=0', 'heal.solve=8']
SHORT += ['data.schedule=[{epoch: 0, img_size: [32, 32]}, {epoch: 1, img_size: [48, 48]}]', 'data.batch_size=4']
SHORT += ['device=cpu', 'threads=1', 'data.workers=0']


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A model for 32 px, and 20 images of many sizes and kinds, deep and flat."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    options = dict(embed_dim=24, depth=2, num_heads=2, num_classes=5, img_size=32, patch_size=8)
    model = timm.create_model('vit_small_patch16_224', **options)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(20)
    save_model(model, 'model')
    for i in range(20):
        folder = tmp_path / 'images' / ('deep' if i % 3 else '')
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i, (50 + i, 60, 3) if i % 4 else (50, 60))).save(folder / f'{i}.png')
    return tmp_path


def test_a_model_is_healed_in_one_command_and_shown(here, capsys):
    command = ['heal', 'model', '--images', 'images', '--attention', 'dct', '--keep-ratio', '1/4', '--img-size', '48']
    assert main([*command, '--out', 'healed', *SHORT]) == 0
    said = capsys.readouterr().out
    for name in ('teacher', 'swapped', 'solved', 'recovered', 'refined'):
        assert f'| {name} ' in said
    assert '2 images that were not learned from; see healed' in said
    assert (here / 'healed/healing.md').read_text() in said
    model = timm.create_model('local-dir:healed/model', pretrained=True)
    assert model.attention_spec()[0] == ('dct', {**model.attention_spec()[0][1], 'keep_ratio': 0.25})
    about = json.loads((here / 'healed/model/config.json').read_text())['healed']
    assert about['teacher'] == 'vit_small_patch16_224 of model' and about['losses']['solve'] == 8

    assert main(['features', 'model', 'healed', 'images/0.png', '--img-size', '48', '--at', '0.2', '0.9']) == 0
    assert (
        main(
            [
                'features',
                'model',
                'healed',
                'images/0.png',
                '--img-size',
                '48',
                '--swapped',
                'dct',
                '--out',
                'three.png',
            ]
        )
        == 0
    )
    assert Image.open('three.png').size[0] > Image.open('features.png').size[0]
    assert Image.open('features.png').size[0] > 3 * 250
    capsys.readouterr()
    table = ['table', 'fidelity', 'model', '--images', 'images', '--img-size', '48', '--no-times']
    assert main([*table, '--attention', 'dct:keep_ratio=1/4', 'healed', '--format', 'json']) == 0
    exact, swapped, healed = json.loads(capsys.readouterr().out)
    assert exact['given_back'] is None and swapped['given_back'] is None
    part = (healed['centred'] - swapped['centred']) / (1 - swapped['centred'])
    assert healed['given_back'] == pytest.approx(100 * part) and part > 0
    assert 0 < healed['neighbours'] <= 1 and exact['neighbours'] == 1
    assert main(['plot', 'healed', '--out', 'curve.png']) == 0
    # Once more, from where it stands: the same command goes on, and is done.
    assert main([*command, '--out', 'healed', *SHORT, 'resume=auto']) == 0


def test_a_plan_and_a_model_of_one_size_are_healed(here):
    (here / 'plan.yaml').write_text(PLAN)
    options = dict(embed_dim=24, depth=2, num_heads=2, num_classes=0, img_size=32, patch_size=8)
    save_model(timm.create_model('beit_base_patch16_224', **options), 'beit')
    command = ['heal', 'beit', '--images', 'images', '--attention', 'plan.yaml', '--out', 'run', *SHORT[:4], *SHORT[5:]]
    assert main(command) == 0
    assert [name for name, _ in load_model('run').attention_spec()] == ['full', 'subsample']
    assert load_recipe('run/recipe.yaml').data.schedule == []


PLAN = """
model: beit_base_patch16_224
img_size: [32, 32]
unit: gmacs
budget: 0.9
share: 0.8
gmacs: [1.0, 0.8]
loss: centred
predicted: 0.1
measured: 0.1
fidelity: {patch: 0.9, centred: 0.9, prefix: 0.9, error: 0.1}
layers:
- full
- subsample: {keep_ratio: 0.25}
"""


def test_a_recipe_runs_as_by_train(here, capsys):
    (here / 'images.yaml').write_text(
        'task: features\nmodel: {name: vit_small_patch16_224, init_from: model, attention: pool}\n'
        'data: {train: images, val: images}\noptim: {lr: 1.0e-5}\n'
    )
    keys = ['model.args.dynamic_img_size=true', 'data.img_size=[32,32]', 'output=run', *SHORT[:4], *SHORT[5:]]
    assert main(['heal', 'images.yaml', *keys]) == 0
    assert '| refined ' in capsys.readouterr().out
    assert load_recipe('run/recipe.yaml').task == 'features'


def test_some_layers_are_healed(here):
    command = ['heal', 'model', '--images', 'images', '--attention', 'dct:keep_ratio=1/4,layers=[-1]', *SHORT]
    assert main([*command, '--img-size', '48', '--out', 'run']) == 0
    assert [name for name, _ in load_model('run').attention_spec()] == ['full', 'dct']
    assert load_recipe('run/recipe.yaml').model.layers == [-1]


def test_least_squares_alone_need_no_batch(here, capsys):
    """Of images in a list that begins with a byte order mark."""
    names = [path.as_posix() for path in sorted((here / 'images').rglob('*.png'))][:10]
    (here / 'list.txt').write_text('\n'.join(names), encoding='utf-8-sig')
    command = ['heal', 'model', '--images', 'list.txt', '--attention', 'dct:keep_ratio=1/4', '--img-size', '48']
    keys = [*SHORT[3:4], *SHORT[6:], 'sched.epochs=0', 'stages=[]', 'data.schedule=[]', 'data.batch_size=64']
    assert main([*command, '--out', 'run', *keys]) == 0
    assert '| solved ' in capsys.readouterr().out


def test_a_folder_does_not_hide_an_attention(here, capsys):
    (here / 'pool').mkdir()
    table = ['table', 'fidelity', 'model', '--images', 'images', '--img-size', '48', '--no-times', '--format', 'json']
    assert main([*table, '--attention', 'pool']) == 0
    assert json.loads(capsys.readouterr().out)[1]['attention'] == 'pool'
    assert main([*table, '--attention', './pool']) == 2
    assert 'pool: not a model folder' in capsys.readouterr().err


def test_the_size_is_that_of_the_model(here):
    options = dict(embed_dim=24, depth=1, num_heads=2, num_classes=0, patch_size=8, img_size=(96, 128))
    save_model(timm.create_model('vit_small_patch16_224', **options), here / 'wide')
    keys = [*SHORT[:4], 'heal.solve=0', *SHORT[5:]]
    assert main(['heal', 'wide', '--images', 'images', '--attention', 'pool', '--out', 'run', *keys]) == 0
    config = load_recipe('run/recipe.yaml')
    assert config.data.img_size == config.model.args['img_size'] == [96, 128]
    # The last stage has the size of use, however long the others are.
    assert [(part.epoch, part.img_size) for part in config.data.schedule] == [(0, [64, 72]), (1, [96, 128])]


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        ('nowhere.yaml', 'nowhere.yaml: no such recipe'),
        ('modle --images images --attention dct', 'modle: no such recipe, folder, or model of timm'),
        ('model --images images', '--images and --attention must be given'),
        ('model --images images --attention dctt', "'dctt'"),
        (
            'model --images images --attention dct --img-size 50',
            '50 is not a multiple of the patch size 8; use 48 or 56',
        ),
        ('model --images images --attention dct --out ./model', '--out model is the model that is to be healed'),
        ('model --images nowhere --attention dct', 'nowhere: no such folder of images'),
        ('model --images images --attention dct:keep_ratio=1/4 --keep-ratio 1/2', 'which says it already'),
        ('vit_full_tiny --images images --attention dct', 'timm has no pretrained weights of it'),
        ('resnet18 --images images --attention dct', 'a ResNet has no one grid of patches'),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(here, capsys, command, message):
    assert main(['heal', *command.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count('\n') == 1
    assert not (here / 'runs').exists()


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        ('model images/0.png --img-size 50', 'is not a multiple of the patch size 8'),
        ('model images/99.png --img-size 48', 'images/99.png: no such image'),
        ('model images/0.png --img-size 48 --at 2 0', '--at must be two numbers from 0 to 1, got 2 0'),
    ],
)
def test_pictures_that_cannot_be_drawn(here, capsys, command, message):
    assert main(['features', *command.split()]) == 2
    assert message in capsys.readouterr().err


def test_models_of_other_widths_are_not_compared(here, capsys):
    save_model(
        timm.create_model('vit_small_patch16_224', embed_dim=48, depth=1, num_heads=2, img_size=32, patch_size=8),
        'wide',
    )
    assert main(['features', 'model', 'wide', 'images/0.png', '--img-size', '48']) == 2
    assert 'tokens of several widths cannot be compared' in capsys.readouterr().err
    table = ['table', 'fidelity', 'model', '--images', 'images', '--img-size', '48', '--attention', 'wide']
    assert main(table) == 2
    assert 'wide at 48 px: its tokens have 48 channels and 1 of them are prefix tokens' in capsys.readouterr().err
