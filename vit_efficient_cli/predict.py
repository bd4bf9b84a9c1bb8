"""`vit-efficient predict MODEL IMAGES --out FOLDER`."""

import argparse
import sys
from functools import partial
from pathlib import Path

from vit_efficient_cli.parsing import MODEL, check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', help='a run folder, or a model folder, of segmentation')
    parser.add_argument('images', nargs='+', metavar='IMAGES', help='images, and folders of images')
    about = 'for masks/; stopped, the same command goes on'
    parser.add_argument('--out', type=Path, required=True, metavar='FOLDER', help=about)
    about = 'side of tiles in pixels, a multiple of the patches; auto: whole within --memory, else the largest tiles '
    parser.add_argument('--tile', metavar='PX', help=f'{about}(default: whole images)')
    about = 'such as 4GB: an image that takes more is refused before it is decoded, and the tile that fits is named'
    parser.add_argument('--memory', metavar='SIZE', help=about)
    about = 'least share of a tile that the next one has too (default: 1/4)'
    parser.add_argument('--overlap', default='1/4', metavar='SHARE', help=about)
    about = 'of masks: indexed PNG, or TIFF, of which GeoTIFFs keep their place (default: TIFF of TIFFs, else PNG)'
    parser.add_argument('--format', choices=('auto', 'png', 'tif'), default='auto', help=about)
    parser.add_argument('--overlays', action='store_true', help='write overlays/: images tinted by class')
    about = 'write probabilities/: .npy of (classes, height, width), float16'
    parser.add_argument('--probabilities', action='store_true', help=about)
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, … (default: %(default)s)')
    as_run = "the type of matrix products (default: as the run's recipe says, else none)"
    parser.add_argument('--amp', choices=('none', 'bf16'), help=as_run)
    about = 'end at an image that cannot be read, or leave it out (default: %(default)s)'
    parser.add_argument('--on-error', choices=('error', 'skip'), default='error', help=about)


def run(args: argparse.Namespace) -> None:
    check_exists(args.model, MODEL)
    for path in args.images:
        check_exists(path, 'image or folder of images')
    from vit_efficient.prediction import Wanted, list_images, open_predictor, predict_files
    from vit_efficient.utils.checks import as_integer
    from vit_efficient.utils.options import parse_bytes, parse_value
    from vit_efficient.utils.packages import needing

    with needing('train', 'progress is shown with'):
        from tqdm import tqdm

    jobs = list_images(args.images, args.out)
    tile = args.tile
    if tile not in (None, 'auto'):
        tile = as_integer('--tile', parse_value(tile))
    memory = None if args.memory is None else parse_bytes('--memory', args.memory)
    predictor, settings = open_predictor(args.model, parse_value(args.overlap), args.device, args.amp)
    wanted = Wanted(tile, memory, args.format, args.overlays, args.probabilities)
    bar = tqdm(jobs, 'predict', disable=None)
    say = partial(tqdm.write, file=sys.stderr)
    written, skipped = predict_files(predictor, bar, args.out, wanted, settings, args.on_error, say)
    for reason in skipped.values():
        print(f'skipped: {reason}', file=sys.stderr)
    there = len(jobs) - written - len(skipped)
    said = [f'{there} were there'] * bool(there) + [f'{len(skipped)} cannot be read'] * bool(skipped)
    print(f'{written} of {len(jobs)} masks written to {args.out / "masks"}{"".join(f"; {each}" for each in said)}')
