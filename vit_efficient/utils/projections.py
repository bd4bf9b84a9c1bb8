"""Linear layers, and what users put in their place: quantised ones, adapters such as LoRA, wrappers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.utils.compat import own_parameters


class Rows:
    """Some rows of a linear layer, as a layer of their own.

    Args:
        weight, bias: (out, in), (out,) or None.
        separate: Whether the bias is added to what the product has been rounded to.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, separate: bool = False):
        self.weight, self.bias, self.separate = weight, bias, separate

    def __call__(self, x: Tensor) -> Tensor:
        if self.separate and self.bias is not None:
            return F.linear(x, self.weight) + self.bias
        return F.linear(x, self.weight, self.bias)


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer does what its weight says: no adapter, pruning or parametrisation."""
    return type(module) is nn.Linear and 'weight' in own_parameters(module) and 'forward' not in vars(module)


def bias_of(projection: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """What a projection adds to each token of its input x (B, N, in): (out,), or None where that is nothing.

    A layer that is no plain one may have no bias to read, or adds more: what it makes of zeros is asked for.
    """
    if isinstance(projection, Rows) or is_plain(projection):
        return projection.bias
    return projection(x.new_zeros(1, 1, x.shape[-1]))[0, 0]


def kind_of_weights(projection: nn.Module) -> dict[str, Any]:
    """Device and dtype for weights beside those of a projection: PyTorch's defaults where it has none that are real."""
    weights = next((p for p in projection.parameters() if p.is_floating_point()), torch.empty(0))
    return {'device': weights.device, 'dtype': weights.dtype}


def channels_of(projection: nn.Module) -> int:
    """The channels that a projection takes."""
    return next(module.in_features for module in projection.modules() if hasattr(module, 'in_features'))
