"""Whether two classifiers differ, from their answers to the same images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vit_efficient.utils.errors import UserError


@dataclass(frozen=True)
class Paired:
    """A classifier against another on the same images.

    Attributes:
        pairs: Answers compared: images × seeds.
        only_first: Pairs in which only the first classifier is right.
        only_other: Pairs in which only the other one is.
        p: Of McNemar's exact test.
        difference: Accuracy of the other classifier minus that of the first, in points.
        low, high: 95 % interval of the difference.
    """

    pairs: int
    only_first: int
    only_other: int
    p: float
    difference: float
    low: float
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
