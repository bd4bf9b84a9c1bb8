"""What takes part in training and belongs to one mechanism, one task or a plug-in: behind one small interface.

Ours are modules of this package; others are registered by `register_hook`.
"""

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vit_efficient.train.evaluation import Evaluation
from vit_efficient.utils.checks import argument_names, check_options
from vit_efficient.utils.errors import UserError, first_line

if TYPE_CHECKING:
    from vit_efficient.train.experiment import Experiment
    from vit_efficient.train.stages import Stage
    from vit_efficient.train.state import TrainState
    from vit_efficient.train.trainer import Trainer

HOOKS: dict[str, type['TrainingHook']] = {}
KINDS = ('train', 'val', 'frozen', 'skipped', 'nonfinite')  # of lines of metrics; others are names of hooks


class TrainingHook:
    """A part of a run that the trainer calls at fixed moments. All methods do nothing here.

    Attributes:
        name: Its registered name.
        memory: What it has to remember when the run goes on in another process, of types that JSON has (or numbers of
            NumPy); it is kept in checkpoints.
        tensors: What it has to remember beside that, whole and the same in all processes; it is assigned anew, not
            changed.
    """

    name: str = ''
    tensors: Mapping[str, Tensor] = MappingProxyType({})

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
        if options is None:
            return None
        names, takes_others = argument_names(cls)
        if not takes_others:
            check_options(f'the training hook {cls.name!r}', options, names)
        return cls(**options)

    def before_stage(self, stage: 'Stage', model: nn.Module) -> None:
        """A stage begins, before its layers are converted; `model` is as the one before has left it.

        Called again, with the memory as it was saved, when the run goes on in that stage.
        """

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

    def before_step(self, state: 'TrainState') -> None:
        """The gradients of an update are there, of all processes; their norm is yet to be taken."""

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

    def about_model(self) -> dict[str, Any]:
        """Entries of the config.json of models that the run saves."""
        return {}

    def result(self) -> dict[str, Any]:
        """Entries of result.json."""
        return {}


def register_hook(name: str) -> Callable[[type[TrainingHook]], type[TrainingHook]]:
    """Class decorator: makes a `TrainingHook` known by `name`. Ours are called first, then others by name.

    Raises:
        UserError: If the name is taken, or is that of a kind of metrics.
    """

    def register(cls: type[TrainingHook]) -> type[TrainingHook]:
        if name in KINDS:
            raise UserError(f'a training hook cannot be called {name!r}: lines of metrics are of that kind')
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
    asked, others = experiment.config.hooks, sorted(HOOKS.keys() - set(OURS))
    check_options('hooks', asked, others)
    for name, options in asked.items():
        if not isinstance(options, dict | None):
            raise UserError(f'hooks.{name} must be a mapping of options to values, got {options!r}')
    given = {name: options or {} for name, options in asked.items()}
    hooks = [HOOKS[name].of(experiment, given.get(name)) for name in (*OURS, *others)]
    hooks = [hook for hook in hooks if hook is not None]
    for hook in hooks:
        remembered(hook)
    return hooks


def remembered(hook: TrainingHook) -> dict[str, Any]:
    """The memory of a hook, in types that JSON has.

    Raises:
        UserError: If it holds anything else.
    """
    if not hasattr(hook, 'memory'):
        raise UserError(f'the training hook {hook.name!r} has no memory; let its __init__ call super().__init__()')
    return plain(hook.memory, f'the memory of the training hook {hook.name!r}')


def plain(value: Any, what: str) -> Any:
    """A mapping in types that JSON has, numbers of NumPy and PyTorch as Python's."""
    try:
        text = json.dumps(value, default=lambda number: number.item())
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f'{what} must be of types that JSON has: {first_line(error)}') from error
    if not isinstance(value, dict):
        raise UserError(f'{what} must be a mapping, got {value!r}')
    return json.loads(text)


from vit_efficient.train.hooks import attention_outputs, distillation, healing, leaves, pruning, truncation  # noqa: E402, F401 (they register themselves)

OURS = tuple(HOOKS)
