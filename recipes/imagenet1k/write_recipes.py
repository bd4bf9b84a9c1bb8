"""Writes the recipes of this folder: each holds what differs from the settings that it extends.

    python recipes/imagenet1k/write_recipes.py
    python recipes/imagenet1k/write_recipes.py --throughput throughput.csv …

The second one adds the GPU hours that a recipe would take, a projection, from what

    vit-efficient benchmark model --device cuda --dtype bfloat16 --amp --compile --work 'training step' --format csv …

has measured for its model at its size (see README.md); a recipe whose models were not measured has none. Computing
activations again (`grad_checkpointing`) is taken to be another forward pass, a third more; a teacher is heard in
inference; of a model that is converted in part, the mean of what it was and what it becomes counts.
"""

import argparse
import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

import vit_efficient  # noqa: F401 (registers its models)
from vit_efficient.flops import count_flops

FOLDER = Path(__file__).parent
TRAIN_IMAGES = 1_281_167
ATTENTIONS = ('full', 'dct', 'linformer', 'treeformer_tc')
#: Share of blocks that stochastic depth leaves out at the end of the network, by size: of `deit3` and of `augreg`.
DROP_PATH = {'deit3': {'tiny': 0.0, 'small': 0.0, 'base': 0.1}, 'augreg': {'tiny': 0.0, 'small': 0.1, 'base': 0.1}}
#: Images per GPU and micro-batch, and micro-batches, of fine-tuning: 512 per update on 8 GPUs.
BATCHES = {384: (64, 1), 512: (32, 2), 1024: (8, 8)}
TEACHER = 'regnety_160.deit_in1k'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--throughput', type=Path, nargs='+', default=[], metavar='FILE.csv', help='of `vit-efficient benchmark model`'
    )
    args = parser.parse_args()
    try:
        measured = _read(args.throughput)
    except (OSError, KeyError) as error:
        files = ' '.join(map(str, args.throughput))
        parser.error(f'--throughput {files}: not a table of `vit-efficient benchmark model`: {error!r}')
    for attention in ATTENTIONS:
        for setting, about in (('deit3', 'DeiT III'), ('augreg', 'AugReg')):
            for size, drop_path in DROP_PATH[setting].items():
                model = {'name': f'vit_{attention}_{size}'}
                if drop_path:
                    model['args'] = {'drop_path_rate': drop_path}
                what = f'{about} settings at 224 px'
                _write(f'{setting}/{attention}_{size}', what, f'../{setting}.yaml', {'model': model}, 224, measured)
        for px, (batch, accumulated) in BATCHES.items():
            source = f'runs/imagenet1k/deit3/{attention}_base'
            # The size of a layer's scale is an argument of the model too, and in the checkpoint.
            model = {'name': f'vit_{attention}_base', 'init_from': source}
            model['args'] = {'img_size': px, 'init_values': 1e-4, 'drop_path_rate': 0.1}
            keys: dict[str, Any] = {'model': model, 'data': {'batch_size': batch}}
            if accumulated > 1:
                keys['grad_accum'] = accumulated
            if px >= 1024:
                keys['grad_checkpointing'] = True
            what = f'Fine-tuning of deit3/{attention}_base at {px} px'
            _write(f'finetune/{attention}_base_{px}', what, '../finetune.yaml', keys, px, measured)
        keys = {'loss': {'bce': False}, 'distill': {'teacher': TEACHER, 'kind': 'hard', 'weight': 0.5}}
        what = f'deit3/{attention}_small with the teacher of DeiT (arXiv 2012.12877)'
        _write(f'distill/{attention}_small', what, f'../deit3/{attention}_small.yaml', keys, 224, measured)
    what = 'Treeformer (TC) bootstrapped from exact attention, which stands half of the epochs, at 224 px'
    keys = _bootstrap('treeformer_tc', 'base')
    _write('deit3/treeformer_tc_base-bootstrapped', what, '../deit3.yaml', keys, 224, measured, 'treeformer_tc')


