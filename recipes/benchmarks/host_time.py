"""Times what Python and PyTorch take to start the operators of a layer and of a model, beside timm's. Prints a table.

    python recipes/benchmarks/host_time.py

The work is next to nothing (24 channels, 3 heads, 8 × 8 patches, one image, inference, one thread), so that a call
takes what the host takes. It is what a GPU waits for at small sizes, unless a CUDA graph or a compiled model spares it.
Layers and models take turns; the least time of each counts, and the ratio is that of two least times.
"""

import argparse
import time

import timm
import torch

import vit_efficient
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.environment import describe_environment, one_line

SIDE, DIM, HEADS, PATCH = 8, 24, 3, 16
ATTENTIONS = ('dct', 'dct:domain=frequency', 'dct:place=block', 'dct1d', 'pool')


def options(name: str) -> tuple[str, dict[str, str]]:
    name, _, rest = name.partition(':')
    return name, dict(pair.split('=') for pair in rest.split(',') if rest)


def layers(prefix: int) -> dict:
    """A call of each layer; one of a block at place 'block', as it needs one."""
    grid = vit_efficient.PatchGrid(SIDE, SIDE, prefix)
    x = torch.randn(1, grid.num_tokens, DIM)
    exact = timm.layers.Attention(DIM, HEADS, qkv_bias=True).eval()
    calls = {'timm': lambda: exact(x)}
    for name in ATTENTIONS:
        mechanism, chosen = options(name)
        if chosen.get('place') != 'block':
            layer = vit_efficient.create_attention(mechanism, DIM, HEADS, qkv_bias=True, **chosen).eval()
            calls[name] = lambda layer=layer: layer(x, grid)
    return calls


def models(prefix: int) -> dict:
    size = dict(img_size=SIDE * PATCH, patch_size=PATCH, embed_dim=DIM, num_heads=HEADS, num_classes=10)
    tokens = dict(class_token=bool(prefix), global_pool='token' if prefix else 'avg')
    images = torch.randn(1, 3, SIDE * PATCH, SIDE * PATCH)
    exact = timm.models.VisionTransformer(**size, **tokens).eval()
    calls = {'timm': lambda: exact(images)}
    for name in ATTENTIONS:
        mechanism, chosen = options(name)
        model = timm.create_model(f'vit_{mechanism}_tiny', **size, **tokens, attention_kwargs=chosen).eval()
        calls[name] = lambda model=model: model(images)
    return calls


def least(calls: dict, seconds: float) -> dict[str, float]:
    """Microseconds of a call of each, the least of those that fit in the time, in turns."""
    found = dict.fromkeys(calls, float('inf'))
    for call in calls.values():
        for _ in range(5):
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name] = min(found[name], (time.perf_counter() - start) * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--seconds', type=float, default=10, help='for the layers, and for the models, each twice')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'], help='bfloat16: by autocast')
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=args.dtype == 'bfloat16'):
        for what, make in (('layer', layers), ('model', models)):
            for prefix in (0, 1):
                times = least(make(prefix), args.seconds)
                for name, took in times.items():
                    rows.append(dict(what=what, prefix=prefix, attention=name, us=took, ratio=took / times['timm']))
    columns = [
        'what',
        Column('prefix', 'prefix tokens'),
        'attention',
        Column('us', 'µs', 0),
        Column('ratio', '× timm', 2),
    ]
    print(Table(columns, rows).render())
    print(one_line(describe_environment(torch.device('cpu'))))


if __name__ == '__main__':
    main()
