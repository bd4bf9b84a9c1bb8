"""What takes part in training and belongs to one mechanism, one task or a plug-in: behind one small interface.

Ours are modules of this package; others are registered by `register_hook`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vit_efficient.train.evaluation import Evaluation
from vit_efficient.utils.checks import check_options
from vit_efficient.utils.errors import UserError

if TYPE_CHECKING:
    from vit_efficient.train.experiment import Experiment
    from vit_efficient.train.stages import Stage
    from vit_efficient.train.state import TrainState
    from vit_efficient.train.trainer import Trainer

HOOKS: dict[str, type['TrainingHook']] = {}


class TrainingHook:
    """A part of a run that the trainer calls at fixed moments. All methods do nothing here.

    Attributes:
        name: Its registered name.
        memory: What it has to remember when the run goes on in another process, of types that JSON has; it is kept in
            checkpoints.
    """

    name: str = ''

    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}

    @classmethod
    def of(cls, experiment: 'Experiment', options: dict[str, Any] | None) -> 'TrainingHook | None':
        """The hook of a run, or None for a run that has no use for it.

        Args:
            experiment: Of the run; its model is as it is built, and it has no hooks yet.
            options: Those of the recipe (`hooks.NAME`); None where it does not name the hook.

        Raises:
            UserError: If the run cannot have it.
        """
        return None if options is None else cls(**options)

    def before_stage(self, stage: 'Stage', model: nn.Module) -> None:
        """A stage begins, before its layers are converted; `model` is as the one before has left it."""

    def begin_stage(self, trainer: 'Trainer') -> None:
        """A stage has begun: the model is what it trains, and can be measured."""

    def penalty(self, state: 'TrainState', images: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """The loss of a batch, with what the hook adds to it.

        Args:
            state: Of the run.
            images: (B, C, H, W), as the model has seen them.
            logits: Of the model.
            loss: So far, a scalar.
        """
        return loss

    def after_step(self, state: 'TrainState') -> None:
        """The optimiser has made a step, and the average of weights has followed."""

    def values(self, state: 'TrainState') -> dict[str, float]:
        """What is logged beside each evaluation, in its own line."""
        return {}

    def measure(self, trainer: 'Trainer') -> dict[str, float]:
        """What is logged after each evaluation, in a line of the hook's name. All processes call."""
        return {}

    def end_stage(self, trainer: 'Trainer', following: 'Stage', evaluation: Evaluation) -> None:
        """The last epoch of a stage has been evaluated, and another one follows."""

    def end(self, trainer: 'Trainer', model: nn.Module, evaluation: Evaluation) -> tuple[nn.Module, Evaluation]:
        """The run has been trained: the model that is saved, and its evaluation, in the place of those given.

        Args:
            trainer: Of the run. What an interrupted run saves is its state, so that is left as it is.
            model: As it has been evaluated.
            evaluation: Of that model.
        """
        return model, evaluation

    def result(self) -> dict[str, Any]:
        """Entries of result.json."""
        return {}


def register_hook(name: str) -> Callable[[type[TrainingHook]], type[TrainingHook]]:
    """Class decorator: makes a `TrainingHook` known by `name`. Hooks are called in the order of their registration.

    Raises:
        UserError: If the name is taken.
    """

    def register(cls: type[TrainingHook]) -> type[TrainingHook]:
        if name in HOOKS:
            raise UserError(f'a training hook {name!r} is registered already: {HOOKS[name].__qualname__}')
        cls.name, HOOKS[name] = name, cls
        return cls

    return register


def create_hooks(experiment: 'Experiment') -> list[TrainingHook]:
    """The hooks of a run: those that it has use for, and those that its recipe names.

    Raises:
        UserError: If the recipe names one that is not registered, or the run cannot have one of them.
    """
    from vit_efficient.train.hooks import distillation, leaves, truncation  # noqa: F401 (they register themselves)

    asked = experiment.config.hooks
    check_options('hooks', asked, HOOKS)
    hooks = (cls.of(experiment, asked.get(name)) for name, cls in HOOKS.items())
    return [hook for hook in hooks if hook is not None]
