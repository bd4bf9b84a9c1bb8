"""The training loop: PyTorch and timm pieces, put in order.

Everything random is a function of the recipe's seed and a counter: the order of (seed, epoch), the augmentation of
(seed, epoch, index), mixing and dropout of (seed, update). So a run that goes on from a checkpoint, in the midst of an
epoch too, reaches the same weights as one that was never interrupted (on the CPU, bit by bit).

An update takes `data.batch_size` × `grad_accum` × processes images. Their product alone decides which images these are,
and the weights, but for rounding and for what is drawn per batch: with the same `data.batch_size` the draws are the
same as well; with another one mixing, dropout and drop path draw differently, and so do the images that stand in for
those that are skipped. Normalisation by the statistics of a batch, which vision transformers have not, would differ.
"""

import copy
import csv
import gc
import io
import json
import math
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from vit_efficient.attention.treeformer.leaves import has_trees, leaf_occupancy
from vit_efficient.data import (
    EpochSampler,
    Preprocessing,
    Samples,
    check_same_classes,
    class_names,
    create_dataset,
    create_loader,
    eval_input,
    input_shape,
    iterate,
    shard_order,
    stable_seed,
    train_input,
)
from vit_efficient.models.truncation import copy_sizes, freeze_truncation, has_windows, soft_cost
from vit_efficient.train.build import create_model
from vit_efficient.train.checkpoint import (
    CHECKPOINT,
    check_room,
    list_checkpoints,
    load_newest,
    save_checkpoint,
    writing,
)
from vit_efficient.train.config import Config, StageConfig, identity, to_yaml, validate
from vit_efficient.train.distillation import Distillation
from vit_efficient.train.distributed import Processes, has_unused_parameters, processes
from vit_efficient.train.evaluation import Evaluation, describe, evaluate
from vit_efficient.train.interrupts import Interrupted, Interrupts
from vit_efficient.train.log import METRICS, MetricsLog, has_metrics, used_memory
from vit_efficient.train.optim import create_loss, create_optimizer, create_scheduler, try_learning
from vit_efficient.train.sharding import (
    copy_empty,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    shard,
)
from vit_efficient.train.stages import check_stages, list_stages, stage_of
from vit_efficient.train.tasks import Task
from vit_efficient.utils.environment import describe_environment
from vit_efficient.utils.errors import UserError, first_line
from vit_efficient.utils.files import lock, remove_unfinished, write_json, write_text
from vit_efficient.utils.precision import autocast

RESULT = 'result.json'
SKIPPED = 'skipped.txt'
LOCK = '.lock'
BEST = 'best'  # a model folder
MAX_NONFINITE = 25  # updates left out in a row (`on_nonfinite`), then the run ends
TRIED_IMAGES = 100  # at most, of each set, until one can be read
_IMAGES_PER_UPDATE = 'data.batch_size × grad_accum × processes'
OCCUPANCY_IMAGES = 16  # of the validation set, for what is logged of Treeformer's leaves


