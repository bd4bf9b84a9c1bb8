"""Where the tokens of a vision transformer come from: the grid of image patches, and the prefix tokens before it."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch


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
        ValueError: If `height` or `width` is below 1, or `prefix` below 0.
    """

    height: int
    width: int
    prefix: int = 0

    def __post_init__(self):
        for name, least in (('height', 1), ('width', 1), ('prefix', 0)):
            value = getattr(self, name)
            # Sizes that are symbols (torch.export, FX) are taken as they are: comparing them would fix their value.
            if type(value) in (int, float, bool, str) and (type(value) is not int or value < least):
                raise ValueError(f'PatchGrid: {name} must be an integer of at least {least}, got {name}={value!r}')

    @property
    def num_patches(self) -> int:
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.prefix + self.height * self.width


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
