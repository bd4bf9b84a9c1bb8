"""How much of what pools looks at digits, against their share of the area, over validation images; and a picture.

    python recipes/megapixel_mnist/pooling/attention_on_digits.py RUN … [--limit 200] [--out FOLDER]

Runs whose folders differ by the seed alone, `NAME-s0`, `NAME-s1`, are a row: their mean, and the standard deviation.
"""

import argparse
import re
import sys
from pathlib import Path
from statistics import fmean, stdev

import torch
from tqdm import tqdm

from vit_efficient.attention_maps import attention_maps
from vit_efficient.data.megapixel_mnist import NONE
from vit_efficient.report.evaluation import SavedModel
from vit_efficient.report.plot import show_image
from vit_efficient.report.table import Column, Table
from vit_efficient.utils.environment import describe_environment, one_line
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import save_figure, write_text
from vit_efficient.utils.packages import needing

COLUMNS = [
    Column('model'),
    Column('digits', 'on digits (%)', 1, spread='spread'),
    Column('spread'),
    Column('area', 'their area (%)', 1),
    Column('times', 'times their area', 2),
    Column('others', 'to no patch (%)', 1),
    Column('runs'),
]


def measure(path: Path, limit: int) -> dict[str, float]:
    """Shares of a run, in percent: of weights that lie on digits, of those of patches; of the area; of weights that lie
    on no patch."""
    saved = SavedModel(path)
    dataset = saved.open_data('val')
    digits, areas, others = [], [], []
    for index in tqdm(range(min(limit, len(dataset))), path.name, leave=False, disable=None):
        maps = attention_maps(saved.model, saved.open_image(str(index), 'val')[None])
        covered = torch.from_numpy(dataset[index][2]) != NONE
        looked = maps.patches.mean((0, 1, 2))
        digits.append(float(looked[covered].sum() / looked.sum()))
        areas.append(float(covered.float().mean()))
        others.append(float(maps.others.mean()))
    return {name: 100 * fmean(of) for name, of in (('digits', digits), ('area', areas), ('others', others))}


def draw(runs: dict[str, list[Path]], path: Path, index: int = 0) -> None:
    """Saves what the first run of each kind looks at, of one canvas."""
    with needing('train', 'plots are drawn with'):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * (len(runs) + 1), 2.4), dpi=150, layout='constrained')
    first, *others = figure.subplots(1, len(runs) + 1)
    for axes, (name, (folder, *_)) in zip(others, runs.items(), strict=True):
        saved = SavedModel(folder)
        image = saved.open_image(str(index), 'val')
        show_image(first, saved.as_seen(image))
        looked = attention_maps(saved.model, image[None]).patches.mean((0, 1, 2))
        axes.imshow(looked.numpy(), cmap='inferno', vmin=0, interpolation='nearest')
        axes.set(xticks=[], yticks=[], title=name)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN')
    parser.add_argument('--limit', type=int, default=200, metavar='N', help='images (default: %(default)s)')
    parser.add_argument('--out', type=Path, metavar='FOLDER', help='also for the picture')
    args = parser.parse_args(argv)
    kinds: dict[str, list[Path]] = {}
    for run in args.runs:
        kinds.setdefault(re.sub(r'-s\d+$', '', run.name), []).append(run)
    try:
        rows = []
        for name, runs in kinds.items():
            found = [measure(run, args.limit) for run in runs]
            row = {key: fmean(each[key] for each in found) for key in found[0]}
            row['spread'] = stdev(each['digits'] for each in found) if len(found) > 1 else None
            rows.append({'model': name, **row, 'times': row['digits'] / row['area'], 'runs': len(runs)})
        about = (
            f'Weights of patches, mean over heads, of the first {args.limit} validation images; ± is the standard '
            f'deviation of runs. {one_line(describe_environment(torch.device("cpu")))}.'
        )
        text = f'{Table(COLUMNS, rows).render()}\n{about}\n'
        if args.out:
            write_text(args.out / 'attention.md', text)
            draw(kinds, args.out / 'attention.png')
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(text, end='')
    return 0


if __name__ == '__main__':
    sys.exit(main())
