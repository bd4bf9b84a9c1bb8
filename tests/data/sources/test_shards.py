import io
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

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
