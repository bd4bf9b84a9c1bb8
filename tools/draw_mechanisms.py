"""Draws the two pictures of the README: what a query reads under each mechanism, and what a layer takes.

    python tools/draw_mechanisms.py [FOLDER]     # docs/images by default; a few seconds, without a network

`mechanisms.png`: for every mechanism, the weight with which one query reads the value of each patch, measured through
the module itself. The input of patch j is its features (colour and place in a photograph) beside the j-th unit vector;
queries and keys read the features, values the unit vector, so the output of a query is its row of weights. What is
learned (Linformer's matrices, Treeformer's trees) is as a seed draws it.

`speed.png`: the times of a layer, from the tables in recipes/benchmarks.
"""

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient import PatchGrid, create_attention
from vit_efficient.attention import layer_options
from vit_efficient.report.plot import COLOURS, log_axis, tidy
from vit_efficient.utils.files import save_figure
from vit_efficient.utils.packages import import_optional

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / 'recipes' / 'benchmarks'

GRID = PatchGrid(16, 16)
QUERY = (3, 7)  # row and column of a patch of the face
SHARPNESS = 12.0  # of the softmax
# Options, and what stands under the panel; all with a budget of a sixteenth.
MECHANISMS: dict[str, tuple[dict[str, Any], str]] = {
    'full': ({}, 'every patch by itself'),
    'dct': (dict(keep_ratio=1 / 16), 'lowest 4 × 4 frequencies'),
    'dct1d': (dict(keep_ratio=1 / 16), 'frequencies, row after row'),
    'linformer': (dict(num_tokens=16), 'mixtures (untrained)'),
    'pool': (dict(keep_ratio=1 / 16), 'means of cells'),
    'subsample': (dict(keep_ratio=1 / 16), 'every 4th row and column'),
    'merge': (dict(keep_ratio=1 / 16), 'means of alike patches'),
    'combiner': (dict(window_size=4, reach=0), 'its 4 × 4, others by one key'),
    'monarch': ({}, 'all, by way of half rows'),
    'nystrom': (dict(num_landmarks=16), 'all, by way of 16 means'),
    'performer': (dict(num_features=64), 'all, by 64 random features'),
    'treeformer_tc': (dict(tree_height=4), 'nodes of a tree (untrained)'),
    'treeformer_tf': (dict(tree_height=4), 'leaf of a tree (untrained)'),
    'window': (dict(window_size=4), 'its window of 4 × 4'),
}


def photograph() -> Tensor:
    """A photograph, (3, 512, 512) in [0, 1]."""
    data = import_optional('skimage.data', 'the photograph is one of', 'demo', 'scikit-image')
    return torch.tensor(data.astronaut()).permute(2, 0, 1) / 255


def features(image: Tensor, grid: PatchGrid) -> Tensor:
    """What queries and keys know of the patches: mean colour and place, (N, 5), of mean 0 and then of length 1."""
    colours = F.adaptive_avg_pool2d(image, (grid.height, grid.width)).flatten(1).T
    rows, columns = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing='ij')
    known = torch.cat([colours, torch.stack([rows.flatten(), columns.flatten()], dim=1)], dim=1)
    return F.normalize((known - known.mean(0)) / known.std(0), dim=1)


@torch.no_grad()
def read_weights(name: str, options: dict[str, Any], known: Tensor, grid: PatchGrid) -> tuple[Tensor, int]:
    """The weights with which each patch, by row, reads the values of all, (N, N), and how many keys it attends to."""
    n, width = known.shape
    torch.manual_seed(0)
    options = layer_options(name, options, 0, 1, (grid.height, grid.width))
    attention = create_attention(name, n + width, num_heads=1, qkv_bias=False, **options).eval()
    q, k, v = attention.qkv.weight.zero_().chunk(3)
    # The scores are SHARPNESS · cosine: a patch is most like itself. `scale` is undone.
    for rows in (q, k):
        rows[:width, :width] = torch.eye(width) * (SHARPNESS / attention.scale) ** 0.5
    v[width:, width:] = torch.eye(n)
    attention.proj.weight.copy_(torch.eye(n + width))
    attention.proj.bias.zero_()
    return attention(torch.cat([known, torch.eye(n)], dim=1)[None], grid)[0, :, width:], attention.num_attended(grid)


