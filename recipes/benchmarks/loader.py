"""Times the ways from a JPEG file to the tensor that a patch embedding takes, in one run; prints a table.

    python recipes/benchmarks/loader.py

scikit-image's photographs, enlarged to 2,048 pixels on their longer side and stored at quality 90 with 4:2:0 chroma,
are read by two processes of one thread each, as by two loader workers, from the system's file cache. The ways take
turns, each with all files. Tensors are float32, normalised: of pixels (3, H, W), or of patch coefficients. Pixels are
normalised as data sets of pixels are here, by albumentations; "in blocks" stands for the fastest way found, which keeps
to a core's cache.
"""

import argparse
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import albumentations as A
import torch
from PIL import Image
from skimage import data
from torchvision.io import decode_image

from vit_efficient.benchmark import take_turns
from vit_efficient.data import ReducedReader, read_coefficients, read_image, to_array
from vit_efficient.environment import describe_environment, one_line
from vit_efficient.tables import Column, Table

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = ('astronaut', 'chelsea', 'coffee', 'rocket')
SIDE = 2048
PROCESSES = 2
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
    # All but square images are at least half as high as wide; at no less than `least` all are reduced alike.
    reader = ReducedReader(1, 1)
    reader.reduction = lambda height, width: reduction
    return finish(reader(path))


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
BASES = {'× Pillow': 'full: Pillow', '× best full': None}


def write_photographs(folder: Path, copies: int) -> list[str]:
    paths = []
    for name in PHOTOGRAPHS:
        image = Image.fromarray(getattr(data, name)())
        factor = SIDE / max(image.size)
        image = image.resize([round(side * factor) for side in image.size], Image.Resampling.LANCZOS)
        for copy in range(copies):
            paths.append(f'{folder}/{name}-{copy}.jpg')
            image.save(paths[-1], quality=90, subsampling='4:2:0')
    return paths


def read(way: str, path: str) -> None:
    WAYS[way](path)


def measure(paths: list[str], rounds: int) -> list[dict]:
    with ProcessPoolExecutor(PROCESSES, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        calls = [partial(lambda way: list(pool.map(partial(read, way), paths)), way) for way in WAYS]
        seconds = take_turns(calls, torch.device('cpu'), rounds)
    rates = {way: [len(paths) / time for time in times] for way, times in zip(WAYS, seconds, strict=True)}
    best = {way: max(rate) for way, rate in rates.items()}
    full = max(rate for way, rate in best.items() if way.startswith('full'))
    return [
        {
            'way': way,
            'best': best[way],
            'median': statistics.median(rate),
            'least': min(rate),
            'to_pillow': best[way] / best['full: Pillow'],
            'to_full': best[way] / full,
        }
        for way, rate in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--copies', type=int, default=2, help='of each photograph, per turn (default: %(default)s)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder), args.copies)
        size = statistics.mean(Path(path).stat().st_size for path in paths)
        rows = measure(paths, args.rounds)
    columns = [
        Column('way', 'file to tensor'),
        Column('best', 'images/s', 1),
        Column('median', 'median', 1),
        Column('least', 'least', 1),
        Column('to_pillow', '× Pillow', 2),
        Column('to_full', '× best full', 2),
    ]
    print(Table(columns, rows).render())
    environment = describe_environment(torch.device('cpu'))
    print(
        f'images/s and ratios: the best of {args.rounds} rounds; {len(paths)} files of {size / 1024:.0f} KiB on average, '
        f'{PROCESSES} processes. {one_line(environment)}.'
    )


if __name__ == '__main__':
    main()
