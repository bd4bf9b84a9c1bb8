"""`vit-efficient train RECIPE [key=value …]`."""

import argparse
import sys

from vit_efficient_cli import is_first_process
from vit_efficient_cli.parsing import RECIPE, check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('recipe', help='YAML file, such as recipes/mnist5k/dct.yaml')
    parser.add_argument('overrides', nargs='*', metavar='KEY=VALUE', help='such as optim.lr=1e-3 or resume=auto')


def run(args: argparse.Namespace) -> int | None:
    check_exists(args.recipe, 'recipe', RECIPE)
    from vit_efficient.train import Interrupted, load_recipe, train
    from vit_efficient.train.evaluation import describe

    config = load_recipe(args.recipe, args.overrides)
    try:
        result = train(config)
    except Interrupted as stop:
        if is_first_process():  # under torchrun, all have been stopped
            print(f'vit-efficient train: {stop}; resume=auto goes on', file=sys.stderr)
        return stop.exit_status
    if result:  # under torchrun, the first process has it
        counts, skipped = (result.get('train_skipped', 0), result.get('val_skipped', 0)), ''
        if any(counts) or config.data.on_error == 'skip':
            skipped = '; skipped {} training and {} validation images that cannot be read'.format(*counts)
        found = f'{describe(result)} of {result["val_images"]} images after {result["epochs"]} epochs'
        print(f'{result["model"]}: {found} in {result["train_seconds"]:.0f} s; see {config.output}{skipped}')
    return None
