"""Writes a recipe for every mechanism at equal attention GMACs, and for exact attention and its cheap rivals.

    python recipes/megapixel_mnist/write_recipes.py --size 128 --budgets 0.175 0.103 0.051

The option that sets what a mechanism costs is searched for the attention GMACs (projections, products and transforms)
that are closest to the budget. A mechanism that does not come within 10 % of it has no recipe there: with all patches
projected, most cannot cost as little as the smallest budget.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from vit_efficient.flops import count_flops

FOLDER = Path(__file__).parent
TOLERANCE = 0.1
#: By the name of the recipe: the mechanism, its options, the one that sets the cost, how much of it there may be for N
#: patches, and the least, beyond which costs grow (1 if it is left out).
RIVALS = {
    'dct': ('dct', {}, 'num_tokens', lambda n: n),
    'frequency': ('dct', {'domain': 'frequency'}, 'num_tokens', lambda n: n),
    'dct1d': ('dct1d', {}, 'num_tokens', lambda n: n),
    'linformer': ('linformer', {}, 'num_tokens', lambda n: n),
    'pool': ('pool', {}, 'num_tokens', lambda n: n),
    'subsample': ('subsample', {}, 'num_tokens', lambda n: n),
    'nystrom': ('nystrom', {}, 'num_landmarks', lambda n: n),
    'performer': ('performer', {}, 'num_features', lambda n: n),
    'window': ('window', {}, 'window_size', math.isqrt),
    'combiner': ('combiner', {'cell_size': 8}, 'window_size', math.isqrt, 8),
    'combiner-paper': (
        'combiner',
        {'reach': 0, 'shift': False, 'summary': 'max', 'count_bias': False},
        'window_size',
        math.isqrt,
        8,
    ),
    'merge': ('merge', {}, 'num_tokens', lambda n: n),
    'merge-x': ('merge', {'place': 'x'}, 'num_tokens', lambda n: n),
    'monarch': ('monarch', {}, 'block_size', lambda n: n, 32),
}


def attention_gmacs(name: str, model_args: dict[str, Any]) -> float:
    with torch.device('meta'):
        model = timm.create_model(f'vit_{name}_tiny', **model_args)
    return count_flops(model, (model_args['in_chans'], *model.patch_embed.img_size)).attention / 1e9


def closest(rival: str, budget: float, model_args: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The options with which a mechanism costs closest to the budget, and its GMACs: cost grows with the last one."""
    name, options, knob, most, *least = RIVALS[rival]

    def cost(value: int) -> float:
        return attention_gmacs(name, {**model_args, 'attention_kwargs': {**options, knob: value}})

    low, high = (least or [1])[0], most((model_args['img_size'] // model_args['patch_size']) ** 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    best = min((low, high), key=lambda value: abs(cost(value) - budget))
    return {**options, knob: best}, cost(best)


def write(path: Path, about: str, name: str, args: dict[str, Any], size: int, img_size: int | None = None) -> None:
    """A recipe that holds what differs from base.yaml."""
    recipe: dict[str, Any] = {'extends': '../base.yaml', 'model': {'name': f'vit_{name}_tiny', 'args': args}}
    recipe['data'] = {'args': {'size': size}}
    if img_size:
        recipe['data']['img_size'] = [img_size, img_size]
    header = f'# {about}; written by write_recipes.py.\n'
    command = f'#     vit-efficient train recipes/megapixel_mnist/{path.parent.name}/{path.name}\n\n'
    path.write_text(header + command + yaml.safe_dump(recipe, sort_keys=False), encoding='utf-8')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, default=128, help='px of the canvas (default: %(default)s)')
    parser.add_argument('--budgets', type=float, nargs='+', required=True, metavar='GMACS', help='of all attentions')
    args = parser.parse_args()
    base = {**yaml.safe_load((FOLDER / 'base.yaml').read_text())['model']['args'], 'img_size': args.size}
    folder = FOLDER / f'{args.size}px'
    folder.mkdir(exist_ok=True)

    half, patch = args.size // 2, 2 * base['patch_size']
    for name, about, changes, img_size in (
        ('full', 'Exact attention', {'img_size': args.size}, None),
        ('full-half', f'Exact attention at half the resolution, {half} px', {'img_size': half}, half),
        ('full-patch', f'Exact attention on patches of {patch} px', {'img_size': args.size, 'patch_size': patch}, None),
    ):
        gmacs = attention_gmacs('full', {**base, **changes})
        write(folder / f'{name}.yaml', f'{about}: {gmacs:.4f} GMACs in attention', 'full', changes, args.size, img_size)
        print(f'{name}: {gmacs:.4f} GMACs')
    for budget in args.budgets:
        for rival, (name, *_) in RIVALS.items():
            options, gmacs = closest(rival, budget, base)
            if abs(gmacs / budget - 1) > TOLERANCE:
                print(f'{rival} cannot be had for {budget} GMACs: {gmacs:.4f} with {options}')
                continue
            label = f'{rival}-{round(1e3 * budget)}'
            about = f'{gmacs:.4f} GMACs in attention, of a budget of {budget}'
            write(
                folder / f'{label}.yaml', about, name, {'img_size': args.size, 'attention_kwargs': options}, args.size
            )
            print(f'{label}: {gmacs:.4f} GMACs with {options}')


if __name__ == '__main__':
    main()
