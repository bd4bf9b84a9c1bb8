"""What runs on cut-outs find, by the size of objects, with intervals over cut-outs and images; and what it costs.

    python recipes/cutouts/measure.py full plan combiner … [--runs runs/cutouts] [--out recipes/cutouts]

Each name stands for its runs, RUNS/NAME-sSEED, as `vit-efficient table accuracy` calls them; the first is what the
others are compared to. Models take turns, image by image. Written are results.md, results.csv and sizes.png.
"""

import argparse
import csv
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vit_efficient import count_flops
from vit_efficient.benchmark.live_memory import LiveMemory
from vit_efficient.report.evaluation import SavedModel
from vit_efficient.report.masks import RESAMPLES, interval, mean_share, shares
from vit_efficient.report.plot import line_style
from vit_efficient.report.table import Column, Table
from vit_efficient.train.masks import PixelScore
from vit_efficient.train.tasks import Task
from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.device import choose_device, limit_threads
from vit_efficient.utils.environment import describe_environment, one_line
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import save_figure, write_text
from vit_efficient.utils.measurements import digest

BINS = (16, 32, 64, 128, 401)  # px, of the longer side of objects
_AROUND = 1 / 4  # of its box, by which the box of an object is grown on each side


@dataclass
class Object:
    """A line of objects.csv, and its place among images, cut-outs and bins."""

    label: int
    cutout: str
    image: int
    box: tuple[slice, slice]  # rows and columns
    around: tuple[slice, slice]  # of the box grown
    size: int  # the bin


def read_objects(path: Path, classes: list[str], files: list[str], size: tuple[int, int]) -> list[Object]:
    order = {Path(name).stem: i for i, name in enumerate(files)}
    found = []
    with open(path, newline='', encoding='utf-8') as file:
        for row in csv.DictReader(file):
            top, left, height, width = (int(row[name]) for name in ('top', 'left', 'height', 'width'))
            if row['image'] not in order or not int(row['pixels']):
                continue
            box = slice(top, top + height), slice(left, left + width)
            grown = (_grown(side, length) for side, length in zip(box, size, strict=True))
            place = int(np.clip(np.digitize(max(height, width), BINS) - 1, 0, len(BINS) - 2))
            found.append(Object(classes.index(row['label']), row['cutout'], order[row['image']], box, (*grown,), place))
    return found


def _grown(side: slice, length: int) -> slice:
    more = round(_AROUND * (side.stop - side.start))
    return slice(max(side.start - more, 0), min(side.stop + more, length))


@dataclass
class Found:
    """What a run finds: for each object the classes that its pixels were taken for (objects, K), and its IoU; for each
    image, those that its background was taken for (images, K), and the boundary F."""

    of_objects: np.ndarray
    iou: np.ndarray
    of_background: np.ndarray
    boundary_f: np.ndarray


class Runs:
    """The runs of a name: seeds that share a backbone, if that does not learn."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.paths = sorted(folder.glob(f'{name}-s[0-9]*'))
        if not self.paths:
            raise UserError(f'{folder}: no runs {name}-s0, …; `vit-efficient table accuracy` trains them')
        self.saved = [SavedModel(path) for path in self.paths]
        bodies = [
            digest((k, v) for k, v in each.model.state_dict().items() if not k.startswith('head.'))
            for each in self.saved
        ]
        self.sources = [bodies.index(body) for body in bodies]  # whose features each of them reads
        self.seconds: list[float] = []
        self.peak = 0
        self.found: list[Found] = []

    @torch.inference_mode()
    def logits(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Of each run (1, K, h, w); the first one's forward pass is timed."""
        start, features, found = time.perf_counter(), {}, []
        for number, (saved, source) in enumerate(zip(self.saved, self.sources, strict=True)):
            if source == number:
                features[number] = saved.model.features(images)
            logits = saved.model(features[source])
            if number == 0:
                self.seconds.append(time.perf_counter() - start)
            found.append(logits.float().cpu())
        if not self.peak:
            with LiveMemory() as memory:
                self.saved[0].model(images)
            self.peak = memory.peak
        return found


def score(predicted: np.ndarray, classes: np.ndarray, objects: list[Object], kinds: int) -> tuple[list, list]:
    """For each object of an image, what its pixels were taken for, and its IoU: of its pixels and the background around
    it. Pixels of other objects do not count.

    Lists of numbers, and not small arrays, are kept for each image: these would lie between the large ones of the next
    images, which glibc could then not give back.
    """
    rows, ious = [], []
    for each in objects:
        here = classes[each.box] == each.label
        rows.append(np.bincount(predicted[each.box][here], minlength=kinds).tolist())
        background = (classes[each.around] == 0) & (predicted[each.around] == each.label)
        ious.append(rows[-1][each.label] / int(here.sum() + background.sum()))
    return rows, ious


