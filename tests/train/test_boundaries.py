import math

import numpy as np
import pytest

from vit_efficient.train.boundaries import boundary_f

NEIGHBOURS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]


def slow(predicted, truth, tolerance):
    """By lists of pixels."""
    height, width = truth.shape

    def around(row, column):
        places = ((row + i, column + j) for i, j in NEIGHBOURS)
        return [(r, c) for r, c in places if 0 <= r < height and 0 <= c < width]

    def outline(classes, label):
        found = []
        for row in range(height):
            for column in range(width):
                beside = around(row, column)
                counts = all(truth[place] >= 0 for place in [(row, column), *beside])
                if counts and classes[row, column] == label and any(classes[place] != label for place in beside):
                    found.append((row, column))
        return found

    scores = []
    labels = {
        c for classes in (predicted, truth) for c, t in zip(classes.flatten(), truth.flatten(), strict=True) if t >= 0
    }
    for label in labels:
        ours, theirs = outline(predicted, label), outline(truth, label)
        if not ours and not theirs:
            continue
        near = [
            sum(any(math.dist(a, b) <= tolerance for b in others) for a in pixels) / max(len(pixels), 1)
            for pixels, others in ((ours, theirs), (theirs, ours))
        ]
        scores.append(2 * near[0] * near[1] / sum(near) if sum(near) else 0.0)
    return np.mean(scores) if scores else math.nan


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('tolerance', [0, 1, 1.5, 2.3])
@pytest.mark.parametrize('ignored', [False, True])
def test_against_lists_of_pixels(seed, tolerance, ignored):
    rng = np.random.default_rng(seed)
    truth = np.kron(rng.integers(0, 3, (3, 4)), np.ones((4, 3), int)).astype(np.int16)
    predicted = np.roll(truth, rng.integers(-2, 3, 2), (0, 1)).astype(np.uint8)
    predicted[rng.random(truth.shape) < 0.05] = 3
    if ignored:
        truth[rng.integers(12) :, rng.integers(12) :] = -1
    assert boundary_f(predicted, truth, tolerance) == pytest.approx(slow(predicted, truth, tolerance), nan_ok=True)


def test_a_square_that_is_moved():
    truth = np.zeros((100, 100), np.int16)
    truth[20:60, 20:60] = 1
    for shift, least, most in ((0, 1, 1), (1, 1, 1), (10, 0, 0.7)):  # the tolerance is 1.06 px
        found = boundary_f(np.roll(truth, shift, 1).astype(np.uint8), truth)
        assert least <= found <= most


def test_images_without_an_outline():
    assert math.isnan(boundary_f(np.zeros((5, 6), np.uint8), np.zeros((5, 6), np.int16)))
    assert math.isnan(boundary_f(np.zeros((5, 6), np.uint8), np.full((5, 6), -1, np.int16)))
    predicted = np.zeros((5, 6), np.uint8)
    predicted[2, 2] = 1
    assert boundary_f(predicted, np.zeros((5, 6), np.int16)) == 0
