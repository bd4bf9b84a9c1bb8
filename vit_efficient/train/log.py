"""What a run tells on its way: metrics.jsonl, TensorBoard, and the memory it takes."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import write_text, writing

METRICS = 'metrics.jsonl'
KINDS = ('train', 'val', 'frozen', 'skipped', 'nonfinite')  # of lines; and the names of hooks that measure
TENSORBOARD = 'tensorboard'

logger = logging.getLogger(__name__)


class SilentLog:
    """The log of the processes that write none."""

    def write(self, kind: str, epoch: int, step: int, values: dict[str, float]) -> None:
        """Adds a line."""

    def say(self, text: str) -> None:
        """Tells the user."""

    def name_skipped(self, split: str, skipped: Mapping[int, str]) -> None:
        """Tells the user, once, which images of a split could not be read, and why."""


class MetricsLog(SilentLog):
    """Lines of metrics, each with `kind`, `epoch` (from 0), `step` (updates done) and its values.

    Kinds: train (of an update), val (of an evaluation), leaves (of Treeformer's trees), frozen (an evaluation once
    truncations that were learned are hard), skipped (images that could not be read), nonfinite (of an update that was
    left out, with the number of those so far), and the names of hooks that measure.

    JSON has no numbers that are not finite: they are null.

    Args:
        folder: The run's folder.
        epoch: The epoch that the run stands in. What was written of it and of later ones after `step` is dropped,
            since a run that goes on writes it again.
        step: Updates done.
    """

    def __init__(self, folder: Path, epoch: int = 0, step: int = 0):
        path = folder / METRICS
        if path.exists():
            kept = [line for line in _lines(path) if _is_before(line, epoch, step)]
            write_text(path, ''.join(json.dumps(line) + '\n' for line in kept))
        self.file = open(path, 'a', encoding='utf-8')  # noqa: SIM115  open as long as the run
        self.board = SummaryWriter(folder / TENSORBOARD, purge_step=step + 1)
        self.named: set[tuple[str, str]] = set()

    def write(self, kind: str, epoch: int, step: int, values: dict[str, float]) -> None:
        with writing(Path(self.file.name)):
            self.append(json.dumps({'kind': kind, 'epoch': epoch, 'step': step, **_as_json(values)}))
            for name, value in values.items():
                self.board.add_scalar(f'{kind}/{name}', value, step)

    def append(self, line: str) -> None:
        """Adds a line to the file."""
        self.file.write(line + '\n')
        self.file.flush()

    def say(self, text: str) -> None:
        logger.info(text)

    def name_skipped(self, split: str, skipped: Mapping[int, str]) -> None:
        for reason in skipped.values():
            if (split, reason) not in self.named:
                self.named.add((split, reason))
                self.say(f'skipped, {split}: {reason}')

    def close(self) -> None:
        for writer in (self.file, self.board):
            with suppress(OSError):  # what could not be written has been told of, and is tried once more
                writer.close()


def _as_json(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def has_metrics(folder: Path) -> bool:
    """Whether a run in this folder has come to its first line."""
    path = folder / METRICS
    return path.exists() and path.stat().st_size > 0


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, none before its first; the last one may still be being written.

    Raises:
        UserError: If there is no such file, or it holds something else.
    """
    path = Path(folder) / METRICS
    try:
        texts = path.read_text(encoding='utf-8').splitlines()
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {error.strerror}; give the folder of a run') from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(texts):
                break
            raise UserError(f'{path}, line {number}: not JSON') from error
        if not isinstance(line, dict) or not {'kind', 'epoch', 'step'} <= set(line):
            raise UserError(f'{path}, line {number}: not a line of metrics')
        lines.append(line)
    return lines


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding='utf-8').splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the machine stopped
            continue


def _is_before(line: dict[str, Any], epoch: int, step: int) -> bool:
    return line['step'] <= step if line['kind'] in ('train', 'nonfinite') else line['epoch'] < epoch


def used_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors have taken, elsewhere what the process has in memory now (0: not known)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    except OSError:
        return 0
