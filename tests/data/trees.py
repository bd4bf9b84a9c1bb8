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


def write_masks(
    root: Path, count: int = 4, size: tuple[int, int] = (20, 24), odd: bool = False, classes: int = 3
) -> Path:
    """Images root/images/{0,1,2,10,…}.jpg of bright squares, and root/masks/….png of their classes, from 0; 255 at the
    upper edge. With `odd` each image has a size of its own."""
    for folder in ('images', 'masks'):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        height, width = (int(side + odd * rng.integers(0, 9)) for side in size)
        image, mask = rng.integers(0, 60, (height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
        for label in range(1, classes):
            side = int(rng.integers(6, 10))
            top, left = (int(rng.integers(0, whole - side)) for whole in (height, width))
            mask[top : top + side, left : left + side] = label
        for label in range(1, classes):
            image[mask == label, label] += 180
        mask[0] = 255
        name = number if number < 3 else number + 7
        Image.fromarray(image).save(root / f'images/{name}.jpg', quality=95)
        Image.fromarray(mask).save(root / f'masks/{name}.png')
    return root


# Odd files that are images all the same, and files that are none, or no longer.
READABLE = ('cmyk.jpg', 'one_pixel.png', 'png_by_nature.jpg')
UNREADABLE = ('corrupt.png', 'empty.jpg', 'text.png', 'truncated.jpg')


def write_odd_files(folder: Path) -> None:
    """READABLE and UNREADABLE, in a folder of images."""
    image = Image.fromarray(pixels(0, (20, 24, 3)) // 2)
    image.convert('CMYK').save(folder / 'cmyk.jpg')
    image.resize((1, 1)).save(folder / 'one_pixel.png')
    image.save(folder / 'png_by_nature.jpg', format='PNG')
    image.save(folder / 'corrupt.png')
    content = bytearray((folder / 'corrupt.png').read_bytes())
    content[60:80] = bytes(20)
    (folder / 'corrupt.png').write_bytes(content)
    (folder / 'empty.jpg').touch()
    (folder / 'text.png').write_text('Not an image.\n')
    image.save(folder / 'truncated.jpg')
    content = (folder / 'truncated.jpg').read_bytes()
    (folder / 'truncated.jpg').write_bytes(content[:-100])
