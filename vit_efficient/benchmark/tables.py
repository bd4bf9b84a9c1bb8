"""What benchmarks have measured: as tables of text, as plots, and as files."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vit_efficient.benchmark.layers import PASSES
from vit_efficient.benchmark.timing import check_request, slope
from vit_efficient.report.plot import line_style, log_axis, tidy
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.files import save_figure, write_text
from vit_efficient.utils.packages import needing

logger = logging.getLogger(__name__)

Rows = Sequence[dict[str, Any]]
Lines = dict[tuple[str, str], dict[int, float]]  # by attention and pass: times by number of tokens

_SWEPT = [Column('batch_size', 'batch'), Column('dtype')]
_WAY = [Column('sdpa', 'SDPA'), Column('graph', 'CUDA graph')]
_TIMES = [Column('milliseconds', 'ms', 1), Column('median_milliseconds', 'median ms', 1)]
_HOST = Column('host_milliseconds', 'host ms', 3)
_TIMES += [Column('spread_percent', 'spread %', 1), Column('rounds'), _HOST]
_FRESH = Column('fresh_inputs')
# Columns of CSV and JSON only where something stands in them.
_RARE = [*_SWEPT, *_WAY, _HOST, _FRESH]
_GMACS = Column('gmacs', 'GMACs', 2)
_PEAK = Column('peak_mib', 'peak MiB', 1)
_RATE = Column('peak_share', 'of matmul rate', 2)
_ERROR = Column('error')
_ABOUT_RATE = (
    'Of matmul rate: multiply-accumulates per second, a backward pass counted as two forward passes, as a fraction of '
    'those of a large matrix product. '
)


@dataclass(frozen=True)
class Report:
    """How the rows of a benchmark are shown."""

    render: Callable[[Rows, str, str], str]  # from rows, a format, and what Markdown says below of the measurement
    size: str  # the key of rows that tells the size
    name: str  # the key that tells what was timed
    head: str  # a block's size in words, a format of it

    def follow(self, blocks: Iterable[Rows], format: str, setup: str, out: Path | None = None) -> str:
        """The table of all blocks that a benchmark yields; each is logged, and written, as it comes: the rest may fail.

        Beside `out`, the file of the table, go the rows as CSV and a plot.
        """
        rows, text = [], ''
        for block in blocks:
            rows += block
            logger.info('%s, %s%s: done', self.head.format(block[0][self.size]), block[0]['work'], series(block[0]))
            text = self.render(rows, format, setup)
            if out:
                write_text(out, text)
                write_text(out.with_suffix('.csv'), self.render(rows, 'csv', ''))
                plot_times(by_series(rows, self.name), out.with_suffix('.png'), self.size, self.name)
        return text


def sweep(
    batch_sizes: Sequence[int], dtypes: Sequence[str], max_seconds: float, blocks_of: Callable[..., Iterable[Rows]]
) -> Iterator[list[dict[str, Any]]]:
    """The blocks of rows for each batch size and dtype; rows say theirs where there are several.

    Mistakes are found before anything is timed: `blocks_of`, which makes those of one, does so too.
    """
    check_request((), max_seconds, [batch_sizes, dtypes])
    parts = []
    for batch_size, dtype in itertools.product(batch_sizes, dtypes):
        said = dict(batch_size=batch_size) if len(batch_sizes) > 1 else {}
        said |= dict(dtype=dtype) if len(dtypes) > 1 else {}
        parts.append((said, blocks_of(batch_size, getattr(torch, dtype))))
    return ([said | row for row in block] for said, blocks in parts for block in blocks)


def series(row: dict[str, Any]) -> str:
    """What tells the rows of a sweep apart, beside size and work."""
    batch = f', batch {row["batch_size"]}' if 'batch_size' in row else ''
    return batch + (f', {row["dtype"]}' if 'dtype' in row else '')


def by_series(rows: Rows, name: str) -> list[dict[str, Any]]:
    """The rows under names that no two of one size and work have: a line of a plot, and its slope, is of one name."""
    return [row | {name: row[name] + series(row)} for row in rows]


def render_models(rows: Rows, format: str, setup: str = '') -> str:
    """The table of models (see `Report.render`), from the rows of `benchmark_models`."""
    columns = [*_SWEPT, Column('img_size', 'px'), Column('work'), Column('model'), *_WAY]
    columns += [Column('parameters_m', 'parameters (M)', 1), _GMACS, *_TIMES]
    columns += [Column('images_per_second', 'images/s', 2), Column('ratio', '× first', 2), _PEAK, _RATE, _ERROR]
    if format != 'markdown':
        return _with_content([*columns, _FRESH], rows, format)
    table = _with_content(columns, rows)
    return (
        f'{table}\nLeast and median of rounds in which the models take turns; spread: from least to most, of the '
        'median; × first: ratio of the least times. Peak: what the work adds to the memory of weights, inputs and the '
        f'state of the optimiser. {_ABOUT_RATE}{_about_inputs(rows, "model")}GMACs of a forward pass of all images. '
        f'{setup}'
    )


def render_layers(rows: Rows, format: str, setup: str = '') -> str:
    """The table of layers (see `Report.render`), from the rows of `benchmark_layer`.

    The slopes stand in a second table in Markdown, otherwise in a column.
    """
    lines: Lines = {}
    named = by_series(rows, 'attention')
    for row in named:
        line = lines.setdefault((row['attention'], row['work']), {})
        if row['milliseconds'] is not None:
            line[row['tokens']] = row['milliseconds']
    slopes = {key: slope(list(line.items())) for key, line in lines.items()}
    columns = [*_SWEPT, Column('tokens', 'N'), Column('work'), Column('attention'), *_WAY, Column('attended'), _GMACS]
    columns += [*_TIMES, Column('ratio', '× exact', 2), Column('to_part', 'to its products', 2), _RATE, _PEAK]
    if format != 'markdown':
        rows = [row | dict(slope=slopes[of['attention'], of['work']]) for row, of in zip(rows, named, strict=True)]
        columns = [*columns, Column('slope'), _ERROR, _FRESH]
        columns = [c for c in columns if c not in _RARE or any(row.get(c.key) is not None for row in rows)]
        return Table(columns, [{c.key: row.get(c.key) for c in columns} for row in rows]).render(format)
    parts = [_with_content([*columns, _ERROR], rows)]
    notes = (
        'Least and median of rounds in which the layers take turns; spread: from least to most, of the median; '
        '× exact: ratio of the least times. '
    )
    if any(value is not None for value in slopes.values()):
        parts.append(_slopes(lines, slopes, list(dict.fromkeys(row['tokens'] for row in rows))))
        notes += 'Slope: of log time against log N, by least squares. '
    for key, note in {
        'to_part': 'To its products: its time over that of its matrix products, softmax and fused attention, one after '
        'the other on the same operands. ',
        'peak_share': _ABOUT_RATE,
        'peak_mib': 'Peak: what a pass adds to the memory of weights and inputs. ',
    }.items():
        notes += note * any(row.get(key) is not None for row in rows)
    notes += _about_inputs(rows, 'attention')
    return '\n'.join([*parts, f'{notes}GMACs of the forward pass. {setup}'])


def _about_inputs(rows: Rows, name: str) -> str:
    """What is to be said of the inputs, and of the host's time."""
    note = 'Host: until a call returns to Python, on a GPU that has nothing to do. '
    note *= any(row.get('host_milliseconds') is not None for row in rows)
    if fresh := dict.fromkeys(row[name] for row in rows if row.get('fresh_inputs')):
        note += f'The cost of {", ".join(fresh)} depends on the input: each call has one of its own, drawn before the '
        note += 'clock starts (a turn has 1 GiB of them at most; then they come again). '
    return note


