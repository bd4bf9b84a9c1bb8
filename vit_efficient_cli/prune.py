"""`vit-efficient prune MODEL --keep 0.1 --out FOLDER`."""

import argparse
from pathlib import Path

from vit_efficient_cli.parsing import FORMAT, MODEL, check_exists

METHODS = ('lamp', 'global', 'uniform', 'uniform+', 'erk')  # those of `vit_efficient.prune`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        'Weights are those of linear layers and convolutions; biases and norms stay. Zeros make no product faster, and '
        'no file smaller: see vit_efficient.sparse. A recipe that trains the pruned model on keeps them with '
        'stages=[{epochs: N, prune: 0}].'
    )
    parser.add_argument('model', help='a run folder, or a model folder')
    parser.add_argument('--keep', required=True, metavar='SHARE', help='of the weights, such as 0.1 or 1/10')
    about = 'which go: lamp, layer-adaptive; global, the smallest of all layers; uniform, uniform+, erk, layer by layer'
    parser.add_argument('--method', choices=METHODS, default='lamp', help=f'{about} (default: lamp)')
    about = 'modules that stay as they are, such as head or blocks.0 (default: head; nothing after it: none)'
    parser.add_argument('--skip', nargs='*', default=['head'], metavar='NAME', help=about)
    parser.add_argument(
        '--out', type=Path, required=True, metavar='FOLDER', help='of the pruned model, as timm reads it'
    )
    parser.add_argument('--format', **FORMAT)


def run(args: argparse.Namespace) -> None:
    check_exists(args.model, MODEL)
    from vit_efficient.report.pruning import prune_saved

    table, about = prune_saved(args.model, args.keep, args.out, args.method, args.skip)
    print(table.render(args.format), end='')
    if args.format == 'markdown':
        print(about)
