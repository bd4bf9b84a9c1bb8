"""What Treeformer's trees have learned: which leaf each patch falls into, and how full the leaves are."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vit_efficient.attention.treeformer.tc import TreeAttention
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import save_figure


@dataclass(frozen=True)
class Leaves:
    """The leaves of a layer.

    Attributes:
        queries, keys: Of the patches, in row-major order, (B, heads, patches), int64. Numbered from left to right.
        grid: Of the patches.
        num_leaves: Of a tree.
    """

    queries: Tensor
    keys: Tensor
    grid: PatchGrid
    num_leaves: int


@dataclass(frozen=True)
class Occupancy:
    """How the keys of an image fall into the leaves of a head's tree; means over images and heads.

    Attributes:
        entropy: In bits; at most the tree's height, which it is if all leaves hold as many.
        empty: Share of the leaves that hold none.
        largest: Share of the keys that are in the fullest leaf.
    """

    entropy: float
    empty: float
    largest: float


def has_trees(model: nn.Module) -> bool:
    """Whether a layer of the model is an attention of Treeformer."""
    return any(isinstance(module, TreeAttention) for module in model.modules())


@torch.no_grad()
def find_leaves(model: nn.Module, images: Tensor) -> dict[int, Leaves]:
    """The leaves that patches fall into, of each layer that has trees.

    Args:
        model: A registered or converted ViT, which is run in evaluation mode and left in the mode it was in.
        images: (B, C, H, W), preprocessed, on the model's device.

    Returns:
        By the number of the block.

    Raises:
        UserError: If no layer of the model has trees.
    """
    if not has_trees(model):
        raise UserError(
            'no layer of the model has trees; they belong to the attentions treeformer_tc and treeformer_tf'
        )
    found: dict[int, Leaves] = {}

    def note(layer: int, attention: TreeAttention, x: Tensor, grid: PatchGrid) -> None:
        found[layer] = Leaves(*attention.leaves(x, grid), grid, 2**attention.tree.height)

    was_training = model.training
    with ExitStack() as hooks:
        for layer, block in enumerate(model.blocks):
            if isinstance(block.attn, TreeAttention):
                hook = block.attn.register_forward_pre_hook(
                    lambda attention, args, layer=layer: note(layer, attention, *args)
                )
                hooks.callback(hook.remove)
        hooks.callback(model.train, was_training)
        model.eval()(images)
    return found


def leaf_occupancy(model: nn.Module, images: Tensor) -> dict[int, Occupancy]:
    """The occupancy of the leaves of each layer that has trees, by the number of the block; see `find_leaves`."""
    return {layer: occupancy(leaves.keys, leaves.num_leaves) for layer, leaves in find_leaves(model, images).items()}


def occupancy(leaf: Tensor, num_leaves: int) -> Occupancy:
    """The occupancy of leaves numbered (B, heads, patches)."""
    counts = torch.zeros(*leaf.shape[:2], num_leaves, device=leaf.device)
    shares = counts.scatter_add_(2, leaf, torch.ones_like(leaf, dtype=counts.dtype)) / leaf.shape[2]
    return Occupancy(
        entropy=torch.special.entr(shares).sum(dim=2).mean().item() / math.log(2),
        empty=(shares == 0).float().mean().item(),
        largest=shares.amax(dim=2).mean().item(),
    )


def plot_leaves(image: Tensor, found: dict[int, Leaves], path: str | Path, queries: bool = False) -> None:
    """Saves maps of the leaves that the patches of one image fall into: a row for each layer, a column for each head.

    Leaves that share a longer part of their way have colours that are more alike.

    Args:
        image: What the model saw, (C, H, W) in [0, 1]: grey, RGB, or of many channels, whose mean is shown.
        found: What `find_leaves` found for a batch of this image alone.
        path: PNG, or by another suffix PDF or SVG.
        queries: Of the patches as queries rather than as keys.
    """
    from matplotlib.figure import Figure

    rows, heads = len(found), next(iter(found.values())).keys.shape[1]
    figure = Figure(figsize=(1.5 * (heads + 1) + 0.3, 1.6 * rows + 0.2), dpi=150, layout='constrained')
    grid = figure.subplots(rows, heads + 1, squeeze=False)
    shown = image if image.shape[0] == 3 else image.mean(dim=0, keepdim=True).expand(3, -1, -1)
    for axes_of_row, (layer, leaves) in zip(grid, found.items(), strict=True):
        axes_of_row[0].imshow(shown.permute(1, 2, 0).clamp(0, 1).cpu().numpy())
        axes_of_row[0].set_ylabel(f'block {layer}', fontsize='small')
        maps = (leaves.queries if queries else leaves.keys)[0].unflatten(1, (leaves.grid.height, leaves.grid.width))
        for head, axes in enumerate(axes_of_row[1:]):
            axes.imshow(maps[head].cpu().numpy(), cmap='turbo', vmin=0, vmax=max(1, leaves.num_leaves - 1))
    for head, axes in enumerate(grid[0, 1:]):
        axes.set_title(f'head {head}', fontsize='small')
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    save_figure(figure, path)
