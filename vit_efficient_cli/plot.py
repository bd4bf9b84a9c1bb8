"""`vit-efficient plot RUN… --out curves.png`."""

import argparse
import sys
from pathlib import Path

from vit_efficient_cli.parsing import check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folders of runs, finished or not')
    about = 'such as train/loss, val/top1, train/lr (default: losses and accuracies)'
    parser.add_argument('--values', nargs='+', default=[], metavar='KIND/VALUE', help=about)
    parser.add_argument('--against', default='epoch', help='epoch (default), step or hours, of training')
    parser.add_argument('--out', type=Path, default=Path('curves.png'), help='(default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    args.runs = list(dict.fromkeys(map(Path, args.runs)))
    for path in args.runs:
        check_exists(path, 'run')
    from vit_efficient.report.curves import plot_curves
    from vit_efficient.utils.errors import UserError

    if args.out.is_dir():
        raise UserError(f'--out={args.out} is a folder; give the file of the figure, such as {args.out / "curves.png"}')
    values, left_out = plot_curves(args.runs, args.out, args.values, args.against)
    for reason in left_out.values():
        print(f'left out: {reason}', file=sys.stderr)
    print(f'saved {args.out}: {", ".join(values)} of {len(args.runs) - len(left_out)} runs')
