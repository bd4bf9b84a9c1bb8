"""Times the ways from a JPEG file to the tensor that a patch embedding takes, and the training of a small model that is
fed by each, in one run; prints a table of either.

    python recipes/benchmarks/loader.py

scikit-image's photographs, enlarged to 2,048 pixels of width and stored at quality 90 with 4:2:0 chroma, are read from
the system's file cache by two processes of one thread each, as by two loader workers. Each way has two of its own, so
that none profits from what another does to its process's memory; they take turns, each with all files. Tensors are
float32, normalised: of pixels (3, H, W), or of patch coefficients. Pixels are normalised as data sets of pixels are
here, by albumentations; "in blocks" stands for the fastest way found, which keeps to a core's cache. Processor time is
that of the processes, without what they wait for each other and for whatever else runs.

The models that are trained (`MODEL`, at 512 pixels, of two depths) have a process of one thread, and their loader one
worker. Of pixels they take random crops of a quarter of the area or more, resized; of coefficients, windows of 512 ×
512 pixels, since they cannot be resized.

What reads coefficients runs as with `MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=268435456` in its
environment, with which glibc keeps the memory that pyjpegio frees after each image.
"""

import argparse
import contextlib
import ctypes
import io
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import albumentations as A
import torch
from PIL import Image
from skimage import data
from torchvision.io import decode_image

from vit_efficient.benchmark import take_turns
from vit_efficient.data import ReducedReader, read_coefficients, read_image, to_array
from vit_efficient.data.config import DECODE, AugmentConfig, DataConfig
from vit_efficient.report.table import Column, Table
from vit_efficient.train import Config, train
from vit_efficient.train.config import ModelConfig, SchedConfig
from vit_efficient.utils.environment import describe_environment, one_line

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = ('astronaut', 'chelsea', 'coffee', 'rocket')
WIDTH = 2048
PROCESSES = 2
MODEL, SIZE, DEPTHS = 'vit_full_tiny_dctpatch32', [512, 512], (1, 4)
TO_TENSOR = A.Compose([A.Normalize(MEAN, STD), A.ToTensorV2()])


def normalise(pixels):
    """(H, W, 3), uint8 -> (3, H, W), float32"""
    return TO_TENSOR(image=pixels)['image']


def normalise_in_blocks(pixels, lines: int = 64):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = torch.from_numpy(pixels)
    out = torch.empty(3, *pixels.shape[:2])
    for y in range(0, len(pixels), lines):
        block = out[:, y : y + lines]
        block.copy_(pixels[y : y + lines].permute(2, 0, 1)).mul_(1 / 255 / std).sub_(mean / std)
    return out


def pillow(path):
    return normalise(to_array(read_image(path), 3))


def torchvision(path):
    return normalise(decode_image(path).permute(1, 2, 0).numpy())


