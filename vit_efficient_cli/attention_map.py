"""`vit-efficient attention-map MODEL IMAGE --out FILE.png`."""

import argparse
from pathlib import Path

from vit_efficient_cli.parsing import DATA, MODEL, check_exists

CLASSES = 3  # whose maps are drawn, of a token for each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = 'a run folder, or a model folder, of a model that pools by attention or has a class token'
    parser.add_argument('model', help=about)
    parser.add_argument('image', help='a file; with --data, the number of an image of it')
    parser.add_argument('--data', **DATA)
    about = (
        'the class token of this block asks, of exact attention; -1 is the last (default: the pooling, if it attends)'
    )
    parser.add_argument('--block', type=int, metavar='I', help=about)
    parser.add_argument('--mean', action='store_true', help='the mean of the heads (default: each of them)')
    about = f'of a token for each class: their numbers (default: the {CLASSES} that are likeliest)'
    parser.add_argument('--classes', type=int, nargs='+', metavar='K', help=about)
    parser.add_argument('--out', type=Path, default=Path('attention-map.png'), help='(default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    check_exists(args.model, MODEL)
    if args.data is None:
        check_exists(args.image, 'image')
    from vit_efficient.attention_maps import attention_maps
    from vit_efficient.report.attention_maps import plot_attention_maps, queries_of
    from vit_efficient.report.evaluation import SavedModel
    from vit_efficient.utils.files import check_can_write

    check_can_write(args.out)
    saved = SavedModel(args.model)
    image = saved.open_image(args.image, args.data)
    maps = attention_maps(saved.model, image[None], args.block)
    rows = queries_of(saved.model, image[None], maps, args.classes, CLASSES)
    plot_attention_maps(saved.as_seen(image), maps, args.out, rows, args.mean)
    for query, name in rows.items():
        patches, others = maps.patches[0, :, query], maps.others[0, :, query]
        if args.mean:
            patches, others = patches.mean(0, keepdim=True), others.mean(0, keepdim=True)
        for head, share in enumerate(others.tolist()):
            print(
                f'{name or maps.source}, {"mean of heads" if args.mean else f"head {head}"}: {100 * share:.1f} % to '
                f'tokens that are no patches, {100 * patches[head].max().item():.1f} % to one patch at most'
            )
    print(f'saved {args.out}')
