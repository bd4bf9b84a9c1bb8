"""recipes/heal: how its photographs are divided, and that its files are those that its script writes."""

import importlib.util
from pathlib import Path

import pytest

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
