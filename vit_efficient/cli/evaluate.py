"""`vit-efficient evaluate MODEL --data FOLDER`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', help='a run folder, or a model folder (config.json and weights)')
    parser.add_argument('--data', required=True, metavar='FOLDER', help='a folder of class folders')
    parser.add_argument('--batch-size', type=int, default=64, help='images per batch (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=0, help='loader processes (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, … (default: %(default)s)')
    parser.add_argument('--amp', choices=('none', 'bf16'), default='none', help='(default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    from vit_efficient.data import (
        EpochSampler,
        EvalTransform,
        ImageTree,
        Preprocessing,
        Samples,
        check_same_classes,
        create_loader,
    )
    from vit_efficient.train import evaluate, load_model
    from vit_efficient.train.distributed import processes

    for name in ('batch_size', 'workers'):
        if getattr(args, name) < (name == 'batch_size'):
            raise ValueError(f'--{name.replace("_", "-")} must be at least {int(name == "batch_size")}')
    dataset = ImageTree(args.data)
    model = load_model(args.model)
    check_same_classes(model.pretrained_cfg.get('label_names'), dataset.classes, 'the model', args.data)
    preprocessing = Preprocessing.of(model)
    samples = Samples(dataset, EvalTransform(preprocessing), preprocessing.input_size[0], model.num_classes)
    with processes(args.device) as team:
        sampler = EpochSampler(len(samples), shuffle=False, rank=team.rank, world_size=team.world_size, even=False)
        loader = create_loader(samples, sampler, args.batch_size, args.workers, pin=team.device.type == 'cuda')
        found = evaluate(model.to(team.device), loader, team, args.amp)
    if team.is_first:
        print(
            f'top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, loss {found.loss:.4f} on {found.images} images, '
            f'{found.images_per_second:.0f} images/s'
        )
