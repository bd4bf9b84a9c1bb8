"""The table of what models compute, in multiply-accumulates, at several image sizes. Nothing is executed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vit_efficient.flops import ROLES, count_flops
from vit_efficient.models.create import attention_of, create_from_spec
from vit_efficient.models.inputs import input_size
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.options import parse_spec

_KEYS = {role: f'{role.replace(" ", "_")}_gmacs' for role in ROLES}
COLUMNS = [Column('model'), Column('img_size', 'px'), Column('parameters_m', 'parameters (M)', 2), Column('tokens')]
COLUMNS += [Column('gmacs', 'GMACs', 3), Column('ratio', '÷ first', 3), Column('attention_gmacs', 'in attention', 3)]
COLUMNS += [Column(key, role, 3) for role, key in _KEYS.items()]
_ERROR = Column('error')


def flops_table(
    specs: Sequence[str],
    img_sizes: Sequence[int],
    attention_kwargs: dict[str, Any] | None = None,
    format: str = 'markdown',
) -> str:
    """The table as text, by image size; the first model is what the others are compared with.

    The cells of a model that cannot be had at a size, such as one whose patches do not divide it, are empty; why, the
    text below the table says, and in CSV and JSON a column `error`.

    Args:
        specs: Models, each `NAME[:KEY=VALUE,…]` (see `models.create`).
        img_sizes: Sides of square images, in pixels.
        attention_kwargs: Options of the attention of each model whose attention is ours and not exact; those in a spec
            go first.
        format: One of `report.table.FORMATS`.

    Raises:
        UserError: If a model or an option is unknown, or a model can be had at none of the sizes.
    """
    sizes = [as_integer('--img-sizes', size) for size in img_sizes]
    models = []
    for spec in specs:
        name, options = parse_spec(spec)
        exact = attention_of(name, options) in (None, 'full')
        models.append((spec, name, options if exact else {**(attention_kwargs or {}), **options}))
    rows, expected = [], {}  # the latter: models whose cost depends on the data
    for size in sizes:
        of_size = []
        for spec, name, options in models:
            row = dict(model=spec, img_size=size)
            try:
                with torch.device('meta'):
                    model = create_from_spec(name, options, size)
                row |= _costs(model, size)
            except UserError as error:
                row['error'] = str(error)
            else:
                if any(getattr(module, 'cost_depends_on_data', False) for module in model.modules()):
                    expected[spec] = None
            of_size.append(row)
        first = of_size[0].get('gmacs')
        rows += [row | {'ratio': row['gmacs'] / first} if first and 'gmacs' in row else row for row in of_size]
    for spec in specs:
        errors = [row.get('error') for row in rows if row['model'] == spec]
        if all(errors):
            raise UserError(f'{spec} at {sizes[0]} px: {errors[0]}')
    failed = [row for row in rows if 'error' in row]
    if format != 'markdown':
        return Table([*COLUMNS, *([_ERROR] if failed else [])], rows).render(format)
    shown = [{key: value for key, value in row.items() if key != 'error'} for row in rows]
    notes = [''.join(f'- {row["model"]} at {row["img_size"]:,} px: {row["error"]}.\n' for row in failed)]
    if _counts_differ(rows):
        notes.append('Parameters: with the position embeddings of each size.\n')
    if expected:
        notes.append(f'In expectation, as if all leaves held as many patches: {", ".join(expected)}.\n')
    return '\n'.join([Table(COLUMNS, shown).render(), *filter(None, notes)])


def _costs(model: nn.Module, size: int) -> dict[str, Any]:
    """What a model's row says of it at an image size, but for what the others cost."""
    count = count_flops(model, input_size(model, size))
    parameters = sum(p.numel() for p in model.parameters())
    row = dict(parameters_m=parameters / 1e6, tokens=_tokens(model), gmacs=count.total / 1e9)
    row['attention_gmacs'] = count.attention / 1e9
    return row | {_KEYS[role]: macs / 1e9 for role, macs in count.by_role.items()}


def _counts_differ(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a model has other numbers of parameters at other sizes."""
    counts: dict[str, set[float]] = {}
    for row in rows:
        if 'error' not in row:
            counts.setdefault(row['model'], set()).add(row['parameters_m'])
    return any(len(found) > 1 for found in counts.values())


def _tokens(model: nn.Module) -> int | None:
    """Tokens that a plain vision transformer works on; None for other models."""
    patches = getattr(getattr(model, 'patch_embed', None), 'num_patches', None)
    prefix = getattr(model, 'num_prefix_tokens', None)
    return None if patches is None or prefix is None else patches + prefix
