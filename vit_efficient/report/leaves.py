"""Maps of the leaves that Treeformer's trees sort patches into."""

from pathlib import Path

from torch import Tensor

from vit_efficient.attention.treeformer.leaves import Leaves
from vit_efficient.report.plot import show_image
from vit_efficient.utils.files import save_figure
from vit_efficient.utils.packages import needing


def plot_leaves(image: Tensor, found: dict[int, Leaves], path: str | Path, queries: bool = False) -> None:
    """Saves maps of the leaves that the patches of one image fall into: a row for each layer, a column for each head.

    The longer two leaves have the same way, the more alike are their colours.

    Args:
        image: What the model saw, as of `show_image`.
        found: What `find_leaves` found for a batch of this image alone.
        path: PNG, or by another suffix PDF or SVG.
        queries: Whether to show the leaves of the patches as queries rather than as keys.
    """
    with needing('train', 'plots are drawn with'):
        from matplotlib.figure import Figure

    rows, heads = len(found), next(iter(found.values())).keys.shape[1]
    figure = Figure(figsize=(1.5 * (heads + 1) + 0.3, 1.6 * rows + 0.2), dpi=150, layout='constrained')
    grid = figure.subplots(rows, heads + 1, squeeze=False)
    for axes_of_row, (layer, leaves) in zip(grid, found.items(), strict=True):
        show_image(axes_of_row[0], image)
        axes_of_row[0].set_ylabel(f'block {layer}', fontsize='small')
        maps = (leaves.queries if queries else leaves.keys)[0].unflatten(1, (leaves.grid.height, leaves.grid.width))
        for head, axes in enumerate(axes_of_row[1:]):
            axes.imshow(maps[head].cpu().numpy(), cmap='turbo', vmin=0, vmax=max(1, leaves.num_leaves - 1))
            axes.set(xticks=[], yticks=[])
    for head, axes in enumerate(grid[0, 1:]):
        axes.set_title(f'head {head}', fontsize='small')
    save_figure(figure, path)
