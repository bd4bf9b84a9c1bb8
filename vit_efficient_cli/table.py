"""`vit-efficient table flops …`, `table families …`, `table fidelity …`, `table healing …`, `table tiles …`
and `table accuracy …`."""

import argparse
import sys
from pathlib import Path

from vit_efficient_cli.parsing import DATA, FORMAT, IMG_SIZES, MODEL, MODELS, RECIPE, check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tables = parser.add_subparsers(dest='table', required=True, metavar='TABLE')

    about = 'multiply-accumulates of models at several image sizes; nothing is executed'
    flops = tables.add_parser('flops', help=about, description=about)
    flops.add_argument('--models', **MODELS)
    flops.add_argument('--img-sizes', **IMG_SIZES)
    about = 'options of the attention, such as keep_ratio=1/16, for all models of this package but vit_full_*'
    flops.add_argument('--attention-kwargs', nargs='+', default=[], metavar='KEY=VALUE', help=about)
    flops.add_argument('--format', **FORMAT)
    flops.add_argument('--out', type=Path, metavar='FILE', help='write the table to this file')
    flops.set_defaults(make=_flops_table)

    about = 'which plain ViTs of timm can be converted, by family, and why the others cannot; nothing is executed'
    families = tables.add_parser('families', help=about, description=about)
    about = "names of timm's models, with * and ? (default: all plain ViTs)"
    families.add_argument('--models', nargs='+', metavar='NAME', help=about)
    about = 'what they are converted to, with its options (default: dct)'
    families.add_argument('--attention', default='dct', metavar='NAME[:KEY=VALUE,…]', help=about)
    families.add_argument('--format', **FORMAT)
    families.add_argument('--out', type=Path, metavar='FILE', help='write the table to this file')
    families.set_defaults(make=_families_table)

    about = 'what attentions keep of the features of a pretrained model, without training, and what they cost'
    fidelity = tables.add_parser('fidelity', help=about, description=about)
    about = "a run or model folder, or a model of timm's as NAME[:KEY=VALUE,…], with its pretrained weights"
    fidelity.add_argument('model', metavar='MODEL', help=about)
    about = 'folders of photographs; those that are smaller than the size are left out'
    fidelity.add_argument('--images', nargs='+', required=True, type=Path, metavar='FOLDER', help=about)
    about = 'sides of square images, the middle of photographs that are resized to it by their shorter side'
    fidelity.add_argument('--img-size', nargs='+', required=True, type=int, metavar='PX', help=about)
    about = 'attentions with their options, and layers=6-11 for some layers; @FILE stands for the lines of a file'
    fidelity.add_argument('--attention', nargs='+', required=True, metavar='NAME[:KEY=VALUE,…]', help=about)
    fidelity.add_argument('--enlarge', action='store_true', help='take photographs that are too small, enlarged')
    fidelity.add_argument(
        '--no-times', dest='times', action='store_false', help='leave out how long a photograph takes'
    )
    fidelity.add_argument('--device', default='auto', help='auto, cpu, cuda, … (default: %(default)s)')
    fidelity.add_argument('--format', **FORMAT)
    fidelity.add_argument('--out', type=Path, metavar='DIR', help='for fidelity.md, .csv, .png')
    about = 'keeps what was measured: the same command goes on, another one adds (default: measured.json in --out)'
    fidelity.add_argument('--measured', type=Path, metavar='FILE.json', help=about)
    fidelity.set_defaults(make=_fidelity_table)

    about = 'what runs of vit-efficient heal have given back, on the images that they were measured on'
    healing = tables.add_parser('healing', help=about, description=about)
    about = 'finished runs; NAME-s0, NAME-s1, … are seeds, of which the table has the mean'
    healing.add_argument('runs', nargs='+', type=Path, metavar='RUN', help=about)
    healing.add_argument('--format', **FORMAT)
    healing.add_argument('--out', type=Path, metavar='FILE', help='write the table to this file')
    healing.set_defaults(make=_healing_table)

    about = (
        'whole images against tiles of them, by the same weights on images with masks: mIoU, also near seams, seconds'
    )
    tiles = tables.add_parser('tiles', help=about, description=about)
    about = 'run or model folders of segmentation; differences are to the first one, on whole images'
    tiles.add_argument('models', nargs='+', metavar='MODEL', help=about)
    tiles.add_argument('--data', required=True, **DATA)
    about = 'sides of tiles in pixels, multiples of the patches'
    tiles.add_argument('--tile', nargs='+', required=True, type=int, metavar='PX', help=about)
    about = 'least shares of a tile that the next one has too (default: 0 1/4)'
    tiles.add_argument('--overlap', nargs='+', default=['0', '1/4'], metavar='SHARE', help=about)
    about = 'pixels from a seam that are near it (default: the side of a patch)'
    tiles.add_argument('--near', type=int, metavar='PX', help=about)
    tiles.add_argument('--limit', type=int, metavar='N', help='images (default: all)')
    tiles.add_argument('--threads', type=int, help='of PyTorch on the CPU (default: its own choice)')
    tiles.add_argument('--device', default='auto', help='auto, cpu, cuda, … (default: %(default)s)')
    tiles.add_argument('--format', **FORMAT)
    tiles.add_argument('--out', type=Path, metavar='FILE', help='write the table to this file')
    tiles.set_defaults(make=_tiles_table)

    about = 'train the models of recipes, once for each seed, and compare accuracy, FLOPs and speed'
    overrides = dict(takes_overrides=True, epilog='key=value, anywhere, overrides a key of all recipes')
    accuracy = tables.add_parser('accuracy', help=about, description=about, **overrides)
    accuracy.add_argument('recipes', nargs='+', type=Path, metavar='RECIPE', help='the first one is compared against')
    accuracy.add_argument('--seeds', nargs='+', type=int, metavar='SEED', help="(default: each recipe's own)")
    about = "the runs' parent folder (default: runs/ and the first recipe's folder)"
    accuracy.add_argument('--runs', type=Path, metavar='DIR', help=about)
    accuracy.add_argument('--out', type=Path, metavar='DIR', help='for results.md, .csv, .png (default: --runs)')
    accuracy.set_defaults(make=_accuracy_table)


