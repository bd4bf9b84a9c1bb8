"""The grid of image patches and the prefix tokens before it; and the arithmetic of smaller grids of its aspect."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

import torch

from vit_efficient.utils.checks import as_integer

SYMBOLS = (torch.SymInt, torch.fx.Proxy)  # of torch.export and FX


@dataclass(frozen=True)
class PatchGrid:
    """The layout of N = prefix + height · width tokens.

    The first `prefix` tokens are not patches (class token, registers); the patches follow in row-major order. The grid
    is a value: it is made once per forward pass, where the patches are embedded, and handed down with the tokens.

    Args:
        height: Rows of patches.
        width: Columns of patches.
        prefix: Tokens before the patches.

    Raises:
        UserError: If `height` or `width` is below 1, or `prefix` below 0.
    """

    height: int
    width: int
    prefix: int = 0

    def __post_init__(self):
        for name, least in (('height', 1), ('width', 1), ('prefix', 0)):
            value = getattr(self, name)
            # Sizes that are symbols (torch.export, FX) are taken as they are: comparing them would fix their value.
            # Those of a jit trace are tensors.
            if (type(value) is int and value >= least) or isinstance(value, SYMBOLS):
                continue
            if torch.is_tensor(value) and torch.jit.is_tracing():
                continue
            what = f'an integer of at least {least} in a PatchGrid'
            object.__setattr__(self, name, as_integer(name, value, least, what))

    @property
    def num_patches(self) -> int:
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.prefix + self.height * self.width


@dataclass(frozen=True)
class PackedGrids:
    """The layout of images of several sizes, one after the other in one sequence (1, T, C), those of one size together.

    There is no padding: T is the sum of their tokens. What mixes tokens does so in each image.

    Args:
        groups: A grid, and how many images have it.
    """

    groups: tuple[tuple[PatchGrid, int], ...]

    def split(self, x: torch.Tensor, num_tokens: Callable[[PatchGrid], int] | None = None) -> list[torch.Tensor]:
        """(1, T, C) → (images, N, C) of each group

        Args:
            num_tokens: The tokens of an image of a grid, where they are not all that it has.
        """
        counts = [grid.num_tokens if num_tokens is None else num_tokens(grid) for grid, _ in self.groups]
        sizes = [count * images for count, (_, images) in zip(counts, self.groups, strict=True)]
        return [part[0].unflatten(0, (-1, count)) for part, count in zip(x.split(sizes, dim=1), counts, strict=True)]

    @staticmethod
    def join(parts: Iterable[torch.Tensor]) -> torch.Tensor:
        """(images, N, C) of each group → (1, T, C)"""
        return torch.cat([part.flatten(0, 1) for part in parts])[None]


def plain_sizes(sizes: Iterable) -> tuple:
    """Sizes as plain numbers under `torch.jit.trace` too, where they would be tensors; otherwise as they are.

    A jit trace is of one image size; the warning that says so at each size would be one per attention.
    """
    if not torch.jit.is_tracing():
        return tuple(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        return tuple(int(size) if torch.is_tensor(size) else size for size in sizes)


def smaller(a, b):
    """min(a, b) for sizes that may be symbols; `torch.sym_min` of plain ones does not compile (torch 2.10)."""
    return min(a, b) if type(a) is int and type(b) is int else torch.sym_min(a, b)


def larger(a, b):
    """max(a, b), likewise."""
    return max(a, b) if type(a) is int and type(b) is int else torch.sym_max(a, b)


# What follows is integer arithmetic with neither branches on sizes nor float functions of them, so that torch.export
# can leave height and width open.


def scaled_grid(height, width, *, count: int | None = None, ratio: float | None = None) -> tuple:
    """The largest (h, w) of the grid's aspect, h = ⌊s · height⌋ and w = ⌊s · width⌋ (at least 1), within a budget.

    Args:
        height, width: The sides of the grid.
        count: The most cells, h · w; needs sizes that are no symbols. One of count and ratio.
        ratio: The same as a fraction of height · width.
    """
    if ratio is None:
        most = min(count, height * width)
        h, w = floor_sqrt(most * height // width), floor_sqrt(most * width // height)
    else:
        most, scale = fraction_of(height * width, ratio), math.sqrt(ratio)
        h, w = fraction_of(height, scale), fraction_of(width, scale)
    h, w = larger(1, h), larger(1, w)
    # Beyond (h, w), one side can grow on its own until the other's turn comes, or the budget is spent.
    taller = smaller(most // w, (height * (w + 1) - 1) // width)
    wider = smaller(most // h, (width * (h + 1) - 1) // height)
    return larger(1, taller), larger(1, wider)


def floor_sqrt(n) -> int:
    """⌊√n⌋."""
    if not torch.compiler.is_compiling():
        return math.isqrt(n)
    root = 0
    while (root + 1) * (root + 1) <= n:  # n may be a symbol, which can be compared and no more
        root += 1
    return root


def fraction_of(count, ratio: float):
    """⌊count · ratio⌋; a ratio that was rounded to a float counts as the simple fraction it stands for."""
    exact = Fraction(float(ratio)).limit_denominator(10**6)
    return count * exact.numerator // exact.denominator
