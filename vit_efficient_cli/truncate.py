"""`vit-efficient truncate IMAGE --out FILE.png [--keep 1/4 1/16 …] [--block 16] [--order zigzag]`."""

import argparse
from pathlib import Path

from vit_efficient_cli.parsing import check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        'The energy is the sum of the squares of all pixels, of all channels; most of it is in the mean, so that it is '
        'given without the mean of each channel too. Both are exact, before values are clipped, and of the image with '
        'its edge repeated where blocks do not divide it.'
    )
    parser.add_argument('image', help='a file: PNG, JPEG, TIFF, …; or an array (.npy), channels last or first')
    about = 'of the coefficients, such as 1/16 or 0.1 (default: 1/4 1/16 1/64)'
    parser.add_argument('--keep', nargs='+', default=['1/4', '1/16', '1/64'], metavar='RATIO', help=about)
    parser.add_argument('--block', type=int, metavar='P', help='truncate blocks of P × P (default: the whole image)')
    about = 'the low square, or as in JPEG (default: square)'
    parser.add_argument('--order', choices=('square', 'zigzag'), default='square', help=about)
    parser.add_argument('--out', type=Path, default=Path('truncated.png'), help='(default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    check_exists(args.image, 'image')
    from vit_efficient.report.truncation import truncation_table

    ratios = {text: _ratio(text) for text in args.keep}
    print(truncation_table(args.image, ratios, args.out, args.block, args.order).render(), end='')
    print(f'saved {args.out}')


def _ratio(text: str) -> float:
    from vit_efficient.utils.checks import is_real
    from vit_efficient.utils.errors import UserError
    from vit_efficient.utils.options import parse_value

    ratio = parse_value(text)
    if not (is_real(ratio) and 0 < ratio <= 1):
        raise UserError(f'--keep must be shares above 0 and at most 1, such as 1/16, got {text!r}')
    return float(ratio)
