"""A run as its recipe describes it: data, model, task, stages and hooks, built and checked; nothing is written."""

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vit_efficient import data
from vit_efficient.data.config import IMAGES_PER_UPDATE
from vit_efficient.train.build import create_model
from vit_efficient.train.config import Config, identity
from vit_efficient.train.distributed import Processes
from vit_efficient.train.features import CachedFeatures, DenseFeatures
from vit_efficient.train.healing import FeatureTask, create_student
from vit_efficient.train.hooks import TrainingHook, create_hooks
from vit_efficient.train.rules import check_cached, check_targets
from vit_efficient.train.stages import Stage, list_stages, model_at_stages
from vit_efficient.train.tasks import Task
from vit_efficient.utils.environment import describe_environment
from vit_efficient.utils.errors import UserError, first_line


def open_data(config: Config, train_set: Dataset | None, val_set: Dataset | None) -> tuple[Dataset, Dataset]:
    """Those that are given or else, by the recipe, `data.train` and `data.val`."""
    keys = config.data

    def opened(path: str, key: str, args: dict[str, Any]) -> Dataset:
        kind = keys.dataset
        if config.task == 'features' and not kind:  # without labels
            kind = '' if path.lower().endswith('.tar') else 'images'
            args = args if kind else {'target_key': '', **args}
        return data.create_dataset(path, kind, keys.root, key, args)

    if train_set is None:
        train_set = opened(keys.train, 'data.train', keys.args)
    if val_set is None:
        val_set = opened(keys.val, 'data.val', {**keys.args, **keys.val_args})
    return train_set, val_set


def images_per_update(config: Config, team: Processes) -> int:
    return config.data.batch_size * config.grad_accum * team.world_size


def identity_of_recipe(config: Config, team: Processes) -> dict[str, Any]:
    """What the weights of a run depend on by its recipe, by name."""
    return {**identity(config), IMAGES_PER_UPDATE: images_per_update(config, team)}


def identity_of_data(train_set: Dataset) -> dict[str, Any]:
    """What the weights of a run depend on by its training set, by name."""
    digest = getattr(train_set, 'digest', None)
    return {
        'training images': len(train_set),
        'training files': digest() if digest else None,
        'classes': data.class_names(train_set),
    }


class Feed:
    """The images of a run on their way to the model: samples, their order, and loaders."""

    def __init__(self, config, team, train_set, val_set, model, preprocessing: data.Preprocessing, task: Task, labels):
        keys, tones = config.data, config.data.augment
        self.config, self.team, self.preprocessing = config, team, preprocessing
        check_targets(config, task.of_patches, task.of_pixels)
        self.whole = task.of_pixels
        (train_set, augment), (val_set, fixed) = self._inputs(train_set, val_set, model)
        tonal = tones.three or tones.color_jitter or tones.hue or tones.dct_truncate
        if task.of_patches and not task.of_pixels and not tonal:
            augment = fixed  # nothing is drawn: where images are resized, training sees what evaluation sees
        check_target = task.check_target if task.of_patches else None
        num_classes = model.num_classes if task.reads_labels else None
        options = preprocessing.input_size[0], num_classes, keys.cache, check_target, keys.on_error
        self.train_samples = data.Samples(train_set, augment, *options)
        self.val_samples = data.Samples(val_set, fixed, *options, labels)
        if not len(self.val_samples):
            raise UserError('the validation set is empty')
        self.trained_on, self.validated_on = self.train_samples, self.val_samples
        if keys.cache_features:
            check_cached(config)
            if isinstance(task, FeatureTask):
                taught, about = partial(task.kept, layers=model.layers), task.about(model.layers)
                self.trained_on = CachedFeatures(self.train_samples, taught, about, keys.cache_features, beside=True)
            else:
                kept, whole = (DenseFeatures(model, task, config.amp, half) for half in (True, False))
                self.trained_on = CachedFeatures(self.train_samples, kept, kept.about(), keys.cache_features)
                if self.trained_on.folder:  # of whole images features may be many: they are not kept in memory
                    self.validated_on = CachedFeatures(self.val_samples, whole, whole.about(), keys.cache_features)
        part = {'rank': team.rank, 'world_size': team.world_size, 'block': keys.batch_size, 'repeats': keys.repeats}
        shards = data.shard_order(train_set, keys.mixed_shards)
        self.workers = data.limit_workers(keys.workers, 'data.workers')
        self.sampler = data.EpochSampler(len(train_set), config.seed, **part, **shards)
        self.train_loader, self.val_loader = self._loaders()

    def _inputs(self, train_set: Dataset, val_set: Dataset, model: nn.Module) -> tuple[Any, Any]:
        keys = self.config.data
        train = data.train_input(train_set, model, self.preprocessing, keys, self.config.seed)
        return train, data.eval_input(val_set, model, self.preprocessing, keys.decode, self.whole)

    def _loaders(self) -> tuple[DataLoader, DataLoader]:
        keys, team, samples = self.config.data, self.team, self.validated_on
        pin = team.device.type == 'cuda'
        order = data.EpochSampler(len(samples), shuffle=False, even=False, rank=team.rank, world_size=team.world_size)
        batch_size = keys.eval_batch_size or (1 if self.whole else keys.batch_size)
        workers = [0 if isinstance(each, CachedFeatures) else self.workers for each in (self.trained_on, samples)]
        train = data.create_loader(self.trained_on, self.sampler, keys.batch_size, workers[0], True, pin)
        return train, data.create_loader(samples, order, batch_size, workers[1], pin=pin)

    def samples_of_full_size(self, model: nn.Module) -> data.Samples:
        """Those of training for a model, without a schedule of sizes."""
        train, keys = self.train_samples, replace(self.config.data, schedule=[])
        dataset, augment = data.train_input(train.dataset, model, self.preprocessing, keys, self.config.seed)
        return data.Samples(dataset, augment, train.in_chans, train.num_classes, on_error=train.on_error)

    def follow(self, model: nn.Module) -> None:
        """Gives what the model takes: a patch embedding that has been truncated takes fewer coefficients."""
        if self.config.data.decode == 'coefficients':
            train, val = self._inputs(self.train_samples.dataset, self.val_samples.dataset, model)
            self.train_samples.transform, self.val_samples.transform = train[1], val[1]
            self.train_loader, self.val_loader = self._loaders()


