"""Models around a vision transformer, their `backbone`: what timm and training ask a model for is asked of it."""

from collections.abc import Callable, Iterable
from typing import Any

from timm.models import group_parameters
from torch import nn

BACKBONE = 'backbone.'


class WithBackbone(nn.Module):
    """A module that has a model of ours as `backbone`."""

    backbone: nn.Module

    @property
    def patch_embed(self) -> nn.Module:
        return self.backbone.patch_embed

    @property
    def in_chans(self) -> int:
        return self.backbone.in_chans

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's, of the backbone."""
        self.backbone.set_grad_checkpointing(enable)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As timm's, of the backbone."""
        self.backbone.set_input_size(*args, **kwargs)

    def no_weight_decay(self) -> set[str]:
        """As timm's: names of parameters that are not to decay."""
        return {f'{BACKBONE}{name}' for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], Iterable[float]]:
        """As timm's: the layers of parameters, in order. What is not of the backbone is beyond all of its layers."""
        layers = group_parameters(self.backbone, self.backbone.group_matcher(coarse), reverse=True)
        return lambda name: (layers.get(name.removeprefix(BACKBONE), float('inf')),)
