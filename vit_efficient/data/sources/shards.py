"""WebDataset's tar shards (Aizman et al., 2019, arXiv 2001.01858) with random access to their samples.

The webdataset library streams them: what comes when depends on the number of processes and on what has been read
before. Here the headers of the shards are read once, for an index of where each sample lies. So their samples come in
the order of `EpochSampler`, as those of a folder do, and a run that goes on mid-epoch loses and repeats none.

A sample is what has the same name up to the first dot (`0017.jpg`, `0017.cls`), as in webdataset.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from glob import glob
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np
from timm.data.readers.reader import Reader

from vit_efficient.data.files.images import EXTENSIONS
from vit_efficient.utils.compat import tar_members
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import replacing
from vit_efficient.utils.packages import import_optional

IMAGE_KEYS = ';'.join(extension[1:] for extension in EXTENSIONS)
_THREADS = 16  # that read headers: most of the time goes by in waiting for the disk
_NOWHERE = (-1, 0)
# The offset and the size, in bytes, of the image and the label of a sample in its shard.
_EXTENT = [('image', np.int64), ('image_size', np.int64), ('label', np.int64), ('label_size', np.int64)]


class ShardReader(Reader):
    """A reader as timm's, of (image as stored, label), by index: shards in the order of the pattern, then as in them.

    The index is kept in the user's cache folder (`XDG_CACHE_HOME`, by default ~/.cache), and made anew for shards whose
    size or date has changed.

    Args:
        pattern: The paths of the shards, with braces as in `train-{000000..000009}.tar`, or with wildcards.
        input_key: Extensions of the images, separated by semicolons; of several, the first one that a sample has.
        target_key: Extension of the labels: integers, as text.
        classes: Names of the classes, or a text file with one in each line; by default they are not known.

    Raises:
        UserError: If the shards are not plain tar files on this machine, one of them is missing or damaged, or there
            is no image or no label in them.
        MissingPackage: If `webdataset` is not installed.
    """

    def __init__(
        self, pattern: str, input_key: str = IMAGE_KEYS, target_key: str = 'cls', classes: Sequence[str] | None = None
    ):
        super().__init__()
        self.input_key, self.target_key = input_key, target_key
        self.classes = _read_names(classes) if isinstance(classes, str) else list(classes) if classes else None
        self.shards = _expand(pattern)
        self.root = os.path.commonpath([Path(shard).parent for shard in self.shards])
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(partial(_index, input_key=input_key, target_key=target_key), self.shards))
        self.groups = [len(names) for names, _ in found]  # samples of each shard
        self._ends = np.cumsum(self.groups)
        # Arrays, not lists: those would be copied, page by page, into each loader process.
        self._names = np.concatenate([names for names, _ in found])
        self._extents = np.concatenate([extents for _, extents in found])
        if not (self._extents['image'] >= 0).any():
            raise UserError(f'{pattern}: no sample has an image ({input_key})')
        if not (self._extents['label'] >= 0).any():
            raise UserError(
                f'{pattern}: no sample has a label ({target_key}); a tar of class folders is read with '
                'data.dataset=tar (its folder is data.root), labels of another extension with target_key'
            )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        extent, contents = self._extents[index], []
        # Opened anew: a position in a file that is open is shared with the processes that are forked.
        with open(self._shard(index), 'rb') as file:
            for part, keys in (('image', self.input_key), ('label', self.target_key)):
                if extent[part] < 0:
                    raise UserError(f'it has no {part} ({keys})')
                file.seek(extent[part])
                contents.append(file.read(extent[f'{part}_size']))
        image, label = contents
        try:
            return io.BytesIO(image), int(label)
        except ValueError:
            raise UserError(f'its label ({self.target_key}) is {label[:20]!r}, not an integer') from None

    def digest(self) -> str:
        """A hash of the names and the order of the samples and of how many each shard has."""
        return hashlib.sha256(self._names.tobytes() + repr(self.groups).encode()).hexdigest()

    def _shard(self, index: int) -> str:
        return self.shards[np.searchsorted(self._ends, index, side='right')]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = Path(self._shard(index), self._names[index].decode())
        return name.name if basename else str(name) if absolute else name.relative_to(self.root).as_posix()


def _expand(pattern: str) -> list[str]:
    shardlists = import_optional('webdataset.shardlists', 'shards are read with', 'webdataset')
    if pattern.startswith('pipe:') or '://' in pattern:
        raise UserError(
            f'{pattern}: shards that come as a stream have no samples with an index, without which a run cannot go on '
            'where it stopped; copy them to a disk'
        )
    shards = []
    for path in shardlists.expand_urls(pattern):
        shards += sorted(glob(path)) if set('*?[') & set(path) else [path]
    missing = [shard for shard in shards if not Path(shard).is_file()]
    if missing or not shards:
        which = f'{len(missing)} of {len(shards)} shards, such as {missing[0]}' if missing else 'a shard'
        raise UserError(f'{pattern}: there is no file for {which}')
    return shards


def _read_names(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError as error:
        raise UserError(f'classes={path}: cannot read it: {error.strerror}') from error


def _index(path: str, input_key: str, target_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Names (bytes) and extents (_EXTENT) of the samples of a shard, from the cache if they are there."""
    status = os.stat(path)
    key = (os.path.abspath(path), status.st_size, status.st_mtime_ns, input_key, target_key)
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'vit_efficient', 'shards')
    cached = folder / f'{hashlib.sha256(repr(key).encode()).hexdigest()}.npz'
    with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile), np.load(cached) as index:
        return index['names'], index['places']
    names, extents = _scan(path, input_key.lower().split(';'), target_key.lower())
    with suppress(OSError):  # it is a convenience
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as temporary, open(temporary, 'wb') as file:
            np.savez(file, names=names, places=extents)
    return names, extents


def _scan(path: str, input_keys: list[str], target_key: str) -> tuple[np.ndarray, np.ndarray]:
    from webdataset.tariterators import base_plus_ext

    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        for member in tar_members(path):
            name, extension = base_plus_ext(member.name)
            if member.isfile() and name is not None:
                members.setdefault(name, {})[extension.lower()] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f'{path}: not a readable tar shard, uncompressed ({error}); make it anew') from error
    extents = []
    for parts in members.values():
        image = next((parts[key] for key in input_keys if key in parts), _NOWHERE)
        extents.append((*image, *parts.get(target_key, _NOWHERE)))
    return np.array([name.encode() for name in members], dtype=bytes), np.array(extents, dtype=_EXTENT)
