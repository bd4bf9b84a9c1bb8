"""`vit-efficient heal RECIPE [KEY=VALUE …]` and `vit-efficient heal MODEL --images FOLDER --attention NAME`."""

import argparse
import sys
from pathlib import Path

from vit_efficient_cli import is_first_process
from vit_efficient_cli.parsing import RECIPE, check_exists
from vit_efficient_cli.shipped import find_shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        'key=value, anywhere, overrides a key of the recipe, such as optim.lr=3e-6 or resume=auto. Of a MODEL it is '
        'heal/images.yaml; to train it for longer, give sched.epochs and stages, whose epochs add up to it: '
        'sched.epochs=20 "stages=[{epochs: 16, heal: recover}, {epochs: 4, heal: refine, lr: 3e-6}]"; for least '
        'squares alone, in minutes, sched.epochs=0 stages=[]'
    )
    parser.takes_overrides = True
    about = "a recipe of task features, .yaml; or a run or model folder, or timm's name of a pretrained model"
    parser.add_argument('model', metavar='RECIPE|MODEL', help=about)
    about = 'of a MODEL: images without labels, a folder, deep or flat, or a list, .txt; every tenth is held out'
    parser.add_argument('--images', metavar='FOLDER', help=about)
    about = "of a MODEL: what its attention becomes, or a plan's file, .yaml"
    parser.add_argument('--attention', metavar='NAME[:KEY=VALUE,…]', help=about)
    parser.add_argument('--keep-ratio', metavar='SHARE', help='option of that attention, such as 1/4')
    about = 'of a MODEL: side of images at use, a multiple of the patches (default: the height and width of the model)'
    parser.add_argument('--img-size', type=int, metavar='PX', help=about)
    about = "of a MODEL: the run's folder (default: runs/heal/NAME-ATTENTION)"
    parser.add_argument('--out', type=Path, metavar='FOLDER', help=about)


def run(args: argparse.Namespace) -> int | None:
    of_model = {name: getattr(args, name) for name in ('images', 'attention', 'keep_ratio', 'img_size', 'out')}
    given = [f'--{name.replace("_", "-")}' for name, value in of_model.items() if value is not None]
    is_recipe = Path(args.model).suffix in ('.yaml', '.yml')
    if is_recipe:
        check_exists(args.model, 'recipe', RECIPE)
    from vit_efficient.report.healing import blocks_table, healing_table
    from vit_efficient.train import Interrupted, load_recipe, train
    from vit_efficient.train.healing_recipe import recipe_of_model
    from vit_efficient.utils.errors import UserError
    from vit_efficient.utils.files import write_text

    if is_recipe:
        if given:
            raise UserError(f'{" and ".join(given)} are for a MODEL; {args.model} is a recipe, whose keys say it')
        config = load_recipe(args.model, args.overrides)
        if config.task != 'features':
            raise UserError(f'{args.model}: task must be features to heal, got {config.task}')
    else:
        config = recipe_of_model(find_shipped('heal/images.yaml'), args.model, overrides=args.overrides, **of_model)
    try:
        result = train(config)
    except Interrupted as stop:
        if is_first_process():
            print(f'vit-efficient heal: {stop}; resume=auto goes on', file=sys.stderr)
        return stop.exit_status
    if result:
        text = f'{healing_table(result).render()}\nPatch cosine after each block:\n\n{blocks_table(result).render()}'
        write_text(Path(config.output) / 'healing.md', text)
        print(f'{text}\n{result["val_images"]} images that were not learned from; see {config.output}')
    return None
