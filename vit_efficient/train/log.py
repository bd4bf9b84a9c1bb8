"""What is told of a run: metrics.jsonl and TensorBoard, a line on its way, and result.json at its end."""

import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from vit_efficient.models import model_arguments
from vit_efficient.train.evaluation import Evaluation, describe
from vit_efficient.train.experiment import Experiment
from vit_efficient.train.hooks import plain
from vit_efficient.train.state import Progress, TrainState
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import as_json, write_text, writing
from vit_efficient.utils.packages import needing

with needing('train', 'training is logged by'):
    from torch.utils.tensorboard import SummaryWriter

METRICS = 'metrics.jsonl'
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

    JSON has no numbers that are not finite: they are null. What was written of the `epoch` that the run stands in and
    of later ones after `step`, the updates done, is dropped, since a run that goes on writes it again.
    """

    def __init__(self, folder: Path, epoch: int = 0, step: int = 0):
        path = folder / METRICS
        if path.exists():
            lines = path.read_text(encoding='utf-8').splitlines()
            write_text(path, ''.join(f'{line}\n' for line in lines if _is_before(line, epoch, step)))
        self.file = open(path, 'a', encoding='utf-8')  # noqa: SIM115  open as long as the run
        self.board = SummaryWriter(folder / TENSORBOARD, purge_step=step + 1)
        self.named: set[tuple[str, str]] = set()

    def write(self, kind: str, epoch: int, step: int, values: dict[str, float]) -> None:
        with writing(Path(self.file.name)):
            self.append(json.dumps(as_json({'kind': kind, 'epoch': epoch, 'step': step, **values})))
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


def _is_before(text: str, epoch: int, step: int) -> bool:
    """Whether a run that goes on leaves this line; not the one being written when the machine stopped."""
    try:
        line = json.loads(text)
    except ValueError:
        return False
    return line['step'] <= step if line['kind'] in ('train', 'nonfinite') else line['epoch'] < epoch


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


def used_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors have taken, elsewhere what the process has in memory now (0: not known)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path('/proc/self/statm').read_text(encoding='utf-8').split()[1]) * os.sysconf('SC_PAGE_SIZE')
    except OSError:
        return 0


def describe_scale(experiment: Experiment) -> str:
    """How an update is split, on one line."""
    config, processes = experiment.config, experiment.team.world_size
    how = f' ({config.parallel.upper()})' if processes > 1 else ''
    return (
        f'{experiment.images_per_update} images per update: {config.data.batch_size} per batch × {config.grad_accum} '
        f'accumulated × {processes} processes{how}; learning rate {max(s.optim.lr for s in experiment.stages):g}'
    )


def describe_coverage(experiment: Experiment) -> str:
    """How many of the training images an epoch shows, on one line."""
    total, repeats = len(experiment.feed.train_samples), experiment.config.data.repeats
    shown = -(-experiment.updates_per_epoch * experiment.images_per_update // repeats)
    often = f', {repeats} times each' if repeats > 1 else ''
    left = '; the others, which change from epoch to epoch, fill no update' if shown < total and repeats == 1 else ''
    return f'each epoch shows {shown} of {total} training images{often}{left}'


def describe_start(experiment: Experiment, progress: Progress, folder: Path) -> str:
    """Where a run goes on that has begun before, on one line."""
    epoch, epochs = progress.epoch + 1, experiment.config.sched.epochs
    where = 'at the end of' if progress.updates == epoch * experiment.updates_per_epoch else 'in'
    return f'going on {where} epoch {epoch}/{epochs}, after update {progress.updates}, with what is in {folder}'


def train_loss(experiment: Experiment, progress: Progress) -> float:
    """The mean loss of the updates that the epoch has taken."""
    taken = experiment.updates_per_epoch - progress.epoch_nonfinite
    return progress.loss_sum / taken if taken else math.nan


def describe_epoch(experiment: Experiment, progress: Progress, evaluation: Evaluation | None = None) -> str:
    """How far a run is and, where it has been evaluated, how good, on one line."""
    epochs, measured, skipped = experiment.config.sched.epochs, '', ()
    if evaluation:
        accuracies, skipped = dict(evaluation.accuracies), evaluation.skipped
        accuracies.pop('top5', None)
        measured = f', val loss {evaluation.loss:.3f}, {describe(accuracies)}'
    to_go = epochs * experiment.updates_per_epoch - progress.updates
    left = tqdm.format_interval(progress.train_seconds / progress.updates * to_go)
    counts = progress.epoch_skipped, len(skipped)
    return (
        f'epoch {progress.epoch + 1}/{epochs}: train loss {train_loss(experiment, progress):.3f}{measured}, '
        f'{progress.train_seconds:.0f} s'
        + (f', about {left} to go' if to_go else '')
        + ('; skipped {} training and {} validation images'.format(*counts) if any(counts) else '')
    )


def values_of_epoch(experiment: Experiment, state: TrainState, evaluation: Evaluation) -> dict[str, float]:
    """What is logged of an evaluation at the end of an epoch."""
    config, progress = experiment.config, state.progress
    values = {
        'train_loss': train_loss(experiment, progress),
        'loss': evaluation.loss,
        **evaluation.accuracies,
        'lr': state.lr,
        'train_seconds': progress.train_seconds,
        **({'stage': state.stage} if config.stages else {}),
        **({'skipped': len(evaluation.skipped)} if config.data.on_error == 'skip' else {}),
        **({'nonfinite': progress.epoch_nonfinite} if config.on_nonfinite == 'skip' else {}),
    }
    for hook in experiment.hooks:
        values |= hook.values(state)
    return values


def describe_result(
    experiment: Experiment, progress: Progress, model: nn.Module, evaluation: Evaluation
) -> dict[str, Any]:
    """What result.json holds of a run at its end, but for the environment."""
    config, args = experiment.config, experiment.config.model.args
    start = config.model.init_from or args.get('checkpoint_path') or ('pretrained' if args.get('pretrained') else None)
    attention = model_arguments(model).get('attention')  # as config.json has it; None of models that timm alone builds
    result = {
        'recipe': config.recipe,
        'model': config.model.name,
        'args': args,
        'attention': json.loads(json.dumps(attention)),
        'started_from': start,
        'seed': config.seed,
        'epochs': config.sched.epochs,
        'steps': progress.updates,
        **evaluation.accuracies,
        'val_images': evaluation.images,
        'train_images': len(experiment.feed.train_samples),
        'val_skipped': len(evaluation.skipped),
        'train_skipped': len(progress.skipped),
        'nonfinite': progress.nonfinite,
        'parameters': sum(parameter.numel() for parameter in model.parameters()),
        'train_seconds': progress.train_seconds,
        'images_per_second_train': progress.updates * experiment.images_per_update / progress.train_seconds,
        'images_per_second_eval': evaluation.images_per_second,
        **({'best': progress.best} if progress.best else {}),
    }
    for hook in experiment.hooks:
        result |= plain(hook.result(), f'the result of the training hook {hook.name!r}')
    return result | ({'stages': [*progress.stages, evaluation.accuracies]} if config.stages else {})
