"""Files that are either whole or not there."""

import errno
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors import SafetensorError

from vit_efficient.utils.errors import UserError, first_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

with suppress(ImportError):  # Windows has none
    import fcntl

_TEMPORARY = re.compile(r'\.(.+)\.\d+\.tmp')


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; once that is done it takes the name of `path`.

    Whenever the process or the machine stops, the old file or the new one is there, whole. Missing folders are made.
    It has the mode that `open` gives, whatever has written it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # safetensors lets none but the owner read
        os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name != 'nt':  # Windows has no descriptors of folders, and needs none to make a rename durable
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_unfinished(folder: str | Path, name: str | None = None) -> None:
    """Removes what `replacing` has left in a folder where the process was killed; with a name, of that file only."""
    for path in Path(folder).glob('.*.tmp'):
        found = _TEMPORARY.fullmatch(path.name)
        if found and name in (None, found[1]):
            path.unlink(missing_ok=True)


def check_can_write(path: str | Path) -> None:
    """Tries to write beside a file, before what is to be in it is made.

    Raises:
        UserError: If it cannot be.
    """
    with writing(Path(path)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass


def lock(path: str | Path) -> IO[str] | None:
    """Takes a file for this process alone, until what is returned is closed or the process has ended, however it does.

    None if another process has taken it. File systems without locks always give it.
    """
    file = open(path, 'a', encoding='utf-8')  # noqa: SIM115  open as long as it is taken
    try:
        # A lock of the process, not of the open file: loader processes do not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except (OSError, NameError):
        pass
    return file


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def save_figure(figure: 'Figure', path: str | Path) -> None:
    """Writes a figure of matplotlib, in the format of the path's suffix (PNG without one), atomically."""
    name, known = Path(path).suffix.lstrip('.').lower() or 'png', figure.canvas.get_supported_filetypes()
    if name not in known:
        raise UserError(f'{path}: Format {name!r} is not supported; matplotlib has {", ".join(known)}')
    content = io.BytesIO()
    figure.savefig(content, format=name)
    write_bytes(path, content.getvalue())


def write_text(path: str | Path, text: str) -> None:
    """Writes text as UTF-8, atomically.

    A file name that is no UTF-8, which Python has with surrogates, is written as the bytes that it is on the disk;
    `read_text` gives it back.
    """
    write_bytes(path, text.encode(errors='surrogateescape'))


def read_text(path: str | Path) -> str:
    """What `write_text` has written, or a user, whose editor may begin with a byte order mark."""
    return Path(path).read_bytes().decode('utf-8-sig', errors='surrogateescape')


def as_json(value: Any) -> Any:
    """A value of dictionaries, lists and numbers, with None for each number that is not finite, which JSON lacks."""
    if isinstance(value, dict):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON, atomically. Numbers that are not finite, which JSON lacks, are null."""
    text = json.dumps(as_json(value), indent=2, ensure_ascii=False) + '\n'
    write_bytes(path, text.encode(errors='backslashreplace'))  # JSON has an escape for each surrogate, such as \udce9


@contextmanager
def writing(path: Path, state: str = '') -> Iterator[None]:
    """Turns what the system says when a file or folder cannot be written into a UserError, which ends with `state`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = error  # PyTorch's writer, stopped in the middle, raises an error of its own over that of the system
        while cause and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, RuntimeError) and not cause:
            raise
        reason = (cause and cause.strerror) or first_line(error)
        raise UserError(f'{path}: cannot be written: {reason}{state}') from error
