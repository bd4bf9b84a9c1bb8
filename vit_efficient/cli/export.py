"""`vit-efficient export MODEL --out FILE.onnx`."""

import argparse
from pathlib import Path

from vit_efficient.utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', help='a run folder, or a model folder')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help='ends in .onnx or .pt2 (torch.export)')
    parser.add_argument(
        '--img-size',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='of the images, in pixels (default: as it was trained)',
    )
    parser.add_argument(
        '--batch-size', type=int, default=0, metavar='N', help='images of a batch (default: any number)'
    )


def run(args: argparse.Namespace) -> None:
    from vit_efficient.export import export_model
    from vit_efficient.report.evaluation import SavedModel

    saved = SavedModel(args.model, img_size=args.img_size)
    size = saved.input_shape
    try:
        difference = export_model(saved.model, args.out, size, args.batch_size)
    except ImportError as error:
        raise UserError(str(error)) from error
    images = args.batch_size or 'any number of'
    print(
        f'saved {args.out}: {images} images of {size[0]}×{size[1]}×{size[2]}, float32; it differs from the model by '
        f'{difference:.1g} of the largest output'
    )
