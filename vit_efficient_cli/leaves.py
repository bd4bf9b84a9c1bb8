"""`vit-efficient leaves MODEL IMAGE --out FILE.png`."""

import argparse
from pathlib import Path

from vit_efficient_cli.parsing import DATA, MODEL, check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', help='a run folder, or a model folder, of a model with Treeformer attention')
    parser.add_argument('image', help='a file; with --data, the number of an image of it')
    parser.add_argument('--data', **DATA)
    parser.add_argument('--queries', action='store_true', help='of the patches as queries (default: as keys)')
    parser.add_argument('--out', type=Path, default=Path('leaves.png'), help='(default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    check_exists(args.model, MODEL)
    if args.data is None:
        check_exists(args.image, 'image')
    import torch

    from vit_efficient.attention.treeformer.leaves import find_leaves, occupancy
    from vit_efficient.data import EvalTransform, read_image, takes_coefficients, to_array
    from vit_efficient.report.evaluation import SavedModel
    from vit_efficient.report.leaves import plot_leaves
    from vit_efficient.utils.errors import UserError

    saved = SavedModel(args.model)
    if takes_coefficients(saved.model):
        raise UserError(f'{args.model} takes DCT coefficients of patches, and leaves are drawn on pixels')
    if args.data is None:
        image = read_image(args.image)
    else:
        dataset = saved.open_data(args.data)
        if not args.image.isdecimal() or int(args.image) >= len(dataset):
            raise UserError(f'IMAGE must be a number from 0 to {len(dataset) - 1} with --data, got {args.image!r}')
        image = dataset[int(args.image)][0]
    preprocessing = saved.preprocessing
    tensor = EvalTransform(preprocessing)(to_array(image, preprocessing.input_size[0]), 0, 0)
    found = find_leaves(saved.model, tensor[None])
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    plot_leaves(tensor * std + mean, found, args.out, args.queries)
    for layer, leaves in found.items():
        full = occupancy(leaves.queries if args.queries else leaves.keys, leaves.num_leaves)
        print(
            f'block {layer}: entropy {full.entropy:.2f} bits of {leaves.num_leaves.bit_length() - 1}, '
            f'{100 * full.empty:.0f} % of the leaves empty, {100 * full.largest:.0f} % of the patches in the largest'
        )
    print(f'saved {args.out}')
