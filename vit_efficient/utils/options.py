"""Options of a mechanism or model as they are written on the command line."""

import ast
import re
from fractions import Fraction
from typing import Any

from vit_efficient.utils.errors import UserError

_FRACTION = re.compile(r'\d+/[1-9]\d*')


def parse_fractions(value: Any) -> Any:
    """A value of a configuration with each fraction in it, such as '1/16', as a number."""
    if isinstance(value, dict):
        return {key: parse_fractions(part) for key, part in value.items()}
    if isinstance(value, list):
        return [parse_fractions(part) for part in value]
    return float(Fraction(value)) if isinstance(value, str) and _FRACTION.fullmatch(value) else value


def parse_option(text: str) -> tuple[str, Any]:
    """'key=value' as a pair; the value is a Python literal, a fraction such as 1/16, or text.

    Raises:
        UserError: If there is no `=`.
    """
    key, equals, value = text.partition('=')
    if not key or not equals:
        raise UserError(f'expected key=value, got {text!r}')
    if _FRACTION.fullmatch(value):
        return key, float(Fraction(value))
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """'name:key=value,…' as a name and its options; commas within brackets belong to a value.

    Raises:
        UserError: If an option has no `=`.
    """
    name, _, options = text.partition(':')
    parts, depth = [''] if options else [], 0
    for character in options:
        depth += (character in '([{') - (character in ')]}')
        if character == ',' and not depth:
            parts.append('')
        else:
            parts[-1] += character
    return name, dict(parse_option(part) for part in parts)