def simplejpeg(path, reduction: int = 1, finish=normalise):
    return finish(ReducedReader(1, WIDTH // reduction)(path))


def coefficients(path, patch: int, keep: int):
    return read_coefficients(path, patch, keep, 3, MEAN, STD)


WAYS = {
    'full: Pillow': pillow,
    'full: torchvision': torchvision,
    'full: simplejpeg': simplejpeg,
    'full: simplejpeg, normalised in blocks': partial(simplejpeg, finish=normalise_in_blocks),
    'scaled: 1/2': partial(simplejpeg, reduction=2),
    'scaled: 1/4': partial(simplejpeg, reduction=4),
    'coefficients: patch 32, 16 × 16 kept': partial(coefficients, patch=32, keep=16),
    'coefficients: patch 16, 8 × 8 kept': partial(coefficients, patch=16, keep=8),
    'coefficients: patch 16, all kept': partial(coefficients, patch=16, keep=16),
}


def write_photographs(folder: Path, copies: int) -> list[str]:
    paths = []
    for name in PHOTOGRAPHS:
        image = Image.fromarray(getattr(data, name)())
        image = image.resize((WIDTH, image.height * WIDTH // image.width), Image.Resampling.LANCZOS)
        for copy in range(copies):
            paths.append(f'{folder}/{name}-{copy}.jpg')
            image.save(paths[-1], quality=90, subsampling='4:2:0')
    return paths


def read(way: str, path: str) -> float:
    """Processor time in ms."""
    start = time.process_time()
    WAYS[way](path)
    return 1e3 * (time.process_time() - start)


def keep_freed_memory() -> None:
    """Does from within the process what the two variables do, which glibc reads as it starts."""
    if sys.platform == 'linux':
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the most that glibc allows
            mallopt(-1, 2**28)  # M_TRIM_THRESHOLD


def start(way: str) -> None:
    torch.set_num_threads(1)
    if way.startswith('coefficients'):
        keep_freed_memory()


class Loaders:
    """The processes of a way. A call reads all files."""

    def __init__(self, way: str, paths: list[str]):
        self.way, self.paths, self.milliseconds = way, paths, []
        self.pool = ProcessPoolExecutor(PROCESSES, initializer=start, initargs=(way,))

    def __call__(self) -> None:
        self.milliseconds.append(statistics.mean(self.pool.map(partial(read, self.way), self.paths)))


def measure(paths: list[str], rounds: int) -> list[dict]:
    ways = [Loaders(way, paths) for way in WAYS]
    seconds = take_turns(ways, torch.device('cpu'), rounds)
    rows = []
    for way, times in zip(ways, seconds, strict=True):
        way.pool.shutdown()
        rates = [len(paths) / time for time in times]
        rows.append(
            {
                'way': way.way,
                'rate': statistics.median(rates),
                'least': min(rates),
                'most': max(rates),
                'cpu': statistics.median(way.milliseconds),
            }
        )
    full = max((row for row in rows if row['way'].startswith('full')), key=lambda row: row['rate'])
    for row in rows:
        row['to_pillow'] = row['rate'] / rows[0]['rate']
        row['to_full'] = row['rate'] / full['rate']
    return rows


def train_on(folder: Path, depth: int, decode: str, output: Path) -> float:
    """Images per second of an epoch, without the first one, in which loader and memory are set up."""
    augment = {'color_jitter': 0.0, 'rand_ops': 0, 'erasing': 0.0}
    if decode == 'coefficients':
        keep_freed_memory()  # its loader processes are copies of this one
        augment['crop_scale'] = None
    else:
        augment['crop_scale'] = [0.25, 1.0]
    patch_input = 'coefficients' if decode == 'coefficients' else 'pixels'
    args = {'img_size': SIZE, 'depth': depth, 'patch_input': patch_input}
    config = Config(
        model=ModelConfig(MODEL, args),
        data=DataConfig(
            train=str(folder), val=str(folder), batch_size=8, workers=1, decode=decode, augment=AugmentConfig(**augment)
        ),
        sched=SchedConfig(epochs=3, warmup_epochs=0),
        output=str(output),
        device='cpu',
        threads=1,
        eval_every=3,
        log_every=1,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        train(config)
    lines = [json.loads(line) for line in (output / 'metrics.jsonl').open()]
    rates = [line['images_per_second'] for line in lines if line['kind'] == 'train' and line['epoch'] > 0]
    return statistics.harmonic_mean(rates)


def measure_training(paths: list[str], rounds: int, folder: Path) -> list[dict]:
    for number, path in enumerate(paths):
        (folder / 'data' / str(number % 2)).mkdir(parents=True, exist_ok=True)
        for copy in range(4):
            (folder / 'data' / str(number % 2) / f'{number}-{copy}.jpg').symlink_to(path)
    rates: dict[tuple[int, str], list[float]] = {(depth, decode): [] for depth in DEPTHS for decode in DECODE}
    for turn in range(rounds):
        for depth, decode in rates:
            output = folder / f'{depth}-{decode}-{turn}'
            rates[depth, decode].append(train_on(folder / 'data', depth, decode, output))
    medians = {key: statistics.median(values) for key, values in rates.items()}
    return [
        {
            'depth': depth,
            'decode': decode,
            'rate': medians[depth, decode],
            'least': min(values),
            'most': max(values),
            'ratio': medians[depth, decode] / medians[depth, 'pixels'],
        }
        for (depth, decode), values in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--training-rounds', type=int, default=3)
    parser.add_argument('--copies', type=int, default=2, help='of each photograph, per turn (default: %(default)s)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder), args.copies)
        size = statistics.mean(Path(path).stat().st_size for path in paths)
        rows = measure(paths, args.rounds)
        training = measure_training(paths, args.training_rounds, Path(folder))
    columns = [
        Column('way', 'file to tensor'),
        Column('rate', 'images/s', 1),
        Column('least', 'least', 1),
        Column('most', 'most', 1),
        Column('to_pillow', '× Pillow', 2),
        Column('to_full', '× fastest full', 2),
        Column('cpu', 'processor ms per image', 1),
    ]
    print(Table(columns, rows).render())
    columns = [
        Column('depth', 'training, layers'),
        Column('decode', 'data.decode'),
        Column('rate', 'images/s', 1),
        Column('least', 'least', 1),
        Column('most', 'most', 1),
        Column('ratio', '× pixels', 2),
    ]
    print(Table(columns, training).render())
    files = f'{len(paths)} files of {size / 1024:.0f} KiB on average'
    environment = one_line(describe_environment(torch.device('cpu')))
    versions = ', '.join(f'{name} {version(name)}' for name in ('pillow', 'torchvision', 'simplejpeg', 'pyjpegio'))
    rounds = f'Medians of {args.rounds} rounds, of training {args.training_rounds}'
    print(f'{rounds}; {files}, {PROCESSES} processes. {environment}, {versions}.')


if __name__ == '__main__':
    main()
