"""Draws the plots under recipes/ again, from the numbers that lie beside them: after a change of how plots look.

python tools/redraw.py [FOLDER]
"""

import csv
import re
import sys
from pathlib import Path
from typing import Any

from vit_efficient.benchmark.tables import LAYERS, MODELS, by_series, plot_times
from vit_efficient.report.accuracy import line_labels, panels_of
from vit_efficient.report.parts import ACCURACIES
from vit_efficient.report.plot import plot_accuracy
from vit_efficient.train import Config, load_recipe

ROOT = Path(__file__).resolve().parents[1]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, its numbers as numbers, its empty cells as None."""

    def value(text: str) -> Any:
        try:
            return float(text) if text else None
        except ValueError:
            return text

    with open(path, newline='', encoding='utf-8') as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def recipe_of(label: str, folder: Path) -> tuple[str, Config] | None:
    """The recipe of a model that a table calls NAME (RECIPE): the nearest of that name, from the table's folder up."""
    stem = re.search(r'\(([^)]+)\)$', label)
    while stem and folder != ROOT / 'recipes' and folder != folder.parent:
        if found := sorted(folder.rglob(f'{stem[1]}.yaml')):
            return stem[1], load_recipe(found[0])
        folder = folder.parent
    return None


def redraw(path: Path) -> None:
    """Draws the plot of a table: of accuracies (results.csv) or of times."""
    rows, out = read_rows(path), path.with_suffix('.png')
    if path.name == 'results.csv':
        labels = [row['model'] for row in rows]
        accuracies = [name for name in ACCURACIES if name in rows[0]]
        plot_accuracy(
            panels_of(rows, line_labels(labels, [recipe_of(x, path.parent) for x in labels]), accuracies), out
        )
    else:
        report = LAYERS if LAYERS.size in rows[0] else MODELS
        plot_times(by_series(rows, report.name), out, report.size, report.name)


def main(folder: Path) -> None:
    for path in sorted(folder.rglob('*.csv')):
        if path.with_suffix('.png').exists():
            redraw(path)
            print(path.with_suffix('.png'))


if __name__ == '__main__':
    main(Path(*sys.argv[1:2] or [ROOT / 'recipes']))
