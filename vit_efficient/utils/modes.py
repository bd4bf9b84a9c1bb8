"""Training and evaluation mode of a model, module by module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from torch import nn

Result = TypeVar('Result')


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """A context that leaves each module of a model in the mode it was in, also where these differ."""
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        # By their own `train`, which some modules do more in, parents first; then those that stand in several parents.
        for module, mode in before.items():
            if module.training != mode:
                module.train(mode)
        for module, mode in before.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode; after it each module is in the mode it was in."""
    with keeping_modes(model):
        model.eval()
        yield


def evaluates(function: Callable[..., Result]) -> Callable[..., Result]:
    """Decorator of a function whose first argument is a model, which it has in evaluation mode as in `evaluating`."""

    @wraps(function)
    def within(model: nn.Module, *args: Any, **kwargs: Any) -> Result:
        with evaluating(model):
            return function(model, *args, **kwargs)

    return within
