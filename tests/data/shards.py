"""Shards and saved data sets made of a tree of images, for the tests."""

import io
import tarfile
from pathlib import Path


def write_shards(tree: Path, folder: Path, name: str = 'train', size: int = 5, **extra: bytes) -> str:
    """The images of a tree in shards of `size` samples, as webdataset's ShardWriter would lay them out.

    Args:
        tree: Class folders of images.
        folder: Where the shards go.
        name: What the names of the shards begin with.
        size: Samples in a shard.
        **extra: Further members of the last shard, by name; `__` stands for the dot.

    Returns:
        The pattern of their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(tree.glob('*/*'), key=lambda path: (path.stem, path.parent.name))  # classes mixed
    labels = {path.name: label for label, path in enumerate(sorted(tree.iterdir()))}
    count = -(-len(files) // size)
    for number in range(count):
        with tarfile.open(folder / f'{name}-{number:03}.tar', 'w') as archive:
            for file in files[number * size : (number + 1) * size]:
                stem = f'{file.parent.name}/{file.stem}'
                add(archive, f'{stem}{file.suffix}', file.read_bytes())
                add(archive, f'{stem}.cls', str(labels[file.parent.name]).encode())
            if number == count - 1:
                for member, content in extra.items():
                    add(archive, member.replace('__', '.'), content)
    return f'{folder}/{name}-{{000..{count - 1:03}}}.tar'


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_saved(tree: Path, folder: Path) -> Path:
    """The images of a tree as a split that `datasets` has saved to disk: the files' bytes, labels with names."""
    import datasets

    files = sorted(tree.glob('*/*'))
    names = sorted(path.name for path in tree.iterdir())
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=names)})
    rows = {
        'image': [{'bytes': file.read_bytes(), 'path': f'{file.parent.name}/{file.name}'} for file in files],
        'label': [file.parent.name for file in files],
    }
    datasets.Dataset.from_dict(rows, features).save_to_disk(folder)
    return folder
