"""WebDataset's tar shards (Aizman et al., 2019, arXiv 2001.01858) with random access to their samples.

The webdataset library streams them: what comes when depends on the number of processes and on what has been read
before. Here the headers of the shards are read once, for an index of where each sample lies. So their samples come in
the order of `EpochSampler`, as those of a folder do, and a run that goes on mid-epoch loses and repeats none.

A sample is what has the same name up to the first dot (`0017.jpg`, `0017.cls`), as in webdataset; its parts may
lie apart. Hidden files are in none.
"""

import hashlib
import io
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from glob import escape, glob
from pathlib import Path
from typing import BinaryIO

import numpy as np
from timm.data.readers.reader import Reader

from vit_efficient.data.files.images import EXTENSIONS
from vit_efficient.data.sources.archives import THREADS, cached, decoded, encoded, list_files, read_names
from vit_efficient.data.sources.folders import is_image
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.packages import import_optional

IMAGE_KEYS = ';'.join(extension[1:] for extension in EXTENSIONS)
_NOWHERE = (-1, 0)
_META = re.compile('__[^/]*__($|/)')  # what webdataset passes over
# The offset and the size, in bytes, of the image and the label of a sample in its shard.
_EXTENT = [('image', np.int64), ('image_size', np.int64), ('label', np.int64), ('label_size', np.int64)]


class ShardReader(Reader):
    """A reader as timm's, of (image as stored, label), by index: shards in the order of the pattern, then as in them.
    With a `target_key` of images, it is (image as stored, mask as stored).

    The index is kept in the user's cache folder (`XDG_CACHE_HOME`, by default ~/.cache), and made anew for shards whose
    size or date has changed.

    Args:
        pattern: The paths of the shards, with braces as in `train-{000000..000009}.tar`, or with wildcards.
        input_key: Extensions of the images, separated by semicolons; of several, the first one that a sample has.
        target_key: Extension of the labels: integers, as text. Or of masks, such as png or seg.png. '': labels are not
            read, and are 0.
        classes: Names of the classes, or a text file with one in each line; by default they are not known. Those of
            masks are not told here.

    Raises:
        UserError: If the shards are not plain tar files on this machine, one of them is missing or damaged or has a
            sample twice, or there is no image or no label in them.
        MissingPackage: If `webdataset` is not installed.
    """

    def __init__(
        self, pattern: str, input_key: str = IMAGE_KEYS, target_key: str = 'cls', classes: Sequence[str] | None = None
    ):
        super().__init__()
        self.input_key, self.target_key = input_key, target_key
        self.of_masks = is_image(f'.{target_key}')
        if self.of_masks:
            keys = input_key.split(';')
            self.input_key = input_key = ';'.join(key for key in keys if key != target_key)
            classes = None
        self.classes = (
            read_names(classes, 'classes') if isinstance(classes, str) else list(classes) if classes else None
        )
        self.shards = _expand(pattern)
        self.root = os.path.commonpath([Path(shard).parent for shard in self.shards])
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(partial(_index, input_key=input_key, target_key=target_key), self.shards))
        self.groups = [len(names) for names, _ in found]  # samples of each shard
        self._ends = np.cumsum(self.groups)
        # Arrays, not lists: those would be copied, page by page, into each loader process.
        self._names = np.concatenate([names for names, _ in found])
        self._extents = np.concatenate([extents for _, extents in found])
        if not (self._extents['image'] >= 0).any():
            raise UserError(f'{pattern}: no sample has an image ({input_key})')
        if target_key and not (self._extents['label'] >= 0).any():
            raise UserError(
                f'{pattern}: no sample has a label ({target_key}); a tar of class folders is read with '
                'data.dataset=tar (its folder is data.root), labels of another extension with target_key'
            )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | BinaryIO]:
        extent, contents = self._extents[index], []
        # Opened anew: a position in a file that is open is shared with the processes that are forked.
        with open(self._shard(index), 'rb') as file:
            parts = [('image', self.input_key), ('label', self.target_key)]
            for part, keys in parts if self.target_key else parts[:1]:
                if extent[part] < 0:
                    raise UserError(f'it has no {part} ({keys})')
                file.seek(extent[part])
                contents.append(file.read(extent[f'{part}_size']))
        image, label = contents if self.target_key else (*contents, b'0')
        if self.of_masks:
            return io.BytesIO(image), io.BytesIO(label)
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
        name = Path(self._shard(index), decoded(self._names[index]))
        return name.name if basename else str(name) if absolute else name.relative_to(self.root).as_posix()


def _expand(pattern: str) -> list[str]:
    shardlists = import_optional('webdataset.shardlists', 'shards are read with', 'webdataset')
    if pattern.startswith('pipe:') or '://' in pattern:
        raise UserError(
            f'{pattern}: shards that come as a stream have no samples with an index, without which a run cannot go on '
            'where it stopped; copy them to a disk'
        )
    if os.path.isfile(pattern):
        return [pattern]
    shards = []
    for part in pattern.split('::'):
        folder = _folder(part)  # braces and brackets in its name are no pattern
        for rest in shardlists.expand_urls(part[len(folder) :]):
            shards += _matches(folder + rest)
    missing = [shard for shard in shards if not Path(shard).is_file()]
    if missing or not shards:
        which = f'{len(missing)} of {len(shards)} shards, such as {missing[0]}' if missing else 'a shard'
        raise UserError(f'{pattern}: there is no file for {which}')
    return shards


def _folder(path: str) -> str:
    """The folder that is there, nearest to a path or a pattern."""
    folder = os.path.dirname(path)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _matches(path: str) -> list[str]:
    folder = _folder(path)
    if os.path.isfile(path) or not set('*?[') & set(path[len(folder) :]):
        return [path]
    return sorted(glob(escape(folder) + path[len(folder) :]))


def _index(path: str, input_key: str, target_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Names (bytes) and extents (_EXTENT) of the samples of a shard, from the cache if they are there."""
    keys = input_key.lower().split(';'), target_key.lower()
    arrays = cached(
        path, lambda: dict(zip(('names', 'extents'), _scan(path, *keys), strict=True)), input_key, target_key
    )
    return arrays['names'], arrays['extents']


def _scan(path: str, input_keys: list[str], target_key: str) -> tuple[np.ndarray, np.ndarray]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    images, last = {*input_keys, *(extension[1:] for extension in EXTENSIONS)} - {target_key}, None
    for member, extent in list_files(path, lambda name: '.' in name.rpartition('/')[2], what='shard')[0]:
        folder, slash, base = member.rpartition('/')
        stem, dot, extension = base.partition('.')
        if not (stem and dot) or _META.match(member):
            continue
        name, extension = folder + slash + stem, extension.lower()
        parts = samples.setdefault(name, {})
        # Parts that lie apart may be those of two samples, so that the image of one would get the label of the other.
        other_image = name != last and extension in images and images & parts.keys()
        if extension in parts or other_image:
            raise UserError(
                f'{path}: sample {name} is in it twice ({member}), as where archives are joined; whose label is whose '
                'is not known: give them names of their own'
            )
        parts[extension] = extent
        last = name
    extents = []
    for parts in samples.values():
        image = next((parts[key] for key in input_keys if key in parts), _NOWHERE)
        extents.append((*image, *parts.get(target_key, _NOWHERE)))
    return np.array([encoded(name) for name in samples], dtype=bytes), np.array(extents, dtype=_EXTENT)
