"""What is in tar files, as offsets at which it can be read at random."""

import hashlib
import os
import posixpath
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from vit_efficient.data.sources.folders import is_hidden
from vit_efficient.utils.compat import tar_members
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import replacing

_FORMAT = 2  # of the arrays in the cache, and of how they are made
_NOWHERE = (-1, 0)
THREADS = 16  # that read headers: most of the time goes by in waiting for the disk


def encoded(name: str) -> bytes:
    """A name as bytes, for an array; those that are no UTF-8 are what they were."""
    return name.encode(errors='surrogateescape')


def decoded(name: bytes) -> str:
    return name.decode(errors='surrogateescape')


def read_names(path: str, argument: str) -> list[str]:
    """The names of classes in a text file, one in each line. A UserError names the argument and the file."""
    where = f'{argument}={path}'
    try:
        text = Path(path).read_bytes().decode('utf-8-sig')
    except OSError as error:
        raise UserError(f'{where}: cannot read it: {error.strerror}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{where}: it is no UTF-8 ({error.reason} at byte {error.start}); save it as such') from error
    if '\0' in text:
        raise UserError(f'{where}: it is no UTF-8 (it has empty bytes, as UTF-16 has); save it as such')
    names = text.replace('\r\n', '\n').replace('\r', '\n').split('\n')
    while names and not names[-1].strip():
        names.pop()
    lines: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name.strip():
            raise UserError(f'{where}: line {line} is empty; each line has the name of a class')
        if lines.setdefault(name, line) != line:
            raise UserError(f'{where}: {name!r} is in it twice, in lines {lines[name]} and {line}')
    if not names:
        raise UserError(f'{where}: it is empty; each line has the name of a class')
    return names


def list_files(
    path: str, needed: Callable[[str], bool], start: int = 0, size: int | None = None, what: str = 'file'
) -> tuple[list[tuple[str, tuple[int, int]]], list[str]]:
    """The names of the files in a tar file, in its order, with the offset and size of each; and its folders.

    None of them is hidden. Links have the extent of the file they lead to; one that leads to none is left out if its
    name is not `needed`. `start` and `size` are those of `tar_members`, `what` is for messages.

    Raises:
        UserError: If it is not a readable tar file, or a link that is needed leads to no file in it.
    """
    files: list[tuple[str, tuple[int, int] | str]] = []
    folders: list[str] = []
    extents: dict[str, tuple[int, int] | str] = {}  # or the name that a link leads to
    try:
        for member in tar_members(path, start, size):
            name = normal(member.name)
            if member.isreg():
                extent = member.offset_data, member.size
            elif member.islnk():
                extent = extents.get(normal(member.linkname), _NOWHERE)
            elif member.issym():
                extent = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            else:
                if member.isdir() and not is_hidden(member.name):
                    folders.append(member.name)
                continue
            extents[name] = extent
            if not is_hidden(member.name):
                files.append((member.name, extent))
    except (OSError, tarfile.TarError) as error:
        raise UserError(f'{path}: not a readable tar {what}, uncompressed ({error}); make it anew') from error
    found = []
    for name, extent in files:
        if (place := _follow(extent, extents)) != _NOWHERE:
            found.append((name, place))
        elif needed(name):
            raise UserError(f'{path}: {name} is a link that leads to no file in it; pack with --dereference')
    return found, folders


def normal(name: str) -> str:
    """The path of a member below the folder in which it would be unpacked."""
    if name[:1] not in '/.' and '/.' not in name and '//' not in name and name[-1:] != '/':
        return name  # as most are
    return posixpath.normpath(f'/{name.lstrip("/")}')[1:]


def _follow(extent: tuple[int, int] | str, extents: dict) -> tuple[int, int]:
    """Where the file lies that an extent is of, or a link leads to; `_NOWHERE` if that is none."""
    seen = set()
    while isinstance(extent, str) and extent not in seen:
        seen.add(extent)
        extent = extents.get(extent, _NOWHERE)
    return _NOWHERE if isinstance(extent, str) else extent


def cached(path: str, make: Callable[[], dict[str, np.ndarray]], *key: str) -> dict[str, np.ndarray]:
    """Arrays that `make` makes of a file, from the user's cache folder while the file has the size and date it had."""
    status = os.stat(path)
    key = (_FORMAT, os.path.abspath(path), status.st_size, status.st_mtime_ns, *key)
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'vit_efficient', 'shards')
    kept = folder / f'{hashlib.sha256(repr(key).encode()).hexdigest()}.npz'
    with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile), np.load(kept) as arrays:
        return {name: arrays[name] for name in arrays.files}
    arrays = make()
    with suppress(OSError):  # it is a convenience
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as temporary, open(temporary, 'wb') as file:
            np.savez(file, **arrays)
    return arrays
