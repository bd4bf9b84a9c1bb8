"""Tables as Markdown, CSV and JSON, and plots of accuracy against cost."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_efficient.report.figures import line_style
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import save_figure

FORMATS = ('markdown', 'csv', 'json')
NOTHING = '–'  # an empty cell, where a reader is to see that it is empty


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        key: Its name in rows, CSV and JSON.
        title: Its heading in Markdown; the key by default.
        digits: Decimals of numbers in Markdown; None shows them as they are. CSV and JSON hold them unrounded.
        spread: The key of another column, which Markdown shows in this one's cells after a ±.
    """

    key: str
    title: str = ''
    digits: int | None = None
    spread: str = ''

    def show(self, row: Mapping[str, Any]) -> str:
        """The cell of a row, in Markdown."""
        spread = row[self.spread] if self.spread else None
        return self._text(row[self.key]) + ('' if spread is None else f' ± {self._text(spread)}')

    def _text(self, value: Any) -> str:
        if value is None:
            return NOTHING
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return f'{value:,}' if self.digits is None else f'{value:,.{self.digits}f}'
        return str(value).replace('|', r'\|').replace('\n', ' ')


class Table:
    """Rows under columns.

    Args:
        columns: In order; a name stands for a column of that key.
        rows: Mappings by column key. A missing key, None and a number that is not finite are empty cells.

    Raises:
        UserError: If a row has a key that is no column's.
    """

    def __init__(self, columns: Sequence[Column | str], rows: Sequence[Mapping[str, Any]] = ()):
        self.columns = [Column(column) if isinstance(column, str) else column for column in columns]
        keys = [column.key for column in self.columns]
        for row in rows:
            for key in row:
                if key not in keys:
                    raise UserError(f'no column {key!r} in a table of {", ".join(keys)}')
        self.rows = [{key: None if _is_nothing(row.get(key)) else row[key] for key in keys} for row in rows]

    def render(self, format: str = 'markdown') -> str:
        """The table as text that ends with a newline.

        Raises:
            UserError: If the format is not one of `FORMATS`.
        """
        if format not in FORMATS:
            raise UserError(f'format must be one of {", ".join(FORMATS)}, got {format=}')
        return getattr(self, f'_{format}')()

    def _markdown(self) -> str:
        """Padded, so that it reads as plain text too; numbers to the right."""
        spreads = {column.spread for column in self.columns}
        columns = [column for column in self.columns if column.key not in spreads]
        heads = [column.title or column.key for column in columns]
        cells = [[column.show(row) for column in columns] for row in self.rows]
        numeric = [all(isinstance(row[c.key], (int, float, type(None))) for row in self.rows) for c in columns]
        widths = [max(3, *(len(line[i]) for line in [heads, *cells])) for i in range(len(heads))]

        def line(texts: Sequence[str]) -> str:
            padded = (f'{text:{">" if n else "<"}{w}}' for text, w, n in zip(texts, widths, numeric, strict=True))
            return f'| {" | ".join(padded)} |\n'

        rule = ['-' * (w - 1) + (':' if n else '-') for w, n in zip(widths, numeric, strict=True)]
        return ''.join(line(texts) for texts in [heads, rule, *cells])

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, [column.key for column in self.columns], lineterminator='\n')
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def _json(self) -> str:
        return json.dumps(self.rows, indent=2, ensure_ascii=False) + '\n'


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


@dataclass(frozen=True)
class Point:
    """A model in a plot.

    Args:
        label: Its name in the legend. A line joins points of the same name.
        cost: Such as billions of multiply-accumulates of an image; above 0.
        accuracy: In percent.
        error: Half the length of the error bar, in points; None for no bar.
    """

    label: str
    cost: float
    accuracy: float
    error: float | None = None


@dataclass(frozen=True)
class Panel:
    """Accuracy against cost, one of several plots in a figure.

    Args:
        points: The models.
        x: What the cost is.
        y: What the accuracy is.
    """

    points: Sequence[Point]
    x: str = 'GMACs per image'
    y: str = 'top-1 accuracy (%)'


def plot_accuracy(rows: Sequence[Sequence[Panel]], path: str | Path) -> None:
    """Saves a figure of rows of panels as PNG (or by another suffix, PDF or SVG), costs on logarithmic axes.

    One legend is for all: every panel has the same models in the same order.

    Raises:
        UserError: If a panel has no points, or costs that are not above 0.
    """
    from matplotlib.figure import Figure

    panels = [panel for row in rows for panel in row]
    _check(panels)
    labels = list(dict.fromkeys(point.label for point in panels[0].points))
    columns = 2 if max(map(len, labels)) > 24 else 3
    legend = 0.22 * -(-len(labels) // columns)  # inches
    figure = Figure(figsize=(5 * len(rows[0]), 3.6 * len(rows) + legend), dpi=150, layout='constrained')
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=True):
        lines = _draw(axes, panel, labels)
    figure.legend(lines, labels, loc='outside lower center', ncols=columns, frameon=False, fontsize='small')
    save_figure(figure, path)


def _check(panels: Sequence[Panel]) -> None:
    for panel in panels:
        if not panel.points:
            raise UserError('points must not be empty')
        for point in panel.points:
            if not point.cost > 0:
                raise UserError(f'{panel.x} must be above 0 on a logarithmic axis, got {point}')


def _draw(axes, panel: Panel, labels: Sequence[str]) -> list:
    """The points, with what the axes are; returns what stands for each label in a legend."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    drawn = []
    for i, label in enumerate(labels):
        points = sorted((point for point in panel.points if point.label == label), key=lambda point: point.cost)
        line = axes.errorbar(
            [point.cost for point in points],
            [point.accuracy for point in points],
            [point.error or 0 for point in points] if any(point.error is not None for point in points) else None,
            **line_style(i),
            markersize=7,
            linewidth=1,
            capsize=3,
        )
        drawn.append(line)
    axes.set_xscale('log')
    costs = [point.cost for point in panel.points]
    ratio = max(costs) / min(costs)
    axes.margins(x=0.08, y=0.15)
    # Within a decade or two the powers of ten are too few marks to read.
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 5 else (1, 2, 5) if ratio < 50 else (1,))
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
    return drawn
