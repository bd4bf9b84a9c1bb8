"""Checks of arguments, by UserErrors that name the argument, its value and what it must be.

NumPy's integers are integers.
"""

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from vit_efficient.utils.errors import UserError


def is_integer(value: Any, least: int | None = None) -> bool:
    """Whether a value is an integer, of Python or NumPy, and at least `least`; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and (least is None or value >= least)


def is_real(value: Any) -> bool:
    """Whether a value is a real number, of Python or NumPy; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_pair(value: Any) -> bool:
    """Whether a value is a sequence of two, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def as_integer(name: str, value: Any, least: int = 1, what: str = '') -> int:
    """A value as a plain int of at least `least`; `what` says in words what it must be, where `least` does not."""
    if not is_integer(value, least):
        what = what or ('a positive integer' if least == 1 else f'an integer of at least {least}')
        raise UserError(f'{name} must be {what}, got {name}={value!r}')
    return int(value)


def as_sides(name: str, value: Any, pair: str = '(h, w)') -> int | tuple[int, int]:
    """A positive integer, or a pair of them, as plain ints."""
    if is_integer(value, 1):
        return int(value)
    if is_pair(value) and all(is_integer(side, 1) for side in value):
        return int(value[0]), int(value[1])
    raise UserError(f'{name} must be a positive integer or a pair {pair} of them, got {name}={value!r}')


def plain_integers(value: Any) -> Any:
    """A value with integers of NumPy, it or those in a tuple or list, as plain ints; anything else as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(plain_integers(each) for each in value) if type(value) in (tuple, list) else value
    return int(value) if is_integer(value) else value


def as_share(name: str, value: Any) -> float:
    """A share, above 0 and at most 1, as a plain float."""
    if not (is_real(value) and 0 < value <= 1):
        raise UserError(f'{name} must be a number with 0 < {name} ≤ 1, got {name}={value!r}')
    return float(value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises a UserError if the value is not one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f'{name} must be one of {", ".join(choices)}, got {name}={value!r}')


def check_flag(name: str, value: Any) -> None:
    """Raises a UserError if the value is not True or False."""
    if not isinstance(value, bool):
        raise UserError(f'{name} must be True or False, got {name}={value!r}')


def nearest(name: Any, known: Iterable[str]) -> str:
    """'; did you mean …?' with the name that is nearest to one that is not known; empty if none is near."""
    close = difflib.get_close_matches(str(name), [str(each) for each in known], n=1)
    return f'; did you mean {close[0]}?' if close else ''


def multiples_around(size: int, side: int) -> str:
    """'504 or 518', the multiples of a side, above 0, that are next to a size which is none."""
    below = size // side * side
    return ' or '.join(str(multiple) for multiple in (below, below + side) if multiple)


def check_options(owner: str, given: Iterable[str], known: Collection[str], has: str = '') -> None:
    """Raises a UserError for the first option that its owner does not have, with the nearest one that it has.

    `has` says in words which there are, where they are too many to list.
    """
    for name in given:
        if name not in known:
            has = has or ', '.join(known) or 'none'
            raise UserError(f'{owner} has no option {name!r}{nearest(name, known)} (it has {has})')


def argument_names(function: Callable) -> tuple[list[str], bool]:
    """The names of the arguments of a function or class, and whether it takes any others by name."""
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)
