"""Times Treeformer's layers against timm's exact attention, in one run; prints a table.

    python recipes/benchmarks/treeformer.py

d = 768, 12 heads, trees of height 7, forward, float32. Leaves are balanced by placing each predicate at the median of
the keys that reach it (queries are made to fall as keys do), or so that one leaf holds a fifth of all.
"""

import argparse
from functools import partial

import torch
from timm.layers import Attention
from torch.nn import functional as F

from vit_efficient import PatchGrid, create_attention
from vit_efficient.attention.treeformer.tc import average_over_nodes
from vit_efficient.benchmark import take_turns
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.environment import describe_environment, one_line

DIM, HEADS, HEIGHT = 768, 12, 7


def place_predicates(attention, x, share_of_first: float) -> None:
    """Puts predicates where the first leaf holds that share of the keys, and the others are even."""
    rows = attention.qkv.weight.unflatten(0, (3, -1))
    rows.data[0] = rows.data[1]
    keys = attention.project(x)[1][0]
    for head, z in enumerate(keys):
        parts = [z]
        for level in range(HEIGHT):
            halves = []
            for number, part in enumerate(parts):
                node = 2**level - 1 + number
                left = share_of_first ** (1 / HEIGHT) if not number else 0.5
                score = part @ attention.tree.weight[head, node]
                cut = score.quantile(left)
                attention.tree.bias[head, node] = -cut
                halves += [part[score < cut], part[score >= cut]]
            parts = halves


def between_projections(attention, x):
    """What a layer does with queries, keys and values, as a call without arguments."""
    q, k, v = (t.contiguous() for t in attention.project(x))
    weights = (attention.tree.weight, attention.tree.bias, attention.level_weight)
    return partial(average_over_nodes, q, k, v, *weights, 0, x.shape[1], attention.scale, True)


def folding(attention, folds: bool, x, grid):
    attention._folds = lambda *_: folds
    return partial(attention, x, grid)


@torch.no_grad()
def measure(tokens: int, rounds: int) -> list[dict]:
    torch.manual_seed(0)
    side = int(tokens**0.5)
    grid, x = PatchGrid(side, tokens // side), torch.randn(1, tokens, DIM)
    exact = Attention(DIM, HEADS, qkv_bias=True).eval()
    build = partial(create_attention, dim=DIM, num_heads=HEADS, qkv_bias=True, tree_height=HEIGHT)
    tc, folded, even, uneven = (build(f'treeformer_{name}').eval() for name in ('tc', 'tc', 'tf', 'tf'))
    for attention, share in ((tc, 2**-HEIGHT), (folded, 2**-HEIGHT), (even, 2**-HEIGHT), (uneven, 0.2)):
        place_predicates(attention, x, share)
    q, k, v = (t.contiguous() for t in even.project(x))
    works = {
        'exact (timm)': partial(exact, x),
        'treeformer_tc, as written': folding(tc, False, x, grid),
        'treeformer_tc, folded': folding(folded, True, x, grid),
        'treeformer_tf, even leaves': partial(even, x, grid),
        'treeformer_tf, a leaf of 20 %': partial(uneven, x, grid),
        'fused attention alone': partial(F.scaled_dot_product_attention, q, k, v),
        'treeformer_tc between the projections': between_projections(tc, x),
    }
    seconds = dict(zip(works, map(min, take_turns(list(works.values()), x.device, rounds)), strict=True))
    against = {'treeformer_tc between the projections': 'fused attention alone', 'fused attention alone': None}
    rows = []
    for name, time in seconds.items():
        base = against.get(name, 'exact (timm)')
        rows.append(
            {'tokens': tokens, 'layer': name, 'ms': 1e3 * time, 'ratio': seconds[base] / time if base else None}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tokens', type=int, nargs='+', default=[16384])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for tokens in args.tokens for row in measure(tokens, args.rounds)]
    columns = [Column('tokens', 'N'), Column('layer'), Column('ms', digits=1), Column('ratio', '× exact', 1)]
    print(Table(columns, rows).render())
    print(f'Least of {args.rounds} rounds. {one_line(describe_environment(torch.device("cpu")))}.')


if __name__ == '__main__':
    main()
