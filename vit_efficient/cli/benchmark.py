"""`vit-efficient benchmark layer …` and `vit-efficient benchmark model …`."""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vit_efficient.utils.errors import UserError

_OF_MATMUL_RATE = (
    'Of matmul rate: multiply-accumulates per second, a backward pass counted as two forward passes, as a share of '
    'those of a large matrix product. '
)
DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='WHAT')
    about = "time attention layers, projections included, against timm's Attention in the same run"
    layer = kinds.add_parser('layer', help=about, description=about)
    layer.add_argument(
        '--attentions',
        nargs='+',
        metavar='NAME[:KEY=VALUE,…]',
        help='registered attentions and their options (default: all, and dct:keep_ratio=1/16), or layers of other '
        'packages: package/linformer, package/nystrom-attention, package/performer-pytorch',
    )
    layer.add_argument('--tokens', nargs='+', type=int, default=[1024, 4096, 16384], metavar='N', help='patches')
    layer.add_argument('--prefix', type=int, default=0, metavar='P', help='tokens before them: class token, registers')
    layer.add_argument('--dim', type=int, default=768)
    layer.add_argument('--heads', type=int, default=12)
    layer.add_argument('--products', action='store_true', help='time the matrix products of each layer alone, too')
    _add_common(layer, 'layers', 'N and pass')
    layer.set_defaults(make=_layers)

    about = 'time whole models against the first of them, in the same run'
    model = kinds.add_parser('model', help=about, description=about)
    model.add_argument(
        '--models',
        nargs='+',
        required=True,
        metavar='NAME[:KEY=VALUE,…]',
        help='names as in timm.create_model, and its further arguments; the first is what the others are compared to',
    )
    model.add_argument('--img-sizes', nargs='+', type=int, default=[224], metavar='PX', help='of square images')
    model.add_argument('--labels', nargs='+', metavar='LABEL', help='what the table calls them (default: all of it)')
    model.add_argument(
        '--work', nargs='+', default=['inference'], help="'inference' (default), 'forward+backward', 'training step'"
    )
    model.add_argument('--amp', action='store_true', help='autocast to --dtype; the weights stay in float32')
    _add_common(model, 'models', 'size and work')
    model.set_defaults(make=_models)


def _add_common(parser: argparse.ArgumentParser, what: str, block: str) -> None:
    parser.add_argument('--batch-size', nargs='+', type=int, default=[1], metavar='B', help='one or several')
    parser.add_argument(
        '--dtype', nargs='+', choices=DTYPES, default=['float32'], metavar='DTYPE', help=f'of {", ".join(DTYPES)}'
    )
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, help='of PyTorch on the CPU (default: its own choice)')
    parser.add_argument('--rounds', type=int, default=5, help='turns of each; the least time counts')
    parser.add_argument(
        '--max-seconds',
        type=float,
        default=600,
        metavar='SECONDS',
        help=f'for the turns of all {what} at one {block}; there are fewer rounds, at least one, where they would '
        'take longer (default: %(default)s)',
    )
    parser.add_argument(
        '--no-memory',
        dest='memory',
        action='store_false',
        help=f'do not measure peak memory, which on the CPU takes a process for each of the {what}, {block}',
    )
    parser.add_argument('--compile', action='store_true', help=f'time compiled {what}')
    parser.add_argument('--format', choices=('markdown', 'csv', 'json'), default='markdown')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FILE',
        help='write the table to this file, and a .csv and a plot beside it',
    )


def run(args: argparse.Namespace) -> None:
    args.make(args, _device(args))


def _device(args: argparse.Namespace):
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f'--threads must be at least 1, got {args.threads}')
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {args.device}: {str(error).splitlines()[0]}') from error
    if args.out and (args.out.suffix == '.png' or (args.out.suffix == '.csv' and args.format != 'csv')):
        raise UserError(f'--out {args.out}: the {args.out.suffix} goes beside the table; name that, for example .md')
    return device


def _on(device) -> str:
    import torch

    from vit_efficient.utils.environment import describe_environment, one_line

    threads = f' (threads: {torch.get_num_threads()})' if device.type == 'cpu' else ''
    return f'{device}{threads}. {one_line(describe_environment(device))}.\n'


def _sweep(args: argparse.Namespace, blocks_of: Callable) -> Iterator[list[dict[str, Any]]]:
    """The blocks of rows for each batch size and dtype. Of what has several values, rows say theirs.

    Args:
        args: Of the command.
        blocks_of: Makes the blocks of one batch size and dtype; it finds mistakes before the first block is asked for.
    """
    import torch

    from vit_efficient.benchmark.timing import check_request

    check_request((), args.max_seconds, [args.batch_size, args.dtype])
    parts = []
    for batch_size, dtype in itertools.product(args.batch_size, args.dtype):
        said = dict(batch_size=batch_size) if len(args.batch_size) > 1 else {}
        said |= dict(dtype=dtype) if len(args.dtype) > 1 else {}
        parts.append((said, blocks_of(batch_size, getattr(torch, dtype))))
    return ([said | row for row in block] for said, blocks in parts for block in blocks)


