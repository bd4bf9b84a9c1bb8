"""The register of attentions: names, and what each stands for."""

from collections.abc import Callable
from typing import Any, NamedTuple

from vit_efficient.utils.checks import nearest
from vit_efficient.utils.errors import UserError


class Entry(NamedTuple):
    """What a name stands for: a class, and default options of its own."""

    cls: type
    preset: dict[str, Any]


ATTENTIONS: dict[str, Entry] = {}
OBSERVERS: list[Callable[[str], object]] = []


def register_attention(name: str, **preset) -> Callable[[type], type]:
    """Class decorator: makes a `GridAttention` known by `name`, with `preset` as its default options.

    Raises:
        UserError: If the name is taken.
    """

    def register(cls: type) -> type:
        if not name.isidentifier():
            raise UserError(f'an attention is named as a variable of Python is, such as my_mean, got {name!r}')
        if name in ATTENTIONS:
            raise UserError(f'an attention {name!r} is registered already: {ATTENTIONS[name].cls.__qualname__}')
        ATTENTIONS[name] = Entry(cls, preset)
        for callback in OBSERVERS:
            callback(name)
        return cls

    return register


def on_register(callback: Callable[[str], object]) -> None:
    """Calls `callback(name)` for every attention, those registered already and each later one."""
    OBSERVERS.append(callback)
    for name in list_attentions():
        callback(name)


def list_attentions() -> list[str]:
    """The names of the registered attentions, sorted."""
    return sorted(ATTENTIONS)


def get_attention(name: str) -> Entry:
    """The class and preset options behind a name.

    Raises:
        UserError: If no attention has the name.
    """
    if name not in ATTENTIONS:
        hint = nearest(name, ATTENTIONS) or '; list_attentions() names those that there are'
        raise UserError(f'unknown attention {name!r}{hint}')
    return ATTENTIONS[name]
