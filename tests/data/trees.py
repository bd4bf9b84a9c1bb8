"""Small data sets on disk for the tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int, shape: tuple[int, ...], dtype: str = 'uint8') -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype.startswith('float'):
        return rng.random(shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def write_tree(root: Path, classes: int = 3, train: int = 8, val: int = 2, channels: int = 3) -> Path:
    """ImageFolder trees root/{train,val}/{c0,…}; images of other than 1 or 3 channels are .npy files."""
    seed = 0
    for split, count in (('train', train), ('val', val)):
        for label in range(classes):
            folder = root / split / f'c{label}'
            folder.mkdir(parents=True)
            for number in range(count):
                seed += 1
                image = pixels(seed, (20, 24, channels)) // 2 + 40 * label
                if channels in (1, 3):
                    Image.fromarray(image[..., 0] if channels == 1 else image).save(folder / f'{number}.png')
                else:
                    np.save(folder / f'{number}.npy', image)
    return root
