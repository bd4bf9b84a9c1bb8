"""What is used of dependencies beyond their public names, one small function each: here they can break, and only here."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

import torch
from torch import nn

# The mode in which every operator passes one method; `torch.utils.flop_counter` is built on it.
from torch.utils._python_dispatch import TorchDispatchMode as OperatorMode

__all__ = ['OperatorMode', 'feature_indices', 'model_args', 'save_model_config', 'set_model_args', 'without_recompile_limit']


def model_args(model: nn.Module) -> dict[str, Any]:
    """A copy of the arguments that timm recorded when it built a model, none being left out."""
    return dict(getattr(model, '_model_args', {}))


def set_model_args(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Replaces the arguments that timm recorded of a model."""
    model._model_args = arguments


def save_model_config(model: nn.Module, path: str | PathLike, arguments: dict[str, Any], **more: Any) -> None:
    """Writes the config.json of timm's `local-dir:` layout.

    Args:
        model: Its `pretrained_cfg` is written.
        path: Of the file.
        arguments: With which its entry point builds the model.
        **more: Further entries.
    """
    from timm.models._hub import save_config_for_hf  # timm's public save_for_hf writes the weights too, into a folder

    save_config_for_hf(model, path, model_config=more, model_args=arguments)


def feature_indices(depth: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """timm's reading of `indices` in `forward_intermediates`: those of `depth` blocks, and the last of them."""
    from timm.models._features import feature_take_indices

    return feature_take_indices(depth, indices)


def without_recompile_limit() -> AbstractContextManager:
    """A context in which `torch.compile` compiles as often as there are shapes, classes or options."""
    return torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)