def measure(every: list[Runs], split: str, limit: int | None) -> tuple[list[Object], int, tuple[int, int]]:
    saved = every[0].saved[0]
    dataset = saved.open_data(split)
    classes, kinds = dataset.classes, len(dataset.classes)
    task = Task.of('segmentation', saved.model, saved.preprocessing, classes, 1.0, of_pixels=True)
    samples = saved.samples(dataset, 'error', check_target=task.check_target)
    count = len(samples) if limit is None else min(len(samples), as_integer('--limit', limit))
    size = samples.decode(0)[0].shape[:2]
    files = [dataset.filename(i) for i in range(count)]
    objects = read_objects(Path(dataset.root) / 'objects.csv', classes, files, size)
    of_image = defaultdict(list)
    for each in objects:
        of_image[each.image].append(each)
    objects = [each for i in range(count) for each in of_image[i]]  # in the order in which they are measured
    kept = [[([], [], [], []) for _ in runs.paths] for runs in every]
    device = next(saved.model.parameters()).device
    for index in tqdm(range(count), 'images', disable=None):
        image, _, mask = samples[0, index][:3]
        truth = mask.numpy()
        images = samples.normalize(image[None].to(device))
        for runs, lists in zip(every, kept, strict=True):
            for logits, (rows, ious, background, outlines) in zip(runs.logits(images), lists, strict=True):
                found = PixelScore.of(logits[0], mask, runs.saved[0].model.patch_size)
                more, iou = score(found.predicted, truth, of_image[index], kinds)
                rows += more
                ious += iou
                background.append(np.bincount(found.predicted[truth == 0], minlength=kinds).tolist())
                outlines.append(100 * found.boundary_f)
    for runs, lists in zip(every, kept, strict=True):
        runs.found = [Found(*map(np.array, each)) for each in lists]
    return objects, count, size


def confusions(found: Found, objects: list[Object], weights: np.ndarray, of_images: np.ndarray) -> np.ndarray:
    """(resamples, K, K), objects and images being there as often as the weights (resamples, …) say."""
    kinds = found.of_background.shape[1]
    labels = np.array([each.label for each in objects])
    total = np.zeros((len(weights), kinds, kinds))
    total[:, 0] = of_images @ found.of_background
    for label in range(1, kinds):
        chosen = labels == label
        total[:, label] = weights[:, chosen] @ found.of_objects[chosen]
    return total


def foreground_miou(confusion: np.ndarray) -> np.ndarray:
    diagonal = np.diagonal(confusion, axis1=-2, axis2=-1)
    return mean_share(shares(np.stack([confusion.sum(-1), confusion.sum(-2), diagonal], -2)), 0)


def draw(objects: list[Object], count: int) -> tuple[np.ndarray, np.ndarray]:
    """How often objects and images are there in each resample of a bootstrap over images and, apart from them, over
    the cut-outs of each class: (resamples, objects) and (resamples, images)."""
    rng = np.random.default_rng(0)
    of_images = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float32)
    weights = of_images[:, [each.image for each in objects]]
    for label in {each.label for each in objects}:
        names = sorted({each.cutout for each in objects if each.label == label})
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES).astype(np.float32)
        for i, each in enumerate(objects):
            if each.label == label:
                weights[:, i] *= drawn[:, names.index(each.cutout)]
    return weights, of_images


def by_size(found: Found, objects: list[Object], weights: np.ndarray) -> np.ndarray:
    """(resamples, bins): the mean IoU of objects, in percent."""
    sizes = np.array([each.size for each in objects])
    inside = np.eye(len(BINS) - 1)[sizes]
    total = weights @ inside
    return 100 * np.divide(
        weights @ (inside * found.iou[:, None]), total, out=np.full(total.shape, np.nan), where=total > 0
    )


