"""Linear layers, and what users put in their place: quantised ones, adapters such as LoRA, wrappers."""

from typing import Any

import torch
from torch import Tensor, nn

from vit_efficient.utils.compat import own_parameters


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer does what its weight says: no adapter, pruning or parametrisation."""
    return type(module) is nn.Linear and 'weight' in own_parameters(module) and 'forward' not in vars(module)


def bias_of(projection: nn.Module, x: Tensor) -> Tensor | None:
    """What a projection adds to each token of its input x (B, N, in): (out,), or None where that is nothing.

    A layer that is no plain one may have no bias to read, or adds more: what it makes of zeros is asked for.
    """
    return projection.bias if is_plain(projection) else projection(x.new_zeros(1, 1, x.shape[-1]))[0, 0]


def kind_of_weights(projection: nn.Module) -> dict[str, Any]:
    """Device and dtype for weights beside those of a projection: PyTorch's defaults where it has none that are real."""
    weights = next((p for p in projection.parameters() if p.is_floating_point()), torch.empty(0))
    return {'device': weights.device, 'dtype': weights.dtype}


def channels_of(projection: nn.Module) -> int:
    """The channels that a projection takes."""
    return next(module.in_features for module in projection.modules() if hasattr(module, 'in_features'))
