"""How far rotary positions turn from one patch to the next, where the rotations themselves do not tell.

timm's modules give sines and cosines. On small grids those of neighbours may be more than half a turn apart, since
coordinates are stretched to the side that a model was made for (EVA-02, Perception Encoder) or to −1 … 1 (DINOv3), in
training by an augmentation too. Then the module's frequencies tell how many whole turns there are.
"""

import math
from typing import Any

import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from torch import Tensor, nn

from vit_efficient.attention.rotary import Rope, steps_between


def with_steps(rope: Tensor, module: nn.Module, height: Any, width: Any) -> Tensor | Rope:
    """Rotations with the angles between neighbours, where these can be half a turn or more.

    Args:
        rope: What the module has made for the grid, (N, 2 D).
        module: Of timm's.
        height, width: The grid; where they are no numbers, the rotations go on as they are.
    """
    if not (type(height) is type(width) is int):
        return rope
    stretch = _stretch(module)
    most = _largest_step(module, min(height, width))
    if most is None or most * stretch < math.pi:
        return rope
    found = torch.stack(steps_between(rope, height, width))
    nominal = _nominal_steps(module, height, width).to(found)
    if stretch > 1:  # the one drawn, by the slowest channel of each axis
        slowest = torch.where(nominal > 0, nominal, torch.inf).argmin(dim=1, keepdim=True)
        nominal = nominal * (found.gather(1, slowest) / nominal.gather(1, slowest))
    turns = ((nominal - found) / (2 * math.pi)).round()
    sides = torch.tensor([[height], [width]], device=found.device)
    return Rope(rope, torch.where(sides > 1, found + 2 * math.pi * turns, found))


def _stretch(module: nn.Module) -> float:
    """By how much coordinates can be scaled up in training."""
    if not (module.training and getattr(module, 'aug_active', False)):
        return 1.0
    return (module.jitter_coords or 1.0) * (module.rescale_coords or 1.0)


def _largest_step(module: nn.Module, side: int) -> float | None:
    """Of the fastest channel, along the shorter side; None of modules whose steps do not grow on small grids."""
    if isinstance(module, RotaryEmbeddingDinoV3):
        return 4 * math.pi / side / (module.min_period or 1.0)
    if isinstance(module, RotaryEmbeddingCat) and module.ref_feat_shape is not None and module.grid_type == 'index':
        return max(module.ref_feat_shape) / side
    return None


def _nominal_steps(module: nn.Module, height: int, width: int) -> Tensor:
    """Without augmentation, from each patch to the one below it and to the one on its right: (2, D)"""
    if isinstance(module, RotaryEmbeddingDinoV3):
        size = {'max': max(height, width), 'min': min(height, width)}
        frequencies = 4 * math.pi / module.periods
        of_axes = [frequencies / size.get(module.normalize_coords, side) for side in (height, width)]
    else:
        reference = module.ref_feat_shape
        of_axes = [module.bands * (r / side) for r, side in zip(reference, (height, width), strict=True)]
    zeros = torch.zeros_like(of_axes[0])
    down, across = torch.cat([of_axes[0], zeros]), torch.cat([zeros, of_axes[1]])
    if module.grid_indexing == 'xy':
        down, across = (torch.roll(step, len(zeros)) for step in (down, across))
    steps = torch.stack([down, across])
    return steps.repeat(1, 2) if module.rotate_half else steps.repeat_interleave(2, dim=1)
