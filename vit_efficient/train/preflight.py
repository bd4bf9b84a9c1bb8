"""What is tried before the first byte of a run is written: images, model, optimiser and schedule."""

from functools import partial

import torch
from torch import Tensor

from vit_efficient.data import Preprocessing
from vit_efficient.train.experiment import Experiment
from vit_efficient.train.optim import try_learning
from vit_efficient.train.sharding import shard
from vit_efficient.train.state import TrainState
from vit_efficient.utils.errors import UserError, first_line, is_bug_of_plugin
from vit_efficient.utils.precision import autocast

TRIED_IMAGES = 100  # at most, of each set, until one can be read


def preflight(experiment: Experiment, state: TrainState) -> None:
    """Tries what a run will do, and leaves everything as it was.

    Raises:
        UserError: Naming the key or the image that does not fit.
    """
    for samples in (experiment.feed.train_samples, experiment.feed.val_samples):
        next(samples.readable(TRIED_IMAGES))
    logits = try_size(experiment, state, experiment.preprocessing, 'data.img_size, model.args')
    experiment.task.check_logits(logits)
    try_training(experiment, state)
    config, team = experiment.config, experiment.team
    for scheduled in experiment.preprocessing.scheduled(config.data.schedule).values() if config.data.schedule else ():
        try_size(experiment, state, scheduled, 'data.schedule; try model.args.dynamic_img_size=true')
    split = partial(shard, processes=team, amp=config.amp) if experiment.sharded else None
    for stage in experiment.stages:
        try_learning(stage.optim, stage.sched, experiment.updates_per_epoch, team.device, split)


def try_size(experiment: Experiment, state: TrainState, preprocessing: Preprocessing, keys: str) -> Tensor:
    """The logits of a blank image of the size that `keys` give it."""
    channels, height, width = preprocessing.input_size
    state.model.eval()
    try:
        # Not inference_mode: what a model caches in it could not be trained through.
        with torch.no_grad(), autocast(experiment.team.device, experiment.config.amp):
            return state.model(experiment.blank_input(preprocessing))
    except Exception as error:  # models check what they are given in all ways, or not at all
        if is_bug_of_plugin(error):
            raise
        raise UserError(
            f'model {experiment.config.model.name} does not take images of {height}×{width} pixels and {channels} '
            f'channels ({keys}): {first_line(error)}'
        ) from error


def try_training(experiment: Experiment, state: TrainState) -> None:
    """Tries what a model does in training only: dropping paths and patches, statistics of a batch."""
    config, model = experiment.config, state.model
    images = experiment.blank_input().repeat(min(2, config.data.batch_size), 1, 1, 1)
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.train()
    try:
        with torch.no_grad(), autocast(experiment.team.device, config.amp):
            model(images.to(memory_format=experiment.layout))
    except Exception as error:  # as in `try_size`
        if is_bug_of_plugin(error):
            raise
        raise UserError(
            f'model.name={config.model.name} with model.args={config.model.args} cannot be trained '
            f'(data.batch_size={config.data.batch_size}): {first_line(error)}'
        ) from error
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