@dataclass
class Experiment:
    """A run in one process, before anything learns."""

    config: Config
    team: Processes
    classes: list[str] | None  # their names, if the data tell
    model: nn.Module  # as it is built, on the device
    preprocessing: data.Preprocessing
    task: Task
    feed: Feed
    stages: list[Stage]  # at least one
    hooks: list[TrainingHook] = field(default_factory=list)

    @classmethod
    def build(
        cls, config: Config, team: Processes, train_set: Dataset | None = None, val_set: Dataset | None = None
    ) -> 'Experiment':
        """Builds all of it, on `train_set` and `val_set` where they are given, else on `data.train` and `data.val`."""
        keys = config.data
        train_set, val_set = open_data(config, train_set, val_set)
        teacher = classes = labels = None
        if config.task == 'features':
            model, teacher = create_student(config)
            teacher.model.to(team.device)
        else:
            classes = data.class_names(train_set)
            labels = data.labels_among(classes, data.class_names(val_set), 'the training set', 'the validation set')
            model = create_model(config, classes)
        model = model.to(team.device, memory_format=_layout(config))
        if config.grad_checkpointing:
            try:
                model.set_grad_checkpointing()
            except Exception as error:  # of models that have it not, or only the name
                missing = f'model {config.model.name} does not have it ({first_line(error)})'
                raise UserError(f'grad_checkpointing=true: {missing}') from error
        preprocessing = data.Preprocessing.of(model, keys)
        if teacher:
            task = FeatureTask.of_teacher(teacher, config)
        else:
            of_pixels = data.has_masks(train_set, val_set)
            task = Task.of(config.task, model, preprocessing, classes, config.loss.patch_weight, of_pixels)
        feed = Feed(config, team, train_set, val_set, model, preprocessing, task, labels)
        experiment = cls(config, team, classes, model, preprocessing, task, feed, list_stages(config))
        if config.sched.epochs and not experiment.updates_per_epoch:
            raise UserError(
                f'an update takes {experiment.images_per_update} images ({IMAGES_PER_UPDATE}), the training set has '
                f'{len(train_set)}; make data.batch_size={keys.batch_size} smaller'
                + (f', or grad_accum={config.grad_accum}' if config.grad_accum > 1 else '')
            )
        for number, (stage, at_stage) in enumerate(model_at_stages(model, experiment.stages)):  # which tries them
            task.check_stage(f'stages[{number}]', stage.config, at_stage)
        task.try_inputs(experiment.blank_input())
        experiment.hooks = create_hooks(experiment)
        return experiment

    @property
    def layout(self) -> torch.memory_format:
        """Of images in memory."""
        return _layout(self.config)

    @property
    def sharded(self) -> bool:
        """Whether the processes split the weights among each other."""
        return self.config.parallel == 'fsdp' and self.team.world_size > 1

    @property
    def images_per_update(self) -> int:
        return images_per_update(self.config, self.team)

    @property
    def updates_per_epoch(self) -> int:
        return len(self.feed.train_samples) // self.images_per_update

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the weights of the run depend on, by name."""
        return identity_of_recipe(self.config, self.team) | identity_of_data(self.feed.train_samples.dataset)

    def environment(self) -> dict[str, Any]:
        """What the run runs on, and how an update is split among processes."""
        config, processes = self.config, self.team.world_size
        scale = {
            'images_per_update': self.images_per_update,
            'processes': processes,
            'batch_size': config.data.batch_size,
            'grad_accum': config.grad_accum,
            'lr': max(stage.optim.lr for stage in self.stages),
            'updates_per_epoch': self.updates_per_epoch,
            'parallel': config.parallel if processes > 1 else None,
        }
        return {**describe_environment(self.team.device), 'scale': scale}

    def blank_input(self, preprocessing: data.Preprocessing | None = None) -> torch.Tensor:
        """A batch of one image without content, as the model takes it."""
        shape = data.input_shape(self.model, preprocessing or self.preprocessing)
        return torch.zeros(1, *shape, device=self.team.device)


def _layout(config: Config) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.preserve_format
