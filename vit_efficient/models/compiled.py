"""Models compiled in parts."""

from typing import Any

from torch import nn

from vit_efficient.models.forward import backbone_of
from vit_efficient.utils.compat import unwrap


def compile_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """Compiles each block of a model, in place, and returns it; without `blocks`, the model as a whole.

    Equal blocks share one graph, so that compiling takes as long for twelve of them as for one; drop path, whose rate
    grows from block to block, makes them unequal in training. What is outside of blocks runs as it is written. Names in
    the state dict stay as they are, and copies of the model are not compiled.

    Args:
        model: Of timm, or ours, wrapped or not.
        **options: As of `torch.compile`.

    Raises:
        UserError: If it is not an nn.Module.
    """
    *_, inner = unwrap(model)
    inner = backbone_of(inner)
    blocks = getattr(inner, 'blocks', None)
    for part in blocks if isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks) else [model]:
        part.compile(**options)
    return model
