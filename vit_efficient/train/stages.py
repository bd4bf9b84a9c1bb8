"""The stages of a run: what the model is converted to, part after part, while its weights go on."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from vit_efficient.conversion import convert
from vit_efficient.models import freeze_truncation
from vit_efficient.train.config import Config, OptimConfig, SchedConfig, StageConfig
from vit_efficient.utils.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A stage of a run: its epochs, start ≤ epoch < end, and how it learns."""

    config: StageConfig
    start: int
    end: int
    optim: OptimConfig  # the recipe's, as `sched` is, with what the stage has of its own
    sched: SchedConfig

    @property
    def changes(self) -> bool:
        """Whether the model becomes another one where the stage begins."""
        return bool(self.config.attention or self.config.freeze)

    def convert(self, model: nn.Module) -> None:
        """Converts the layers of a model, as the stage before has left it, in place."""
        if self.config.attention:
            convert(model, self.config.attention, self.config.layers, **self.config.attention_kwargs)

    def __str__(self) -> str:
        """What begins with it, such as 'treeformer_tc in layers -2 -1', or 'refine'."""
        begins = [self.config.heal] if self.config.heal else []
        if self.config.freeze:
            begins.append('truncations frozen')
        if self.config.prune is not None:
            begins.append(f'{self.config.prune:g} of the weights left pruned ({self.config.prune_method})')
        if self.config.attention:
            layers = self.config.layers
            where = ' in layers ' + ' '.join(map(str, layers)) if layers is not None else ''
            begins.append(self.config.attention + where)
        return ', '.join(begins) or ('on' if self.start else 'as built')


def list_stages(config: Config) -> list[Stage]:
    """The stages of a recipe; without any, a single one that is the whole run."""
    stages, start = [], 0
    for stage in config.stages or [StageConfig(config.sched.epochs)]:
        optim = config.optim if stage.lr is None else replace(config.optim, lr=stage.lr)
        warmup = config.sched.warmup_epochs if stage.warmup_epochs is None else stage.warmup_epochs
        sched = replace(config.sched, epochs=stage.epochs, warmup_epochs=warmup)
        stages.append(Stage(stage, start, start + stage.epochs, optim, sched))
        start += stage.epochs
    return stages


def stage_of(stages: Sequence[Stage], epoch: int) -> int:
    """The number of the stage that an epoch is in; of a run without epochs, that of its only one."""
    return next((number for number, stage in enumerate(stages) if epoch < stage.end), len(stages) - 1)


def model_at_stages(model: nn.Module, stages: Sequence[Stage], sizes=None) -> Iterator[tuple[Stage, nn.Module]]:
    """Each stage with the model that it trains: a copy without data, converted part after part.

    Learned truncations are frozen to `sizes`, by default uncut ones.

    Raises:
        UserError: Naming the first stage that does not fit.
    """
    if any(stage.changes for stage in stages):
        model = copy.deepcopy(model).to('meta')
    for number, stage in enumerate(stages):
        try:
            if stage.config.freeze:
                freeze_truncation(model, sizes)
            stage.convert(model)
        except UserError as error:
            raise UserError(f'stages[{number}]: {error}') from error
        yield stage, model