def _write(
    name: str, what: str, extends: str, keys: dict[str, Any], px: int, measured: dict, becomes: str | None = None
) -> None:
    path = FOLDER / f'{name}.yaml'
    path.parent.mkdir(exist_ok=True)
    model = _model_name(path, extends, keys)
    last = model.replace('full', becomes) if becomes else model
    gmacs = f'{_gmacs(model, px):,.2f} GMACs per image'
    if becomes:
        gmacs += f', {_gmacs(last, px):,.2f} at the end'
    lines = [f'{what}; {gmacs}.', 'Meant for a node of 8 GPUs of 80 GB.']
    epochs = _setting(path.parent / extends)['sched']['epochs']
    seconds = _seconds_of_an_image(keys, model, last, px, epochs, measured)
    if seconds:
        hours = epochs * TRAIN_IMAGES * seconds / 3600
        lines.append(f'Projection, not a result: {hours:,.0f} GPU hours, at {1 / seconds:,.0f} images/s per GPU.')
    else:
        lines.append('GPU hours: not projected, since no throughput has been measured (README.md).')
    lines.append(f'    torchrun --nproc-per-node 8 -m vit_efficient train recipes/imagenet1k/{name}.yaml')
    header = ''.join(f'# {line}\n' for line in lines)
    path.write_text(f'{header}\n{yaml.safe_dump({"extends": extends, **keys}, sort_keys=False)}', encoding='utf-8')


@cache
def _gmacs(model: str, px: int) -> float:
    with torch.device('meta'):
        return count_flops(timm.create_model(model, img_size=px), (3, px, px)).total / 1e9


def _seconds_of_an_image(
    keys: dict[str, Any], first: str, last: str, px: int, epochs: int, measured: dict[tuple[str, str, int], float]
) -> float | None:
    """Of training on one GPU; the mean over the epochs. None where a part was not measured."""
    needed = [('training step', first, px), ('training step', last, px)]
    if 'distill' in keys:
        needed.append(('inference', TEACHER, 224))
    if any(key not in measured for key in needed):
        return None
    before, after, *teacher = (1 / measured[key] for key in needed)
    step = before
    if 'stages' in keys:
        whole, half, all_of_it = (stage['epochs'] for stage in keys['stages'])
        step = (whole * before + half * (before + after) / 2 + all_of_it * after) / epochs
    return step * (4 / 3 if keys.get('grad_checkpointing') else 1) + sum(teacher)


def _model_name(path: Path, extends: str, keys: dict[str, Any]) -> str:
    return keys['model']['name'] if 'model' in keys else _setting(path.parent / extends)['model']['name']


def _setting(path: Path) -> dict[str, Any]:
    """A recipe with the sections of what it extends; keys of a section replace one another as a whole here."""
    recipe = yaml.safe_load(path.read_text())
    base = recipe.pop('extends', None)
    return {**_setting(path.parent / base), **recipe} if base else recipe


def _bootstrap(attention: str, size: str) -> dict[str, Any]:
    """A model that is trained with exact attention, and gets another one in its last blocks, then in all."""
    depth = 12
    stages = [
        {'epochs': 200},
        {'epochs': 80, 'attention': attention, 'layers': list(range(depth // 2, depth)), 'warmup_epochs': 2},
        {'epochs': 120, 'attention': attention, 'layers': list(range(depth // 2)), 'warmup_epochs': 2},
    ]
    return {'model': {'name': f'vit_full_{size}', 'args': {'drop_path_rate': 0.1}}, 'stages': stages}


def _read(paths: Sequence[Path]) -> dict[tuple[str, str, int], float]:
    """Images per second by work, model and size."""
    rows = []
    for path in paths:
        with path.open() as file:
            rows += [row for row in csv.DictReader(file) if row['images_per_second']]
    return {(row['work'], row['model'], int(row['img_size'])): float(row['images_per_second']) for row in rows}


if __name__ == '__main__':
    main()
