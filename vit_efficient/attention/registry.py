"""The register of attentions: names, and what each stands for."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

from vit_efficient.utils.errors import UserError

_ATTENTIONS: dict[str, 'Entry'] = {}


class Entry(NamedTuple):
    cls: type
    preset: dict[str, Any]


def register_attention(name: str, **preset) -> Callable[[type], type]:
    """Class decorator: makes a `GridAttention` known by `name`, with `preset` as its default options.

    Raises:
        UserError: If the name is taken.
    """

    def register(cls: type) -> type:
        if name in _ATTENTIONS:
            raise UserError(f'an attention {name!r} is registered already: {_ATTENTIONS[name].cls.__qualname__}')
        _ATTENTIONS[name] = Entry(cls, preset)
        return cls

    return register


def list_attentions() -> list[str]:
    """The names of the registered attentions, sorted."""
    return sorted(_ATTENTIONS)


def get_attention(name: str) -> Entry:
    """The class and preset options behind a name.

    Raises:
        UserError: If no attention has the name.
    """
    if name not in _ATTENTIONS:
        near = difflib.get_close_matches(str(name), _ATTENTIONS, n=1)
        hint = f'did you mean {near[0]!r}?' if near else 'list_attentions() names them.'
        raise UserError(f'unknown attention {name!r}; {hint}')
    return _ATTENTIONS[name]