def train(config: Config, train_set: Dataset | None = None, val_set: Dataset | None = None) -> dict[str, Any]:
    """Trains the model of a recipe and measures it on the validation set.

    The run's folder (`output`) gets recipe.yaml (resolved), environment.json, metrics.jsonl, tensorboard/,
    checkpoint.pt, and, once the run is done, model/ (timm's local-dir layout), predictions.csv, result.json and, if
    files were skipped (`data.on_error`), skipped.txt, which names them; the last checkpoints (`checkpoint_keep`) and
    best/, the best model so far (`checkpoint_best`), if it is to keep them. Under torchrun the processes share the work
    (DDP), or the weights too (FSDP2, `parallel`), and the first one writes. The last images of an epoch that do not
    fill an update are left out; evaluation leaves nothing out that can be read.

    Args:
        config: The recipe, from `load_recipe`.
        train_set: Instead of `data.train`: any map-style data set of (PIL image or array, label), for tasks of patches
            of (PIL image or array, label, target).
        val_set: Instead of `data.val`.

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
    if config.threads:
        torch.set_num_threads(config.threads)
    with Interrupts() as interrupts, processes(config.device) as team:
        run = _Run(config, team, train_set, val_set)
        try:
            return run.finished() or run.fit(interrupts)
        except ValueError as error:
            if team.world_size == 1:
                raise
            raise UserError(f'rank {team.rank}: {error}') from error
        finally:
            # DDP must not outlive its process group: its end would wait, holding the interpreter's lock, for a thread
            # of gloo that waits for that lock (PyTorch 2.10).
            run.step_model = run.model


@dataclass
class _Progress:
    """How far a run is."""

    epoch: int = 0
    updates: int = 0
    loss_sum: float = 0.0  # over the updates of the epoch
    train_seconds: float = 0.0
    stages: list[dict[str, float]] = field(default_factory=list)  # accuracies at the end of each that is done
    skipped: dict[int, str] = field(default_factory=dict)  # training images that could not be read, with the reason
    epoch_skipped: int = 0  # of them, those of the epoch
    truncation: dict[str, Any] = field(default_factory=dict)  # that a stage has frozen; as result.json has it
    nonfinite: int = 0  # updates left out for a loss or gradient that is not finite
    epoch_nonfinite: int = 0  # of them, those of the epoch
    nonfinite_in_row: int = 0  # of them, the last ones without another between
    best: dict[str, float] = field(default_factory=dict)  # epoch and accuracies of the best evaluation


class _Run:
    """A run in one process: everything is built and checked here, nothing is written before `fit`."""

    def __init__(self, config: Config, team: Processes, train_set: Dataset | None, val_set: Dataset | None):
        data = config.data
        self.config = config
        self.team = team
        self.folder = Path(config.output)
        self.progress = _Progress()
        self.made_folder = False
        self.named: set[str] = set()  # skipped images that this process has printed

        if train_set is None:
            train_set = create_dataset(data.train, data.dataset, data.root, 'data.train', data.args)
        if val_set is None:
            args = {**data.args, **data.val_args}
            val_set = create_dataset(data.val, data.dataset, data.root, 'data.val', args)
        self.classes = class_names(train_set)
        check_same_classes(self.classes, class_names(val_set), 'the training set', 'the validation set')
        self.sharded = config.parallel == 'fsdp' and team.world_size > 1
        self.layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.model = self._create_model()
        self.preprocessing = Preprocessing.of(self.model, data)
        in_chans, num_classes = self.preprocessing.input_size[0], self.model.num_classes
        self.task = Task.of(config.task, self.model, self.preprocessing, self.classes, config.loss.patch_weight)
        train_set, augment = train_input(train_set, self.model, self.preprocessing, data, config.seed)
        val_set, fixed = eval_input(val_set, self.model, self.preprocessing, data.decode)
        tones = data.augment
        if self.task.of_patches and not (tones.three or tones.color_jitter or tones.hue or tones.dct_truncate):
            augment = fixed  # nothing is drawn: where images are resized, training sees what evaluation sees
        check_target = self.task.check_target if self.task.of_patches else None
        options = in_chans, num_classes, data.cache, check_target, data.on_error
        self.train_samples = Samples(train_set, augment, *options)
        self.val_samples = Samples(val_set, fixed, *options)
        if not len(self.val_samples):
            raise UserError('the validation set is empty')

        self.sampler = EpochSampler(
            len(train_set),
            config.seed,
            rank=team.rank,
            world_size=team.world_size,
            block=data.batch_size,
            repeats=data.repeats,
            **shard_order(train_set, data.mixed_shards),
        )
        self._create_loaders()
        self.images_per_update = data.batch_size * config.grad_accum * team.world_size
        self.updates_per_epoch = len(train_set) // self.images_per_update
        if not self.updates_per_epoch:
            raise UserError(
                f'an update takes {self.images_per_update} images ({_IMAGES_PER_UPDATE}), the training set has '
                f'{len(train_set)}; make data.batch_size={data.batch_size} smaller'
                + (f', or grad_accum={config.grad_accum}' if config.grad_accum > 1 else '')
            )
        self.identity = {
            **{key: value for key, value in identity(config).items() if key not in _IMAGES_PER_UPDATE.split(' × ')},
            _IMAGES_PER_UPDATE: self.images_per_update,
            'training images': len(train_set),
            'training files': digest() if (digest := getattr(train_set, 'digest', None)) else None,
            'classes': self.classes,
        }
        self.stages = list_stages(config)
        learns_truncation = check_stages(self.model, self.stages, config.truncation.penalty)
        if learns_truncation:
            self._check_learned_truncation()
        self.distillation: Distillation | None = None
        if config.distill.teacher:
            options = self.preprocessing, team.device, self.classes
            self.distillation = Distillation(config.distill, self.model, *options)
        for stage in self.stages:
            share = partial(shard, processes=team, amp=config.amp) if self.sharded else None
            try_learning(stage.optim, stage.sched, self.updates_per_epoch, team.device, share)
        self.frozen: nn.Module | None = None
        self.stage = -1
        self._enter_stage(0)

    def _check_learned_truncation(self) -> None:
        if self.sharded:
            raise UserError('parallel must be ddp for a model that learns truncations, got fsdp')
        built, given = self.model.patch_embed.img_size, self.preprocessing.input_size[1:]
        if self.config.data.schedule or built is None or tuple(built) != tuple(given):
            raise UserError(
                'a model that learns truncations is trained at the size it is built for: model.args.img_size makes '
                f'it {built}, data.img_size {given}; set both to one, and no data.schedule'
            )

    def _create_model(self) -> nn.Module:
        model = create_model(self.config, self.classes).to(self.team.device, memory_format=self.layout)
        if self.config.grad_checkpointing:
            try:
                model.set_grad_checkpointing()
            except Exception as error:  # of models that have it not, or only the name
                raise UserError(
                    f'grad_checkpointing=true: model {self.config.model.name} does not have it ({first_line(error)})'
                ) from error
        return model

    def _whole(self, model: nn.Module, everywhere: bool = False) -> nn.Module:
        """The model; of a sharded one a copy that is not, which has its weights in the first process.

        Args:
            model: As the current stage has it.
            everywhere: Give the weights to all processes.
        """
        if not self.sharded:
            return model
        weights = model_state(model, everywhere)
        if not weights:
            return self.unsharded
        device = self.team.device if everywhere else 'cpu'
        whole = copy_empty(self.unsharded, device)
        whole.load_state_dict(weights)
        return whole.to(device, memory_format=self.layout)

    def _create_loaders(self) -> None:
        data, team = self.config.data, self.team
        pin = team.device.type == 'cuda'
        self.train_loader = create_loader(
            self.train_samples, self.sampler, data.batch_size, data.workers, drop_last=True, pin=pin
        )
        self.val_loader = create_loader(
            self.val_samples,
            EpochSampler(len(self.val_samples), shuffle=False, even=False, rank=team.rank, world_size=team.world_size),
            data.eval_batch_size or data.batch_size,
            data.workers,
            pin=pin,
        )

    def _enter_stage(self, number: int) -> None:
        """The model as this stage has it, after those between; and all that learns, anew."""
        truncation = self.progress.truncation
        if self.stage >= 0:
            self.model = self._whole(self.model, everywhere=True)
        for between in range(self.stage + 1, number + 1):
            seed_everything('stage', self.config.seed, between)  # what a conversion adds is drawn
            stage = self.stages[between]
            if stage.config.freeze and 'kept' not in truncation:
                truncation['cost'] = soft_cost(self.model, hard=True).item()
            kept = stage.begin(self.model, truncation.get('kept'))
            if kept:
                truncation['kept'] = kept
                self._give_what_is_taken_by(self.model)
        self.stage = number
        self._build_learning()

    def _give_what_is_taken_by(self, model: nn.Module) -> None:
        """A patch embedding that has been truncated takes fewer coefficients of each patch from the loaders."""
        data = self.config.data
        if data.decode != 'coefficients':
            return
        train_set, val_set = self.train_samples.dataset, self.val_samples.dataset
        _, self.train_samples.transform = train_input(train_set, model, self.preprocessing, data, self.config.seed)
        _, self.val_samples.transform = eval_input(val_set, model, self.preprocessing, data.decode)
        self._create_loaders()

    def _build_learning(self) -> None:
        """Optimiser, schedule, losses, average of weights: all that learns."""
        config, stage = self.config, self.stages[self.stage]
        self.step_model: nn.Module = self.model
        if self.stage:
            gc.collect()  # DDP of the stage before has hooks on the parameters until it is gone
            torch.compiler.reset()
        self.ema = None
        if config.ema.decay:
            # PyTorch's fused operations do not take shards and whole buffers together.
            options = {'use_warmup': config.ema.warmup, 'foreach': not self.sharded}
            self.ema = ModelEmaV3(self.model, config.ema.decay, **options)
        if self.sharded:
            self.unsharded = copy_empty(self.model, 'meta')
            for model in (self.model, self.ema.module) if self.ema else (self.model,):
                shard(model, self.team, config.amp)
        self.optimizer = create_optimizer(self.model, stage.optim)
        self.scheduler = create_scheduler(self.optimizer, stage.sched, self.updates_per_epoch)
        self.mixup, self.loss = create_loss(config.loss, self.model.num_classes)
        self.learns_sizes = has_windows(self.model)
        self.penalised = config.truncation.penalty > 0 and self.learns_sizes

    def _build_step_model(self) -> None:
        """The model as updates call it. Until it is built, nothing but the model's forward pass has been checked."""
        if self.team.world_size > 1 and not self.sharded:
            unused = has_unused_parameters(self.model, self._blank_input(self.preprocessing))
            self.step_model = DistributedDataParallel(self.model, find_unused_parameters=unused)
        if self.config.compile:
            self.step_model = torch.compile(self.step_model)

    def finished(self) -> dict[str, Any] | None:
        """The result of a run that is done already; loads the checkpoint of one that is not.

        Raises:
            UserError: If the folder holds a run that `resume` does not allow to touch, or one of another recipe.
        """
        checkpoints, result = list_checkpoints(self.folder), self.folder / RESULT
        if len(set(self.team.gather((bool(checkpoints), result.exists())))) > 1:
            raise UserError(
                f'output={self.folder}: some processes find a run there and some do not; all nodes must share one file '
                'system'
            )
        if self.config.resume == 'never' and (checkpoints or result.exists() or has_metrics(self.folder)):
            raise UserError(
                f'{self.folder} holds a run already; resume=auto goes on with it, resume=restart replaces it, '
                'output=… starts another'
            )
        if self.config.resume == 'restart' or not (checkpoints or result.exists()):
            return None
        if not checkpoints:
            raise UserError(
                f'{self.folder} holds a result and no checkpoint; resume=restart replaces it, output=… starts another'
            )
        checkpoint, state = self._load_newest()
        with _reading(checkpoint):
            saved = self._saved_identity(state)
        for key, ours in self.identity.items():
            theirs = saved.get(key)
            if theirs != json.loads(json.dumps(ours)):
                raise UserError(
                    f'{checkpoint} was written with {key}={theirs!r}, this run has {key}={ours!r}; set it back, or '
                    'start another run with output=… (resume=restart replaces this one)'
                )
        if result.exists():
            return _read_result(result)
        with _reading(checkpoint):
            self._restore(state)
        return None

    def _saved_identity(self, state: dict[str, Any]) -> dict[str, Any]:
        saved = {**identity(Config()), **state['identity']}  # there may be keys that are newer than the checkpoint
        saved.setdefault(_IMAGES_PER_UPDATE, saved['data.batch_size'] * saved['grad_accum'] * saved.get('processes', 1))
        saved.setdefault('training files', self.identity['training files'])
        saved['stages'] = [{**asdict(StageConfig()), **stage} for stage in saved['stages']]
        return saved

    def _restore(self, state: dict[str, Any]) -> None:
        """Goes back to where a checkpoint was written."""
        state['progress'].pop('batches', None)  # of older checkpoints; it follows from the updates
        self.progress = _Progress(**state['progress'])
        stage = stage_of(self.stages, self.progress.epoch)
        if stage != self.stage:
            self._enter_stage(stage)
        load_model_state(self.model, state['model'])
        load_optimizer_state(self.optimizer, state['optimizer'])
        if self.ema:
            load_model_state(self.ema.module, state['ema'])

    def _load_newest(self) -> tuple[Path, dict[str, Any]]:
        checkpoint, state, unreadable = load_newest(self.folder, 'cpu' if self.sharded else self.team.device)
        if len(set(self.team.gather(checkpoint.name))) > 1:
            raise UserError(f'output={self.folder}: {checkpoint.name} is the newest that this process can read')
        if unreadable and self.team.is_first:
            updates = state['progress']['updates']
            print(f'{"; ".join(unreadable)}; going on from {checkpoint}, update {updates}', file=sys.stderr)
        return checkpoint, state

    def save(self) -> None:
        """Writes the checkpoint, the same whatever the processes share; all of them call, only the first one writes."""
        if not (self.team.is_first or self.sharded):
            return
        state = {
            'identity': json.loads(json.dumps(self.identity)),
            'progress': dict(vars(self.progress)),
            'model': model_state(self.model),
            'optimizer': optimizer_state(self.optimizer),
            'ema': model_state(self.ema.module) if self.ema else None,
        }
        if self.team.is_first:
            save_checkpoint(self.folder / CHECKPOINT, state, self.config.checkpoint_keep)

    def _open_folder(self) -> None:
        """Makes the run's folder ready; the first thing that is written."""
        try:
            try:
                self.folder.mkdir(parents=True)
                self.made_folder = True
            except FileExistsError:
                self.folder.mkdir(exist_ok=True)  # unless it is a file
            self.lock = lock(self.folder / LOCK)
            if not self.lock:
                self.made_folder = False
                raise UserError(
                    f'output={self.folder}: another process trains there; wait for its end, or set another output'
                )
            config = self.config
            average = self.ema is not None
            check_room(self.folder, self.model, average, config.checkpoint_keep, config.checkpoint_best)
            for name in ('', 'model', BEST):
                remove_unfinished(self.folder / name)
            if config.resume == 'restart':
                for path in list_checkpoints(self.folder):
                    path.unlink()
                for name in (RESULT, SKIPPED, METRICS, 'predictions.csv'):
                    (self.folder / name).unlink(missing_ok=True)
                for name in ('model', BEST, 'tensorboard'):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
            write_text(self.folder / 'recipe.yaml', to_yaml(config))
            self.environment = {**describe_environment(self.team.device), 'scale': self._scale()}
            write_json(self.folder / 'environment.json', self.environment)
        except OSError as error:
            raise UserError(f'output={self.folder}: cannot write there: {error.strerror}') from error

    def _try_input(self) -> None:
        """What does not fit the model shows now, before anything is written."""
        for samples in (self.train_samples, self.val_samples):
            next(samples.readable(TRIED_IMAGES))
        self.task.check_logits(self._try_size(self.preprocessing, 'data.img_size, model.args'))
        self._try_training()
        if self.config.data.schedule:
            for scheduled in self.preprocessing.scheduled(self.config.data.schedule).values():
                self._try_size(scheduled, 'data.schedule; try model.args.dynamic_img_size=true')

    def _try_size(self, preprocessing: Preprocessing, keys: str) -> Tensor:
        channels, height, width = preprocessing.input_size
        self.model.eval()
        try:
            # Not inference_mode: what a model caches in it could not be trained through.
            with torch.no_grad(), autocast(self.team.device, self.config.amp):
                return self.model(self._blank_input(preprocessing))
        except Exception as error:  # models check what they are given in all ways, or not at all
            raise UserError(
                f'model {self.config.model.name} does not take images of {height}×{width} pixels and {channels} '
                f'channels ({keys}): {first_line(error)}'
            ) from error

    def _try_training(self) -> None:
        """What a model does in training only: dropping paths and patches, statistics of a batch."""
        images = self._blank_input(self.preprocessing).repeat(min(2, self.config.data.batch_size), 1, 1, 1)
        images = images.to(memory_format=self.layout)
        kept = [buffer.clone() for buffer in self.model.buffers()]
        self.model.train()
        try:
            with torch.no_grad(), autocast(self.team.device, self.config.amp):
                self.model(images)
        except Exception as error:  # as in `_try_size`
            config = self.config.model
            raise UserError(
                f'model.name={config.name} with model.args={config.args} cannot be trained '
                f'(data.batch_size={self.config.data.batch_size}): {first_line(error)}'
            ) from error
        for buffer, value in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(value)

    def _blank_input(self, preprocessing: Preprocessing) -> Tensor:
        return torch.zeros(1, *input_shape(self.model, preprocessing), device=self.team.device)

    def _scale(self) -> dict[str, Any]:
        """How an update is shared out."""
        config, processes = self.config, self.team.world_size
        return {
            'images_per_update': self.images_per_update,
            'processes': processes,
            'batch_size': config.data.batch_size,
            'grad_accum': config.grad_accum,
            'lr': max(stage.optim.lr for stage in self.stages),
            'updates_per_epoch': self.updates_per_epoch,
            'parallel': config.parallel if processes > 1 else None,
        }

    def fit(self, interrupts: Interrupts) -> dict[str, Any]:
        """From where `progress` stands to the result. A folder made for a run without an update is removed again."""
        self._try_input()
        self._build_step_model()
        try:
            return self._fit(interrupts)
        except Exception:  # Interrupted is none: it leaves a checkpoint
            if self.made_folder and not self.progress.updates:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _fit(self, interrupts: Interrupts) -> dict[str, Any]:
        self.log = self.lock = None
        interrupts.share(self.team)
        try:
            with interrupts.held():
                if self.team.is_first:
                    self._open_folder()
                    with writing(self.folder):
                        self.log = MetricsLog(self.folder, self.progress.epoch, self.progress.updates)
            self._announce_scale()
            self._announce_stage()
            self._measure_frozen(interrupts)
            evaluation, truncation = self._freeze(self._epochs(interrupts), interrupts)
            model = self._whole(self.evaluated_model)
            with writing(self.folder, '; resume=auto goes on from the checkpoint'):
                return self._finish(model, evaluation, truncation) if self.team.is_first else {}
        except Interrupted as stop:
            self.save()
            message = f'stopped by {signal.Signals(stop.signal).name} after update {self.progress.updates}'
            raise Interrupted(stop.signal, f'{message}; {self.folder / CHECKPOINT} is saved') from None
        finally:
            for file in (self.log, self.lock):
                if file:
                    file.close()

    def _epochs(self, interrupts: Interrupts) -> Evaluation:
        config, progress = self.config, self.progress
        while True:
            self._epoch(interrupts)
            self._log_skipped(interrupts)
            stage_ends = progress.epoch + 1 == self.stages[self.stage].end
            if stage_ends or (progress.epoch + 1) % config.checkpoint_every == 0:
                self.save()
            if stage_ends or (progress.epoch + 1) % config.eval_every == 0:
                evaluation = self._evaluate(interrupts)
                self._keep_best(evaluation)
            if progress.epoch + 1 == config.sched.epochs:
                return evaluation
            freezes = stage_ends and self.stages[self.stage + 1].config.freeze
            if freezes:  # the weights themselves, not their average
                learned = self._measure(interrupts, self.model) if self.ema else evaluation
            with interrupts.held():
                progress.epoch, progress.loss_sum = progress.epoch + 1, 0.0
                progress.epoch_skipped = progress.epoch_nonfinite = 0
                if freezes:
                    progress.truncation['learned'] = learned.accuracies
                if stage_ends:
                    progress.stages.append(evaluation.accuracies)
                    self._enter_stage(self.stage + 1)
                    self._build_step_model()
            if stage_ends:
                self._announce_stage()
                self._measure_frozen(interrupts)

    def _announce_scale(self) -> None:
        if self.team.is_first:
            scale = self._scale()
            how = f' ({self.config.parallel.upper()})' if self.team.world_size > 1 else ''
            print(
                '{images_per_update} images per update: {batch_size} per batch × {grad_accum} accumulated × '
                '{processes} processes{how}; learning rate {lr:g}'.format(how=how, **scale),
                file=sys.stderr,
            )

    def _announce_stage(self) -> None:
        if self.team.is_first and self.config.stages:
            print(f'stage {self.stage + 1}/{len(self.stages)}: {self.stages[self.stage]}', file=sys.stderr)

    def _epoch(self, interrupts: Interrupts) -> None:
        """The updates of an epoch that are still to be done."""
        config, progress, team = self.config, self.progress, self.team
        done = progress.updates - progress.epoch * self.updates_per_epoch
        if done == self.updates_per_epoch:
            return
        self.step_model.train()
        self.sampler.set_epoch(progress.epoch, start=done * self.images_per_update)
        unreadable: dict[int, str] = {}
        batches = iterate(self.train_loader, unreadable)
        name = f'epoch {progress.epoch + 1}/{config.sched.epochs}'
        images = self.images_per_update
        bar = tqdm(
            desc=name,
            total=self.updates_per_epoch * images,
            initial=done * images,
            unit=' images',
            disable=None if team.is_first else True,
        )
        clock = time.perf_counter()
        with bar:
            for _ in range(done, self.updates_per_epoch):
                chunk = list(islice(batches, config.grad_accum))
                with interrupts.held():
                    loss = self._update(chunk)
                    progress.updates += 1
                    progress.loss_sum += loss or 0.0
                    self._count_skipped(unreadable)
                    now = time.perf_counter()
                    seconds, clock = now - clock, now
                    progress.train_seconds += seconds
                    if loss is not None:
                        if progress.updates % config.log_every == 0:
                            self._log_update(loss, images / seconds)
                        memory = f'{used_memory(team.device) / 1e9:.2f} GB'
                        bar.set_postfix(loss=f'{loss:.3f}', memory=memory, refresh=False)
                bar.update(images)
                interrupts.check()
                if config.checkpoint_steps and progress.updates % config.checkpoint_steps == 0:
                    self.save()
                    clock = time.perf_counter()

    def _count_skipped(self, unreadable: dict[int, str]) -> None:
        """Adds what the update did without, in all processes, and empties the argument."""
        if self.config.data.on_error != 'skip':
            return
        for share in self.team.gather(unreadable):
            self.progress.skipped.update(share)
            self.progress.epoch_skipped += len(share)
            self._name_skipped('training', share)
        unreadable.clear()

    def _name_skipped(self, split: str, skipped: dict[int, str]) -> None:
        for reason in skipped.values():
            line = f'skipped, {split}: {reason}'
            if self.team.is_first and line not in self.named:
                tqdm.write(line, file=sys.stderr)
                self.named.add(line)

    def _log_skipped(self, interrupts: Interrupts) -> None:
        if self.log and self.config.data.on_error == 'skip':
            progress = self.progress
            with interrupts.held():
                self.log.write('skipped', progress.epoch, progress.updates, {'images': progress.epoch_skipped})

    def _update(self, chunk: list[tuple[Tensor, ...]]) -> float | None:
        """One step of the optimiser on `grad_accum` micro-batches of every process.

        Returns:
            The mean loss of all; None if it or its gradient is not finite, and all have left out the step.
        """
        config, team, update = self.config, self.team, self.progress.updates
        losses = []
        for number, (*tensors, _) in enumerate(chunk):
            # The number of the batch among those of all processes: a single one would draw the same.
            seed_everything('step', config.seed, (update * len(chunk) + number) * team.world_size + team.rank)
            with self._without_sync(number + 1 < len(chunk)):
                loss = self._loss(*tensors)
                (loss / len(chunk)).backward()
            losses.append(loss.detach())
        values = torch.stack(losses).tolist()  # once all is under way: reading a number waits for the device
        mean = team.mean(sum(values) / len(chunk))  # that of one process that is not finite makes it so for all
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        finite = math.isfinite(mean) and math.isfinite(norm.full_tensor() if self.sharded else norm)
        of_stage = update + 1 - self.stages[self.stage].start * self.updates_per_epoch
        if finite:
            self._step(norm, of_stage)
        elif math.isfinite(mean):
            self._leave_out('the gradient is not finite', [indices for *_, indices in chunk])
        else:
            suspects = [indices for value, (*_, indices) in zip(values, chunk, strict=True) if not math.isfinite(value)]
            self._leave_out(f'the loss is {mean}', suspects)
        self.optimizer.zero_grad()
        if self.scheduler:
            self.scheduler.step_update(of_stage)
        return mean if finite else None

    def _loss(self, images: Tensor, *truth: Tensor) -> Tensor:
        """That of a micro-batch, all that is learned from taken together."""
        config, device = self.config, self.team.device
        images, *truth = (tensor.to(device, non_blocking=True) for tensor in (images, *truth))
        images = images.to(memory_format=self.layout)
        if self.mixup:
            images, *truth = self.mixup(images, *truth)
        with autocast(device, config.amp):
            logits = self.step_model(images)
        loss = self.task.loss(self.task.split(logits, truth), truth, self.loss)
        if self.distillation:
            with autocast(device, config.amp):
                loss = self.distillation(images, logits.float(), loss)
        if self.penalised:
            excess = (soft_cost(self.model) - config.truncation.budget).clamp(min=0)
            loss = loss + config.truncation.penalty * excess
        return loss

    def _step(self, norm: Tensor, of_stage: int) -> None:
        """Takes the gradients, of this norm, to the weights and to their average."""
        if self.config.clip_grad:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_grad, norm)
        self.optimizer.step()
        self.progress.nonfinite_in_row = 0
        if self.ema:
            self.ema.update(self.model, step=of_stage)
            if self.learns_sizes:
                copy_sizes(self.model, self.ema.module)

    def _leave_out(self, what: str, suspects: list[Tensor]) -> None:
        """Counts an update without a step, which all processes leave out; ends the run if that is the recipe's policy.

        Args:
            what: Is not finite.
            suspects: Indices of samples of this process, by micro-batch, among which the cause is.
        """
        progress = self.progress
        names = self.team.gather([self.train_samples.filename(int(index)) for batch in suspects for index in batch])
        files = ', '.join(name for share in names for name in share)
        message = f'{what} at update {progress.updates} (epoch {progress.epoch}), images {files}'
        if self.config.on_nonfinite == 'error':
            raise UserError(f'{message}; the weights are unchanged; on_nonfinite=skip goes on without it')
        progress.nonfinite += 1
        progress.epoch_nonfinite += 1
        progress.nonfinite_in_row += 1
        if progress.nonfinite_in_row == MAX_NONFINITE:
            raise UserError(f'{message}; with it, {MAX_NONFINITE} updates in a row were left out')
        if self.log:
            tqdm.write(f'left out: {message}', file=sys.stderr)
            self.log.write('nonfinite', progress.epoch, progress.updates + 1, {'updates': progress.nonfinite})

    def _without_sync(self, more_to_come: bool) -> Any:
        """Gradients are averaged once per update, not per micro-batch: a context for its forward and backward pass."""
        if self.sharded:
            self.model.set_requires_gradient_sync(not more_to_come)
        elif more_to_come and self.team.world_size > 1:
            return self.step_model.no_sync()
        return nullcontext()

    @property
    def evaluated_model(self) -> nn.Module:
        return self.frozen or (self.ema.module if self.ema else self.model)

    def _log_update(self, loss: float, images_per_second: float) -> None:
        if self.log:
            values = {'loss': loss, 'lr': self._lr(), 'images_per_second': images_per_second}
            self.log.write('train', self.progress.epoch, self.progress.updates, values)

    def _lr(self) -> float:
        return max(group['lr'] for group in self.optimizer.param_groups)

    def _evaluate(self, interrupts: Interrupts) -> Evaluation:
        evaluation = self._measure(interrupts)
        # What a sharded model computes takes all processes.
        leaves = self._leaf_occupancy() if self.log or self.sharded else {}
        if self.log:
            progress, accuracies = self.progress, dict(evaluation.accuracies)
            taken = self.updates_per_epoch - progress.epoch_nonfinite
            values = {
                'train_loss': progress.loss_sum / taken if taken else math.nan,
                'loss': evaluation.loss,
                **accuracies,
                'lr': self._lr(),
                'train_seconds': progress.train_seconds,
                **({'stage': self.stage} if self.config.stages else {}),
                **({'skipped': len(evaluation.skipped)} if self.config.data.on_error == 'skip' else {}),
                **({'nonfinite': progress.epoch_nonfinite} if self.config.on_nonfinite == 'skip' else {}),
                **({'truncation_cost': soft_cost(self.model).item()} if self.learns_sizes else {}),
            }
            self._name_skipped('validation', evaluation.skipped)
            accuracies.pop('top5', None)
            with interrupts.held():
                self.log.write('val', progress.epoch, progress.updates, values)
                if leaves:
                    self.log.write('leaves', progress.epoch, progress.updates, leaves)
            to_go = self.config.sched.epochs * self.updates_per_epoch - progress.updates
            left = tqdm.format_interval(progress.train_seconds / progress.updates * to_go)
            ends = f', about {left} to go' if to_go else ''
            counts = progress.epoch_skipped, len(evaluation.skipped)
            ends += '; skipped {} training and {} validation images'.format(*counts) if any(counts) else ''
            print(
                f'epoch {progress.epoch + 1}/{self.config.sched.epochs}: train loss {values["train_loss"]:.3f}, '
                f'val loss {evaluation.loss:.3f}, {describe(accuracies)}, {progress.train_seconds:.0f} s{ends}',
                file=sys.stderr,
            )
        return evaluation

    def _keep_best(self, evaluation: Evaluation) -> None:
        """Saves the model if its top-1, or the mIoU where there is none, is above that of all evaluations before."""
        if not self.config.checkpoint_best:
            return
        name = 'top1' if self.task.of_images else 'miou'
        accuracies = evaluation.accuracies
        if not self.progress.best or accuracies[name] > self.progress.best[name]:
            model = self._whole(self.evaluated_model)
            if self.team.is_first:
                with writing(self.folder / BEST, '; the checkpoint is as it was, resume=auto goes on from it'):
                    self._save_model(model, BEST)
            self.progress.best = {'epoch': self.progress.epoch, **accuracies}

    def _measure(self, interrupts: Interrupts, model: nn.Module | None = None) -> Evaluation:
        options = self.team, self.config.amp, self.task, True, interrupts.check
        return evaluate(model or self.evaluated_model, self.val_loader, *options)

    def _leaf_occupancy(self) -> dict[str, float]:
        """Of Treeformer's trees, on a few validation images spread over the set."""
        if not has_trees(self.evaluated_model):
            return {}
        images = self.val_samples.spread(OCCUPANCY_IMAGES).to(self.team.device)
        with autocast(self.team.device, self.config.amp):
            occupancies = leaf_occupancy(self.evaluated_model, images)
        return {
            f'block{layer}/{name}': value
            for layer, occupancy in occupancies.items()
            for name, value in vars(occupancy).items()
        }

    def _measure_frozen(self, interrupts: Interrupts) -> None:
        """What it costs that the stage has made truncations hard ones, before it trains on."""
        truncation = self.progress.truncation
        if 'kept' in truncation and 'frozen' not in truncation:
            evaluation = self._measure(interrupts, self.model)
            self._log_frozen(self.progress.epoch - 1, truncation, evaluation, interrupts)

    def _freeze(self, evaluation: Evaluation, interrupts: Interrupts) -> tuple[Evaluation, dict[str, Any]]:
        """Makes truncations that are learned to the end of the run hard ones, and measures what that costs."""
        if not has_windows(self.evaluated_model):
            return evaluation, self.progress.truncation
        # A copy, of the model and of what is known of it: what an interrupted run saves is the model as it learns.
        frozen = copy.deepcopy(self.evaluated_model)
        truncation = {'learned': evaluation.accuracies, 'cost': soft_cost(frozen, hard=True).item()}
        truncation['kept'] = freeze_truncation(frozen)
        self._give_what_is_taken_by(frozen)
        self.frozen = frozen
        evaluation = self._measure(interrupts)
        self._log_frozen(self.progress.epoch, truncation, evaluation, interrupts)
        return evaluation, truncation

    def _log_frozen(
        self, epoch: int, truncation: dict[str, Any], evaluation: Evaluation, interrupts: Interrupts
    ) -> None:
        with interrupts.held():
            truncation['frozen'] = evaluation.accuracies
            if self.log:
                self.log.write('frozen', epoch, self.progress.updates, evaluation.accuracies)
        if self.log:
            print(
                f'truncations frozen: {describe(truncation["learned"])} before, {describe(evaluation.accuracies)}; '
                f'{truncation["cost"]:.3f} of the multiply-accumulates, budget {self.config.truncation.budget:g}',
                file=sys.stderr,
            )

    def _finish(self, model: nn.Module, evaluation: Evaluation, truncation: dict[str, Any]) -> dict[str, Any]:
        """Writes model, predictions and, last, the result: it tells that the run is complete."""
        config, progress = self.config, self.progress
        self._save_model(model, 'model')
        table = io.StringIO(newline='')
        writer = csv.writer(table, lineterminator='\n')
        writer.writerow(['index', 'file', *evaluation.columns[1:]])
        for index, *prediction in evaluation.predictions:
            writer.writerow([index, self.val_samples.filename(index), *prediction])
        write_text(self.folder / 'predictions.csv', table.getvalue())
        if progress.skipped or evaluation.skipped:
            lines = [f'training: {reason}\n' for _, reason in sorted(progress.skipped.items())]
            lines += [f'validation: {reason}\n' for reason in evaluation.skipped.values()]
            write_text(self.folder / SKIPPED, ''.join(lines))
        result = {
            'recipe': config.recipe,
            'model': config.model.name,
            'args': config.model.args,
            'seed': config.seed,
            'epochs': config.sched.epochs,
            'steps': progress.updates,
            **evaluation.accuracies,
            'val_images': evaluation.images,
            'train_images': len(self.train_samples),
            'val_skipped': len(evaluation.skipped),
            'train_skipped': len(progress.skipped),
            'nonfinite': progress.nonfinite,
            'parameters': sum(parameter.numel() for parameter in model.parameters()),
            'train_seconds': progress.train_seconds,
            'images_per_second_train': progress.updates * self.images_per_update / progress.train_seconds,
            'images_per_second_eval': evaluation.images_per_second,
            **({'best': progress.best} if progress.best else {}),
            **({'truncation': truncation} if truncation else {}),
            **({'stages': [*progress.stages, evaluation.accuracies]} if config.stages else {}),
            'environment': self.environment,
        }
        write_json(self.folder / RESULT, result)
        return result

    def _save_model(self, model: nn.Module, name: str) -> None:
        """As a folder of the run's that carries its preprocessing and the names of its classes."""
        from vit_efficient.models import save_model

        model.pretrained_cfg = {
            **model.pretrained_cfg,
            **self.preprocessing.as_dict(),
            'num_classes': model.num_classes,
        }
        names = self.classes if self.classes and len(self.classes) == model.num_classes else None
        save_model(model, self.folder / name, label_names=names)


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Names the file whose content does not fit; it may be anything."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'{checkpoint}: not a state of this run ({type(error).__name__}: {reason})') from error


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
        if 'environment' in result:  # the last entry
            return result
    except (TypeError, ValueError):
        pass
    raise UserError(f'{path}: not a readable result; delete it, and resume=auto writes it anew from the checkpoint')


def seed_everything(stream: str, *key: int) -> None:
    """Seeds the generators of PyTorch, NumPy and Python (see `stable_seed`), whatever was drawn before."""
    torch_seed, numpy_seed, python_seed = stable_seed(stream, *key).generate_state(3).tolist()
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)  # timm's Mixup draws from the global generator
    random.seed(python_seed)
