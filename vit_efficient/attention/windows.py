"""The grid cut into windows, and tokens in another order than that of the grid."""

from typing import NamedTuple

import torch
from torch import Tensor

from vit_efficient.grid import larger, smaller
from vit_efficient.utils.device import on_gpu


class Run(NamedTuple):
    """Windows of the same side, one after the other along an axis."""

    start: int
    number: int
    side: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.number * self.side)


def runs(length: int, side: int, shift: bool) -> list[Run]:
    """The windows along an axis; those at its ends may be smaller.

    Args:
        length: The patches along the axis.
        side: Those of a window.
        shift: Whether the first window has half the side, rounded down.
    """
    if side >= length:
        return [Run(0, 1, length)]
    first = side // 2 if shift else 0
    number, last = (length - first) // side, (length - first) % side  # torch.compile has no divmod of symbols
    found = Run(0, 1, first), Run(first, number, side), Run(length - last, 1, last)
    return [run for run in found if run.number and run.side]


def padding(length, side: int, shift: bool) -> tuple:
    """What to put before an axis to make its windows whole, and their number; no branch on the length, a symbol."""
    shifted = smaller(1, larger(0, length - side)) if shift else 0  # 1 where there are several windows
    before = shifted * (-(side // 2) % side)
    return before, (before + length + side - 1) // side


def permuted(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`x.index_select(-2, order)`: (…, N, C) → (…, N, C), where `order` is a permutation and `inverse` its inverse."""
    return Permutation.apply(x, order, inverse) if on_gpu(x) else x.index_select(-2, order)


class Permutation(torch.autograd.Function):
    """`x.index_select(-2, order)`, whose gradient is gathered by the inverse of the order.

    PyTorch would add it up: on a GPU with atomics, slower, and in any order.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(-2, order)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return Permutation.apply(gradient, inverse, order), None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_: None) -> Tensor:
        return tangent.index_select(-2, ctx.saved_tensors[0])
