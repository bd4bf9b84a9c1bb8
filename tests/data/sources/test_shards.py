import bz2
import io
import lzma
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from tests.data.shards import add, write_shards
from tests.data.trees import pixels, write_tree
from vit_efficient.data import ShardReader, class_names, create_dataset, shard_order
from vit_efficient.data.sources import shards


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp('cache')
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder))
    return folder / 'vit_efficient/shards'


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / 'tree') / 'train'


def test_samples_are_those_that_webdataset_streams(tree, tmp_path):
    pattern = write_shards(tree, tmp_path / 'shards')
    dataset = create_dataset(pattern, args={'classes': ['a', 'b', 'c']})
    streamed = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert len(dataset) == len(streamed) == 24
    for index, sample in enumerate(streamed):
        image, label = dataset[index]
        assert label == int(sample['cls'])
        assert np.array_equal(image, Image.open(io.BytesIO(sample['png'])))
        assert dataset.filename(index).endswith('.tar/' + sample['__key__'])
    assert dataset.filename(7) == 'train-001.tar/c1/2'
    assert class_names(dataset) == ['a', 'b', 'c']
    assert shard_order(dataset, 2) == {'groups': [5, 5, 5, 5, 4], 'mixed': 2}
    assert shard_order(dataset, None) == {}


def test_patterns(tree, tmp_path):
    pattern = write_shards(tree, tmp_path / 'a')
    write_shards(tree, tmp_path / 'b', size=24)
    names = [create_dataset(pattern).filename(index) for index in range(24)]
    for other in (f'{tmp_path}/a/*.tar', f'{tmp_path}/a/train-00?.tar', f'{tmp_path}/a/train-{{000,001,00[2-4]}}.tar'):
        dataset = create_dataset(other)
        assert [dataset.filename(index) for index in range(24)] == names
    both = create_dataset(f'{tmp_path}/{{a,b}}/*.tar')
    assert len(both) == 48
    assert {both.filename(0), both.filename(24)} == {'a/train-000.tar/c0/0', 'b/train-000.tar/c0/0'}