def _slopes(lines: Lines, slopes: dict[tuple[str, str], float | None], tokens: Sequence[int]) -> str:
    """The table of slopes by attention and pass, and of those of all numbers of tokens that their lines lack."""
    rows = []
    for attention in dict.fromkeys(attention for attention, _ in lines):
        found = {work: slopes.get((attention, work)) for work in PASSES}
        left_out = [f'{n:,} {work}' for work in PASSES for n in tokens if n not in lines.get((attention, work), ())]
        rows.append({'attention': attention, **found, 'left_out': ', '.join(left_out) or None})
    heads = [Column('attention', 'slope'), *(Column(work, digits=2) for work in PASSES)]
    return _with_content([*heads, Column('left_out', 'without N =')], rows)


def _with_content(columns: Sequence[Column], rows: Rows, format: str = 'markdown') -> str:
    """The table without columns in which nothing stands; that a spread is not known is something."""
    columns = [c for c in columns if c.key == 'spread_percent' or any(row.get(c.key) is not None for row in rows)]
    return Table(columns, [{column.key: row.get(column.key) for column in columns} for row in rows]).render(format)


def plot_times(rows: Sequence[dict[str, Any]], path: str | Path, size: str = 'tokens', name: str = 'attention') -> None:
    """Saves a plot of time against size, both logarithmic, as PNG: a panel for each work, a line for each name.

    Args:
        rows: Of `benchmark_layer` or, with size 'img_size' and name 'model', of `benchmark_models`; those without times
            are left out. The name of the first row is drawn in black.
        path: The file.
        size, name: Keys of the rows.
    """
    with needing('train', 'plots are drawn with'):
        from matplotlib.figure import Figure

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
        axes.set(xscale='log', yscale='log', title=work)
        tidy(axes, {'tokens': 'N', 'img_size': 'px'}[size])
    for axes in panels[: len(works)]:  # which share their limits, known now
        log_axis(axes.xaxis, sorted({row[size] for row in rows}))
        log_axis(axes.yaxis)
    panels[0].set_ylabel('ms')
    # The legend from the slowest down, as the lines end on the right.
    ends = {row[name]: (row[size], row['milliseconds']) for row in sorted(rows, key=lambda r: r[size])}
    order = sorted(handles, key=ends.get, reverse=True)
    figure.legend([handles[label] for label in order], order, loc='outside right center', frameon=False)
    save_figure(figure, path)


LAYERS = Report(render_layers, 'tokens', 'attention', 'N = {:,}')
MODELS = Report(render_models, 'img_size', 'model', '{:,} px')
