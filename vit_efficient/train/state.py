"""What learns in a run, and how far it is: what a checkpoint holds."""

import gc
import json
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vit_efficient.data import stable_seed
from vit_efficient.models import compile_blocks
from vit_efficient.train import sharding
from vit_efficient.train.distributed import has_unused_parameters
from vit_efficient.train.experiment import Experiment
from vit_efficient.train.hooks import remembered
from vit_efficient.train.optim import create_loss, create_optimizer, create_scheduler
from vit_efficient.train.stages import stage_of


@dataclass
class Progress:
    """How far a run is."""

    epoch: int = 0
    updates: int = 0
    loss_sum: float = 0.0  # over the updates of the epoch
    train_seconds: float = 0.0
    stages: list[dict[str, float]] = field(default_factory=list)  # accuracies at the end of each that is done
    skipped: dict[int, str] = field(default_factory=dict)  # training images that could not be read, with the reason
    epoch_skipped: int = 0  # of them, those of the epoch
    nonfinite: int = 0  # updates left out for a loss or gradient that is not finite
    epoch_nonfinite: int = 0  # of them, those of the epoch
    nonfinite_in_row: int = 0  # of them, the last ones without another between
    best: dict[str, float] = field(default_factory=dict)  # epoch and accuracies of the best evaluation

    def begin_epoch(self) -> None:
        """The next epoch begins."""
        self.epoch, self.loss_sum = self.epoch + 1, 0.0
        self.epoch_skipped = self.epoch_nonfinite = 0

    def skip(self, reasons: dict[int, str]) -> None:
        """Counts training images that could not be read."""
        self.skipped.update(reasons)
        self.epoch_skipped += len(reasons)


class TrainState:
    """Model, average of its weights, optimiser, schedule and loss of the current stage, and the progress.

    The model that learns is the experiment's: `model` as the current `stage` has it, `forward` as an update calls it
    (see `wrap`), and `average`, the moving average of its weights, or None.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.progress = Progress()
        self.model = self.forward = experiment.model
        self.stage = -1
        self.enter_stage(0)

    def enter_stage(self, number: int) -> None:
        """The model becomes that of a stage, by those between; and all that learns begins anew."""
        experiment = self.experiment
        if self.stage >= 0:
            self.model = self.whole(self.model, everywhere=True)
        for between in range(self.stage + 1, number + 1):
            seed_everything('stage', experiment.config.seed, between)  # what a conversion adds is drawn
            stage = experiment.stages[between]
            for hook in experiment.hooks:
                hook.before_stage(stage, self.model)
            stage.convert(self.model)
        self.stage, config = number, experiment.config
        experiment.task.begin_stage(stage.config, self.model)
        self.forward: nn.Module = self.model
        if number:
            gc.collect()  # DDP of the stage before has hooks on the parameters until it is gone
            torch.compiler.reset()
        self.average = None
        if config.ema.decay:
            # PyTorch's fused operations do not take shards and whole buffers together.
            options = {'use_warmup': config.ema.warmup, 'foreach': not experiment.sharded}
            self.average = ModelEmaV3(self.model, config.ema.decay, **options)
        self._unsharded = sharding.copy_empty(self.model, 'meta') if experiment.sharded else None
        if experiment.sharded:
            for model in (self.model, self.average.module) if self.average else (self.model,):
                sharding.shard(model, experiment.team, config.amp)
        self.optimizer = create_optimizer(self.model, stage.optim)
        self.scheduler = create_scheduler(self.optimizer, stage.sched, experiment.updates_per_epoch)
        of_pixels = experiment.task.of_pixels
        self.mixup, self.criterion = create_loss(config.loss, self.model.num_classes, of_pixels)

    def wrap(self) -> None:
        """Makes `forward` of the model. Until then nothing but the model's own forward pass has been tried."""
        experiment = self.experiment
        if experiment.team.world_size > 1 and not experiment.sharded:
            unused = has_unused_parameters(self.model, experiment.blank_input(), experiment.config.amp)
            self.forward = DistributedDataParallel(self.model, find_unused_parameters=unused)
        if experiment.config.compile:
            for model in (self.model, self.average.module) if self.average else (self.model,):
                compile_blocks(model)

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and saved: the average of weights, where there is one."""
        return self.average.module if self.average else self.model

    @property
    def lr(self) -> float:
        return max(group['lr'] for group in self.optimizer.param_groups)

    def whole(self, model: nn.Module, everywhere: bool = False) -> nn.Module:
        """The model; of a sharded one a copy that is not, which has its weights in the first process, or everywhere."""
        if self._unsharded is None:
            return model
        weights = sharding.model_state(model, everywhere)
        if not weights:
            return self._unsharded
        device = self.experiment.team.device if everywhere else 'cpu'
        whole = sharding.copy_empty(self._unsharded, device)
        whole.load_state_dict(weights)
        return whole.to(device, memory_format=self.experiment.layout)

    def without_sync(self, more_to_come: bool) -> AbstractContextManager:
        """Gradients are averaged once per update, not per micro-batch: a context for its forward and backward pass."""
        if self.experiment.sharded:
            self.model.set_requires_gradient_sync(not more_to_come)
        elif more_to_come and self.experiment.team.world_size > 1:
            return self.forward.no_sync()
        return nullcontext()

    def gradient_norm(self) -> Tensor:
        """Of the gradients; of sharded ones, of those that this process has."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.experiment.sharded:
            gradients = [gradient.to_local() for gradient in gradients]
        return nn.utils.get_total_norm(gradients)

    def step(self, norm: Tensor, update: int) -> None:
        """Takes gradients of this norm to the weights, and these to their average; `update` counts from the stage's."""
        if limit := self.experiment.config.clip_grad:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        self.optimizer.step()
        if self.average:
            self.average.update(self.model, step=update)
        for hook in self.experiment.hooks:
            hook.after_step(self)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, whole, however weights are split; of sharded ones in the first process only."""
        return {
            'identity': json.loads(json.dumps(self.experiment.identity)),
            'preprocessing': json.loads(json.dumps(self.experiment.preprocessing.as_dict())),
            'progress': asdict(self.progress),
            'hooks': {hook.name: remembered(hook) for hook in self.experiment.hooks},
            'model': sharding.model_state(self.model),
            'optimizer': sharding.optimizer_state(self.optimizer),
            'ema': sharding.model_state(self.average.module) if self.average else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was called, in any number of processes."""
        progress = dict(state['progress'])
        memories = {'truncation': progress.pop('truncation', {}), **state.get('hooks', {})}  # as older ones have it
        progress.pop('batches', None)  # of older ones; it follows from the updates
        self.progress = Progress(**progress)
        for hook in self.experiment.hooks:
            hook.memory = dict(memories.get(hook.name, {}))
        stage = stage_of(self.experiment.stages, self.progress.epoch)
        if stage != self.stage:
            self.enter_stage(stage)
        sharding.load_model_state(self.model, state['model'])
        sharding.load_optimizer_state(self.optimizer, state['optimizer'])
        if self.average:
            sharding.load_model_state(self.average.module, state['ema'])


def seed_everything(stream: str, *key: int) -> None:
    """Seeds the generators of PyTorch, NumPy and Python (see `stable_seed`), whatever was drawn before."""
    torch_seed, numpy_seed, python_seed = stable_seed(stream, *key).generate_state(3).tolist()
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)  # timm's Mixup draws from the global generator
    random.seed(python_seed)
