"""Every model of a table against the first, on the same images with the same seeds."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_efficient.report.runs import Entry
from vit_efficient.report.statistics import compare, interval_of_mean
from vit_efficient.report.table import Column, Table

Predictions = list[dict[str, str]]  # a run's predictions.csv
Pairs = list[tuple[Predictions, Predictions]]  # of the first model and another one, for each seed


def compare_with_first(entries: Sequence[Entry]) -> str:
    """The tables of the comparison, with what they mean, and why some models are not in them."""
    first, *others = entries
    of_first = _predictions(first)
    of_images, of_patches, remarks = [], [], []
    for other in others:
        of_other = _predictions(other)
        pairs = [(of_first[seed], of_other[seed]) for seed in of_first if seed in of_other]
        if not pairs:
            remarks.append(f'{other.label} and {first.label} have no seed in common.\n')
        elif any(_images(ours) != _images(theirs) for ours, theirs in pairs):
            remarks.append(f'{other.label} was measured on other validation images than {first.label}.\n')
        else:
            columns = pairs[0][0][0]
            if 'predicted' in columns:
                of_images.append({'model': other.label, **_compare_answers(pairs)})
            if 'patch_accuracy' in columns:
                of_patches.append({'model': other.label, **_compare_patches(pairs)})
    parts = []
    if of_images:
        parts.append(
            _table(f'against {first.label}', of_images)
            + '\nPaired by image and seed. p: exact McNemar test, pairs of all seeds pooled. Interval: bootstrap over '
            'images, each with all its seeds.\n'
        )
    if of_patches:
        parts.append(
            _table(f'patches, against {first.label}', of_patches)
            + '\nShare of patches that are right, paired by image and seed. Interval: bootstrap over images.\n'
        )
    return '\n'.join(parts) + ''.join(remarks)


def _table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    columns = [
        Column('model', title),
        Column('pairs', 'images × seeds'),
        Column('only_first', 'only the first right'),
        Column('only_this', 'only this one right'),
        Column('difference', 'difference (points)', 2),
        Column('interval', '95 % interval'),
        Column('p'),
    ]
    return Table([column for column in columns if column.key in rows[0]], rows).render()


def _predictions(entry: Entry) -> dict[int, Predictions]:
    """What the runs of a recipe predict, by seed. Images that are made up are known by what they are made with."""
    found = {}
    for config, run in zip(entry.configs, entry.runs, strict=True):
        made_with = json.dumps({**config.data.args, **config.data.val_args}, sort_keys=True)
        found[config.seed] = [{**row, 'made_with': made_with} for row in run.predictions()]
    return found


def _images(rows: Predictions) -> list[tuple[str | None, ...]]:
    return [(row['index'], row['file'], row.get('label'), row['made_with']) for row in rows]


def _compare_answers(pairs: Pairs) -> dict[str, Any]:
    ours, theirs = (
        [[row['label'] == row['predicted'] for row in rows] for rows in runs] for runs in zip(*pairs, strict=True)
    )
    found = compare(ours, theirs)
    return {
        'pairs': found.pairs,
        'only_first': found.only_first,
        'only_this': found.only_other,
        'difference': found.difference,
        'interval': f'{found.low:+.2f} … {found.high:+.2f}',
        'p': f'{found.p:.2g}',
    }


def _compare_patches(pairs: Pairs) -> dict[str, Any]:
    ours, theirs = (
        np.array([[float(row['patch_accuracy']) for row in rows] for rows in runs]) for runs in zip(*pairs, strict=True)
    )
    gains = (theirs - ours).mean(axis=0)
    low, high = interval_of_mean(gains)
    return {'pairs': ours.size, 'difference': float(gains.mean()), 'interval': f'{low:+.2f} … {high:+.2f}'}
