"""How well the outlines of classes are met, which the area of large ones hides.

Csurka, Larlus, Perronnin, "What is a good evaluation measure for semantic segmentation?", BMVC 2013.
"""

import math

import numpy as np

from vit_efficient.utils.packages import import_optional

TOLERANCE = 0.0075  # of the image's diagonal, as in the source


def boundary_f(predicted: np.ndarray, truth: np.ndarray, tolerance: float | None = None) -> float:
    """The boundary F-score of an image, from 0 to 1: the mean over the classes that it has, in truth or as predicted.

    Of a class, precision is the share of the pixels on its predicted outline that lie within the tolerance of its true
    one, and recall the converse; F is their harmonic mean. A pixel is on an outline if one of its eight neighbours in
    the image is of another class. Pixels that do not count, and those beside them, are on none.

    Args:
        predicted, truth: Classes (H, W), integers; a negative one in `truth` does not count.
        tolerance: In pixels; by default 0.0075 of the diagonal.

    Returns:
        F; NaN for an image without an outline.
    """
    cv2 = import_optional('cv2', 'distances between outlines are measured with', 'train', 'opencv-python-headless')
    if tolerance is None:
        tolerance = TOLERANCE * math.hypot(*truth.shape)
    counted = ~_grown(truth < 0)
    scores = []
    for label in np.union1d(predicted[truth >= 0], truth[truth >= 0]):
        ours, theirs = (_outline(classes == label) & counted for classes in (predicted, truth))
        if not ours.any() and not theirs.any():
            continue  # it fills the image, or touches what does not count only
        precision, recall = (_near(cv2, a, b, tolerance) for a, b in ((ours, theirs), (theirs, ours)))
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return float(np.mean(scores)) if scores else math.nan


def _near(cv2, pixels: np.ndarray, others: np.ndarray, tolerance: float) -> float:
    """The share of pixels that have one of the others within the tolerance."""
    if not pixels.any() or not others.any():
        return 0.0
    distance = cv2.distanceTransform((~others).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return float((distance[pixels] <= tolerance + 1e-4).mean())


def _outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that have a neighbour in the image that is none of it."""
    return mask & _grown(~mask)


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W), and the eight neighbours of each of its pixels."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
