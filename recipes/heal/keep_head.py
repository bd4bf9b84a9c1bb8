"""Puts another backbone below heads that are trained: what recipes/cutouts/measure.py then compares.

    python recipes/heal/keep_head.py ATTENTION|MODEL NAME --heads runs/cutouts/full-s0 … [--out runs/cutouts]

For each of the runs of --heads, OUT/NAME-sSEED becomes a model folder: its head as it is, on its own backbone with
another attention (`NAME[:KEY=VALUE,…]`, or the file of a plan), or on the backbone that a run or model folder holds.
"""

import argparse
import sys
from pathlib import Path

from vit_efficient import convert, save_model
from vit_efficient.dense import DenseModel
from vit_efficient.models import load_model
from vit_efficient.models.saving import model_folder, read_model_config
from vit_efficient.report.fidelity import Wanted, read_attentions
from vit_efficient.utils.errors import UserError


def with_backbone(run: Path, wanted: Wanted) -> DenseModel:
    """The model of a run, its backbone converted or replaced."""
    model = load_model(run)
    if not isinstance(model, DenseModel):
        raise UserError(f'--heads {run}: a {type(model).__name__} has no head for patches')
    if not wanted.folder:
        return convert(model, wanted.attention, **wanted.options)
    if model.reduce > 1:
        raise UserError(
            f'--heads {run}: its backbone sees images reduced by {model.reduce}, which no other one learned'
        )
    size = model.backbone.patch_embed.img_size
    backbone = load_model(wanted.folder, img_size=size, dynamic_img_size=True)
    other = DenseModel(backbone, model.head_name, model.num_classes, **model.head_options)
    other.head.load_state_dict(model.head.state_dict())
    return other


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('attention', metavar='ATTENTION|MODEL')
    parser.add_argument('name', metavar='NAME')
    parser.add_argument('--heads', nargs='+', required=True, type=Path, metavar='RUN', help='NAME-sSEED')
    parser.add_argument('--out', type=Path, default=Path('runs/cutouts'), metavar='DIR')
    args = parser.parse_args(argv)
    try:
        (wanted,) = read_attentions([args.attention])
        for run in args.heads:
            out = args.out / f'{args.name}-{run.name.rpartition("-")[2]}'
            if out.exists():
                raise UserError(f'{out} is there already; take another NAME, or remove it')
            model, saved = with_backbone(run, wanted), read_model_config(model_folder(run))
            save_model(model, out, saved.get('label_names'))
            print(f'{out}: written')
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
