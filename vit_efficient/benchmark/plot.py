"""Times of layers or models as a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_efficient.report.plot import line_style
from vit_efficient.utils.files import save_figure


def plot_times(rows: Sequence[dict[str, Any]], path: str | Path, size: str = 'tokens', name: str = 'attention') -> None:
    """Saves a plot of time against size, both logarithmic, as PNG: a panel for each work, a line for each name.

    Args:
        rows: Of `benchmark_layer` or, with size 'img_size' and name 'model', of `benchmark_models`; those without times
            are left out.
        path: Of the file.
        size, name: Keys of the rows. The name of the first row is drawn in black.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullLocator, StrMethodFormatter

    first = rows[0][name] if rows else ''
    rows = [row for row in rows if row['milliseconds'] is not None]
    works = list(dict.fromkeys(row['work'] for row in rows))
    labels = list(dict.fromkeys(row[name] for row in rows if row[name] != first))
    styles = {first: dict(color='black', marker='*', markersize=9, linewidth=2)}
    styles |= {label: line_style(i) for i, label in enumerate(labels)}
    figure = Figure(figsize=(11, 5), dpi=150, layout='constrained')
    panels = figure.subplots(1, max(1, len(works)), sharey=True, squeeze=False)[0]
    handles = {}
    for axes, work in zip(panels, works, strict=False):
        for label, style in styles.items():
            points = sorted((r[size], r['milliseconds']) for r in rows if (r['work'], r[name]) == (work, label))
            if points:
                handles[label] = axes.plot(*zip(*points, strict=True), label=label, **style)[0]
        axes.set(xscale='log', yscale='log', title=work, xlabel={'tokens': 'N', 'img_size': 'px'}[size])
        axes.set_xticks(sorted({row[size] for row in rows}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
        axes.yaxis.set_major_formatter(StrMethodFormatter('{x:,g}'))
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # none over more than a decade
        axes.grid(which='both', alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
    panels[0].set_ylabel('ms')
    # The legend from the slowest down, as the lines end on the right.
    ends = {row[name]: (row[size], row['milliseconds']) for row in sorted(rows, key=lambda r: r[size])}
    order = sorted(handles, key=ends.get, reverse=True)
    figure.legend([handles[label] for label in order], order, loc='outside right center', frameon=False)
    save_figure(figure, path)