def run(args: argparse.Namespace) -> int | None:
    return args.make(args)


def _accuracy_table(args: argparse.Namespace) -> int | None:
    for path in args.recipes:
        check_exists(path, 'recipe', RECIPE)
    from vit_efficient.report.accuracy import accuracy_table
    from vit_efficient.train import Interrupted

    try:
        print(accuracy_table(args.recipes, args.overrides, args.seeds, args.runs, args.out), end='')
    except Interrupted as stop:
        print(f'vit-efficient table: {stop}; the same command goes on', file=sys.stderr)
        return stop.exit_status
    return None


def _tiles_table(args: argparse.Namespace) -> None:
    for path in args.models:
        check_exists(path, MODEL)
    from itertools import product

    from vit_efficient.report.tiles import tiles_table
    from vit_efficient.utils.checks import as_integer
    from vit_efficient.utils.device import limit_threads
    from vit_efficient.utils.files import check_can_write
    from vit_efficient.utils.options import parse_value

    limit_threads(None if args.threads is None else as_integer('--threads', args.threads))
    if args.out:
        check_can_write(args.out)
    layouts = list(product(args.tile, map(parse_value, args.overlap)))
    options = args.limit, args.near, args.device, args.format
    _show(tiles_table(args.models, args.data, layouts, *options), args.out)


def _healing_table(args: argparse.Namespace) -> None:
    for path in args.runs:
        check_exists(path, 'run folder')
    from vit_efficient.report.healing import healed_table

    _show(healed_table(args.runs).render(args.format), args.out)


def _flops_table(args: argparse.Namespace) -> None:
    from vit_efficient.report.flops import flops_table
    from vit_efficient.utils.options import parse_option

    options = dict(parse_option(text) for text in args.attention_kwargs)
    _show(flops_table(args.models, args.img_sizes, options, args.format), args.out)


def _families_table(args: argparse.Namespace) -> None:
    from vit_efficient.report.families import PLAIN, families_table
    from vit_efficient.utils.options import parse_spec

    attention, options = parse_spec(args.attention)
    _show(families_table(args.models or PLAIN, attention, options, args.format), args.out)


def _fidelity_table(args: argparse.Namespace) -> None:
    for folder in args.images:
        check_exists(folder, 'folder of images')
    from vit_efficient.report.fidelity import fidelity_table

    options = {name: getattr(args, name) for name in ('format', 'out', 'measured', 'times', 'enlarge', 'device')}
    print(fidelity_table(args.model, args.images, args.img_size, args.attention, **options), end='')


def _show(text: str, out: Path | None) -> None:
    from vit_efficient.utils.files import write_text

    print(text, end='')
    if out:
        write_text(out, text)
