"""`vit-efficient features MODEL [MODEL …] IMAGE --img-size 504 --out FILE.png`."""

import argparse
from pathlib import Path

from vit_efficient_cli.parsing import check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "run or model folders, or timm's names of pretrained models; colours are by the components of the first one"
    parser.add_argument('models', nargs='+', metavar='MODEL', help=about)
    parser.add_argument('image', help='a file')
    about = 'side of the square that is seen of it, a multiple of the patches'
    parser.add_argument('--img-size', type=int, required=True, metavar='PX', help=about)
    about = 'the first model with these attentions, as they are without healing, beside it'
    parser.add_argument('--swapped', nargs='+', default=[], metavar='NAME[:KEY=VALUE,…]', help=about)
    about = 'the patch that others are compared to, from 0 to 1 (default: the middle)'
    parser.add_argument('--at', nargs=2, type=float, metavar=('DOWN', 'ACROSS'), help=about)
    parser.add_argument('--out', type=Path, default=Path('features.png'), help='(default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    check_exists(args.image, 'image')
    from vit_efficient.report.healing import plot_features
    from vit_efficient.utils.checks import as_integer
    from vit_efficient.utils.files import check_can_write

    check_can_write(args.out)
    at = None if args.at is None else tuple(args.at)
    plot_features(args.models, args.image, as_integer('--img-size', args.img_size), args.out, at, args.swapped)
    print(f'saved {args.out}')
