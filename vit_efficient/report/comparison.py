"""Every model of a table against the first, on the same images with the same seeds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_efficient.report.masks import compare_areas
from vit_efficient.report.runs import Entry
from vit_efficient.report.table import Column, Table
from vit_efficient.train.tasks import nothing
from vit_efficient.utils.errors import UserError

Predictions = list[dict[str, str]]  # a run's predictions.csv
Pairs = list[tuple[Predictions, Predictions]]  # of the first model and another one, for each seed


def compare_with_first(entries: Sequence[Entry]) -> str:
    """The tables of the comparison, with what they mean, and why some models are not in them."""
    first, *others = entries
    of_first = _predictions(first)
    of_images, remarks, single = [], [], []
    of_parts: dict[str, list[dict[str, Any]]] = {'patch': [], 'pixel': []}
    of_areas, areas_of_first = [], _areas(first)
    none = nothing(first.saved.model.pretrained_cfg.get('label_names') or []) if areas_of_first else None
    for other in others:
        of_other = _predictions(other)
        pairs = [(of_first[seed], of_other[seed]) for seed in of_first if seed in of_other]
        if not pairs:
            remarks.append(f'{other.label} and {first.label} have no seed in common.\n')
        elif any(_images(ours) != _images(theirs) for ours, theirs in pairs):
            remarks.append(f'{other.label} was measured on other validation images than {first.label}.\n')
        else:
            single += [other.label] if len(pairs) == 1 else []
            columns = pairs[0][0][0]
            if 'predicted' in columns:
                of_images.append({'model': other.label, **_compare_answers(pairs)})
            for part, rows in of_parts.items():
                if f'{part}_accuracy' in columns:
                    rows.append({'model': other.label, **_compare_parts(pairs, f'{part}_accuracy')})
            areas = _areas(other)
            if found := [(areas_of_first[seed], areas[seed]) for seed in areas_of_first if seed in areas]:
                of_areas.append({'model': other.label, **compare_areas(found, none)})
    parts = []
    of_one_seed = _about_one_seed(single, len(others) - len(remarks))
    if of_images:
        about = 'Paired by image and seed. p: exact McNemar test, pairs of all seeds pooled. Interval: bootstrap over '
        about += f'images, each with all its seeds.{of_one_seed}'
        parts.append(f'{_table(f"against {first.label}", of_images)}\n{about}\n')
    for part, plural in (('patch', 'patches'), ('pixel', 'pixels')):
        if of_parts[part]:
            about = f'Share of {plural} that are right, paired by image and seed. Interval: bootstrap over images.'
            about += of_one_seed
            parts.append(f'{_table(f"{plural}, against {first.label}", of_parts[part])}\n{about}\n')
    if of_areas:
        what = 'mIoU' if none is None else 'foreground mIoU'
        about = f'Interval: bootstrap over images, each with all its seeds.{of_one_seed}'
        parts.append(f'{_table(f"{what}, against {first.label}", of_areas)}\n{about}\n')
    return '\n'.join(parts) + ''.join(remarks)


def _about_one_seed(labels: Sequence[str], compared: int) -> str:
    """What is to be said of comparisons of a single seed; '' without such."""
    if not labels:
        return ''
    which = '' if len(labels) == compared else f' of {", ".join(labels)}'
    return (
        f' A single seed{which}: p and interval are over images only, for these very weights; what another seed would '
        'give, which may well differ by more, they do not tell.'
    )


def _table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    columns = [Column('model', title), Column('pairs', 'images × seeds')]
    columns += [Column('only_first', 'only the first right'), Column('only_other', 'only this one right')]
    columns += [Column('difference', 'difference (points)', 2), Column('interval', '95 % interval'), Column('p')]
    return Table([column for column in columns if column.key in rows[0]], rows).render()


def _predictions(entry: Entry) -> dict[int, Predictions]:
    """What the runs of a recipe predict, by seed. Images that are made up are known by what they are made with."""
    found = {}
    for config, run in zip(entry.configs, entry.runs, strict=True):
        made_with = json.dumps({**config.data.args, **config.data.val_args}, sort_keys=True)
        found[config.seed] = [{**row, 'made_with': made_with} for row in run.predictions()]
    return found


def _areas(entry: Entry) -> dict[int, np.ndarray]:
    """The areas of classes in masks, by seed, of runs that have them."""
    runs = [(config.seed, run) for config, run in zip(entry.configs, entry.runs, strict=True) if run.has_areas]
    return {seed: run.areas(entry.saved.model.num_classes) for seed, run in runs}


def _images(rows: Predictions) -> list[tuple[str | None, ...]]:
    return [(row['index'], row['file'], row.get('label'), row['made_with']) for row in rows]


def _compare_answers(pairs: Pairs) -> dict[str, Any]:
    ours, theirs = (
        [[row['label'] == row['predicted'] for row in rows] for rows in runs] for runs in zip(*pairs, strict=True)
    )
    found = vars(compare(ours, theirs)).copy()
    found['interval'] = f'{found.pop("low"):+.2f} … {found.pop("high"):+.2f}'
    return found | {'p': f'{found["p"]:.2g}'}


def _compare_parts(pairs: Pairs, column: str) -> dict[str, Any]:
    ours, theirs = (
        np.array([[float(row[column]) for row in rows] for rows in runs]) for runs in zip(*pairs, strict=True)
    )
    counted = np.isfinite(ours[0])  # of an image no pixel of which counts there is no share
    ours, theirs = ours[:, counted], theirs[:, counted]
    gains = (theirs - ours).mean(axis=0)
    low, high = interval_of_mean(gains)
    return {'pairs': ours.size, 'difference': float(gains.mean()), 'interval': f'{low:+.2f} … {high:+.2f}'}


@dataclass(frozen=True)
class Paired:
    """A classifier against another on the same images."""

    pairs: int  # answers compared: images × seeds
    only_first: int  # pairs in which only the first classifier is right
    only_other: int
    p: float  # of McNemar's exact test
    difference: float  # accuracy of the other classifier minus that of the first, in points
    low: float  # of its 95 % interval
    high: float


def compare(first: Sequence[Sequence[bool]], other: Sequence[Sequence[bool]], resamples: int = 10_000) -> Paired:
    """Compares two classifiers, each trained with the same seeds.

    The p value is that of McNemar's exact test (the pairs in which just one is right, against a fair coin) on the pairs
    of all seeds pooled. It takes the pairs to be independent, which those of one image with several seeds are not
    quite. The interval does not: it is a percentile bootstrap over images, each with all of its seeds. Neither speaks
    of seeds that were not run.

    Args:
        first: (seeds, images), whether the answer is right.
        other: (seeds, images), in the same order.
        resamples: Of the bootstrap, which is seeded.

    Raises:
        UserError: If the two differ in shape, or are empty.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(other, dtype=bool)
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise UserError(f'answers must be two equal (seeds, images), got {a.shape} and {b.shape}')
    only_first, only_other = int((a & ~b).sum()), int((b & ~a).sum())
    gains = 100 * (b.astype(float) - a).mean(axis=0)
    low, high = interval_of_mean(gains, resamples)
    return Paired(a.size, only_first, only_other, mcnemar(only_first, only_other), float(gains.mean()), low, high)


def interval_of_mean(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of what was drawn independently: a percentile bootstrap, seeded."""
    # Equal values are alike: resampling them is drawing how many of each there are.
    distinct, counts = np.unique(values, return_counts=True)
    n = len(values)
    draws = np.random.default_rng(0).multinomial(n, counts / n, size=resamples)
    low, high = np.quantile(draws @ distinct / n, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(only_first: int, only_other: int) -> float:
    """The two-sided p value of McNemar's exact test: of a split at least as uneven, by tosses of a fair coin."""
    n, fewer = only_first + only_other, min(only_first, only_other)
    ways = total = 1
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)  # of integers: right however small
