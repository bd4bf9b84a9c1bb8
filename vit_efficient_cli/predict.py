"""`vit-efficient predict MODEL IMAGES --out FOLDER`."""

import argparse
import sys
from pathlib import Path

from vit_efficient_cli.parsing import MODEL, check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', help='a run folder, or a model folder, of segmentation')
    parser.add_argument('images', nargs='+', metavar='IMAGES', help='images, and folders of images')
    about = 'for masks/, indexed PNGs; stopped, the same command goes on'
    parser.add_argument('--out', type=Path, required=True, metavar='FOLDER', help=about)
    about = 'side of tiles in pixels, a multiple of the patches (default: whole images)'
    parser.add_argument('--tile', type=int, metavar='PX', help=about)
    about = 'least share of a tile that the next one has too (default: 1/4)'
    parser.add_argument('--overlap', default='1/4', metavar='SHARE', help=about)
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
    from vit_efficient.utils.options import parse_value
    from vit_efficient.utils.packages import needing

    with needing('train', 'progress is shown with'):
        from tqdm import tqdm

    jobs = list_images(args.images)
    predictor, settings = open_predictor(args.model, args.tile, parse_value(args.overlap), args.device, args.amp)
    wanted = Wanted(args.overlays, args.probabilities)
    bar = tqdm(jobs, 'predict', disable=None)
    written, skipped = predict_files(predictor, bar, args.out, wanted, settings, args.on_error)
    for reason in skipped.values():
        print(f'skipped: {reason}', file=sys.stderr)
    there = len(jobs) - written - len(skipped)
    said = [f'{there} were there'] * bool(there) + [f'{len(skipped)} cannot be read'] * bool(skipped)
    print(f'{written} of {len(jobs)} masks written to {args.out / "masks"}{"".join(f"; {each}" for each in said)}')
