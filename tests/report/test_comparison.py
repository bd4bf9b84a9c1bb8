import numpy as np
import pytest
from scipy.stats import binomtest

from vit_efficient.report.comparison import compare, mcnemar

pytestmark = pytest.mark.once


@pytest.mark.parametrize(('b', 'c'), [(0, 0), (1, 0), (5, 5), (3, 14), (30, 61), (900, 1100), (20, 3000)])
def test_mcnemar_against_scipy(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(c, b) == mcnemar(b, c)


def test_paired_comparison():
    draw = np.random.default_rng(1)
    first = draw.random((3, 2000)) < 0.9
    other = first ^ (draw.random((3, 2000)) < 0.04)
    found = compare(first, other)
    gains = (other.astype(float) - first).mean(axis=0)
    assert found.difference == pytest.approx(100 * gains.mean())
    assert found.pairs == 6000
    assert found.only_other - found.only_first == round(found.difference / 100 * 6000)
    assert found.p == pytest.approx(binomtest(found.only_first, found.only_first + found.only_other).pvalue)
    normal = 100 * 1.96 * gains.std() / 2000**0.5
    assert found.low == pytest.approx(found.difference - normal, abs=0.1)
    assert found.high == pytest.approx(found.difference + normal, abs=0.1)
    assert found == compare(first, other)


def test_paired_comparison_of_equals_and_of_bad_shapes():
    found = compare([[True, False]], [[True, False]])
    assert (found.p, found.difference, found.low, found.high) == (1, 0, 0, 0)
    for other in ([[True]], [True, False], []):
        with pytest.raises(ValueError, match='seeds, images'):
            compare([[True, False]], other)
