"""The table of which plain ViTs of timm a conversion serves, by family; and of all others, why it does not.

Each model is built on PyTorch's meta device and converted there: nothing is computed or downloaded.
"""

from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import nn

from vit_efficient.conversion import convert
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.errors import UserError, one_line

# timm's names of ViTs that are no hierarchies, mobile networks or hybrids of their own.
PLAIN = ('vit_*', 'deit*', 'eva*', 'beit*', 'flexivit*', 'naflexvit*')

COLUMNS = [Column('family', "timm's module"), Column('model', 'class'), Column('blocks'), Column('attention')]
COLUMNS += [Column('positions'), Column('registered'), Column('served')]


def families_table(
    patterns: Sequence[str] = PLAIN,
    attention: str = 'dct',
    options: dict[str, Any] | None = None,
    format: str = 'markdown',
) -> str:
    """The table as text: models that timm registers and models that can be converted, by what they are made of.

    Below it, in Markdown, stand the models that cannot be, with the module and the reason that `convert` names; in CSV
    and JSON there is a row for each model, with a column `error`.

    Args:
        patterns: Names of models, with `*` and `?` as in a shell; models of this package are left out.
        attention, options: What each is converted to, as `vit_efficient.convert` takes them.
        format: One of `report.table.FORMATS`.

    Raises:
        UserError: If timm has no model of these names, or the attention or an option is unknown.
    """
    names = [name for name in timm.list_models() if any(fnmatch(name, pattern) for pattern in patterns)]
    names = [name for name in names if model_entrypoint(name).__module__.startswith('timm.')]
    if not names:
        raise UserError(f'timm knows no model {", ".join(map(repr, patterns))}')
    convert(_build('vit_tiny_patch16_224'), attention, **(options or {}))  # an unknown option is no model's refusal
    rows = [{'name': name, **_row(name, attention, options)} for name in names]
    if format != 'markdown':
        kinds = [column for column in COLUMNS if column.key not in ('registered', 'served')]
        return Table([Column('name'), *kinds, Column('served'), Column('error')], rows).render(format)
    kinds = [column.key for column in COLUMNS[:-2]]
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[tuple(row[key] for key in kinds)].append(row)
    of_kinds = [
        {**dict(zip(kinds, kind, strict=True)), 'registered': len(found), 'served': sum(row['served'] for row in found)}
        for kind, found in sorted(by_kind.items(), key=lambda item: -len(item[1]))
    ]
    served = sum(row['served'] for row in rows)
    notes = [f'{served} of {len(rows)} are served with attention {attention!r} (timm {timm.__version__}).\n']
    notes += [''.join(f'- {row["name"]}: {row["error"]}\n' for row in rows if not row['served'])]
    return '\n'.join([Table(COLUMNS, of_kinds).render(), *filter(None, notes)])


def _build(name: str) -> nn.Module:
    with torch.device('meta'):
        return timm.create_model(name)


def _row(name: str, attention: str, options: dict[str, Any] | None) -> dict[str, Any]:
    model = _build(name)
    row = _made_of(model) | {'family': model_entrypoint(name).__module__.rpartition('.')[2]}
    try:
        convert(model, attention, **(options or {}))
    except UserError as error:
        return row | {'served': False, 'error': one_line(error)}
    return row | {'served': True}


def _made_of(model: nn.Module) -> dict[str, str]:
    """The classes of a model's parts, by columns."""
    blocks = list(getattr(model, 'blocks', None) or [])
    attentions = [m for block in blocks[:1] for name, m in block.named_modules() if name.rpartition('.')[2] == 'attn']
    kinds = {type(module) for module in model.modules()}
    positions = [
        kind.__name__ for kind in kinds if kind.__name__.startswith(('RotaryEmbedding', 'RelPosMlp', 'RelPosBias'))
    ]
    for part, kind in (('relative_position_bias_table', 'bias table'), ('rel_pos_h', 'decomposed bias')):
        if any(part in name for name, _ in model.named_parameters()) and not positions:
            positions = [kind]
    return dict(
        model=type(model).__name__,
        blocks=', '.join(sorted({type(block).__name__ for block in blocks})),
        attention=', '.join(sorted({type(module).__name__ for module in attentions})),
        positions=', '.join(sorted(positions)),
    )
