"""A tree of odd files is the same images with the same labels in the same order from each source, or is refused."""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.shards import add
from vit_efficient.data import ImageTree, class_names, create_dataset

datasets = pytest.importorskip('datasets')
datasets.disable_progress_bars()

PLAIN = [
    'a',
    'A',
    '1',
    '01',
    '10',
    '9',
    'm²',
    '२',
    'é',
    'e\u0301',
    'x.tar',
    'x.png',
    '[0]',
    '{a,b}',
    'a b',
    "'",
    '-',
    '#\n',
]
CLASSES = [*PLAIN, 'caf\udce9', '.hidden', '__MACOSX']
FOLDERS = ['', '', 'in/', 'in/deep.x/', 'A/', '.git/', 'caf\udce9/']
FILES = [
    '0.png',
    '0.jpg',
    '00.PNG',
    '10.png',
    '9.Tiff',
    'a.b.png',
    '[0].png',
    'é\udce9.png',
    '._0.png',
    '.png',
    '0.gif',
]
FILES += ['notes.txt', 'Thumbs.db', 'none', '0 0.png', '\n.png']
LINKS = [
    '..',
    '.',
    '../..',
    'self',
    '../a',
    '../A',
    '../1/in',
    '0.png',
    '../1/0.png',
    '../nowhere.png',
    '/',
    '/nowhere',
]

files = st.builds('{}/{}{}'.format, st.sampled_from(CLASSES), st.sampled_from(FOLDERS), st.sampled_from(FILES))
links = st.tuples(
    st.builds('{}/{}'.format, st.sampled_from(CLASSES), st.sampled_from(['up', 'z.png', 'in']))
    | st.sampled_from('aA1z'),
    st.sampled_from(LINKS),
)


@pytest.fixture(autouse=True, scope='module')
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        yield


@lru_cache
def png(value):
    Image.fromarray(np.full((2, 2), value, np.uint8)).save(stream := io.BytesIO(), 'png')
    return stream.getvalue()


def write(root, names, links):
    """Files with a grey value each, and links where there is none."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))
    made = []
    for name, target in links:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(root / name):
            (root / name).symlink_to(target)
            made.append(name)
    return made


def pack(root, folder, twice=None):
    """The tree as a tar file (of which one file may be in it twice), as a shard and as a saved data set."""
    with tarfile.open(folder / 'x.tar', 'w') as archive:
        archive.add(root, '.')
        if twice:
            archive.add(root / twice, twice)
    tree = ImageTree(root)
    with tarfile.open(folder / 'shard-0.tar', 'w') as archive:
        for path, label in tree.samples:
            name, suffix = os.path.splitext(Path(path).relative_to(root))
            name = f'{os.path.dirname(name)}/{os.path.basename(name).replace(".", "_")}'  # what follows a dot is a key
            add(archive, name + suffix, Path(path).read_bytes())
            add(archive, f'{name}.cls', str(label).encode())
    if not any('\udce9' in name for name in tree.classes):  # Arrow's names are Unicode
        names = datasets.ClassLabel(names=tree.classes)
        rows = [{'image': {'bytes': Path(path).read_bytes()}, 'label': label} for path, label in tree.samples]
        features = datasets.Features({'image': datasets.Image(), 'label': names})
        datasets.Dataset.from_list(rows, features).save_to_disk(folder / 'saved/train')
    return tree.classes


def read(folder, source, classes):
    """(grey value, label) of each image, and the classes; or the message of a refusal."""
    keys = {
        'folder': (f'{folder}/tree',),
        'tar': ('x.tar', 'tar', str(folder)),
        'shard': (f'{folder}/shard-{{0..0}}.tar', '', '', 'data.train', {'classes': classes}),
        'saved': ('train', f'hfds/{folder}/saved'),
    }
    try:
        dataset = create_dataset(*keys[source])
        items = [dataset[index] for index in range(len(dataset))]
    except ValueError as error:
        return str(error)
    return [(int(np.asarray(image)[0, 0]), label) for image, label in items], class_names(dataset)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(files, min_size=1, max_size=12, unique=True), st.lists(links, max_size=2), st.booleans())
@example(['a/0.png', '.hidden/0.png', '1/._0.png'], [], False)  # a class without an image
@example(['a/0.png', 'a/in/0.png', '1/0.jpg', '1/0.png'], [('a/up', '..'), ('1/z.png', '../a/0.png')], False)
def test_a_tree_is_the_same_from_each_source(names, links, repeat):
    with tempfile.TemporaryDirectory() as folder:
        folder, root = Path(folder), Path(folder, 'tree')
        # With one folder alone, what is in a tar file might be a class, or a folder around them.
        links = write(root, [*names, *('y/0.png', 'z/0.png')], links)
        expected = read(folder, 'folder', None)
        try:
            classes = pack(root, folder, names[0] if repeat else None)
        except (ValueError, OSError) as error:  # refused as a folder; its tar file is there
            assert isinstance(expected, str), error
            found = read(folder, 'tar', None)
            assert isinstance(found, str) or links
            return
        check(folder, expected, classes, links, repeat)


def check(folder, expected, classes, links, repeat):
    values = [value for value, _ in expected[0]]
    assert links or len(values) == len(set(values))
    for source in ('tar', 'shard', 'saved'):
        if source != 'saved' or (folder / 'saved').is_dir():
            found = read(folder, source, classes)
            if isinstance(found, str):
                assert (source == 'tar' and (links or repeat)) or source == 'shard'
                assert 'a link that leads to no file' in found or 'is in it twice' in found
            else:
                assert found == expected


def test_another_hash_seed_reads_the_same(tmp_path):
    names = [f'{name}/{number}.png' for name in PLAIN for number in (1, 10, 9)]
    write(tmp_path / 'tree', names, [])
    classes = pack(tmp_path / 'tree', tmp_path)
    sources = ('folder', 'tar', 'shard', 'saved')
    here = [read(tmp_path, source, classes) for source in sources]
    assert len(here[0][0]) == len(names) and here == here[:1] * 4
    code = (
        'import json; from tests.data.sources.test_same_everywhere import Path, read; '
        f'print(json.dumps([read(Path({str(tmp_path)!r}), source, {classes!r}) for source in {sources}]))'
    )
    there = subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': '1'}, stdout=subprocess.PIPE, check=True
    )
    assert json.loads(there.stdout.splitlines()[-1]) == json.loads(json.dumps(here))
