"""The recipes of ImageNet-1k are those that their script writes; the hours it projects, by hand."""

import csv
import importlib.util
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

FOLDER = Path(__file__).parent.parent / 'recipes/imagenet1k'
IMAGES = 1_281_167


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('write_recipes', FOLDER / 'write_recipes.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(script, folder, monkeypatch, *arguments):
    """The files that it writes, in another folder."""
    monkeypatch.setattr(script, 'FOLDER', folder)
    monkeypatch.setattr('sys.argv', ['write_recipes.py', *map(str, arguments)])
    for setting in ('base', 'deit3', 'augreg', 'finetune'):
        (folder / f'{setting}.yaml').write_text((FOLDER / f'{setting}.yaml').read_text())
    script.main()
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob('*.yaml'))}


def test_recipes_are_those_that_are_written(script, tmp_path, monkeypatch):
    committed = {path.relative_to(FOLDER).as_posix(): path.read_text() for path in sorted(FOLDER.rglob('*.yaml'))}
    assert write(script, tmp_path, monkeypatch) == committed


def test_projected_hours(script, tmp_path, monkeypatch):
    speeds = [
        ('training step', 'vit_dct_small', 224, 1000),
        ('training step', 'vit_full_base', 224, 400),
        ('training step', 'vit_treeformer_tc_base', 224, 500),
        ('training step', 'vit_dct_base', 1024, 50),
        ('inference', 'regnety_160.deit_in1k', 224, 2000),
    ]
    tables = {'throughput.csv': speeds[:-1], 'teacher.csv': speeds[-1:]}
    for name, rows in tables.items():
        with (tmp_path / name).open('w', newline='') as file:
            csv.writer(file).writerows([('work', 'model', 'img_size', 'images_per_second'), *rows])
    files = write(script, tmp_path, monkeypatch, '--throughput', *(tmp_path / name for name in tables))

    def hours(name):
        found = re.findall(r'^# Projection, not a result: ([\d,]+) GPU hours', files[f'{name}.yaml'], re.MULTILINE)
        return float(found[0].replace(',', '')) if found else None

    step = IMAGES / 3600
    assert hours('deit3/dct_small') == pytest.approx(400 * step / 1000, abs=0.5)
    assert hours('augreg/dct_small') == pytest.approx(300 * step / 1000, abs=0.5)
    assert hours('distill/dct_small') == pytest.approx(400 * step * (1 / 1000 + 1 / 2000), abs=0.5)
    assert hours('finetune/dct_base_1024') == pytest.approx(20 * step / 50 * 4 / 3, abs=0.5)  # activations again
    half = 200 / 400 + 80 * (1 / 400 + 1 / 500) / 2 + 120 / 500
    assert hours('deit3/treeformer_tc_base-bootstrapped') == pytest.approx(step * half, abs=0.5)
    assert hours('deit3/dct_base') is None and hours('distill/full_small') is None


@pytest.mark.parametrize('text', [None, 'model,img_size\nvit_dct_small,224\n'])
def test_files_that_are_no_table(script, tmp_path, monkeypatch, capsys, text):
    path = tmp_path / 'table.csv'
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit):
        write(script, tmp_path, monkeypatch, '--throughput', path)
    assert f'--throughput {path}' in capsys.readouterr().err
