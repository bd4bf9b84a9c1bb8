"""Where a model looks, drawn."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vit_efficient.attention_maps import AttentionMaps
from vit_efficient.report.plot import show_image
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import save_figure
from vit_efficient.utils.modes import evaluating
from vit_efficient.utils.packages import needing


@torch.no_grad()
def queries_of(
    model: nn.Module, images: Tensor, maps: AttentionMaps, classes: Sequence[int] | None, count: int
) -> dict[int, str]:
    """Which queries of the maps of an image are drawn, by their numbers, and their names.

    Args:
        classes: Of a query for each class, these; by default the `count` that are likeliest, the likeliest first.

    Raises:
        UserError: If there is no such class, or all have one query.
    """
    number = maps.patches.shape[2]
    if number == 1:
        if classes is not None:
            raise UserError(f'--classes {" ".join(map(str, classes))}: the model has one query for all classes')
        return {0: ''}
    if classes is None:
        with evaluating(model):
            classes = model(images)[0].topk(min(count, number)).indices.tolist()
    for k in classes:
        if not 0 <= k < number:
            raise UserError(f'--classes: the model has classes 0 … {number - 1}, got {k}')
    names = getattr(model, 'pretrained_cfg', {}).get('label_names')
    return {k: str(names[k]) if names else f'class {k}' for k in classes}


def plot_attention_maps(
    image: Tensor, maps: AttentionMaps, path: str | Path, rows: dict[int, str], mean: bool = False
) -> None:
    """Saves the maps of an image: a row for each query, a column for each head. Black is no weight, the brightest patch
    of a map has the largest.

    Args:
        image: What the model saw, as of `show_image`.
        maps: Of a batch of this image alone.
        path: PNG, or by another suffix PDF or SVG.
        rows: Queries that are drawn, and what they are called.
        mean: Whether the heads' mean is drawn, in one column.
    """
    with needing('train', 'plots are drawn with'):
        from matplotlib.figure import Figure

    drawn = maps.patches[0].mean(0, keepdim=True) if mean else maps.patches[0]
    heads, _, height, width = drawn.shape
    cell = 1.6 * max(1.0, width / height), 1.6 * max(1.0, height / width)
    figure = Figure(figsize=(cell[0] * (heads + 1), cell[1] * len(rows) + 0.3), dpi=150, layout='constrained')
    grid = figure.subplots(len(rows), heads + 1, squeeze=False)
    for (first, *others), (query, name) in zip(grid, rows.items(), strict=True):
        show_image(first, image)
        first.set_ylabel(name, fontsize='small')
        for head, axes in enumerate(others):
            axes.imshow(drawn[head, query].cpu().numpy(), cmap='inferno', vmin=0, interpolation='nearest')
            axes.set(xticks=[], yticks=[])
    for title, axes in zip(_titles(heads, mean), grid[0, 1:], strict=True):
        axes.set_title(title, fontsize='small')
    save_figure(figure, path)


def _titles(heads: int, mean: bool) -> Sequence[str]:
    return ['mean of heads' if mean else ''] if heads == 1 else [f'head {head}' for head in range(heads)]
