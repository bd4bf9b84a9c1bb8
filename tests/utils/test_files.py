import json
import math
import os

import pytest

from tests.processes import taking
from vit_efficient.utils import files
from vit_efficient.utils.files import lock, read_text, replacing, write_json, write_text

pytestmark = pytest.mark.once


def test_folders_are_made_and_files_replaced(tmp_path):
    path = tmp_path / 'new' / 'a.txt'
    write_text(path, 'one')
    write_text(path, 'é')
    assert path.read_text(encoding='utf-8') == 'é'
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no modes')
@pytest.mark.parametrize(('umask', 'mode'), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_open_gives(tmp_path, umask, mode):
    """Whatever their writer makes of them, as that of safetensors does."""
    before = os.umask(umask)
    try:
        with replacing(tmp_path / 'a.safetensors') as temporary:
            assert not temporary.exists()  # which a link would not take
            temporary.touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / 'a.safetensors').stat().st_mode & 0o777 == mode


def test_a_folder_that_is_not_writable_is_named_by_the_file(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr('pathlib.Path.touch', refuse)
    with pytest.raises(PermissionError) as error:
        write_text(tmp_path / 'file.txt', 'new')
    assert error.value.filename == str(tmp_path / 'file.txt')


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'file.txt'
    write_text(path, 'old')

    def fail(*_):
        raise OSError('no space')

    monkeypatch.setattr('os.replace', fail)
    with pytest.raises(OSError, match='no space'):
        write_text(path, 'new')
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_names_that_are_no_utf8_are_written_and_read_back(tmp_path):
    for name in (b'caf\xe9', b'\xff\xfe\n', 'ü €'.encode(), b'a\rb'):
        write_text(tmp_path / 'a.txt', os.fsdecode(name))
        assert (tmp_path / 'a.txt').read_bytes() == name
        assert read_text(tmp_path / 'a.txt') == os.fsdecode(name)
        write_json(tmp_path / 'a.json', [os.fsdecode(name)])
        assert json.loads((tmp_path / 'a.json').read_text(encoding='utf-8')) == [os.fsdecode(name)]
    assert (tmp_path / 'a.json').read_bytes() == b'[\n  "a\\rb"\n]\n'


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


def test_json_has_null_for_what_is_not_finite(tmp_path):
    value = {'loss': math.nan, 'best': {'step': 3, 'values': [1.5, -math.inf]}, 'name': 'nan', 'done': True}
    write_json(tmp_path / 'a.json', value)
    read = json.loads(read_text(tmp_path / 'a.json'), parse_constant=pytest.fail)
    assert read == {'loss': None, 'best': {'step': 3, 'values': [1.5, None]}, 'name': 'nan', 'done': True}
