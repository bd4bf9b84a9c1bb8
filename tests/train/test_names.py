"""Names of files, classes and folders that are no UTF-8, or that a table or a line would break at."""

import csv
import json
import os
import subprocess
import sys

import pytest

from tests.data.trees import write_tree
from tests.processes import ROOT
from tests.train.recipes import tiny_recipe
from vit_efficient.report.evaluation import SavedModel, evaluate_saved
from vit_efficient.train import load_recipe, train
from vit_efficient.train.run_folder import RunFolder
from vit_efficient.utils.files import write_json


def test_names_of_any_bytes_reach_all_that_a_run_writes(tmp_path):
    data, odd = write_tree(tmp_path / 'data'), os.fsdecode(b'caf\xe9')
    for split in ('train', 'val'):
        (data / split / 'c1').rename(data / split / odd)
    files = [os.fsdecode(name) for name in (b'\xe9 1.png', b'a\rb.png', b'a\nb, "c".png', b'\xc3\xa9.png')]
    for new, path in zip(files, sorted((data / 'val').glob('*/*.png'))[2:], strict=True):
        path.rename(path.with_name(new))
    (data / 'val' / odd / os.fsdecode(b'\xff\n.png')).touch()
    for path in (data / 'val' / 'c0').iterdir():  # the first class: the others keep their numbers
        path.unlink()
    (data / 'val' / 'c0').rmdir()
    config = tiny_recipe(data, tmp_path / 'rün')
    config.data.on_error = 'skip'
    config.data.augment.rand_ops = 0
    result = train(config)

    run = RunFolder(config.output)
    rows = run.predictions()
    assert sorted(os.fsencode(row['file']) for row in rows) == [
        *(b'c2/a\rb.png', b'c2/\xe9 1.png', b'caf\xe9/a\nb, "c".png', b'caf\xe9/\xc3\xa9.png')
    ]
    assert all((data / 'val' / row['file']).is_file() for row in rows)
    assert [(row['label'], row['label_name']) for row in rows] == [('1', 'c2')] * 2 + [('2', odd)] * 2
    with open(run.path / 'predictions.csv', newline='', encoding='utf-8', errors='surrogateescape') as file:
        assert list(csv.DictReader(file)) == rows
    assert os.fsencode(odd) + b'/\xff .png: ' in (run.path / 'skipped.txt').read_bytes()
    assert (run.path / 'skipped.txt').read_bytes().count(b'\n') == result['val_skipped'] == 1
    assert json.loads((run.path / 'model/config.json').read_text('utf-8'))['label_names'] == ['c0', 'c2', odd]
    assert load_recipe(run.path / 'recipe.yaml').output == config.output
    again = evaluate_saved(SavedModel(run.path), str(data / 'val'), 2, on_error='skip')
    assert again.top1 == result['top1']

    config.output = os.fsdecode(b'run\xe9')
    with pytest.raises(ValueError, match=r'^output=.*: a recipe is kept as UTF-8'):
        train(config)


@pytest.mark.subprocess
def test_files_are_utf8_whatever_the_locale(tmp_path):
    """Read and written where the locale has but ASCII: a recipe, the config of a model, texts, JSON."""
    write_json(tmp_path / 'config.json', {'architecture': 'vit_full_tiny', 'label_names': ['châtaigne']})
    (tmp_path / 'a.yaml').write_text('model: {name: any}\noutput: été\n', encoding='utf-8')
    code = """if True:
        import sys
        from pathlib import Path
        from vit_efficient.models.saving import read_model_config
        from vit_efficient.train import load_recipe
        from vit_efficient.train.recipe import to_yaml
        from vit_efficient.utils.files import write_json, write_text
        folder = Path(sys.argv[1])
        write_json(folder / 'b.json', read_model_config(folder))
        write_text(folder / 'b.yaml', to_yaml(load_recipe(folder / 'a.yaml')))
    """
    locale = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    subprocess.run([sys.executable, '-c', code, tmp_path], check=True, cwd=ROOT, env={**os.environ, **locale})
    assert (tmp_path / 'b.json').read_bytes() == (tmp_path / 'config.json').read_bytes()
    assert load_recipe(tmp_path / 'b.yaml').output == 'été'
