"""The stages of a run: what the model is converted to, part after part, while its weights go on."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from vit_efficient.conversion import convert
from vit_efficient.models.truncation import Sizes, count_windows, freeze_truncation, has_windows
from vit_efficient.train.config import Config, OptimConfig, SchedConfig, StageConfig
from vit_efficient.utils.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A stage of a run: its epochs, of those of the run, and how it learns.

    Attributes:
        config: As the recipe has it.
        start, end: Its epochs are start ≤ epoch < end.
        optim, sched: The recipe's, with what the stage has of its own.
    """

    config: StageConfig
    start: int
    end: int
    optim: OptimConfig
    sched: SchedConfig

    def begin(self, model: nn.Module, sizes: Sizes | None = None) -> Sizes:
        """Freezes what the model has learned to cut, if the stage says so, and converts its layers, in place.

        Args:
            model: As the stage before has left it.
            sizes: To freeze it to, instead of what it has learned.

        Returns:
            The sizes that it has frozen, if any.

        Raises:
            UserError: As `freeze_truncation` and `convert` do.
        """
        kept = freeze_truncation(model, sizes) if self.config.freeze else {}
        if self.config.attention:
            convert(model, self.config.attention, self.config.layers, **self.config.attention_kwargs)
        return kept

    def __str__(self) -> str:
        """What begins with it, such as 'treeformer_tc in layers -2 -1'."""
        begins = ['truncations frozen'] if self.config.freeze else []
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
    """The number of the stage that an epoch is in."""
    return next(number for number, stage in enumerate(stages) if epoch < stage.end)


def check_stages(model: nn.Module, stages: Sequence[Stage], penalty: float) -> bool:
    """Tries all conversions on a copy of the model that has no data.

    Args:
        model: As it is built.
        stages: Of the run.
        penalty: Of truncations that are learned, `truncation.penalty`.

    Returns:
        Whether a stage learns a truncation.

    Raises:
        UserError: Naming the first stage that does not fit, or that would lose what an earlier one has learned to cut;
            if there is a penalty, and no stage learns a truncation.
    """
    learns, frozen = has_windows(model), False
    if any(stage.config.attention or stage.config.freeze for stage in stages):
        model = copy.deepcopy(model).to('meta')
        for number, stage in enumerate(stages):
            before = count_windows(model)
            try:
                stage.begin(model)
            except ValueError as error:
                raise UserError(f'stages[{number}]: {error}') from error
            learns, frozen = learns or has_windows(model), frozen or stage.config.freeze
            if frozen and has_windows(model):
                raise UserError(f'stages[{number}] learns truncations again, after a stage that has frozen some')
            if count_windows(model) < before and not stage.config.freeze:
                raise UserError(
                    f'stages[{number}] takes away truncations that are learned; let a stage with freeze=true go before'
                )
    if penalty and not learns:
        raise UserError(
            f'truncation.penalty={penalty:g}: the model learns no truncation; set model.args.patch_window=true (with '
            'patch_embed=dct) or attention_kwargs.learned=true (attention dct)'
        )
    return learns
