"""Times pruned models whose linear layers are stored sparse against the same models dense, in one run; prints a table.

    python recipes/benchmarks/sparse.py

Weights are those of the start, pruned by LAMP: what a product takes depends on how many are left, not on which. All
linear layers become sparse, also those with more weights than `sparse_linear` would take by default.
One image, float32, inference on the CPU; sizes are those of the saved files of weights.
"""

import argparse
import copy
import tempfile
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

import vit_efficient
from vit_efficient.benchmark import take_turns
from vit_efficient.prune import by_role, densities, prune
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.environment import describe_environment, one_line

COLUMNS = [
    Column('model'),
    Column('img_size', 'px'),
    Column('density', 'weights left (%)', 1),
    Column('dense', 'dense ms', 1),
    Column('sparse', 'sparse ms', 1),
    Column('ratio', 'times as fast', 2),
    Column('dense_mb', 'dense MB', 1),
    Column('sparse_mb', 'sparse MB', 1),
    Column('error', 'largest difference'),
]


def megabytes(model: nn.Module) -> float:
    with tempfile.TemporaryDirectory() as folder:
        vit_efficient.save_model(model, folder)
        return (Path(folder) / 'model.safetensors').stat().st_size / 1e6


@torch.inference_mode()
def measure(name: str, img_size: int, keep: float, rounds: int) -> dict:
    torch.manual_seed(0)
    dense = timm.create_model(name, img_size=img_size).eval()
    prune(dense, 1 - keep, skip=())
    sparse = vit_efficient.sparse_linear(copy.deepcopy(dense), below=1)
    x = torch.randn(1, 3, img_size, img_size)
    times = take_turns([partial(dense, x), partial(sparse, x)], x.device, rounds)
    row = {'dense': 1e3 * min(times[0]), 'sparse': 1e3 * min(times[1]), 'ratio': min(times[0]) / min(times[1])}
    row |= {'dense_mb': megabytes(dense), 'sparse_mb': megabytes(sparse)}
    row |= {'model': name, 'img_size': img_size, 'density': 100 * by_role(densities(dense))[-1].density}
    return row | {'error': f'{float((dense(x) - sparse(x)).abs().max() / dense(x).abs().max()):.0e}'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['vit_base_patch16_224', 'vit_dct_base'])
    parser.add_argument('--img-sizes', nargs='+', type=int, default=[224, 1024])
    parser.add_argument('--keep', nargs='+', type=float, default=[0.2, 0.1, 0.05], help='shares of the weights')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = [(name, size, keep) for name in args.models for size in args.img_sizes for keep in args.keep]
    print(Table(COLUMNS, [measure(*setting, args.rounds) for setting in settings]).render())
    print(
        f'Least of {args.rounds} rounds in which dense and sparse take turns; largest difference of the outputs, as a '
        f'share of the largest output. One image, float32, {args.threads} threads. '
        f'{one_line(describe_environment(torch.device("cpu")))}.'
    )


if __name__ == '__main__':
    main()
