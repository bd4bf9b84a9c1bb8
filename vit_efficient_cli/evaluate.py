"""`vit-efficient evaluate MODEL --data FOLDER`."""

import argparse
import sys
from pathlib import Path

from vit_efficient_cli import is_first_process
from vit_efficient_cli.parsing import DATA, MODEL, check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', help='a run folder, or a model folder (config.json and weights)')
    parser.add_argument('--data', required=True, **DATA)
    about = 'images per batch (default: 64, or of whole images with masks 1)'
    parser.add_argument('--batch-size', type=int, metavar='N', help=about)
    parser.add_argument('--workers', type=int, default=0, help='loader processes (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, … (default: %(default)s)')
    as_run = "the type of matrix products (default: as the run's recipe says, else none)"
    parser.add_argument('--amp', choices=('none', 'bf16'), help=as_run)
    about = "end at a file that cannot be read, or leave it out (default: as the run's recipe says, else error)"
    parser.add_argument('--on-error', choices=('error', 'skip'), help=about)
    about = 'of images with masks: side of tiles in pixels, a multiple of the patches (default: whole images)'
    parser.add_argument('--tile', type=int, metavar='PX', help=about)
    about = 'least share of a tile that the next one has too (default: 1/4)'
    parser.add_argument('--overlap', default='1/4', metavar='SHARE', help=about)
    about = 'of images with masks: for predictions/, classes.md, confusion.png and predictions.csv'
    parser.add_argument('--out', type=Path, metavar='FOLDER', help=about)


def run(args: argparse.Namespace) -> None:
    check_exists(args.model, MODEL)
    from vit_efficient.data import class_names, has_masks
    from vit_efficient.report.evaluation import SavedModel, evaluate_saved
    from vit_efficient.report.masks import MaskFiles
    from vit_efficient.train.evaluation import describe
    from vit_efficient.utils.checks import as_integer
    from vit_efficient.utils.errors import UserError
    from vit_efficient.utils.options import parse_value

    if args.batch_size is not None:
        as_integer('--batch-size', args.batch_size)
    as_integer('--workers', args.workers, least=0)
    saved = SavedModel(args.model)
    amp, on_error = args.amp or saved.config.amp, args.on_error or saved.config.data.on_error
    files = args.out and MaskFiles(args.out, saved.model.num_classes)
    if files and not has_masks(saved.open_data(args.data)):
        raise UserError(f'--out {args.out}: what is written is of images with masks, which {args.data} has not')
    options = args.tile, parse_value(args.overlap), files and files.keep
    found = evaluate_saved(saved, args.data, args.batch_size, args.workers, args.device, amp, on_error, *options)
    if is_first_process():
        if files:
            dataset = saved.open_data(args.data)
            print(files.finish(found, dataset, saved.model.pretrained_cfg.get('label_names') or class_names(dataset)))
        for reason in found.skipped.values():
            print(f'skipped: {reason}', file=sys.stderr)
        skipped = f'; skipped {len(found.skipped)} images that cannot be read' if on_error == 'skip' else ''
        print(
            f'{describe(found.accuracies)}, loss {found.loss:.4f} on {found.images} images, '
            f'{found.images_per_second:.0f} images/s{skipped}'
        )
