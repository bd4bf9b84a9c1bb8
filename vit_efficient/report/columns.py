"""The columns that several tables of runs have: costs, and accuracies as means over seeds."""

import statistics
from collections.abc import Sequence
from typing import Any

from vit_efficient.report.table import Column

# The accuracies of a table: what a column is called, and an axis of the plot.
ACCURACIES = {
    'top1': ('top-1 (%)', 'top-1 accuracy (%)'),
    'foreground_miou': ('foreground mIoU (%)', 'mIoU without the class none (%)'),
    'miou': ('mIoU (%)', 'mIoU (%)'),
}
COSTS = [Column('gmacs', 'GMACs', 4), Column('attention_gmacs', 'in attention', 4)]


def accuracy_columns(accuracies: Sequence[str]) -> list[Column]:
    """The columns of what `mean_and_spread` gives."""
    columns = []
    for name in accuracies:
        columns.append(Column(name, ACCURACIES[name][0], 2, spread=f'{name}_std'))
        columns.append(Column(f'{name}_std', digits=2))
    return columns


def mean_and_spread(results: Sequence[dict[str, Any]], accuracies: Sequence[str]) -> dict[str, float | None]:
    """The mean of each accuracy over seeds, and its standard deviation, None for one seed."""
    found: dict[str, float | None] = {}
    for name in accuracies:
        values = [result[name] for result in results]
        found[name] = statistics.fmean(values)
        found[f'{name}_std'] = statistics.stdev(values) if len(values) > 1 else None
    return found
