"""`vit-efficient plan`, from a folder of images to a converted model."""

import json

import pytest
import timm
from PIL import Image
from torch import nn

from tests.data.trees import pixels
from vit_efficient import Plan, convert, count_flops, save_model
from vit_efficient_cli import main

pytestmark = pytest.mark.once
OPTIONS = ['subsample:keep_ratio=1/4', 'dct:place=block,keep_ratio=1/4']


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model('vit_small_patch16_224', embed_dim=32, depth=3, num_heads=2, num_classes=5, img_size=32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    save_model(model, 'model')
    (tmp_path / 'images' / 'a').mkdir(parents=True)
    for i in range(4):
        Image.fromarray(pixels(i, (70, 80, 3))).save(f'images/a/{i}.png')
    Image.fromarray(pixels(9, (50, 80, 3))).save('images/small.png')
    return tmp_path


def command(*more, size=64):
    return ['plan', 'model', '--images', 'images', '--img-size', str(size), '--limit', '3', *more]


def rows(text):
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line[:1] == '|']


def test_plan_and_picture(here, capsys):
    words = command('--budget', '3/4', '--options', *OPTIONS, '--out', 'new/plan.yaml', '--measured', 'measured.json')
    assert main(words) == 0
    said = capsys.readouterr()
    assert '3 images of 64 × 64 pixels; left out 1 of 5, which are smaller\n' in said.err
    head, _, *layers = rows(said.out)
    assert head == ['block', 'as it is', *OPTIONS]
    found = Plan.load('new/plan.yaml')
    assert found.model == 'vit_small_patch16_224' and found.img_size == (64, 64) and found.share <= 0.75
    for i, (cells, (name, _)) in enumerate(zip(layers, found.layers, strict=True)):
        assert cells[0] == str(i)
        [bold] = [k for k, cell in enumerate(cells) if cell.startswith('**')]
        assert name == ['full', 'subsample', 'dct'][bold - 1]
    assert f'loss (centred) {found.measured:.4g} measured, {found.predicted:.4g} predicted' in said.out
    assert 'saved new/plan.yaml and new/plan.png' in said.out
    assert (here / 'new/plan.png').read_bytes().startswith(b'\x89PNG')
    model = timm.create_model('local-dir:model', pretrained=True, img_size=64)
    assert count_flops(convert(model, 'new/plan.yaml'), (3, 64, 64)).total / 1e9 == pytest.approx(
        found.gmacs[1], rel=1e-5
    )

    before = json.loads((here / 'measured.json').read_text())
    assert main(words) == 0  # again, without measuring
    assert capsys.readouterr().out == said.out
    assert json.loads((here / 'measured.json').read_text()) == before


@pytest.mark.usefixtures('short_clocks')
def test_front(here, capsys):
    budgets = ['--budgets', '0.9', '0.7', '--out', 'plan.yaml', '--no-memory', '--unit', 'keys']
    assert main(command(*budgets, '--options', OPTIONS[0], '--refine', '0', '--loss', 'error')) == 0
    said = capsys.readouterr().out
    head, _, *front = rows(said)
    assert head[:4] == ['budget (keys)', 'loss (error)', 'predicted', 'patch cosine']
    assert [row[0] for row in front] == ['as it is', '0.7', '0.9'] and front[0][1:6] == ['0.0000'] * 2 + ['1.0000'] * 3
    for row in front[1:]:
        found = Plan.load(f'plan-{row[0]}.yaml')
        assert row[1:4] == [f'{found.measured:.4f}', f'{found.predicted:.4f}', f'{found.fidelity["patch"]:.4f}']
        assert row[6] == f'{found.gmacs[1]:.2f}' and float(row[7]) > 0
        assert (here / f'plan-{row[0]}.png').exists()
    assert float(front[1][1]) >= float(front[2][1])


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (command('--budget', '0'), '0 < --budget ≤ 1, got --budget=0'),
        (command('--budget', 'half'), "got --budget='half'"),
        (command(), 'give --budget, or several as --budgets'),
        (command('--budget', '.5', '--budgets', '.5'), 'give --budget, or several as --budgets'),
        (command('--budget', '0.1'), 'budget=0.1 cannot be had'),
        (command('--budget', '.9', size=60), '60 is not a multiple of the patch size 16; use 48 or 64'),
        (command('--budget', '.9', size=96), '--images: none of 5 has 96 pixels'),
        (command('--budget', '.9', '--options', 'dctt'), "options: dctt: unknown attention 'dctt'"),
        (command('--budget', '.9', '--out', 'plan.json'), '--out must end in .yaml, got plan.json'),
        (command('--budget', '.9', '--limit', '0'), '--limit must be a positive integer'),
        (['plan', 'none', *command('--budget', '.9')[2:]], "timm knows no model 'none'"),
        (['plan', 'local-dir:none', *command('--budget', '.9')[2:]], 'none: no such model folder'),
        (['plan', 'model', '--images', 'image', '--img-size', '64'], 'image: no such folder of images; did you mean'),
    ],
)
def test_errors_are_one_line(here, words, message, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == '' and message in said.err.splitlines()[-1] and 'Traceback' not in said.err


def test_enlarged(here, capsys):
    assert main(command('--budget', '.95', '--options', OPTIONS[0], '--enlarge', size=96)) == 0
    assert '3 images of 96 × 96 pixels\n' in capsys.readouterr().err
