"""`vit-efficient export MODEL --out FILE.onnx`."""

import argparse
from pathlib import Path

from vit_efficient_cli.parsing import MODEL, check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', help='a run folder, or a model folder')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help='ends in .onnx or .pt2 (torch.export)')
    parser.add_argument('--img-size', nargs=2, type=int, metavar=('H', 'W'), help='in pixels (default: as trained)')
    parser.add_argument('--batch-size', type=int, default=0, metavar='N', help='(default: any number of images)')


def run(args: argparse.Namespace) -> None:
    check_exists(args.model, MODEL)
    from vit_efficient.export import export_model
    from vit_efficient.report.evaluation import SavedModel
    from vit_efficient.utils.errors import UserError

    saved = SavedModel(args.model, img_size=args.img_size)
    try:
        preprocessing = saved.preprocessing.as_dict()
        difference = export_model(saved.model, args.out, saved.input_shape, args.batch_size, preprocessing)
    except ImportError as error:
        raise UserError(str(error)) from error
    images, shape = args.batch_size or 'any number of', '×'.join(map(str, saved.input_shape))
    about = f'{images} images of {shape}, float32'
    print(f'saved {args.out}: {about}; it differs from the model by {difference:.1g} of the largest output')
