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


def flops_table(
    specs: Sequence[str],
    img_sizes: Sequence[int],
    attention_kwargs: dict[str, Any] | None = None,
    format: str = 'markdown',
) -> str:
    """The table as text, by image size; the first model is what the others are compared with.

    Args:
        specs: Models, each `NAME[:KEY=VALUE,…]` (see `models.create`).
        img_sizes: Sides of square images, in pixels.
        attention_kwargs: Options of the attention of each model whose attention is ours and not exact; those in a spec
            go first.
        format: One of `report.table.FORMATS`.

    Raises:
        UserError: If a model or an option is unknown, or a model cannot be had at a size.
    """
    sizes = [as_integer('--img-sizes', size) for size in img_sizes]
    models = []
    for spec in specs:
        name, options = parse_spec(spec)
        exact = attention_of(name, options) in (None, 'full')
        models.append((spec, name, options if exact else {**(attention_kwargs or {}), **options}))
    rows, expected = [], {}  # the latter: models whose cost depends on the data
    for size in sizes:
        first = None
        for spec, name, options in models:
            try:
                with torch.device('meta'):
                    model = create_from_spec(name, options, size)
                count = count_flops(model, input_size(model, size))
            except UserError as error:
                raise UserError(f'{spec} at {size} px: {error}') from error
            first = first or count.total
            if any(getattr(module, 'cost_depends_on_data', False) for module in model.modules()):
                expected[spec] = None
            parameters = sum(p.numel() for p in model.parameters())
            row = dict(model=spec, img_size=size, parameters_m=parameters / 1e6, tokens=_tokens(model))
            row |= dict(gmacs=count.total / 1e9, ratio=count.total / first, attention_gmacs=count.attention / 1e9)
            rows.append(row | {_KEYS[role]: macs / 1e9 for role, macs in count.by_role.items()})
    text = Table(COLUMNS, rows).render(format)
    if format == 'markdown' and expected:
        text += f'\nIn expectation, as if all leaves held as many patches: {", ".join(expected)}.\n'
    return text


def _tokens(model: nn.Module) -> int | None:
    """Tokens that a plain vision transformer works on; None for other models."""
    patches = getattr(getattr(model, 'patch_embed', None), 'num_patches', None)
    prefix = getattr(model, 'num_prefix_tokens', None)
    return None if patches is None or prefix is None else patches + prefix
