"""A saved model with most of its weights 0, and a table of what is left of it."""

from collections.abc import Collection, Sequence
from pathlib import Path

from vit_efficient.models import load_model, save_model
from vit_efficient.prune import Density, by_role, densities, prune
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.checks import is_real
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.options import parse_value


def prune_saved(
    path: str | Path, keep: str, out: Path, method: str = 'lamp', skip: Collection[str] = ('head',)
) -> tuple[Table, str]:
    """Prunes a run's model, or another, and saves it.

    Args:
        path: A run or model folder.
        keep: The share that is left of the weights that are pruned at all, zeros among them; a fraction or a number.
        out: The model folder that is written, a new one or an empty one.
        method, skip: As of `prune`.

    Returns:
        The densities of each layer, and below them of each role; and a line on what was saved.

    Raises:
        UserError: As `prune`; or if fewer weights than that are left already, or the folder holds anything.
    """
    share = parse_value(keep)
    if not (is_real(share) and 0 < share <= 1):
        raise UserError(f'--keep must be a share above 0 and at most 1, such as 1/10, got {keep!r}')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f'--out {out}: holds something already; name a new folder')
    model = load_model(path)
    before = by_role(densities(model, masks=prune(model, 0, method, skip=skip)))[-1]
    if share > before.density:
        raise UserError(f'--keep={keep}: only {before.density:.3f} of the weights are left already; keep fewer')
    prune(model, 1 - share / before.density, method, skip=skip)
    about = {'method': method, 'keep': float(share), 'skip': list(skip)}
    save_model(model, out, model.pretrained_cfg.get('label_names'), pruned=about)
    found = densities(model)
    whole = by_role(found)[-1]
    saved = f'saved {out}: {whole.left:,} of {whole.weights:,} weights of linear layers and convolutions are not 0'
    return density_table(found), saved


def density_table(found: Sequence[Density]) -> Table:
    """A row for each layer, and below them one for each role, and for all."""
    columns = [Column('layer'), Column('role'), Column('weights'), Column('left'), Column('density', digits=3)]
    named = [(each.name, each) for each in found] + [(None, each) for each in by_role(found)]
    rows = [
        {'layer': name, 'role': each.role, 'weights': each.weights, 'left': each.left, 'density': each.density}
        for name, each in named
    ]
    return Table(columns, rows)
