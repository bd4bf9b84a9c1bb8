"""`vit-efficient truncate IMAGE --out FILE.png [--keep 1/4 1/16 …] [--block 16] [--order zigzag]`."""

import argparse
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_efficient.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        'The energy is the sum of the squares of all pixels, of all channels; most of it is in the mean, so that its '
        'share without the mean of each channel is given too. Both are exact, before values are clipped, and of the '
        'image with its edge repeated where blocks do not divide it.'
    )
    parser.add_argument('image', help='a file: PNG, JPEG, TIFF, …, or an array (.npy); of any number of channels')
    parser.add_argument(
        '--keep',
        nargs='+',
        default=['1/4', '1/16', '1/64'],
        metavar='SHARE',
        help='of the coefficients, such as 1/16 or 0.1 (default: 1/4 1/16 1/64)',
    )
    parser.add_argument('--block', type=int, metavar='P', help='truncate blocks of P × P (default: the whole image)')
    parser.add_argument(
        '--order',
        choices=('square', 'zigzag'),
        default='square',
        help='the low square, or as in JPEG (default: square)',
    )
    parser.add_argument('--out', type=Path, default=Path('truncated.png'), help='(default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    from vit_efficient.data.truncation import repeat_edges, truncate_pixels
    from vit_efficient.dct import kept_coefficients
    from vit_efficient.report.table import Column, Table

    shares = [_share(text) for text in args.keep]
    image = _open(args.image)
    largest = max(1024, *image.shape[-2:])  # what is added to an image has to fit into memory too
    if args.block and args.block > largest:
        raise UserError(f'--block must be at most {largest} for this image, got {args.block}')
    padded = repeat_edges(image, args.block)
    without_mean = padded - padded.mean((-2, -1), keepdim=True)
    sides = (args.block, args.block) if args.block else tuple(image.shape[-2:])
    whole = f'{sides[0]} × {sides[1]}'
    rows: list[dict[str, Any]] = []
    shown = [image]
    for text, share in zip(args.keep, shares, strict=True):
        options = dict(block=args.block, ratio=share, order=args.order)
        h, w, count = kept_coefficients(*sides, ratio=share, order=args.order)
        rows.append(
            {
                'keep': text,
                'coefficients': f'{h} × {w}' if args.order == 'square' else f'{count:,}',
                'energy': 100 * _kept(padded, options),
                'without_mean': 100 * _kept(without_mean, options),
            }
        )
        shown.append(truncate_pixels(image, share, args.block, args.order))
    of = f'blocks of {whole}' if args.block else f'the image of {whole}'
    _plot(shown, rows, f'{args.order} truncation of {of}', args.out)
    columns = [
        Column('keep', 'kept'),
        Column('coefficients', f'coefficients, of {whole}'),
        Column('energy', 'energy (%)', digits=2),
        Column('without_mean', 'without the mean (%)', digits=2),
    ]
    print(Table(columns, rows).render(), end='')
    print(f'saved {args.out}')


def _share(text: str) -> float:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise UserError(f'--keep must be shares above 0 and at most 1, such as 1/16, got {text!r}')
    return float(share)


def _open(path: str) -> 'Tensor':
    """The image as it is, (C, H, W) in [0, 1], float64."""
    import numpy as np
    import torch

    from vit_efficient.data import read_image, to_array
    from vit_efficient.data.files.images import WithAlpha

    image = read_image(path)
    if isinstance(image, np.ndarray):
        channels = image.shape[2] - isinstance(image, WithAlpha) if image.ndim == 3 else 1
    else:
        channels = 1 if image.mode in ('1', 'L', 'LA') else 3
    try:
        pixels = to_array(image, channels)
    except ValueError as error:
        raise UserError(f'{path}: {error}') from error
    scale = 255 if pixels.dtype == np.uint8 else 1
    return torch.tensor(pixels, dtype=torch.float64).permute(2, 0, 1) / scale


def _kept(x: 'Tensor', options: Mapping[str, Any]) -> float:
    """The share of the energy of all channels."""
    from vit_efficient.dct import kept_energy

    energies = x.square().sum((-2, -1))
    shares = kept_energy(x, **options)
    return ((shares * energies).sum() / energies.sum()).item() if energies.any() else 1.0


def _plot(images: Sequence['Tensor'], rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Side by side: the image, and each truncation with its energies. Of many channels, the mean is shown."""
    from matplotlib.figure import Figure

    from vit_efficient.utils.files import save_figure

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
        colour = image if image.shape[0] == 3 else image.mean(dim=0, keepdim=True).expand(3, -1, -1)
        axes.imshow(colour.permute(1, 2, 0).numpy())
        axes.set_title(text, fontsize='x-small')
        axes.set(xticks=[], yticks=[])
    save_figure(figure, path)
