"""`vit-efficient benchmark layer …` and `vit-efficient benchmark model …`."""

import argparse
from pathlib import Path

from vit_efficient_cli.parsing import FORMAT, IMG_SIZES, MODELS

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')
BACKENDS = ('cudnn', 'flash', 'efficient', 'math')
_PIECES = ', block by block: equal blocks are compiled once'
_WAYS = 'cudnn/, flash/, efficient/, math/ (a backend of SDPA), compiled/ and graph/ before a name say so of it alone'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest='kind', required=True, metavar='WHAT')
    about = "time attention layers, projections included, against timm's Attention in the same run"
    layer = kinds.add_parser('layer', help=about, description=about)
    layer.add_argument(
        '--attentions',
        nargs='+',
        metavar='NAME[:KEY=VALUE,…]',
        help='registered attentions and their options (default: all, and dct:keep_ratio=1/16), or layers of others: '
        'timm, flex_window (FlexAttention; on a CPU without a backward pass), tome (Bolya et al., 2023), '
        f'package/linformer, package/nystrom-attention, package/performer-pytorch. {_WAYS}: flash/timm, compiled/dct; '
        'rope/ gives an attention rotary positions: rope/dct, rope/full',
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
    ways = f'{MODELS["help"]}. {_WAYS}: flash/vit_base_patch16_224. Efficient models of timm that take many sizes: '
    ways += 'swin_base_patch4_window7_224, hiera_base_224'
    model.add_argument('--models', **(MODELS | dict(help=ways)))
    model.add_argument('--img-sizes', **IMG_SIZES)
    model.add_argument('--labels', nargs='+', metavar='LABEL', help='what the table calls them (default: all of it)')
    works = "'inference' (default), 'forward+backward', 'training step'"
    model.add_argument('--work', nargs='+', default=['inference'], help=works)
    model.add_argument('--amp', action='store_true', help='autocast to --dtype; the weights stay in float32')
    _add_common(model, 'models', 'size and work')
    model.set_defaults(make=_models)


def _add_common(parser: argparse.ArgumentParser, what: str, block: str) -> None:
    parser.add_argument('--batch-size', nargs='+', type=int, default=[1], metavar='B', help='one or several')
    of = f'of {", ".join(DTYPES)}'
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=['float32'], metavar='DTYPE', help=of)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, help='of PyTorch on the CPU (default: its own choice)')
    parser.add_argument('--rounds', type=int, default=5, help='turns of each; the least time counts')
    limit = f'for all {what} at one {block}; where it would take longer, fewer rounds, at least one (default: 600)'
    parser.add_argument('--max-seconds', type=float, default=600, metavar='SECONDS', help=limit)
    memory = f'do not measure peak memory, which on the CPU takes a process for each of the {what}, {block}'
    parser.add_argument('--no-memory', dest='memory', action='store_false', help=memory)
    parser.add_argument('--compile', action='store_true', help=f'time compiled {what}' + _PIECES * (what == 'models'))
    parser.add_argument(
        '--sdpa', choices=BACKENDS, help='the only backend of F.scaled_dot_product_attention that may run'
    )
    graph = 'time the forward passes without a backward pass as replays of CUDA graphs, which wait for no Python'
    parser.add_argument('--cuda-graph', action='store_true', help=graph)
    parser.add_argument('--format', **FORMAT)
    parser.add_argument('--out', type=Path, metavar='FILE', help='of the table; a .csv and a plot go beside it')


def run(args: argparse.Namespace) -> None:
    import torch

    from vit_efficient.utils.checks import as_integer
    from vit_efficient.utils.device import choose_device
    from vit_efficient.utils.errors import UserError
    from vit_efficient.utils.packages import import_optional

    if args.threads is not None:
        torch.set_num_threads(as_integer('--threads', args.threads))
    if args.out and (args.out.suffix == '.png' or (args.out.suffix == '.csv' and args.format != 'csv')):
        raise UserError(f'--out {args.out}: the {args.out.suffix} goes beside the table; name that, for example .md')
    if args.out:  # rather than when all is measured
        import_optional('matplotlib', 'the plot beside --out is drawn with', 'train')
    device = choose_device(args.device, '--device')
    if device.type == 'cuda':
        torch.cuda.set_device(device)  # whatever names none, as graphs and compilers, uses it
    args.make(args, device)


def _layers(args: argparse.Namespace, device) -> None:
    from vit_efficient.attention import list_attentions
    from vit_efficient.benchmark import Candidate, LayerSetting, benchmark_layer
    from vit_efficient.benchmark.tables import LAYERS
    from vit_efficient.utils.options import parse_spec

    attentions = args.attentions or [*(name for name in list_attentions() if name != 'full'), 'dct:keep_ratio=1/16']
    candidates = [Candidate(*parse_spec(text)) for text in attentions]

    ways = dict(sdpa=args.sdpa, graph=args.cuda_graph)

    def blocks_of(batch_size, dtype):
        setting = LayerSetting(args.dim, args.heads, batch_size, dtype, device, args.compile, args.prefix, **ways)
        measuring = (args.rounds, args.max_seconds, args.memory, args.products)
        return benchmark_layer(candidates, args.tokens, setting, *measuring)

    how = f', {args.prefix} prefix tokens' * bool(args.prefix) + ', compiled' * args.compile
    _report(args, device, LAYERS, blocks_of, f'd = {args.dim}, {args.heads} heads, batch', how)


def _models(args: argparse.Namespace, device) -> None:
    import vit_efficient  # noqa: F401 (registers its models)
    from vit_efficient.benchmark import ModelCandidate, ModelSetting, benchmark_models
    from vit_efficient.benchmark.tables import MODELS
    from vit_efficient.utils.errors import UserError
    from vit_efficient.utils.options import parse_spec

    labels = args.labels or [''] * len(args.models)
    if len(labels) != len(args.models):
        raise UserError(f'--labels must be as many as --models, {len(args.models)}, got {len(labels)}')
    candidates = [ModelCandidate(*parse_spec(text), label) for text, label in zip(args.models, labels, strict=True)]

    ways = dict(sdpa=args.sdpa, graph=args.cuda_graph)

    def blocks_of(batch_size, dtype):
        setting = ModelSetting(batch_size, dtype, args.amp, device, args.compile, **ways)
        measuring = (args.rounds, args.max_seconds, args.memory)
        return benchmark_models(candidates, args.img_sizes, args.work, setting, *measuring)

    how = ', autocast' * args.amp + ', compiled' * args.compile
    _report(args, device, MODELS, blocks_of, 'Batch', how)


def _report(args: argparse.Namespace, device, report, blocks_of, what: str, how: str) -> None:
    import torch

    from vit_efficient.benchmark.tables import sweep
    from vit_efficient.utils.environment import describe_environment, one_line

    blocks = sweep(args.batch_size, args.dtype, args.max_seconds, blocks_of)
    batch_sizes, dtypes = (' / '.join(map(str, values)) for values in (args.batch_size, args.dtype))
    threads = f' (threads: {torch.get_num_threads()})' if device.type == 'cpu' else ''
    measured_on = f'{device}{threads}. {one_line(describe_environment(device))}.'
    how += f', SDPA by {args.sdpa} alone' * bool(args.sdpa) + ', forward passes as CUDA graphs' * args.cuda_graph
    setup = f'{what} {batch_sizes}, {dtypes}{how}, {measured_on}\n'
    print(report.follow(blocks, args.format, setup, args.out), end='')