def _all(values: Sequence[Any]) -> str:
    return ' / '.join(map(str, values))


def _series(row: dict[str, Any]) -> str:
    """What tells the rows of a sweep apart, beside size and work."""
    batch = f', batch {row["batch_size"]}' if 'batch_size' in row else ''
    return batch + (f', {row["dtype"]}' if 'dtype' in row else '')


def _by_series(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows under names that no two of one size and work share: a line of a plot, and its slope, is of one name."""
    return [row | {name: row[name] + _series(row)} for row in rows]


def _models(args: argparse.Namespace, device) -> None:
    import vit_efficient  # noqa: F401 (registers its models)
    from vit_efficient.benchmark import ModelCandidate, ModelSetting, benchmark_models, plot_times
    from vit_efficient.utils.files import write_text
    from vit_efficient.utils.options import parse_spec

    labels = args.labels or [''] * len(args.models)
    if len(labels) != len(args.models):
        raise UserError(f'--labels must be as many as --models, {len(args.models)}, got {len(labels)}')
    candidates = [ModelCandidate(*parse_spec(text), label) for text, label in zip(args.models, labels, strict=True)]

    def blocks_of(batch_size, dtype):
        setting = ModelSetting(batch_size, dtype, args.amp, device, args.compile)
        return benchmark_models(
            candidates, args.img_sizes, args.work, setting, args.rounds, args.max_seconds, args.memory
        )

    blocks = _sweep(args, blocks_of)
    how = ', autocast' * args.amp + ', compiled' * args.compile
    setup = f'Batch {_all(args.batch_size)}, {_all(args.dtype)}{how}, {_on(device)}'
    rows: list[dict[str, Any]] = []
    text = ''
    for block in blocks:
        rows += block
        print(f'{block[0]["img_size"]:,} px, {block[0]["work"]}{_series(block[0])}: done', file=sys.stderr)
        text = render_models(rows, args.format, setup)
        if args.out:
            write_text(args.out, text)
            write_text(args.out.with_suffix('.csv'), render_models(rows, 'csv'))
            plot_times(_by_series(rows, 'model'), args.out.with_suffix('.png'), 'img_size', 'model')
    print(text, end='')


def render_models(rows: Sequence[dict[str, Any]], format: str, setup: str = '') -> str:
    """The table of models.

    Args:
        rows: Of `benchmark_models`.
        format: One of `tables.FORMATS`.
        setup: As of `render`.
    """
    from vit_efficient.report.table import Column, Table

    columns = [
        Column('batch_size', 'batch'),
        Column('dtype'),
        Column('img_size', 'px'),
        Column('work'),
        Column('model'),
        Column('parameters_m', 'parameters (M)', 1),
        Column('gmacs', 'GMACs', 2),
        Column('milliseconds', 'ms', 1),
        Column('median_milliseconds', 'median ms', 1),
        Column('spread_percent', 'spread %', 1),
        Column('rounds'),
        Column('images_per_second', 'images/s', 2),
        Column('ratio', '× first', 2),
        Column('peak_mib', 'peak MiB', 1),
        Column('peak_share', 'of matmul rate', 2),
        Column('error'),
    ]
    columns = _with_content(columns, rows)
    table = Table(columns, [{column.key: row.get(column.key) for column in columns} for row in rows]).render(format)
    if format != 'markdown':
        return table
    return (
        f'{table}\nLeast and median of rounds in which the models take turns; spread: from least to most, of the '
        'median; × first: ratio of the least times. Peak: what the work adds to the memory of weights, inputs and the '
        f'state of the optimiser. {_OF_MATMUL_RATE}GMACs of a forward pass of all images. {setup}'
    )


def _with_content(columns: Sequence[Any], rows: Sequence[dict[str, Any]]) -> list[Any]:
    """The columns but those in which nothing stands; that a spread is not known is something."""
    return [c for c in columns if c.key == 'spread_percent' or any(row.get(c.key) is not None for row in rows)]


def _layers(args: argparse.Namespace, device) -> None:
    from vit_efficient.attention import list_attentions
    from vit_efficient.benchmark import LayerSetting, benchmark_layer, plot_times
    from vit_efficient.utils.files import write_text

    attentions = args.attentions or [*(name for name in list_attentions() if name != 'full'), 'dct:keep_ratio=1/16']
    candidates = [_candidate(text) for text in attentions]

    def blocks_of(batch_size, dtype):
        setting = LayerSetting(args.dim, args.heads, batch_size, dtype, device, args.compile, args.prefix)
        return benchmark_layer(
            candidates, args.tokens, setting, args.rounds, args.max_seconds, args.memory, args.products
        )

    blocks = _sweep(args, blocks_of)
    how = f', {args.prefix} prefix tokens' * bool(args.prefix) + ', compiled' * args.compile
    setup = f'd = {args.dim}, {args.heads} heads, batch {_all(args.batch_size)}, {_all(args.dtype)}{how}, {_on(device)}'
    rows: list[dict[str, Any]] = []
    text = ''
    for block in blocks:
        rows += block
        print(f'N = {block[0]["tokens"]:,}, {block[0]["work"]}{_series(block[0])}: done', file=sys.stderr)
        text = render(rows, args.format, setup)
        if args.out:  # what is measured is not lost if the rest is not
            write_text(args.out, text)
            write_text(args.out.with_suffix('.csv'), render(rows, 'csv'))
            plot_times(_by_series(rows, 'attention'), args.out.with_suffix('.png'))
    print(text, end='')


def _candidate(text: str):
    from vit_efficient.benchmark import Candidate
    from vit_efficient.utils.options import parse_spec

    return Candidate(*parse_spec(text))


def render(rows: Sequence[dict[str, Any]], format: str, setup: str = '') -> str:
    """The table of a benchmark's rows, with the slopes: a second table in Markdown, otherwise a column.

    Args:
        rows: Of `benchmark_layer`.
        format: One of `tables.FORMATS`.
        setup: What was measured, and on what; stands below the tables in Markdown.
    """
    from vit_efficient.benchmark import PASSES, slope
    from vit_efficient.report.table import Column, Table

    lines: dict[tuple[str, str], dict[int, float]] = {}
    series = _by_series(rows, 'attention')
    for row in series:
        line = lines.setdefault((row['attention'], row['work']), {})
        if row['milliseconds'] is not None:
            line[row['tokens']] = row['milliseconds']
    slopes = {key: slope(list(line.items())) for key, line in lines.items()}
    columns = [
        Column('batch_size', 'batch'),
        Column('dtype'),
        Column('tokens', 'N'),
        Column('work'),
        Column('attention'),
        Column('attended'),
        Column('gmacs', 'GMACs', 2),
        Column('milliseconds', 'ms', 1),
        Column('median_milliseconds', 'median ms', 1),
        Column('spread_percent', 'spread %', 1),
        Column('rounds'),
        Column('ratio', '× exact', 2),
        Column('to_part', 'to its products', 2),
        Column('peak_share', 'of matmul rate', 2),
        Column('peak_mib', 'peak MiB', 1),
        Column('error'),
    ]
    if format != 'markdown':
        columns = [c for c in columns if c.key not in ('batch_size', 'dtype') or any(c.key in row for row in rows)]
        rows = [row | dict(slope=slopes[of['attention'], of['work']]) for row, of in zip(rows, series, strict=True)]
        return Table([*columns[:-1], Column('slope'), columns[-1]], rows).render(format)

    def table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> str:
        columns = _with_content(columns, rows)
        return Table(columns, [{column.key: row.get(column.key) for column in columns} for row in rows]).render()

    tokens = list(dict.fromkeys(row['tokens'] for row in rows))
    parts = [table(columns, rows)]
    measured = {column.key for column in columns if any(row.get(column.key) is not None for row in rows)}
    notes = (
        'Least and median of rounds in which the layers take turns; spread: from least to most, of the median; '
        '× exact: ratio of the least times. '
    )
    if any(value is not None for value in slopes.values()):
        second = []
        for attention in dict.fromkeys(row['attention'] for row in series):
            line = {work: slopes.get((attention, work)) for work in PASSES}
            left_out = [f'{n:,} {work}' for work in PASSES for n in tokens if n not in lines.get((attention, work), ())]
            second.append({'attention': attention, **line, 'left_out': ', '.join(left_out) or None})
        heads = [Column('attention', 'slope'), *(Column(work, digits=2) for work in PASSES)]
        parts.append(table([*heads, Column('left_out', 'without N =')], second))
        notes += 'Slope: of log time against log N, by least squares. '
    if 'to_part' in measured:
        notes += (
            'To its products: its time over that of its matrix products, softmax and fused attention, one after the '
            'other on the same operands. '
        )
    if 'peak_share' in measured:
        notes += _OF_MATMUL_RATE
    if 'peak_mib' in measured:
        notes += 'Peak: what a pass adds to the memory of weights and inputs. '
    return '\n'.join([*parts, f'{notes}GMACs of the forward pass. {setup}'])
