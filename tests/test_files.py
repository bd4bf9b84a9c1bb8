import pytest

from vit_efficient.files import write_text


def test_folders_are_made_and_files_replaced(tmp_path):
    path = tmp_path / 'new' / 'a.txt'
    write_text(path, 'one')
    write_text(path, 'é')
    assert path.read_text(encoding='utf-8') == 'é'
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'file.txt'
    write_text(path, 'old')

    def fail(*_):
        raise OSError('no space')

    monkeypatch.setattr('os.replace', fail)
    with pytest.raises(OSError, match='no space'):
        write_text(path, 'new')
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
