"""How lines and images look in figures, and plots of accuracy against cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import save_figure
from vit_efficient.utils.packages import needing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# The first six are those of Okabe and Ito, "Color Universal Design", 2008, told apart with any colour vision; but for
# yellow, and for black, which is kept for what the others are compared to. The others are as far from them and from
# each other as so many can be. Markers differ as well, and the styles of lines: one for each time around the colours.
COLOURS = (
    *('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9'),
    *('#7B3294', '#8C510A', '#808000', '#E7298A', '#707070', '#66D17A', '#A6121F', '#2E2E8C', '#B8B800', '#B79CE0'),
)
_STYLES = ('-', '--', ':')
_MARKERS = 'os^DvPX'

# Options, and keys of recipes at any depth, that say how much of something a model takes: a line joins models that
# differ in nothing else.
BUDGETS = (
    *('keep_ratio', 'num_tokens', 'num_landmarks', 'num_features', 'window_size', 'tree_height'),
    *('patch_keep', 'budget'),  # of coefficients, and of a learned truncation
)


def line_style(number: int, markers: bool = True) -> dict[str, Any]:
    """How matplotlib draws the line with this number, so that it is told apart from the others."""
    style = dict(color=COLOURS[number % len(COLOURS)], linestyle=_STYLES[number // len(COLOURS) % len(_STYLES)])
    return {**style, 'marker': _MARKERS[number % len(_MARKERS)]} if markers else style


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, above 0, for a logarithmic axis: three to eight or so, each with a label."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 2:
            return ticks[:: -(-len(ticks) // 8)]
    return [tick for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]


def log_axis(axis: 'Axis', ticks: Sequence[float] | None = None) -> None:
    """Labels a logarithmic axis, whose limits stand, in plain numbers, with no ticks but those."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(ticks or log_ticks(*sorted(axis.get_view_interval()))))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.6g}' if value < 1e5 else f'{value:,.0f}'))


def tidy(axes: 'Axes', x: str) -> None:
    """Names the x axis, and leaves a light grid as the only frame."""
    axes.set_xlabel(x)
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)


def show_image(axes: 'Axes', image: Tensor) -> None:
    """Draws an image, (C, H, W) in [0, 1]: grey, RGB, or of many channels, whose mean is shown."""
    colours = image if image.shape[0] == 3 else image.mean(dim=0, keepdim=True).expand(3, -1, -1)
    axes.imshow(colours.permute(1, 2, 0).clamp(0, 1).cpu().numpy())
    axes.set(xticks=[], yticks=[])


@dataclass(frozen=True)
class Point:
    """A model in a plot."""

    label: str  # a line joins points of the same: one model with several budgets
    cost: float  # above 0
    accuracy: float  # in percent
    error: float | None = None  # half the length of the error bar, in points


@dataclass(frozen=True)
class Panel:
    """Accuracy against cost, one of several plots in a figure."""

    points: Sequence[Point]
    x: str = 'GMACs per image'
    y: str = 'top-1 accuracy (%)'


def plot_accuracy(rows: Sequence[Sequence[Panel]], path: str | Path) -> None:
    """Saves a figure of rows of panels as PNG (or by another suffix, PDF or SVG), costs on logarithmic axes.

    One legend is for all: every panel has the same models in the same order.

    Raises:
        UserError: If a panel has no points, or costs that are not above 0.
    """
    with needing('train', 'plots are drawn with'):
        from matplotlib.figure import Figure

    panels = [panel for row in rows for panel in row]
    for panel in panels:
        if not panel.points:
            raise UserError('points must not be empty')
        for point in panel.points:
            if not point.cost > 0:
                raise UserError(f'{panel.x} must be above 0 on a logarithmic axis, got {point}')
    labels = list(dict.fromkeys(point.label for point in panels[0].points))
    columns = 2 if max(map(len, labels)) > 24 else 3
    legend = 0.22 * -(-len(labels) // columns)  # inches
    figure = Figure(figsize=(5 * len(rows[0]), 3.6 * len(rows) + legend), dpi=150, layout='constrained')
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=True):
        lines = _draw(axes, panel, labels)
    figure.legend(lines, labels, loc='outside lower center', ncols=columns, frameon=False, fontsize='small')
    save_figure(figure, path)


def _draw(axes: 'Axes', panel: Panel, labels: Sequence[str]) -> list[Any]:
    """The points, with what the axes are; returns what stands for each label in a legend."""
    drawn = []
    for i, label in enumerate(labels):
        points = sorted((point for point in panel.points if point.label == label), key=lambda point: point.cost)
        line = axes.errorbar(
            [point.cost for point in points],
            [point.accuracy for point in points],
            [point.error or 0 for point in points] if any(point.error is not None for point in points) else None,
            **dict(line_style(i), markersize=7, linewidth=1, capsize=3),
        )
        drawn.append(line)
    axes.set_xscale('log')
    axes.margins(x=0.08, y=0.15)
    log_axis(axes.xaxis)
    axes.set_ylabel(panel.y)
    tidy(axes, panel.x)
    return drawn
