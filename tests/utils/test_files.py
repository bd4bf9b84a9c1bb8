import pytest

from tests.processes import taking
from vit_efficient.utils import files
from vit_efficient.utils.files import lock, write_text

pytestmark = pytest.mark.once


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


needs_locks = pytest.mark.skipif(
    not hasattr(files, 'fcntl'), reason='Windows has no fcntl, whose locks end with a process'
)


@needs_locks
@pytest.mark.subprocess
def test_a_file_is_taken_by_one_process_as_long_as_it_lives(tmp_path):
    path = tmp_path / '.lock'
    ours = lock(path)
    with taking(path) as (given, _):
        assert not given
    ours.close()
    with taking(path) as (given, other):
        assert given and lock(path) is None
        other.kill()
        other.join()
        assert lock(path)


@needs_locks
def test_without_locks_a_file_is_always_given(tmp_path, monkeypatch):
    def without(*_):
        raise OSError('no locks here')

    monkeypatch.setattr(files.fcntl, 'lockf', without)
    assert lock(tmp_path / '.lock')
