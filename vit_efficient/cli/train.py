"""`vit-efficient train RECIPE [key=value …]`."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('recipe', help='YAML file, such as recipes/mnist5k/dct.yaml')
    parser.add_argument('overrides', nargs='*', metavar='KEY=VALUE', help='such as optim.lr=1e-3 or resume=auto')


def run(args: argparse.Namespace) -> int | None:
    from vit_efficient.train import Interrupted, load_recipe, train

    config = load_recipe(args.recipe, args.overrides)
    try:
        result = train(config)
    except Interrupted as stop:
        print(f'vit-efficient train: {stop}; resume=auto goes on', file=sys.stderr)
        return 128 + stop.signal
    if result:  # under torchrun, the first process has it
        print(
            f'{result["model"]}: top-1 {result["top1"]:.2f} %, top-5 {result["top5"]:.2f} % of {result["val_images"]} '
            f'images after {result["epochs"]} epochs in {result["train_seconds"]:.0f} s; see {config.output}'
        )
    return None