def draw_mechanisms(path: str | Path, names: Sequence[str] = tuple(MECHANISMS)) -> None:
    """Saves a panel for the photograph and one for each mechanism."""
    from matplotlib.figure import Figure

    image, query = photograph(), QUERY[0] * GRID.width + QUERY[1]
    known = features(image, GRID)
    figure = Figure(figsize=(8, 5.9), dpi=100, layout='constrained', facecolor='white')
    panels = figure.subplots(3, 5).flatten()
    side = image.shape[-1] / GRID.width
    panels[0].imshow(image.permute(1, 2, 0).numpy())
    panels[0].set_xticks([side * i for i in range(GRID.width)], [])
    panels[0].set_yticks([side * i for i in range(GRID.height)], [])
    panels[0].grid(color='white', linewidth=0.4, alpha=0.6)
    panels[0].tick_params(length=0)
    panels[0].set_title('photograph', fontsize=9.5, weight='bold')
    panels[0].set_xlabel(f'{GRID.height} × {GRID.width} patches\nframed: the query', fontsize=7.2)
    _mark(panels[0], side, -0.5)
    for axes, name in zip(panels[1:], names, strict=False):
        options, reads = MECHANISMS[name]
        weights, keys = read_weights(name, options, known, GRID)
        row = weights[query].view(GRID.height, GRID.width)
        most = row.abs().max().item()
        axes.imshow(row.numpy(), cmap='RdBu_r', vmin=-most, vmax=most)
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, fontsize=9.5, weight='bold', family='monospace')
        axes.set_xlabel(f'{reads}\n{GRID.num_patches} keys → {keys}', fontsize=7.2)
        _mark(axes, 1, -0.5)
    for axes in panels[1 + len(names) :]:
        axes.set_visible(False)
    figure.suptitle('How much one query reads of each patch: red adds, blue subtracts, white is not read', fontsize=11)
    save_figure(figure, path)


def _mark(axes: Any, side: float, offset: float) -> None:
    """Frames the patch of the query."""
    from matplotlib.patches import Rectangle

    corner = QUERY[1] * side + offset, QUERY[0] * side + offset
    axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor='#00C853', linewidth=1.8))


# What the picture of times shows: the names in the tables of both machines, in the order of the legend, and in words.
LAYERS = {
    'exact (timm)': 'exact attention',
    'subsample': 'subsample, N/4 keys',
    'pool': 'pool, N/4 keys',
    'dct1d': 'dct1d, N/4',
    'performer': 'performer',
    'nystrom': 'nystrom, 64 landmarks',
    'window': 'window, 7 × 7',
    'treeformer_tc': 'treeformer_tc',
    'linformer': 'linformer, 64 keys',
    'dct': 'dct, N/4',
    'dct (keep_ratio=0.0625)': 'dct, N/16',
}


def times_of_cpu() -> tuple[str, list[tuple[str, int, float]]]:
    """What layer.md says of the machine, and (attention, patches, milliseconds) of layer.csv, forward."""
    with open(BENCHMARKS / 'layer.csv', newline='', encoding='utf-8') as file:
        rows = [row for row in csv.DictReader(file) if row['work'] == 'forward' and row['milliseconds']]
    text = (BENCHMARKS / 'layer.md').read_text(encoding='utf-8')
    dtype, threads = re.search(r'batch 1, (\w+), cpu \(threads: (\d+)\)', text).groups()
    machine = re.search(r'\)\. ([^.]*Xeon[^.,]*)', text)[1].replace('(R)', '').replace(' Processor', '')
    return f'{threads} cores of an {machine}, {dtype}', [
        (row['attention'], int(row['tokens']), float(row['milliseconds'])) for row in rows
    ]


def times_of_gpu() -> tuple[str, list[tuple[str, int, float]]]:
    """What h100.md says of the machine, and (attention, patches, milliseconds of the device) of its layers, forward."""
    text = (BENCHMARKS / 'h100.md').read_text(encoding='utf-8')
    section = text.split('\n## layer\n')[1].split('\n## ')[0]
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in section.splitlines() if line.startswith('|')]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    plain = [row for row in rows if (row['batch'], row['prefix'], row['way']) == ('1', '0', '') and row['graph_ms']]
    return re.search(r'NVIDIA \w+', text)[0] + ', bfloat16, time of the device', [
        (row['attention'], int(row['n']), float(row['graph_ms'])) for row in plain
    ]


def draw_speed(path: str | Path) -> None:
    """Saves the times of a layer against the number of patches, a panel for each machine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), dpi=100, layout='constrained', facecolor='white')
    panels, handles = figure.subplots(1, 2), {}
    for axes, (machine, times) in zip(panels, (times_of_cpu(), times_of_gpu()), strict=True):
        for number, (name, label) in enumerate(LAYERS.items()):
            points = sorted((n, ms) for attention, n, ms in times if attention == name)
            style = dict(color=COLOURS[number - 1], linewidth=1.6, markersize=5)
            if not number:
                style |= dict(color='black', linewidth=2.6, markersize=6)
            elif name.startswith('dct ') or name == 'dct':
                style['linewidth'] = 2.6
            handles[label] = axes.plot(*zip(*points, strict=True), marker='o', **style)[0]
        axes.set(xscale='log', yscale='log')
        axes.set_title(machine, fontsize=10)
        tidy(axes, 'patches of 16 × 16 pixels')
        sizes = sorted({n for name, n, _ in times if name in LAYERS})
        log_axis(axes.xaxis, sizes)
        axes.set_xticks(sizes, [f'{n:,}\n({16 * round(n**0.5):,} px)' for n in sizes], fontsize=9)
        axes.margins(x=0.12)
        log_axis(axes.yaxis)
    panels[0].set_ylabel('milliseconds, forward')
    figure.suptitle('One attention layer of a ViT-B, its projections included', fontsize=11)
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=4, frameon=False, fontsize=8.5)
    save_figure(figure, path)


if __name__ == '__main__':
    folder = Path(*sys.argv[1:2] or [ROOT / 'docs' / 'images'])
    draw_mechanisms(folder / 'mechanisms.png')
    draw_speed(folder / 'speed.png')
