"""The state of a run on disk.

checkpoint.pt is the newest. Of runs that keep several, the last ones are there as checkpoint-UPDATES.pt as well; the
newest has both names.
"""

import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import replacing, writing

CHECKPOINT = 'checkpoint.pt'
_PARTS = ('identity', 'progress', 'model', 'optimizer')  # and, of runs that have one, ema
_NUMBERED = re.compile(r'checkpoint-(\d+)\.pt')


def save_checkpoint(path: Path, state: dict[str, Any], keep: int = 1) -> None:
    """Saves the state of a run, atomically: a failure leaves the previous checkpoint as it was.

    The last `keep` checkpoints are left.
    """
    with writing(path, '; the checkpoint before is as it was, resume=auto goes on from it' if path.exists() else ''):
        # Not the path: PyTorch's own writer does not tell what the system says.
        with replacing(path) as temporary, open(temporary, 'wb') as file:
            torch.save(state, file)
        updates = state['progress']['updates'] if keep > 1 else -1
        if keep > 1:
            with replacing(path.with_name(f'checkpoint-{updates}.pt')) as temporary:
                try:
                    os.link(path, temporary)
                except OSError:  # not all file systems have links
                    shutil.copyfile(path, temporary)
        numbered = _numbered(path.parent)
        # Those of more updates were there when the run went back to an earlier one.
        last = sorted(number for number in numbered if number <= updates)[-keep:]
        for number in numbered.keys() - set(last):
            numbered[number].unlink()


def _numbered(folder: Path) -> dict[int, Path]:
    matches = ((_NUMBERED.fullmatch(path.name), path) for path in folder.glob('checkpoint-*.pt'))
    return {int(match[1]): path for match, path in matches if match}


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in the folder of a run, the newest first."""
    newest = folder / CHECKPOINT
    return [newest] * newest.exists() + [path for _, path in sorted(_numbered(folder).items(), reverse=True)]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads what save_checkpoint saved, on the CPU. Nothing in the file is executed.

    Raises:
        UserError: If the file is not such a checkpoint, or its content is not what was written.
    """
    try:
        damaged = damaged_part(path)
        state = None if damaged else torch.load(path, map_location='cpu', weights_only=True)
    # A damaged file raises whatever the archive reader or the unpickler stumbles over.
    except Exception as error:
        raise UserError(f'{path}: not a readable checkpoint ({type(error).__name__})') from error
    if damaged:
        raise UserError(f'{path}: not a readable checkpoint ({damaged} is not what was written)')
    if not isinstance(state, dict) or 'identity' not in state:
        raise UserError(f'{path}: not a checkpoint of a training run')
    for part in _PARTS:
        if not isinstance(state.get(part), dict):
            raise UserError(f'{path}: not a whole checkpoint (it has no {part})')
    return state


def damaged_part(path: Path) -> str | None:
    """The first part of a file of PyTorch, which stores sums and does not look at them, that is not what was written.

    Raises BadZipFile if it is no such file, or cut off.
    """
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def load_newest(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint that can be read: its file, its state, and why newer ones cannot be read."""
    unreadable = []
    for path in list_checkpoints(folder):
        try:
            return path, load_checkpoint(path), unreadable
        except UserError as error:
            unreadable.append(str(error))
    raise UserError(f'{"; ".join(unreadable)}; resume=restart starts anew')


def check_room(folder: Path, model: nn.Module, average: bool, keep: int, best: bool) -> None:
    """Raises UserError if a disk has no room for the checkpoints of a run, and for one more while it is written.

    What a quota leaves is not known; the checkpoints that are there will make room.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    checkpoint = weights * (2 if average else 1) + 2 * trained  # Adam's two averages; few optimisers have more
    needed = (keep + 1) * checkpoint + (2 * weights if best else 0)
    # Those with two names count once.
    taken = {status.st_ino: status.st_size for status in (path.stat() for path in list_checkpoints(folder))}
    free = shutil.disk_usage(folder).free + sum(taken.values())
    if free < needed:
        raise UserError(
            f'output={folder}: {free / 1e6:.0f} MB are free there, checkpoints take up to {needed / 1e6:.0f} MB '
            f'({keep} of about {checkpoint / 1e6:.0f} MB, and one that is being written); make room, or set another '
            'output'
        )
