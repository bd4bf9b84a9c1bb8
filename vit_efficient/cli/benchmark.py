"""`vit-efficient benchmark layer …`."""

import argparse
import re
from pathlib import Path

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='WHAT')
    about = "time attention layers, projections included, against timm's Attention in the same run"
    layer = kinds.add_parser('layer', help=about, description=about)
    layer.add_argument(
        '--attentions',
        nargs='+',
        default=['dct', 'dct:keep_ratio=1/16', 'dct1d'],
        metavar='NAME[:KEY=VALUE,…]',
        help='registered attentions and their options (default: %(default)s)',
    )
    layer.add_argument('--tokens', nargs='+', type=int, default=[1024, 4096, 16384], metavar='N', help='patches')
    layer.add_argument('--dim', type=int, default=768)
    layer.add_argument('--heads', type=int, default=12)
    layer.add_argument('--batch-size', type=int, default=1)
    layer.add_argument('--dtype', choices=DTYPES, default='float32')
    layer.add_argument('--device', default='cpu')
    layer.add_argument('--threads', type=int, help='of PyTorch on the CPU (default: its own choice)')
    layer.add_argument('--rounds', type=int, default=5, help='turns of each layer; the least time counts')
    layer.add_argument('--format', choices=('markdown', 'csv', 'json'), default='markdown')
    layer.add_argument('--out', type=Path, metavar='FILE', help='write the table to this file')


def run(args: argparse.Namespace) -> None:
    import torch

    from vit_efficient.benchmark import Candidate, benchmark_layer
    from vit_efficient.cli.options import parse_option
    from vit_efficient.environment import describe_environment, one_line
    from vit_efficient.files import write_text
    from vit_efficient.tables import Column, Table

    candidates = []
    for text in args.attentions:
        name, _, options = text.partition(':')
        parts = re.split(r',(?![^(]*\))', options) if options else []  # not at the comma of a pair
        candidates.append(Candidate(name, dict(parse_option(part) for part in parts)))
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f'--threads must be at least 1, got {args.threads}')
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {args.device}: {str(error).splitlines()[0]}') from error
    rows = benchmark_layer(
        candidates,
        args.tokens,
        args.dim,
        args.heads,
        args.batch_size,
        getattr(torch, args.dtype),
        device,
        args.rounds,
    )
    columns = [
        Column('tokens', 'N'),
        Column('work'),
        Column('attention'),
        Column('attended', 'attended'),
        Column('gmacs', 'GMACs', 2),
        Column('milliseconds', 'ms', 1),
        Column('median_milliseconds', 'median ms', 1),
        Column('ratio', '× exact', 1),
    ]
    text = Table(columns, rows).render(args.format)
    if args.format == 'markdown':
        text += (
            f'\nd = {args.dim}, {args.heads} heads, batch {args.batch_size}, {args.dtype}, {device}. Least and median '
            f'of {args.rounds} rounds in which the layers take turns; ratio of the least times. GMACs of the forward '
            f'pass. {one_line(describe_environment(device))}.\n'
        )
    print(text, end='')
    if args.out:
        write_text(args.out, text)
