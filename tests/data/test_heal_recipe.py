"""recipes/heal: how its photographs are divided, its files and those that its script writes, and what is measured."""

import copy
import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from vit_efficient import convert, save_model
from vit_efficient.dense import DenseModel
from vit_efficient.models import load_model
from vit_efficient.models.saving import read_model_config
from vit_efficient.train import load_recipe

FOLDER = Path(__file__).parents[2] / 'recipes/heal'


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prepare(monkeypatch):
    module = load('prepare')
    sky = {f'{i:02}.jpg': bytes([i]) for i in range(40)} | {'notes.txt': b''}
    mate = {f'm{i}.jpg': bytes([100 + i]) for i in range(5)} | {'art.png': b''}
    packages = {'endless-sky-high-dpi': sky, 'mate-backgrounds': mate}
    monkeypatch.setattr(
        type(module.MATE), 'files', lambda source, archives: iter(packages[source.package].items()), raising=True
    )
    return module


def test_photographs_that_validate_cutouts_are_left_out_and_every_tenth_is_for_choosing(prepare, tmp_path, capsys):
    assert prepare.main([str(tmp_path / 'heal')]) == 0
    found = {
        split: sorted(path.name for path in (tmp_path / 'heal' / split).iterdir()) for split in ('train', 'choosing')
    }
    every = sorted([*found['train'], *found['choosing']])
    assert found['choosing'] == every[9::10]
    validating = prepare._cutouts['split_photographs'](f'{i:02}.jpg' for i in range(40))['val']
    assert len(validating) == 8 and not {*every} & {*validating}
    assert len(every) == 40 - 8 + 5
    assert (tmp_path / 'heal/train/m0.jpg').read_bytes() == bytes([100])
    assert prepare.main([str(tmp_path / 'heal')]) == 0
    assert 'there' in capsys.readouterr().out


def test_what_cannot_be_had_leaves_nothing(prepare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(type(prepare.MATE), 'files', lambda source, archives: iter(()))
    assert prepare.main([str(tmp_path / 'heal')]) == 2
    assert 'endless-sky-high-dpi has none of its photographs any more' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_recipes_of_families_are_those_that_the_script_writes():
    module = load('write_recipes')
    written = {path.relative_to(FOLDER).as_posix() for path in FOLDER.glob('families/*/*.yaml')}
    assert written == {
        f'families/{name}/{size}.yaml' for name, (*_, sizes) in module.FAMILIES.items() for size in sizes
    }
    for family, (name, patch, sizes) in module.FAMILIES.items():
        for size in sizes:
            path = FOLDER / f'families/{family}/{size}.yaml'
            assert path.read_text() == module.recipe(family, name, size, module.smaller(size, patch))
            config = load_recipe(path)
            assert config.model.args == {'pretrained': True, 'img_size': size, 'dynamic_img_size': True}
            assert all(side % patch == 0 for part in config.data.schedule for side in part.img_size)


def test_a_head_stays_as_it_is_on_another_backbone(tmp_path, capsys):
    """On one that is converted, and on one that has learned: what it gives are logits of that one's features."""
    module = load('keep_head')
    torch.manual_seed(0)
    tiny = dict(img_size=56, depth=2, embed_dim=24, num_heads=2, num_classes=0, init_values=1.0, dynamic_img_size=True)
    backbone = timm.create_model('vit_small_patch14_dinov2', **tiny)
    dense = DenseModel(copy.deepcopy(backbone), 'multilayer', num_classes=3, width=8)
    save_model(dense, tmp_path / 'full-s7', ['none', 'a', 'b'])
    learned = convert(backbone, 'subsample', keep_ratio=1 / 4)
    for parameter in learned.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_model(learned, tmp_path / 'healed')
    heads = ['--heads', str(tmp_path / 'full-s7'), '--out', str(tmp_path)]
    assert module.main([str(tmp_path / 'healed'), 'learned', *heads]) == 0
    assert module.main(['subsample:keep_ratio=1/4', 'swapped', *heads]) == 0
    images = torch.randn(2, 3, 56, 56)
    expected = {'learned': learned, 'swapped': convert(copy.deepcopy(dense), 'subsample', keep_ratio=1 / 4).backbone}
    for name, wanted in expected.items():
        found = load_model(tmp_path / f'{name}-s7').eval()
        assert read_model_config(tmp_path / f'{name}-s7')['label_names'] == ['none', 'a', 'b']
        reference = DenseModel(copy.deepcopy(wanted), 'multilayer', num_classes=3, width=8)
        reference.head.load_state_dict(dense.head.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(found(images), reference.eval()(images))
    assert module.main(['subsample:keep_ratio=1/4', 'swapped', *heads]) == 2
    assert 'is there already' in capsys.readouterr().err
    assert module.main(['dct', 'other', '--heads', str(tmp_path / 'healed'), '--out', str(tmp_path)]) == 2
    assert 'has no head for patches' in capsys.readouterr().err


def test_saliency_maps_are_compared_with_those_of_the_exact_model(tmp_path, monkeypatch, capsys):
    module = load('saliency')
    torch.manual_seed(0)
    tiny = dict(img_size=56, depth=2, embed_dim=384, num_heads=6, num_classes=0, init_values=1.0, dynamic_img_size=True)
    exact = timm.create_model('vit_small_patch14_dinov2', **tiny)
    for block in exact.blocks:  # so that much hangs on which patches are attended to
        block.attn.qkv.weight.data.mul_(20)
    save_model(exact, tmp_path / 'exact')
    (tmp_path / 'photographs').mkdir()
    for i in range(2):
        Image.effect_mandelbrot((60, 60), (-3 + i, -2.5, 2, 2.5), 99).save(tmp_path / f'photographs/{i}.png')
    head = module.SaliencyHead().eval().requires_grad_(False)
    monkeypatch.setattr(module, 'read_head', lambda archives: head)
    words = ['full', 'subsample:keep_ratio=1/4', '--model', str(tmp_path / 'exact'), '--img-size', '56']
    words += ['--images', str(tmp_path / 'photographs'), '--out', str(tmp_path / 'saliency.md')]
    assert module.main(words) == 0
    text = (tmp_path / 'saliency.md').read_text()
    assert text == capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()[2:5]]
    assert [row[0] for row in rows] == ['as it is', 'full', 'subsample:keep_ratio=1/4']
    assert rows[1][1:] == rows[0][1:] == ['1.000', '1.000', '1.000', '0.0000']
    assert 0 < float(rows[2][1]) < 1 and float(rows[2][4]) > 0
