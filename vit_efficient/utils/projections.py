"""Linear layers, and what users put in their place: quantised ones, adapters such as LoRA, wrappers."""

from collections.abc import Callable
from typing import Any

import torch
from timm.models import register_notrace_module
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


# A leaf for FX, which would take rows of a weight for a constant.
@register_notrace_module
class Part(nn.Module):
    """Some rows or columns of a linear layer that another module has, as a layer without parameters of its own.

    Args:
        owner, name: The module, and what it calls the layer, which is looked up in each call: it may be replaced.
        rows, columns: Which outputs it has, and which inputs; the others are zero.
        has_bias: Whether it adds the bias of its outputs.
    """

    def __init__(
        self,
        owner: nn.Module,
        name: str,
        rows: slice = slice(None),
        columns: slice = slice(None),
        has_bias: bool = True,
    ):
        super().__init__()
        vars(self)['owner'] = owner  # by reference, unregistered: it is what has this part
        self.name, self.rows, self.columns, self.has_bias = name, rows, columns, has_bias

    @property
    def layer(self) -> nn.Module:
        """The whole layer."""
        return getattr(self.owner, self.name)

    @property
    def weight(self) -> Tensor:
        """(out, in)"""
        return self.layer.weight[self.rows, self.columns]

    @property
    def bias(self) -> Tensor | None:
        """(out,)"""
        return self.layer.bias[self.rows] if self.has_bias and self.layer.bias is not None else None

    @property
    def in_features(self) -> int:
        return len(range(channels_of(self.layer))[self.columns])

    def forward(self, x: Tensor) -> Tensor:
        if is_plain(self.layer):
            return F.linear(x, self.weight, self.bias)
        channels = range(channels_of(self.layer))
        inside = channels[self.columns]
        y = self.layer(F.pad(x, (inside.start, len(channels) - inside.stop)))[..., self.rows]
        return y if self.has_bias else y - bias_of(self.layer, x.new_zeros(1, 1, len(channels)))[self.rows]

    def extra_repr(self) -> str:
        return f'{self.name}, in_features={self.in_features}'


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer does what its weight says: no adapter, pruning or parametrisation."""
    if isinstance(module, Part):
        return 'forward' not in vars(module) and is_plain(module.layer)
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
    projection = projection.layer if isinstance(projection, Part) else projection
    weights = next((p for p in projection.parameters() if p.is_floating_point()), torch.empty(0))
    return {'device': weights.device, 'dtype': weights.dtype}


def channels_of(projection: nn.Module) -> int:
    """The channels that a projection takes."""
    return next(module.in_features for module in projection.modules() if hasattr(module, 'in_features'))
