"""Values and options as they are written on the command line."""

import ast
import re
from contextlib import suppress
from fractions import Fraction
from typing import Any

import yaml

from vit_efficient.utils.errors import UserError

# Numbers that YAML has for text: fractions, and powers of ten without a point.
_NUMBER = re.compile(r'\d+/[1-9]\d*|[-+]?\d+[eE][-+]?\d+')


def parse_fractions(value: Any) -> Any:
    """A value of a configuration with each fraction in it, such as '1/16', as a number."""
    if isinstance(value, dict):
        return {key: parse_fractions(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(parse_fractions, value))
    return float(Fraction(value)) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def parse_value(text: str) -> Any:
    """The value that a text stands for, as in a recipe: a number, a fraction such as 1/16, true, null, a list or a
    mapping, in the words of YAML or Python; or the text itself."""
    with suppress(ValueError, SyntaxError):
        return parse_fractions(ast.literal_eval(text))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    is_value = value is None or isinstance(value, (bool, int, float, list, dict))
    return parse_fractions(value if is_value else text)


def parse_bytes(name: str, text: str) -> int:
    """'4GB', '512 MiB' or a number of bytes, as a number of bytes; `name` is what it is given to."""
    found = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*', text, re.IGNORECASE)
    number = float(found[1]) if found else 0.0
    size = number * (1024 if found[3] else 1000) ** ' KMGT'.index(found[2].upper() or ' ') if found else 0.0
    if not 1 <= size < 2**63:
        raise UserError(f'{name} must be a size such as 4GB or 512MiB, got {text!r}')
    return int(size)


def parse_option(text: str) -> tuple[str, Any]:
    """'key=value' as a pair, the value by `parse_value`."""
    key, equals, value = text.partition('=')
    if not key or not equals:
        raise UserError(f'expected key=value, got {text!r}')
    return key, parse_value(value)


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """'name:key=value,…' as a name and its options; commas within brackets belong to a value.

    The name of a converted model has colons of its own: 'convert:base:attention,key=value,…', or
    'convert:base:plan.yaml'.
    """
    name, _, options = text.partition(':')
    if name.rpartition('/')[2] in ('local-dir', 'hf-hub'):
        raise UserError(
            f'{text}: a model is told by its name and options here, such as vit_dct_tiny:keep_ratio=1/4; one that is '
            'saved is counted in Python, by vit_efficient.count_flops'
        )
    if name.rpartition('/')[2] == 'convert':
        base, _, rest = options.partition(':')
        attention, _, options = rest.partition(',')
        if not base or not re.fullmatch(r'\w+|.+\.ya?ml', attention):
            raise UserError(f'expected convert:BASE:ATTENTION[,KEY=VALUE,…] or convert:BASE:PLAN.yaml, got {text!r}')
        name = f'{name}:{base}:{attention}'
    parts, depth = [''] if options else [], 0
    for character in options:
        depth += (character in '([{') - (character in ')]}')
        if character == ',' and not depth:
            parts.append('')
        else:
            parts[-1] += character
    given: dict[str, Any] = {}
    for key, value in map(parse_option, parts):
        if key in given:
            raise UserError(f'{key} is given twice in {text!r}')
        given[key] = value
    return name, given


def write_spec(name: str, options: dict[str, Any]) -> str:
    """What `parse_spec` reads as this name and these options: 'name:key=value,…'."""
    return name + ':' * bool(options) + ','.join(f'{key}={_write_value(value)}' for key, value in options.items())


def _write_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f'[{",".join(map(_write_value, value))}]'
    if isinstance(value, float) and not value.is_integer():
        fraction = Fraction(value).limit_denominator(1000)
        return str(fraction) if float(fraction) == value else repr(value)
    return str(value)


def write_options(options: dict[str, Any]) -> str:
    """Options as they would be given to a function: 'key=value, …', lists as tuples, those that are None left out."""
    shown = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return ', '.join(f'{key}={value!r}' for key, value in shown.items() if value is not None)