def test_the_index_is_kept_until_a_shard_changes(tree, tmp_path, cache, monkeypatch):
    pattern = write_shards(tree, tmp_path / 'shards')
    scanned = []
    scan = shards._scan
    monkeypatch.setattr(shards, '_scan', lambda path, *keys: scanned.append(path) or scan(path, *keys))
    first = ShardReader(pattern)
    assert len(scanned) == len(list(cache.iterdir())) == 5
    again = ShardReader(pattern)
    assert len(scanned) == 5
    assert [again.filename(index) for index in range(24)] == [first.filename(index) for index in range(24)]
    write_shards(tree, tmp_path / 'shards', more__png=b'x')
    assert len(ShardReader(pattern)) == 25
    assert sorted(scanned[5:]) == [f'{tmp_path}/shards/train-00{number}.tar' for number in range(5)]
    for damaged in (lambda data: b'', lambda data: b'damaged', lambda data: data[: len(data) // 2]):
        for file in cache.iterdir():
            file.write_bytes(damaged(file.read_bytes()))
        assert len(ShardReader(pattern)) == 25
    monkeypatch.setenv('XDG_CACHE_HOME', '/proc/nowhere')  # where nothing can be written
    assert len(ShardReader(pattern)) == 25


def test_copies_read_at_once(tree, tmp_path):
    dataset = create_dataset(write_shards(tree, tmp_path / 'shards'))
    expected = [np.asarray(dataset[index][0]).tobytes() for index in range(24)]
    copy = pickle.loads(pickle.dumps(dataset))
    with ThreadPoolExecutor(8) as pool:
        for images in (dataset, copy):
            found = list(pool.map(lambda index, images=images: images[index % 24], range(240)))
            assert [np.asarray(image).tobytes() for image, _ in found] == 10 * expected


def test_keys_of_images_and_labels(tmp_path):
    grey, many = pixels(0, (9, 9)), pixels(1, (9, 9, 5), 'uint16')
    content = {}
    for name, save in (
        ('a.PNG', lambda f: Image.fromarray(grey).save(f, 'png')),
        ('a.npy', lambda f: np.save(f, many)),
    ):
        save(stream := io.BytesIO())
        content[name] = stream.getvalue()
    with tarfile.open(tmp_path / 'x.tar', 'w') as archive:
        for name, data in [*content.items(), ('a.cls', b'1'), ('a.fine.cls', b' 2\n'), ('readme', b'')]:
            add(archive, name, data)
    path = f'{tmp_path}/x.tar'
    assert np.array_equal(create_dataset(path)[0][0], many)  # npy comes before png
    image, label = create_dataset(path, args={'input_key': 'png;npy', 'target_key': 'fine.cls'})[0]
    assert np.array_equal(image, grey) and label == 2
    with pytest.raises(ValueError, match=r'x\.tar: no sample has an image \(jpg\)'):
        create_dataset(path, args={'input_key': 'jpg'})
    (tmp_path / 'names.txt').write_text('cat\nguinea pig\n')
    assert class_names(create_dataset(path, args={'classes': f'{tmp_path}/names.txt'})) == ['cat', 'guinea pig']
    with pytest.raises(ValueError, match=r'data\.train: classes=nowhere: cannot read it: No such file'):
        create_dataset(path, args={'classes': 'nowhere'})
    with pytest.raises(ValueError, match=r"data\.args: ShardReader has no option 'label' \(it has input_key, "):
        create_dataset(path, args={'label': 'cls'})


def test_a_tar_of_class_folders_is_no_shard(tree, tmp_path):
    with tarfile.open(tmp_path / 'x.tar', 'w') as archive:
        archive.add(tree, '')
    with pytest.raises(ValueError, match=r'^data\.val: .*x\.tar: no sample has a label \(cls\); .* data\.dataset=tar'):
        create_dataset(f'{tmp_path}/x.tar', key='data.val')
    assert len(create_dataset('x.tar', 'tar', str(tmp_path))) == 24


def png(value):
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(stream := io.BytesIO(), 'png')
    return stream.getvalue()


def write(path, *members, **options):
    """A shard of images, by names, labels and whatever else has bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', **options) as archive:
        for name, content in members:
            add(archive, name, content)
    return str(path)


def found(dataset):
    return [(int(np.asarray(image)[0, 0]), label) for image, label in (dataset[i] for i in range(len(dataset)))]


FIRST, SECOND = [('0.png', png(10)), ('0.cls', b'0')], [('1.png', png(20)), ('1.cls', b'1')]


def test_parts_of_a_sample_may_lie_apart(tmp_path):
    members = [FIRST[0], SECOND[1], ('0.json', b'{}'), SECOND[0], ('LICENSE.md', b''), FIRST[1]]
    dataset = create_dataset(write(tmp_path / 'x.tar', *members))
    assert [dataset.filename(index) for index in range(3)] == ['x.tar/0', 'x.tar/1', 'x.tar/LICENSE']
    assert [(int(np.asarray(image)[0, 0]), label) for image, label in map(dataset.__getitem__, (0, 1))] == [
        (10, 0),
        (20, 1),
    ]
    with pytest.raises(ValueError, match=r'x\.tar/LICENSE: it has no image'):
        dataset[2]


@pytest.mark.parametrize(
    ('members', 'sample'),
    [
        ([*FIRST, *SECOND, *FIRST], '0'),
        ([*FIRST, FIRST[0]], '0'),
        ([*FIRST, *SECOND, ('1.PNG', png(3)), ('0.cls', b'2')], '1'),
        ([*FIRST, *SECOND, ('0.jpg', png(30))], '0'),  # another image, without a label
        ([FIRST[0], *SECOND, ('0.webp', png(30)), ('0.cls', b'2')], '0'),
        ([*FIRST, *SECOND, ('0.gif', b'an image'), ('0.cls', b'2')], '0'),
        ([('a.b/0.png', png(1)), ('a.b/0.cls', b'1'), *SECOND, ('a.b/0.cls', b'0')], 'a.b/0'),
    ],
)
def test_a_sample_that_is_there_twice_is_refused(tmp_path, members, sample):
    path = write(tmp_path / 'x.tar', *members)
    with pytest.raises(ValueError, match=rf'^data\.train: {path}: sample {sample} is in it twice \('):
        create_dataset(path)
    with pytest.raises(ValueError, match=rf'sample {sample} is in it twice'):
        create_dataset(path, args={'input_key': 'png'})


def test_one_name_in_two_shards_is_two_samples(tmp_path):
    write(tmp_path / '0.tar', *FIRST, *SECOND)
    write(tmp_path / '1.tar', ('0.png', png(30)), ('0.cls', b'2'))
    dataset = create_dataset(f'{tmp_path}/{{0..1}}.tar')
    assert found(dataset) == [(10, 0), (20, 1), (30, 2)]
    assert [dataset.filename(index) for index in range(3)] == ['0.tar/0', '0.tar/1', '1.tar/0']


def test_hidden_and_meta_members_are_no_samples(tmp_path):
    odd = [('._0.png', b''), ('a/._0.png', b''), ('__MACOSX/0.png', b''), ('.x/9.cls', b''), ('__meta__/a.png', b'')]
    assert found(create_dataset(write(tmp_path / 'x.tar', *odd, *FIRST))) == [(10, 0)]


@pytest.mark.parametrize(
    ('encoding', 'name'), [('latin-1', 'café'), ('shift-jis', '猫'), ('utf-8', '猫'), ('koi8-r', 'кот')]
)
def test_names_of_any_encoding(tmp_path, encoding, name):
    members = [(f'{name}/0.png', png(10)), (f'{name}/0.cls', b'1')]
    path = write(tmp_path / 'x.tar', *members, format=tarfile.GNU_FORMAT, encoding=encoding)
    for _ in range(2):  # the second one is from the cache
        dataset = create_dataset(path)
        assert found(dataset) == [(10, 1)]
        assert dataset.filename(0).encode(errors='surrogateescape') == f'x.tar/{name}/0'.encode(encoding)


def test_paths_that_look_like_patterns(tmp_path):
    for name in ('[2024]/{a,b}/x-0.tar', '[2024]/{a,b}/x-1.tar', '[2024]/a?/x[1].tar', '2/x-0.tar', 'a?/{x}.tar'):
        write(tmp_path / name, *FIRST)
    folder = f'{tmp_path}/[2024]/{{a,b}}'
    for pattern, count in [
        *((f'{folder}/x-0.tar', 1), (f'{folder}/x-{{0..1}}.tar', 2), (f'{folder}/x-*.tar', 2)),
        *((f'{folder}/*.tar', 2), (f'{tmp_path}/[2024]/*/x-*.tar', 2)),
        *((f'{tmp_path}/[2024]/a?/x[1].tar', 1), (f'{tmp_path}/[2024]/a?/x[{{1..1}}].tar', 1)),
        *((f'{tmp_path}/a?/{{x}}.tar', 1), (f'{folder}/x-0.tar::{tmp_path}/[12]/x-?.tar', 2)),
    ]:
        assert len(create_dataset(pattern)) == count, pattern
    with pytest.raises(ValueError, match='there is no file for 1 of 2 shards'):
        create_dataset(f'{folder}/x-{{1..2}}.tar')


def test_what_follows_the_end_is_not_lost(tmp_path):
    first, second = (Path(write(tmp_path / f'{i}.tar', *part)).read_bytes() for i, part in enumerate((FIRST, SECOND)))
    for rest in (second, bytes(99 * 512) + second, b'a signature'):
        (tmp_path / 'x.tar').write_bytes(first + rest)
        with pytest.raises(
            ValueError, match=r'x\.tar: not a readable tar shard.*more follows the end of the archive at'
        ):
            create_dataset(f'{tmp_path}/x.tar')
    (tmp_path / 'x.tar').write_bytes(first + bytes(2**21))
    assert len(create_dataset(f'{tmp_path}/x.tar')) == 1


def test_compressed_shards_and_capitals(tmp_path):
    data = Path(write(tmp_path / 'x.TAR', *FIRST)).read_bytes()
    assert len(create_dataset(f'{tmp_path}/x.TAR')) == len(create_dataset(f'{tmp_path}/*.TAR')) == 1
    for name in ('x.tar.gz', 'x.TGZ', 'x-{0..9}.tar.zst'):
        with pytest.raises(
            ValueError, match='^data.val: .*: a compressed tar file cannot be read at random; decompress'
        ):
            create_dataset(f'{tmp_path}/{name}', key='data.val')
    for compressed, kind in (
        (bz2.compress(data), 'bzip2'),
        (lzma.compress(data), 'xz'),
        (b'(\xb5/\xfd' + data, 'zstd'),
    ):
        (tmp_path / 'y.tar').write_bytes(compressed)
        with pytest.raises(ValueError, match=f'it is compressed by {kind}; decompress it'):
            create_dataset(f'{tmp_path}/y.tar')
    beginning = write(tmp_path / 'z.tar', ('BZh/0.png', png(1)), ('BZh/0.cls', b'1'))  # as of a bzip2 file
    assert found(create_dataset(beginning)) == [(1, 1)]


def test_links_and_sparse_files(tmp_path):
    with tarfile.open(tmp_path / 'x.tar', 'w') as archive:
        for name, content in FIRST:
            add(archive, name, content)
        for name, target, kind in (('1.png', '0.png', tarfile.LNKTYPE), ('1.cls', './0.cls', tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    assert found(create_dataset(f'{tmp_path}/x.tar')) == [(10, 0), (10, 0)]
    header = tarfile.TarInfo('2.npy')
    header.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[482:483] = b'\0'
    block[148:156] = b'%06o\0 ' % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    (tmp_path / 'y.tar').write_bytes(bytes(block) + bytes(10240))
    with pytest.raises(ValueError, match=r'2\.npy is stored as a sparse file; pack without --sparse'):
        create_dataset(f'{tmp_path}/y.tar')


@pytest.mark.parametrize(
    ('content', 'names'),
    [
        ('cat\ndog'.encode('utf-8-sig'), ['cat', 'dog']),
        (b'cat\rdog\r\n \r\n\n', ['cat', 'dog']),
        ('c\u2028at\nd\x1cog\n'.encode(), ['c\u2028at', 'd\x1cog']),  # which are ends of lines to splitlines
        ('猫\nchât\n'.encode(), ['猫', 'chât']),
    ],
)
def test_files_of_classes(tmp_path, content, names):
    (tmp_path / 'names.txt').write_bytes(content)
    path = write(tmp_path / 'x.tar', *FIRST)
    assert class_names(create_dataset(path, args={'classes': f'{tmp_path}/names.txt'})) == names


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('cat\n猫\n'.encode('shift-jis'), 'it is no UTF-8 (invalid start byte at byte 4)'),
        ('cat\ndog\n'.encode('utf-16'), 'it is no UTF-8 (invalid start byte at byte 0)'),
        ('cat\ndog\n'.encode('utf-16-le'), 'it is no UTF-8 (it has empty bytes, as UTF-16 has)'),
        (b'cat\n\ndog\n', 'line 2 is empty'),
        (b'cat\ndog\ncat\n', "'cat' is in it twice, in lines 1 and 3"),
        (b'\n', 'it is empty'),
    ],
)
def test_files_of_classes_that_are_refused(tmp_path, content, message):
    (tmp_path / 'names.txt').write_bytes(content)
    path = write(tmp_path / 'x.tar', *FIRST)
    with pytest.raises(ValueError) as error:
        create_dataset(path, args={'classes': f'{tmp_path}/names.txt'})
    assert str(error.value).startswith(f'data.train: classes={tmp_path}/names.txt: {message}')


@pytest.mark.parametrize('damage', ['empty', 'text', 'cut', 'cut between members', 'header', 'compressed'])
def test_a_damaged_shard_is_named(tree, tmp_path, damage):
    pattern = write_shards(tree, tmp_path / 'shards')
    path = tmp_path / 'shards/train-003.tar'
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        place = archive.getmembers()[4].offset
    if damage == 'compressed':
        with tarfile.open(path, 'w:gz') as archive:
            add(archive, 'a.png', bytes(9))
    else:
        wrong = {
            'empty': b'',
            'text': b'Not a shard.\n' * 1000,
            'cut': data[: place - 700],
            'cut between members': data[:place],
            'header': data[:place] + b'x' * 512 + data[place + 512 :],
        }
        path.write_bytes(wrong[damage])
    with pytest.raises(ValueError, match=r'^data\.train: .*/train-003\.tar: not a readable tar shard') as error:
        create_dataset(pattern)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('pattern', 'message'),
    [
        ('pipe:cat a.tar', 'pipe:cat a.tar: shards that come as a stream have no samples with an index'),
        ('s3://bucket/a.tar', 'copy them to a disk'),
        ('nowhere/{00..19}.tar', r'there is no file for 20 of 20 shards, such as nowhere/00\.tar'),
        ('nowhere/*.tar', r'nowhere/\*\.tar: there is no file for a shard'),
    ],
)
def test_shards_that_are_not_there_are_named(pattern, message):
    with pytest.raises(ValueError, match=message):
        create_dataset(pattern)


def test_a_missing_package_is_named(tree, tmp_path, monkeypatch):
    pattern = write_shards(tree, tmp_path / 'shards')
    monkeypatch.setitem(sys.modules, 'webdataset.shardlists', None)
    with pytest.raises(ValueError, match=r"^data\.val: shards .* pip install 'vit-efficient\[webdataset\]'"):
        create_dataset(pattern, key='data.val')


def test_the_stream_of_timm_says_what_to_do(tree, tmp_path):
    write_shards(tree, tmp_path)
    with pytest.raises(ValueError, match=r'data\.dataset=wds/x is a stream.*as data\.train for wds/…'):
        create_dataset('train-{000..004}.tar', 'wds/x', str(tmp_path), args={'num_samples': 24})
