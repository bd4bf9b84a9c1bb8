"""`vit-efficient evaluate MODEL --data FOLDER`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vit_efficient.utils.errors import UserError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from vit_efficient.train import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', help='a run folder, or a model folder (config.json and weights)')
    parser.add_argument(
        '--data',
        required=True,
        metavar='FOLDER',
        help="a folder of class folders, or a split of the data set that the run's recipe names, such as val",
    )
    parser.add_argument('--batch-size', type=int, default=64, help='images per batch (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=0, help='loader processes (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, … (default: %(default)s)')
    parser.add_argument('--amp', choices=('none', 'bf16'), default='none', help='(default: %(default)s)')
    parser.add_argument(
        '--on-error',
        choices=('error', 'skip'),
        help="end at a file that cannot be read, or leave it out (default: as the run's recipe says, else error)",
    )


def run(args: argparse.Namespace) -> None:
    import torch

    from vit_efficient.data import (
        EpochSampler,
        Preprocessing,
        Samples,
        check_same_classes,
        class_names,
        create_loader,
        eval_input,
        input_shape,
        takes_coefficients,
    )
    from vit_efficient.train import evaluate, load_model
    from vit_efficient.train.distributed import processes
    from vit_efficient.train.evaluation import describe
    from vit_efficient.train.tasks import Task

    for name in ('batch_size', 'workers'):
        if getattr(args, name) < (name == 'batch_size'):
            raise UserError(f'--{name.replace("_", "-")} must be at least {int(name == "batch_size")}')
    config = recipe_of(args.model)
    dataset = open_data(args.data, config)
    model = load_model(args.model)
    classes = class_names(dataset)
    check_same_classes(model.pretrained_cfg.get('label_names'), classes, 'the model', args.data)
    preprocessing = Preprocessing.of(model, config.data)
    decode = 'coefficients' if takes_coefficients(model) else config.data.decode
    dataset, transform = eval_input(dataset, model, preprocessing, decode)
    task = Task.of(config.task, model, preprocessing, classes, config.loss.patch_weight)
    with torch.no_grad():
        task.check_logits(model.eval()(torch.zeros(1, *input_shape(model, preprocessing))))
    samples = Samples(
        dataset,
        transform,
        preprocessing.input_size[0],
        model.num_classes,
        check_target=task.check_target if task.of_patches else None,
        on_error=args.on_error or config.data.on_error,
    )
    with processes(args.device) as team:
        sampler = EpochSampler(len(samples), shuffle=False, rank=team.rank, world_size=team.world_size, even=False)
        loader = create_loader(samples, sampler, args.batch_size, args.workers, pin=team.device.type == 'cuda')
        found = evaluate(model.to(team.device), loader, team, args.amp, task)
    if team.is_first:
        for reason in found.skipped.values():
            print(f'skipped: {reason}', file=sys.stderr)
        skipped = f'; skipped {len(found.skipped)} images that cannot be read' if samples.on_error == 'skip' else ''
        print(
            f'{describe(found.accuracies)}, loss {found.loss:.4f} on {found.images} images, '
            f'{found.images_per_second:.0f} images/s{skipped}'
        )


def recipe_of(model: str) -> 'Config':
    """The recipe of a run, from its folder or that of one of its models; without a run, all defaults."""
    from vit_efficient.train import Config, load_recipe
    from vit_efficient.train.trainer import BEST

    folder = Path(model).absolute()
    path = folder / 'recipe.yaml'
    if folder.name in ('model', BEST) and not path.exists():
        path = folder.parent / 'recipe.yaml'
    return load_recipe(path) if path.exists() else Config()


def open_data(data: str, config: 'Config') -> 'Dataset':
    """A folder of class folders, or a split of the data set of a recipe."""
    from vit_efficient.data import create_dataset

    options = {**config.data.args, **config.data.val_args}
    if not config.data.dataset or Path(data).is_dir():
        return create_dataset(data, key='--data', args=options if data.endswith('.tar') else None)
    return create_dataset(data, config.data.dataset, config.data.root, '--data', options)
