"""What is told of a run: on one line on its way, and in result.json at its end."""

import math
from typing import Any

from torch import nn
from tqdm import tqdm

from vit_efficient.train.evaluation import Evaluation, describe
from vit_efficient.train.experiment import Experiment
from vit_efficient.train.hooks import plain
from vit_efficient.train.state import Progress, TrainState


def describe_scale(experiment: Experiment) -> str:
    """How an update is split, on one line."""
    config, processes = experiment.config, experiment.team.world_size
    how = f' ({config.parallel.upper()})' if processes > 1 else ''
    return (
        f'{experiment.images_per_update} images per update: {config.data.batch_size} per batch × {config.grad_accum} '
        f'accumulated × {processes} processes{how}; learning rate {max(s.optim.lr for s in experiment.stages):g}'
    )


def describe_epoch(experiment: Experiment, progress: Progress, train_loss: float, evaluation: Evaluation) -> str:
    """How far a run is, and how good, on one line."""
    epochs, accuracies = experiment.config.sched.epochs, dict(evaluation.accuracies)
    accuracies.pop('top5', None)
    to_go = epochs * experiment.updates_per_epoch - progress.updates
    left = tqdm.format_interval(progress.train_seconds / progress.updates * to_go)
    counts = progress.epoch_skipped, len(evaluation.skipped)
    return (
        f'epoch {progress.epoch + 1}/{epochs}: train loss {train_loss:.3f}, val loss {evaluation.loss:.3f}, '
        f'{describe(accuracies)}, {progress.train_seconds:.0f} s'
        + (f', about {left} to go' if to_go else '')
        + ('; skipped {} training and {} validation images'.format(*counts) if any(counts) else '')
    )


def values_of_epoch(experiment: Experiment, state: TrainState, evaluation: Evaluation) -> dict[str, float]:
    """What is logged of an evaluation at the end of an epoch."""
    config, progress = experiment.config, state.progress
    taken = experiment.updates_per_epoch - progress.epoch_nonfinite
    values = {
        'train_loss': progress.loss_sum / taken if taken else math.nan,
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
    config = experiment.config
    result = {
        'recipe': config.recipe,
        'model': config.model.name,
        'args': config.model.args,
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
