"""Keys of a configuration: dataclass fields that say what they mean and which values they may have."""

import math
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, get_args

from vit_efficient.utils.errors import UserError


@dataclass(frozen=True)
class Range:
    """The values that a key may have; None and sections are not asked for."""

    text: str  # what a value must be, in words that follow 'must be'
    holds: Callable[[Any], bool]


SET = Range('set', lambda value: value != '')
POSITIVE = Range('above 0', lambda value: value > 0)
BELOW_1 = Range('at least 0 and below 1', lambda value: 0 <= value < 1)


def at_least(least: float) -> Range:
    return Range(f'at least {least}', lambda value: value >= least)


def between(least: float, most: float) -> Range:
    return Range(f'between {least} and {most}', lambda value: least <= value <= most)


def one_of(*values: str) -> Range:
    shown = [value or "''" for value in values]
    return Range(f'{", ".join(shown[:-1])} or {shown[-1]}', lambda value: value in values)


def key(
    default: Any = MISSING, help: str = '', within: Range | None = None, resume: bool | str = False, **options
) -> Any:
    """A field of a configuration, as `dataclasses.field`.

    One with `resume` may change when a run goes on, because the weights depend on it by no more than rounding; a text
    says on what condition.
    """
    if isinstance(default, list | dict):
        options['default_factory'], default = partial(copy, default), MISSING
    return field(default=default, metadata={'help': help, 'within': within, 'resume': resume}, **options)


def section(kind: type) -> Any:
    """A field that is a configuration of its own."""
    return field(default_factory=kind)


def walk(config: Any, prefix: str = '') -> Iterator[tuple[str, Field, Any]]:
    """The leaves of a configuration: dotted key, field and value. Lists and mappings are leaves."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from walk(value, f'{prefix}{item.name}.')
        else:
            yield prefix + item.name, item, value


def element_of(item: Field) -> type | None:
    """The class of the sections that a list key holds; None of other keys."""
    kind = next(iter(get_args(item.type)), None)
    return kind if is_dataclass(kind) else None


def flatten(config: Any) -> dict[str, Any]:
    """The leaves of a configuration by dotted key: {'optim.lr': 0.001, …}; sections in a list as mappings."""
    return {name: [asdict(part) for part in value] if element_of(item) else value for name, item, value in walk(config)}


def check_ranges(config: Any, prefix: str = '') -> None:
    """Raises a UserError for the first key whose value is out of its range, with the value and what it must be."""
    for name, item, value in walk(config, prefix):
        if element_of(item):
            for number, part in enumerate(value):
                check_ranges(part, f'{name}[{number}].')
            continue
        within = item.metadata.get('within')
        finite = not isinstance(value, float) or math.isfinite(value)
        if within and value is not None and not (finite and within.holds(value)):
            raise UserError(f'{name} must be {within.text}, got {value!r}')


def describe(config: Any, prefix: str = '') -> list[dict[str, Any]]:
    """A row for each key: key, type, default, range, resume (whether it may change when a run goes on) and help."""
    rows = []
    for name, item, value in walk(config, prefix):
        element, within = element_of(item), item.metadata.get('within')
        kind = str(item.type).replace('typing.', '') if get_args(item.type) else item.type.__name__
        row = dict(key=name, type='list of sections' if element else kind, default=value)
        row.update(range=within.text if within else '', resume=item.metadata.get('resume', False))
        rows.append(row | {'help': item.metadata.get('help', '')})
        if element:
            rows += describe(element(), f'{name}[].')
    return rows
