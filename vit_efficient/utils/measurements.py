"""What has been measured, in a JSON file that is whole after each entry: who is killed goes on where it stopped.

One process at a time has a file: two would each write it without what the other has found.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_efficient.utils.errors import UserError, one_line
from vit_efficient.utils.files import lock, remove_unfinished, write_text, writing
from vit_efficient.version import __version__


class Measurements:
    """Measurements by their keys, several for each.

    Args:
        path: The file, which need not exist; None: they are kept in memory.
        kind: What has measured them.
        about: What all of them are of, by name.

    Raises:
        UserError: If the file holds no measurements, or those of something else; it names what differs. Or if another
            process has the file, or it cannot be written.
    """

    def __init__(self, path: str | os.PathLike | None, kind: str, about: dict[str, str] | None = None):
        about = {'kind': kind, 'version': __version__, **(about or {})}
        self.path = None if path is None else Path(path)
        self._entries: dict[str, Any] = {'about': about}
        if self.path is None:
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path.with_name(f'.{self.path.name}.lock'))
        if not self._lock:
            raise UserError(f'measured={path}: another process measures for it; wait for its end, or name another file')
        remove_unfinished(self.path.parent, self.path.name)
        if not self.path.exists():
            return
        try:
            self._entries = json.loads(self.path.read_text(encoding='utf-8'))
            earlier = dict(self._entries['about'])
            if not all(isinstance(section, dict) for section in self._entries.values()):
                raise ValueError('a part of it is no mapping')
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f'measured={path} is not a file of measurements ({one_line(error)}); name another'
            ) from error
        differing = [name for name in about if earlier.get(name) != about[name]]
        if differing:
            said = ', '.join(f'{name} (was {earlier.get(name)}, is {about[name]})' for name in differing)
            raise UserError(f'measured={path} is of another {said}; name another file')

    def get(self, *keys: str) -> Any:
        """What is known under these keys, or None."""
        found = self._entries
        for key in keys:
            if found is not None and not isinstance(found, dict):
                raise self.damaged(*keys)
            found = found.get(key) if found else None
        return found

    def damaged(self, *keys: str) -> UserError:
        """The error about an entry that is none of what is measured."""
        return UserError(
            f'measured={self.path}: what it has at {" / ".join(keys)} is no measurement; remove that, or the file'
        )

    def add(self, found: dict[tuple[str, ...], Any]) -> None:
        """Adds measurements, and writes the file."""
        for (*parents, last), value in found.items():
            entries = self._entries
            for key in parents:
                entries = entries.setdefault(key, {})
            entries[last] = value
        if self.path is not None:
            with writing(self.path):
                write_text(self.path, json.dumps(self._entries, ensure_ascii=False) + '\n')


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of tensors and their names, sixteen hexadecimal digits."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]
