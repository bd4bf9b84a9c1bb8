"""An image beside its truncations, and the energy that they keep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_efficient.data import read_image, to_array
from vit_efficient.data.files.images import WithAlpha
from vit_efficient.data.truncation import repeat_edges, truncate_pixels
from vit_efficient.dct import kept_coefficients, kept_energy
from vit_efficient.report.plot import show_image
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import save_figure
from vit_efficient.utils.packages import needing


def truncation_table(
    path: str, ratios: Mapping[str, float], out: str | Path, block: int | None = None, order: str = 'square'
) -> Table:
    """Truncates an image in several ways, and saves it beside what is left.

    Args:
        path: The image.
        ratios: The fractions of the coefficients that are kept, by what the table calls them.
        out: The file of the figure.
        block: The side of the blocks that are truncated; None for the whole image.
        order: square or zigzag.

    Returns:
        For each truncation, the energy that it keeps, with and without the mean of each channel, in percent.

    Raises:
        UserError: If the image cannot be read, or an argument does not fit it.
    """
    image = open_pixels(path)
    largest = max(1024, *image.shape[-2:])  # what is added to an image has to fit into memory too
    if block and block > largest:
        raise UserError(f'--block must be at most {largest} for this image, got {block}')
    padded = repeat_edges(image, block)
    without_mean = padded - padded.mean((-2, -1), keepdim=True)
    sides = (block, block) if block else tuple(image.shape[-2:])
    whole = f'{sides[0]} × {sides[1]}'
    rows = []
    for name, ratio in ratios.items():
        options = dict(block=block, ratio=ratio, order=order)
        h, w, count = kept_coefficients(*sides, ratio=ratio, order=order)
        coefficients = f'{h} × {w}' if order == 'square' else f'{count:,}'
        energies = [100 * _energy_ratio(x, options) for x in (padded, without_mean)]
        rows.append(dict(keep=name, coefficients=coefficients, energy=energies[0], without_mean=energies[1]))
    images = [image, *(truncate_pixels(image, ratio, block, order) for ratio in ratios.values())]
    of = f'blocks of {whole}' if block else f'the image of {whole}'
    plot_truncations(images, rows, f'{order} truncation of {of}', out)
    columns = [Column('keep', 'kept'), Column('coefficients', f'coefficients, of {whole}')]
    columns += [Column('energy', 'energy (%)', 2), Column('without_mean', 'without the mean (%)', 2)]
    return Table(columns, rows)


def open_pixels(path: str) -> Tensor:
    """An image with the channels that it has, (C, H, W) in [0, 1], float64.

    An array (`.npy`) of more than 4 columns whose first axis is the shortest has its channels there.
    """
    image = read_image(path)
    if Path(path).suffix.lower() == '.npy' and image.ndim == 3 and image.shape[0] < min(image.shape[1:]):
        image = image.transpose(1, 2, 0) if image.shape[2] > 4 else image
    if isinstance(image, np.ndarray):
        channels = image.shape[2] - isinstance(image, WithAlpha) if image.ndim == 3 else 1
    else:
        channels = 1 if image.mode in ('1', 'L', 'LA') else 3
    try:
        pixels = to_array(image, channels)
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    scale = 255 if pixels.dtype == np.uint8 else 1
    return torch.tensor(pixels, dtype=torch.float64).permute(2, 0, 1) / scale


def _energy_ratio(x: Tensor, options: Mapping[str, Any]) -> float:
    """The energy of all channels that a truncation keeps, relative to what there is."""
    energies = x.square().sum((-2, -1))
    ratios = kept_energy(x, **options)
    return ((ratios * energies).sum() / energies.sum()).item() if energies.any() else 1.0


def plot_truncations(images: Sequence[Tensor], rows: Sequence[Mapping[str, Any]], title: str, path: str | Path) -> None:
    """Saves an image, the first of `images`, and its truncations, each a row of the table, side by side."""
    with needing('train', 'plots are drawn with'):
        from matplotlib.figure import Figure

    dpi = 150
    height, width = images[0].shape[-2:]
    side = min(max(max(height, width) / dpi, 2.4), 6)  # inches
    across, down = (max(side * length / max(height, width), 2.4) for length in (width, height))
    figure = Figure(figsize=(across * len(images), down + 0.7), dpi=dpi, layout='constrained')
    figure.suptitle(title, fontsize='medium')
    titles = ['image'] + [
        f'{row["keep"]} kept: {row["energy"]:.2f} % of the energy,\n{row["without_mean"]:.2f} % without the mean'
        for row in rows
    ]
    for axes, image, text in zip(figure.subplots(1, len(images), squeeze=False)[0], images, titles, strict=True):
        show_image(axes, image)
        axes.set_title(text, fontsize='x-small')
    save_figure(figure, path)
