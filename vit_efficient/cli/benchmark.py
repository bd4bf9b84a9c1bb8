"""`vit-efficient benchmark layer …`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='WHAT')
    about = "time attention layers, projections included, against timm's Attention in the same run"
    layer = kinds.add_parser('layer', help=about, description=about)
    layer.add_argument(
        '--attentions',
        nargs='+',
        metavar='NAME[:KEY=VALUE,…]',
        help='registered attentions and their options (default: all, and dct:keep_ratio=1/16)',
    )
    layer.add_argument('--tokens', nargs='+', type=int, default=[1024, 4096, 16384], metavar='N', help='patches')
    layer.add_argument('--dim', type=int, default=768)
    layer.add_argument('--heads', type=int, default=12)
    layer.add_argument('--batch-size', type=int, default=1)
    layer.add_argument('--dtype', choices=DTYPES, default='float32')
    layer.add_argument('--device', default='cpu')
    layer.add_argument('--threads', type=int, help='of PyTorch on the CPU (default: its own choice)')
    layer.add_argument('--rounds', type=int, default=5, help='turns of each layer; the least time counts')
    layer.add_argument(
        '--max-seconds',
        type=float,
        default=600,
        metavar='SECONDS',
        help='for the turns of all layers at one N and pass; there are fewer rounds, at least one, where they would '
        'take longer (default: %(default)s)',
    )
    layer.add_argument(
        '--no-memory',
        dest='memory',
        action='store_false',
        help='do not measure peak memory, which on the CPU takes a process for each layer, N and pass',
    )
    layer.add_argument('--format', choices=('markdown', 'csv', 'json'), default='markdown')
    layer.add_argument(
        '--out', type=Path, metavar='FILE', help='write the table to this file, and beside it a .csv and a plot, .png'
    )


def run(args: argparse.Namespace) -> None:
    import torch

    from vit_efficient.attention import list_attentions
    from vit_efficient.benchmark import LayerSetting, benchmark_layer, plot_times
    from vit_efficient.environment import describe_environment, one_line
    from vit_efficient.files import write_text

    attentions = args.attentions or [*(name for name in list_attentions() if name != 'full'), 'dct:keep_ratio=1/16']
    candidates = [_candidate(text) for text in attentions]
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f'--threads must be at least 1, got {args.threads}')
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {args.device}: {str(error).splitlines()[0]}') from error
    if args.out and (args.out.suffix == '.png' or (args.out.suffix == '.csv' and args.format != 'csv')):
        raise ValueError(f'--out {args.out}: the {args.out.suffix} goes beside the table; name that, for example .md')
    setting = LayerSetting(args.dim, args.heads, args.batch_size, getattr(torch, args.dtype), device)
    blocks = benchmark_layer(candidates, args.tokens, setting, args.rounds, args.max_seconds, args.memory)

    threads = f' (threads: {torch.get_num_threads()})' if device.type == 'cpu' else ''
    setup = (
        f'd = {args.dim}, {args.heads} heads, batch {args.batch_size}, {args.dtype}, {device}{threads}. '
        f'{one_line(describe_environment(device))}.\n'
    )
    rows: list[dict[str, Any]] = []
    text = ''
    for block in blocks:
        rows += block
        print(f'N = {block[0]["tokens"]:,}, {block[0]["work"]}: done', file=sys.stderr)
        text = render(rows, args.format, setup)
        if args.out:  # what is measured is not lost if the rest is not
            write_text(args.out, text)
            write_text(args.out.with_suffix('.csv'), render(rows, 'csv'))
            plot_times(rows, args.out.with_suffix('.png'))
    print(text, end='')


def _candidate(text: str):
    from vit_efficient.benchmark import Candidate
    from vit_efficient.cli.options import parse_spec

    return Candidate(*parse_spec(text))


def render(rows: Sequence[dict[str, Any]], format: str, setup: str = '') -> str:
    """The table of a benchmark's rows, with the slopes: a second table in Markdown, otherwise a column.

    Args:
        rows: Of `benchmark_layer`.
        format: One of `tables.FORMATS`.
        setup: What was measured, and on what; stands below the tables in Markdown.
    """
    from vit_efficient.benchmark import PASSES, slope
    from vit_efficient.tables import Column, Table

    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        line = lines.setdefault((row['attention'], row['work']), {})
        if row['milliseconds'] is not None:
            line[row['tokens']] = row['milliseconds']
    slopes = {key: slope(list(line.items())) for key, line in lines.items()}
    columns = [
        Column('tokens', 'N'),
        Column('work'),
        Column('attention'),
        Column('attended'),
        Column('gmacs', 'GMACs', 2),
        Column('milliseconds', 'ms', 1),
        Column('median_milliseconds', 'median ms', 1),
        Column('rounds'),
        Column('ratio', '× exact', 2),
        Column('peak_mib', 'peak MiB', 1),
        Column('error'),
    ]
    if format != 'markdown':
        rows = [{**row, 'slope': slopes[row['attention'], row['work']]} for row in rows]
        return Table([*columns[:-1], Column('slope'), columns[-1]], rows).render(format)

    def table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
        """Without the columns in which nothing stands."""
        columns = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
        return Table(columns, [{column.key: row.get(column.key) for column in columns} for row in rows]).render()

    tokens = list(dict.fromkeys(row['tokens'] for row in rows))
    parts = [table(columns, rows)]
    notes = 'Least and median of rounds in which the layers take turns; × exact: ratio of the least times. '
    if any(value is not None for value in slopes.values()):
        second = []
        for attention in dict.fromkeys(row['attention'] for row in rows):
            line = {work: slopes.get((attention, work)) for work in PASSES}
            left_out = [f'{n:,} {work}' for work in PASSES for n in tokens if n not in lines.get((attention, work), ())]
            second.append({'attention': attention, **line, 'left_out': ', '.join(left_out) or None})
        heads = [Column('attention', 'slope'), *(Column(work, digits=2) for work in PASSES)]
        parts.append(table([*heads, Column('left_out', 'without N =')], second))
        notes += 'Slope: of log time against log N, by least squares. '
    if any(row['peak_mib'] is not None for row in rows):
        notes += 'Peak: what a pass adds to the memory of weights and inputs. '
    return '\n'.join([*parts, f'{notes}GMACs of the forward pass. {setup}'])
