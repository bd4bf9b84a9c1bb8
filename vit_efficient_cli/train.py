"""`vit-efficient train RECIPE [key=value …]`."""

import argparse
import sys

from vit_efficient_cli import is_first_process
from vit_efficient_cli.parsing import RECIPE, check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('recipe', help='YAML file, such as recipes/mnist5k/dct.yaml')
    about = 'such as optim.lr=1e-3 or resume=auto'
    parser.add_argument('overrides', nargs='*', default=[], metavar='KEY=VALUE', help=about)


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
        took = f'in {result["train_seconds"]:.0f} s{_about_model(result)}'
        print(f'{result["model"]}: {found} {took}; see {config.output}{skipped}')
    return None


def _about_model(result: dict) -> str:
    """Its mechanisms and the weights that it started from, such as ', with full and dct, from pretrained weights'."""
    spec, start = result.get('attention'), result.get('started_from')  # results of older versions have neither
    layers = [] if not spec else [spec] if isinstance(spec[0], str) else spec
    names = ' and '.join(dict.fromkeys(name for name, _ in layers))
    weights = 'pretrained weights' if start == 'pretrained' else start
    return f', with {names}' * bool(names) + f', from {weights}' * bool(start)
