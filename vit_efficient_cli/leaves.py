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
    from vit_efficient.attention.treeformer.leaves import find_leaves, occupancy
    from vit_efficient.report.evaluation import SavedModel
    from vit_efficient.report.leaves import plot_leaves

    saved = SavedModel(args.model)
    image = saved.open_image(args.image, args.data)
    found = find_leaves(saved.model, image[None])
    plot_leaves(saved.as_seen(image), found, args.out, args.queries)
    for layer, leaves in found.items():
        full = occupancy(leaves.queries if args.queries else leaves.keys, leaves.num_leaves)
        print(
            f'block {layer}: entropy {full.entropy:.2f} bits of {leaves.num_leaves.bit_length() - 1}, '
            f'{100 * full.empty:.0f} % of the leaves empty, {100 * full.largest:.0f} % of the patches in the largest'
        )
    print(f'saved {args.out}')
