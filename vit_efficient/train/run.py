"""From a recipe to a trained model: the parts of a run, one after the other, and what is tried before them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vit_efficient.data import Preprocessing
from vit_efficient.train.config import Config
from vit_efficient.train.distributed import Processes, processes
from vit_efficient.train.experiment import Experiment, open_data
from vit_efficient.train.interrupts import Interrupts
from vit_efficient.train.optim import try_learning
from vit_efficient.train.rules import validate, without_effect
from vit_efficient.train.run_folder import RunFolder, reading
from vit_efficient.train.sharding import shard
from vit_efficient.train.state import TrainState
from vit_efficient.train.trainer import Trainer
from vit_efficient.utils.compat import without_recompile_limit
from vit_efficient.utils.device import limit_threads
from vit_efficient.utils.errors import UserError, first_line, is_bug_of_plugin
from vit_efficient.utils.packages import import_plugins
from vit_efficient.utils.precision import autocast

logger = logging.getLogger(__name__)

TRIED_WHOLE = 8  # at most, of validation images that are evaluated as large as they are
TRIED_IMAGES = 100  # at most, of each set, until one can be read


def train(config: Config, train_set: Dataset | None = None, val_set: Dataset | None = None) -> dict[str, Any]:
    """Trains the model of a recipe and measures it on the validation set.

    The run's folder (`output`) gets recipe.yaml (resolved), environment.json, metrics.jsonl, tensorboard/,
    checkpoint.pt, and, once the run is done, model/ (timm's local-dir layout), predictions.csv, result.json and, if
    files were skipped (`data.on_error`), skipped.txt, which names them; the last checkpoints (`checkpoint_keep`) and
    best/, the best model so far (`checkpoint_best`), if it is to keep them. Under torchrun the processes divide the
    work (DDP), or the weights too (FSDP2, `parallel`), and the first one writes. The last images of an epoch that do
    not fill an update are left out; evaluation leaves nothing out that can be read.

    Args:
        config: The recipe, from `load_recipe`.
        train_set, val_set: Instead of `data.train` and `data.val`: any map-style data set of (PIL image or array,
            label), for tasks of patches of (PIL image or array, label, target).

    Returns:
        What result.json holds: accuracies in percent, seconds of training without evaluation, images per second.

    Raises:
        UserError: For a recipe, data set, image or checkpoint that does not fit, before anything is written where that
            can be known; for a loss or gradient that is not finite, before it reaches the weights (`on_nonfinite`); and
            for a file that cannot be written, which leaves the checkpoints as they were.
        Interrupted: After SIGINT or SIGTERM, with a checkpoint of the last update saved; before there is one to lose,
            with nothing written.
    """
    validate(config)
    limit_threads(config.threads)
    import_plugins(config.plugins)
    with Interrupts() as stop, processes(config.device) as team:
        folder = RunFolder(config.output, team)
        with _naming_rank(team):
            earlier = folder.earlier(config)  # before anything is opened or built, which may take long, and a network
        train_set, val_set = open_data(config, train_set, val_set)
        if earlier:
            with _naming_rank(team):
                earlier.check_data(train_set)
            if earlier.result is not None:
                return earlier.result
        experiment = Experiment.build(config, team, train_set, val_set)
        if idle := without_effect(config):
            logger.info('without effect: %s', idle)
        state = TrainState(experiment)
        if earlier:
            with _naming_rank(team), reading(earlier.path):
                state.load_state_dict(earlier.state)
            earlier = None  # tensors as many as the model's and the optimiser's
        preflight(experiment, state)
        try:
            state.wrap()
            stop.join(team)
            # Blocks that differ in what they drop, and part of them in a stage, are many to the compiler.
            limit = without_recompile_limit() if config.compile else nullcontext()
            with _naming_rank(team), limit, folder.open(experiment, state, stop) as log:
                return Trainer(experiment, state, folder, log, stop).fit()
        finally:
            # DDP must not outlive its process group: its end would wait, holding the interpreter's lock, for a thread
            # of gloo that waits for that lock (PyTorch 2.10).
            state.forward = state.model


@contextmanager
def _naming_rank(team: Processes) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if team.world_size == 1:
            raise
        raise UserError(f'rank {team.rank}: {error}') from error


def preflight(experiment: Experiment, state: TrainState) -> None:
    """Tries what a run will do before its first byte is written, and leaves everything as it was.

    Raises:
        UserError: Naming the key or the image that does not fit.
    """
    for samples in (experiment.feed.train_samples, experiment.feed.val_samples):
        next(samples.readable(TRIED_IMAGES))
    logits = _try_size(experiment, state, experiment.preprocessing, 'data.img_size, model.args')
    experiment.task.check_logits(logits)
    _try_training(experiment, state)
    if experiment.task.of_pixels:
        _try_whole(experiment, state)
    config, team = experiment.config, experiment.team
    for scheduled in experiment.preprocessing.scheduled(config.data.schedule).values() if config.data.schedule else ():
        _try_size(experiment, state, scheduled, 'data.schedule; try model.args.dynamic_img_size=true')
    split = partial(shard, processes=team, amp=config.amp) if experiment.sharded else None
    for stage in experiment.stages:
        try_learning(stage.optim, stage.sched, experiment.updates_per_epoch, team.device, split)


def _try_size(experiment: Experiment, state: TrainState, preprocessing: Preprocessing, keys: str) -> Tensor:
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


def _try_whole(experiment: Experiment, state: TrainState) -> None:
    """Tries images of the validation set as large as they are: the smallest and the largest of some."""
    task, device = experiment.task, experiment.team.device
    images = sorted((image for image, *_ in experiment.feed.val_samples.readable(TRIED_WHOLE)), key=torch.numel)
    sizes, many = [tuple(image.shape[1:]) for image in images], experiment.config.data.eval_batch_size or 1
    if many > 1 and len(set(sizes)) > 1:
        (height, width), (other_height, other_width) = sizes[0], sizes[-1]
        raise UserError(
            f'data.eval_batch_size={many}: validation images of several sizes, such as {height}×{width} and '
            f'{other_height}×{other_width}, are no batch; set it to 1'
        )
    state.model.eval()
    for image in {
        size: image for size, image in zip(sizes, images, strict=True) if size in (sizes[0], sizes[-1])
    }.values():
        try:
            with torch.no_grad(), autocast(device, experiment.config.amp):
                state.model(task.padded(image[None].to(device)))
        except Exception as error:  # as in `_try_size`
            if is_bug_of_plugin(error):
                raise
            height, width = image.shape[1:]
            raise UserError(
                f'model {experiment.config.model.name} does not take whole validation images, such as one of {height}×'
                f'{width} pixels; try model.args.dynamic_img_size=true: {first_line(error)}'
            ) from error


def _try_training(experiment: Experiment, state: TrainState) -> None:
    """Tries what a model does in training only: dropping paths and patches, statistics of a batch."""
    config, model = experiment.config, state.model
    images = experiment.blank_input().repeat(min(2, config.data.batch_size), 1, 1, 1)
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.train()
    try:
        with torch.no_grad(), autocast(experiment.team.device, config.amp):
            model(images.to(memory_format=experiment.layout))
    except Exception as error:  # as in `_try_size`
        if is_bug_of_plugin(error):
            raise
        raise UserError(
            f'model.name={config.model.name} with model.args={config.model.args} cannot be trained '
            f'(data.batch_size={config.data.batch_size}): {first_line(error)}'
        ) from error
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
