"""Curves of training: what runs have written to metrics.jsonl, as a figure."""

import math
from collections.abc import Sequence
from os.path import commonpath
from pathlib import Path
from typing import Any

from vit_efficient.report.plot import line_style, tidy
from vit_efficient.train.log import METRICS
from vit_efficient.train.run_folder import RunFolder
from vit_efficient.utils.checks import check_choice
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import save_figure
from vit_efficient.utils.packages import needing

AXES = ('epoch', 'step', 'hours')
TRAIN_LOSS = 'train/loss'
FEW = 20  # points of a curve, which are marked
DEFAULT_VALUES = (TRAIN_LOSS, 'val/loss', 'val/top1', 'val/foreground_miou', 'val/miou', 'val/centred_cosine')

Points = list[tuple[float, float]]


def known_values(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What can be drawn of a run, such as 'train/loss' and 'val/top1'."""
    names = {}
    for line in lines:
        for key, value in line.items():
            if key not in ('kind', 'epoch', 'step') and _is_finite(value):
                names[f'{line["kind"]}/{key}'] = None
    if 'val/train_loss' in names:  # of which the curve is made where no other is
        names = {TRAIN_LOSS: None, **names}
    return list(names)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)  # null stands for what is not


def points_of(lines: Sequence[dict[str, Any]], value: str, against: str, per_epoch: int | None = None) -> Points:
    """x and y of a curve; without those that have no x, or a y that is not finite.

    Args:
        lines: The metrics of a run.
        value: One of `known_values`.
        against: 'epoch', from 0; 'step', updates; 'hours', of training, which only the lines of evaluations have.
        per_epoch: Updates of an epoch, for runs without an evaluation, which would tell.
    """
    per_epoch = max((line['step'] / (line['epoch'] + 1) for line in lines if line['kind'] == 'val'), default=per_epoch)
    kind, _, key = value.partition('/')
    means = sum('train_loss' in line for line in lines)
    if value == TRAIN_LOSS and sum(line['kind'] == kind for line in lines) < means:
        kind, key = 'val', 'train_loss'  # the mean of each epoch, where there are fewer lines of `log_every` updates
    points = []
    for line in lines:
        x = line['step']
        if against == 'epoch':
            x = x / per_epoch if per_epoch else None
        elif against == 'hours':
            x = line['train_seconds'] / 3600 if 'train_seconds' in line else None
        if line['kind'] == kind and _is_finite(line.get(key)) and x is not None:
            points.append((x, line[key]))
    return points


def _curves(folder: str, lines: Sequence[dict[str, Any]], values: Sequence[str], against: str) -> dict[str, Points]:
    """The points of a run for each value."""
    per_epoch = (RunFolder(folder).environment.get('scale') or {}).get('updates_per_epoch')
    return {value: points_of(lines, value, against, per_epoch) for value in values or DEFAULT_VALUES}


def _why_without(folder: str, lines: Sequence[dict[str, Any]], values: Sequence[str], against: str) -> str:
    """Why there is nothing to draw of a run."""
    if not lines:
        why = 'had no epochs' if RunFolder(folder).is_finished else 'has not come to its first line'
        return f'{Path(folder) / METRICS} is empty: the run {why}'
    instead = '; --against step draws it' if any(_curves(folder, lines, values, 'step').values()) else ''
    known = ', '.join(known_values(lines)) or 'no values'
    return f'{folder}: nothing to draw against {against}, it has {known}{instead}'


def plot_curves(
    folders: Sequence[str | Path], path: str | Path, values: Sequence[str] = (), against: str = 'epoch'
) -> tuple[list[str], dict[str, str]]:
    """Saves the curves of runs, a panel for each value and a line for each run.

    Args:
        folders: The folders of runs, finished or not; those of which there is nothing to draw yet are left out.
        path: The file of the figure; its suffix says the format.
        values: What is drawn, such as 'val/top1'. By default the losses and the accuracies that the runs have.
        against: The x axis: 'epoch', 'step' or 'hours' (of training).

    Returns:
        The values that are drawn, and the runs that are left out, each with the reason.

    Raises:
        UserError: If a folder is not that of a run, a value is one that none of them has, or no run is left to draw.
    """
    check_choice('against', against, AXES)
    runs = {str(folder): RunFolder(folder).metrics() for folder in folders}
    known = list(dict.fromkeys(name for lines in runs.values() for name in known_values(lines)))
    for value in values:
        if known and value not in known:
            raise UserError(f'no run has {value!r}; they have {", ".join(known)}')
    curves = {folder: _curves(folder, lines, values, against) for folder, lines in runs.items()}
    curves = {folder: points for folder, points in curves.items() if any(points.values())}
    left_out = {
        folder: _why_without(folder, lines, values, against) for folder, lines in runs.items() if folder not in curves
    }
    if not curves:
        raise UserError('; '.join(left_out.values()))
    values = values or [name for name in DEFAULT_VALUES if any(points[name] for points in curves.values())]
    _draw(dict(zip(_labels(list(curves)), curves.values(), strict=True)), values, against, path)
    return list(values), left_out


def _draw(curves: dict[str, dict[str, Points]], values: Sequence[str], against: str, path: str | Path) -> None:
    """Saves the figure of curves, by label and value."""
    with needing('train', 'plots are drawn with'):
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(1 + 4.5 * len(values), 4.5), dpi=150, layout='constrained')
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    handles = {}
    for axes, value in zip(panels, values, strict=True):
        for number, (label, points) in enumerate(curves.items()):
            if points[value]:
                x, y = zip(*points[value], strict=True)
                # Lines lie on those before them, and are thinner, so that of equal ones each is seen.
                width = 4 - 3 * number / (len(curves) - 1) if len(curves) > 1 else 1.5
                style = dict(line_style(number, len(x) <= FEW), linewidth=width, markersize=2 * width + 2)
                handles[label] = axes.plot(x, y, label=label, **style)[0]
        low, high = axes.get_xlim()
        if against != 'hours' and math.floor(high) >= low:  # else, there are but parts of an epoch
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_title(value)
        tidy(axes, against)
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=min(4, len(handles)), frameon=False)
    save_figure(figure, path)


def _labels(folders: Sequence[str]) -> list[str]:
    """The folders without the one that all of them are in."""
    if len(folders) == 1:
        return [Path(folders[0]).name]
    absolute = [str(Path(folder).resolve()) for folder in folders]
    common = commonpath(absolute)
    return [Path(folder).relative_to(common).as_posix() for folder in absolute]
