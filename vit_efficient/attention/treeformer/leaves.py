"""What Treeformer's trees have learned: which leaf each patch falls into, and how full the leaves are."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vit_efficient.attention.treeformer.tc import TreeAttention
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.compat import unwrap
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.modes import evaluating


@dataclass(frozen=True)
class Leaves:
    """The leaves of a layer, numbered from left to right."""

    queries: Tensor  # of the patches in row-major order, (B, heads, patches), int64
    keys: Tensor  # likewise
    grid: PatchGrid
    num_leaves: int  # of a tree


@dataclass(frozen=True)
class Occupancy:
    """How the keys of an image fall into the leaves of a head's tree; means over images and heads."""

    entropy: float  # in bits; at most the tree's height, which it is if all leaves hold as many
    empty: float  # the fraction of leaves that hold none
    largest: float  # the fraction of keys that are in the fullest leaf


def has_trees(model: nn.Module) -> bool:
    """Whether a layer of the model is an attention of Treeformer."""
    return any(isinstance(module, TreeAttention) for module in model.modules())


@torch.no_grad()
def find_leaves(model: nn.Module, images: Tensor) -> dict[int, Leaves]:
    """The leaves that patches fall into, of each layer that has trees.

    Args:
        model: A registered or converted ViT, wrapped or not, which is run in evaluation mode; each of its modules is
            left in the mode it was in.
        images: (B, C, H, W), preprocessed, on the model's device.

    Returns:
        By the number of the block, the heads of all its attentions.

    Raises:
        UserError: If no layer of the model has trees.
    """
    *_, model = unwrap(model)
    if not has_trees(model):
        raise UserError(
            'no layer of the model has trees; they belong to the attentions treeformer_tc and treeformer_tf'
        )
    found: dict[int, Leaves] = {}

    def note(layer: int, attention: TreeAttention, args: tuple[Tensor, PatchGrid]) -> None:
        leaves = attention.leaves(*args)
        if layer in found:  # several attentions side by side
            earlier = found[layer].queries, found[layer].keys
            leaves = (torch.cat(pair, dim=1) for pair in zip(earlier, leaves, strict=True))
        found[layer] = Leaves(*leaves, args[1], 2**attention.tree.height)

    with evaluating(model), ExitStack() as hooks:
        for layer, block in enumerate(model.blocks):
            for module in block.modules():
                if isinstance(module, TreeAttention):
                    hooks.callback(module.register_forward_pre_hook(partial(note, layer)).remove)
        model(images)
    return found


def leaf_occupancy(model: nn.Module, images: Tensor) -> dict[int, Occupancy]:
    """The occupancy of the leaves of each layer that has trees, by the number of the block; see `find_leaves`."""
    return {layer: occupancy(leaves.keys, leaves.num_leaves) for layer, leaves in find_leaves(model, images).items()}


def occupancy(leaf: Tensor, num_leaves: int) -> Occupancy:
    """The occupancy of leaves numbered (B, heads, patches)."""
    counts = torch.zeros(*leaf.shape[:2], num_leaves, device=leaf.device)
    fractions = counts.scatter_add_(2, leaf, torch.ones_like(leaf, dtype=counts.dtype)) / leaf.shape[2]
    return Occupancy(
        entropy=torch.special.entr(fractions).sum(dim=2).mean().item() / math.log(2),
        empty=(fractions == 0).float().mean().item(),
        largest=fractions.amax(dim=2).mean().item(),
    )