def rows_of(every: list[Runs], objects: list[Object], count: int, shape: tuple[int, int, int]) -> list[dict]:
    weights, of_images = draw(objects, count)
    once = np.ones((1, len(objects))), np.ones((1, count))
    rows, of_first = [], None
    for runs in every:
        mious = [float(foreground_miou(confusions(each, objects, *once))[0]) for each in runs.found]
        draws = np.mean([foreground_miou(confusions(each, objects, weights, of_images)) for each in runs.found], 0)
        of_first = draws if of_first is None else of_first
        outlines = [float(np.nanmean(each.boundary_f)) for each in runs.found]
        count_of = count_flops(runs.saved[0].model, shape)
        row = {'model': runs.name, 'gmacs': count_of.total / 1e9, 'ms': 1e3 * statistics.median(runs.seconds)}
        ratios = [ours / theirs for ours, theirs in zip(every[0].seconds, runs.seconds, strict=True)]
        row |= {'times': statistics.median(ratios), 'peak': runs.peak / 2**20}
        row |= {'miou': statistics.fmean(mious), 'miou_std': statistics.stdev(mious) if len(mious) > 1 else None}
        row['interval'] = '{:.1f} … {:.1f}'.format(*interval(draws))
        if runs is not every[0]:
            row['difference'] = row['miou'] - rows[0]['miou']
            row['difference_interval'] = '{:+.2f} … {:+.2f}'.format(*interval(draws - of_first))
        row['boundary_f'] = statistics.fmean(outlines)
        row['boundary_f_std'] = statistics.stdev(outlines) if len(outlines) > 1 else None
        sizes = np.mean([by_size(each, objects, once[0])[0] for each in runs.found], 0)
        rows.append(row | {f'size{i}': float(each) for i, each in enumerate(sizes)} | {'seeds': len(runs.paths)})
    return rows


def columns() -> list[Column]:
    first = [Column('model', 'backbone'), Column('gmacs', 'GMACs', 1), Column('ms', digits=0)]
    first += [Column('times', 'times as fast', 2), Column('peak', 'peak MiB', 0)]
    first += [Column('miou', 'mIoU (%)', 2, spread='miou_std'), Column('miou_std'), Column('interval', '95 % interval')]
    first += [Column('difference', 'to the first', 2), Column('difference_interval', 'its interval')]
    first += [Column('boundary_f', 'boundary F (%)', 2, spread='boundary_f_std'), Column('boundary_f_std')]
    sizes = [Column(f'size{i}', f'IoU, {title} px', 1) for i, title in enumerate(titles())]
    return [*first, *sizes, Column('seeds')]


def titles() -> list[str]:
    return [f'{low} to {high - 1}' for low, high in pairwise(BINS)]


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    for number, row in enumerate(rows):
        axes.plot([row[f'size{i}'] for i in range(len(BINS) - 1)], label=row['model'], **line_style(number))
    axes.set_xticks(range(len(BINS) - 1), titles())
    axes.set_xlabel('longer side of objects (px)')
    axes.set_ylabel('mean IoU of objects (%)')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside right center', fontsize='small')
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='+', metavar='NAME')
    parser.add_argument('--runs', type=Path, default=Path('runs/cutouts'), metavar='DIR')
    parser.add_argument('--data', default='data/cutouts/504/val', metavar='FOLDER')
    parser.add_argument('--out', type=Path, default=Path('recipes/cutouts'), metavar='DIR')
    parser.add_argument('--limit', type=int, metavar='N', help='images (default: all)')
    parser.add_argument('--threads', type=int, default=None, help='of PyTorch on the CPU')
    parser.add_argument('--device', default='auto')
    args = parser.parse_args(argv)
    try:
        limit_threads(args.threads)
        device = choose_device(args.device, '--device')
        every = [Runs(name, args.runs) for name in args.names]
        for saved in (each for runs in every for each in runs.saved):
            saved.model.to(device)
        objects, count, size = measure(every, args.data, args.limit)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rows = rows_of(every, objects, count, (3, *size))
    table = Table(columns(), rows)
    cutouts = len({each.cutout for each in objects})
    threads = f' (threads: {torch.get_num_threads()})' if device.type == 'cpu' else ''
    about = (
        f'{count} images of {size[0]} × {size[1]} px, {len(objects)} objects of {cutouts} cut-outs, none of them seen '
        'in training. mIoU without the class none, mean ± standard deviation over seeds. Intervals: bootstrap over '
        'images and over the cut-outs of each class, the seeds together, with the same draws for all models. IoU by '
        'size: of the pixels of an object and the background around it, mean over objects. ms and peak: an image '
        'through backbone and head, models in turns; tensors without weights.'
    )
    text = f'{table.render()}\n{about} {device}{threads}, {one_line(describe_environment(device))}.\n'
    write_text(args.out / 'results.md', text)
    write_text(args.out / 'results.csv', table.render('csv'))
    plot(rows, args.out / 'sizes.png')
    print(text, end='')
    return 0


if __name__ == '__main__':
    sys.exit(main())
