import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.data.shards import add
from vit_efficient.data import class_names, create_dataset
from vit_efficient.data.sources import reads_files


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))


def png(value):
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(stream := io.BytesIO(), 'png')
    return stream.getvalue()


def write(path, *members, **options):
    """A tar file of images, by names or (name, grey value), links (name, target), and what else is TarInfo."""
    with tarfile.open(path, 'w', **options) as archive:
        for member in members:
            name, value = (member, 0) if isinstance(member, str) else member
            if isinstance(value, str):
                info = tarfile.TarInfo(name)
                info.type = tarfile.LNKTYPE if value.startswith('=') else tarfile.SYMTYPE
                info.linkname = value.removeprefix('=')
                archive.addfile(info)
            elif name.endswith('/'):
                info = tarfile.TarInfo(name)
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            else:
                add(archive, name, value if isinstance(value, bytes) else png(value))
    return path


def opened(path, **args):
    return create_dataset(path.name, 'tar', str(path.parent), args=args)


def found(dataset):
    """File, grey value and label of each image."""
    items = [dataset[index] for index in range(len(dataset))]
    return [(dataset.filename(i), int(np.asarray(image)[0, 0]), label) for i, (image, label) in enumerate(items)]


def test_the_order_is_that_of_folders(tmp_path):
    members = [('b/9.png', 1), ('10/1.PNG', 2), ('9/x/0.png', 3), ('9/a.png', 4), ('B/10.png', 5), ('b/10.png', 6)]
    dataset = opened(write(tmp_path / 'x.tar', *members))
    with tarfile.open(tmp_path / 'x.tar') as archive:
        archive.extractall(tmp_path / 'tree', filter='data')
    assert found(dataset) == found(create_dataset(f'{tmp_path}/tree'))
    assert class_names(dataset) == ['9', '10', 'B', 'b']
    assert [label for *_, label in found(dataset)] == [1, 0, 0, 2, 3, 3]
    assert reads_files(dataset)


@pytest.mark.parametrize('around', ['', './', 'train/', './data/train/', '/data/', 'a/'])
def test_folders_around_the_classes(tmp_path, around):
    dataset = opened(write(tmp_path / 'x.tar', around, *(f'{around}{name}' for name in ('a/0.png', 'b/x/0.png'))))
    assert class_names(dataset) == ['a', 'b']
    assert [label for *_, label in found(dataset)] == [0, 1]


def test_a_tar_file_for_each_class(tmp_path):
    folder = tmp_path / 'classes'
    folder.mkdir()
    for value, name in enumerate(('n2.tar', 'n10.TAR', '._n3.tar')):
        write(folder / name, ('1.png', value), ('0.png', 10 + value), '._0.png')
    expected = [('n10.TAR/0.png', 11, 1), ('n10.TAR/1.png', 1, 1), ('n2.tar/0.png', 10, 0), ('n2.tar/1.png', 0, 0)]
    assert found(opened(folder)) == expected
    assert class_names(opened(folder)) == ['n2', 'n10']
    contents = [(f'in/{path.name}', path.read_bytes()) for path in folder.iterdir()]
    nested = opened(write(tmp_path / 'all.tar', *contents))
    assert found(nested) == [(f'in/{name}', value, label) for name, value, label in expected]
    assert class_names(nested) == ['n2', 'n10']
    write(tmp_path / 'cut.tar', ('n1.tar', contents[0][1][:-10240]), ('n2.tar', contents[0][1]))
    with pytest.raises(ValueError, match=r'cut\.tar: not a readable tar file'):  # which goes on into the next one
        opened(tmp_path / 'cut.tar')


def test_a_folder_of_tar_files_of_class_folders(tmp_path):
    folder = tmp_path / 'parts'
    folder.mkdir()
    write(folder / '1.tar', ('cat/0.png', 1), ('dog/0.png', 2))
    write(folder / '2.tar', ('cat/0.png', 3), ('ant/0.png', 4))
    names = [('2.tar/ant/0.png', 4, 0), ('1.tar/cat/0.png', 1, 1), ('2.tar/cat/0.png', 3, 1), ('1.tar/dog/0.png', 2, 2)]
    assert found(opened(folder)) == names


def test_hidden_files_and_others_are_no_images(tmp_path, caplog):
    members = ['a/0.png', 'a/._0.png', '__MACOSX/a/._0.png', '.c/0.png', 'a/notes.txt', 'b/0.png', 'b/1.gif', '2.png']
    assert [name for name, *_ in found(opened(write(tmp_path / 'x.tar', *members)))] == ['a/0.png', 'b/0.png']
    assert caplog.messages[0].startswith(f'{tmp_path}/x.tar: left out 2 of its files, the first one 2.png (')


def test_links_in_a_tar_file_have_what_they_lead_to(tmp_path):
    members = [
        ('a/0.png', 7),
        ('b/0.png', '=a/0.png'),
        ('b/1.png', '../a/0.png'),
        ('b/2.png', '1.png'),
        ('.s/x.png', 9),
    ]
    dataset = opened(write(tmp_path / 'x.tar', *members, ('.s/x.png', 9), ('c/0.png', '../.s/x.png')))
    assert [(value, label) for _, value, label in found(dataset)] == [(7, 0), (7, 1), (7, 1), (7, 1), (9, 2)]
    for name, target in (('a/up', '..'), ('c', 'a'), ('a/1.png', '/a/0.png'), ('a/1.png', '../../a/0.png')):
        write(tmp_path / 'y.tar', 'a/0.png', 'b/0.png', (name, target))
        with pytest.raises(ValueError, match=rf'y\.tar: {name} is a link that leads to no file in it; pack'):
            opened(tmp_path / 'y.tar')


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        (['a/0.png', 'b/0.png', './a/0.png'], r'x\.tar: a/0\.png is in it twice'),
        (['a/0.png', 'b/'], r'x\.tar: Found no valid file for the classes b \(files that are read end in'),
        (['a/0.png', 'b/0.gif', 'c/c.txt'], 'no valid file for the classes b, c'),
        (['a/0.gif'], r'x\.tar: holds no images, only files such as a/0\.gif'),
        (['0.png'], r'x\.tar: no class folder holds an image'),
        (['data/a/0.png', 'data/b/0.png', 'data/0.png'], 'all images are in the folder data, some in folders of it'),
        (['a/0.png', ('n1.tar', b'no tar' * 999)], r'x\.tar: not a readable tar file'),
        (['a/0.png', 'PK/0.png', ('n1.tar', bytes(10240))], r'x\.tar, n1\.tar: holds no images'),
    ],
)
def test_what_would_lose_or_mislabel_images_is_refused(tmp_path, members, message):
    with pytest.raises(ValueError, match=rf'^data\.dataset=tar, split x\.tar: .*{message}') as error:
        opened(write(tmp_path / 'x.tar', *members))
    assert 'data.root is not set' not in str(error.value)


def test_classes_without_images_are_for_evaluation(tmp_path):
    write(tmp_path / 'x.tar', 'a/', 'b/0.png', 'c/0.png')
    dataset = create_dataset('x.tar', 'tar', str(tmp_path), key='data.val')
    assert (class_names(dataset), dataset[0][1]) == (['a', 'b', 'c'], 1)


def test_a_tar_file_that_goes_on_after_its_end_or_is_compressed(tmp_path):
    first = write(tmp_path / 'x.tar', 'a/0.png', 'b/0.png').read_bytes()
    (tmp_path / 'both.tar').write_bytes(first + first)
    with pytest.raises(ValueError, match='more follows the end of the archive at byte 2048, as where'):
        opened(tmp_path / 'both.tar')
    (tmp_path / 'padded.tar').write_bytes(first + bytes(2**21))
    assert len(opened(tmp_path / 'padded.tar')) == 2
    for mode, name in (('w:bz2', 'bzip2'), ('w:xz', 'xz')):
        with tarfile.open(tmp_path / 'z.tar', mode) as archive:
            add(archive, 'a/0.png', png(0))
        with pytest.raises(ValueError, match=f'it is compressed by {name}; decompress it'):
            opened(tmp_path / 'z.tar')
    with pytest.raises(ValueError, match=r'nowhere\.tar: there is no such file, or folder of tar files \(data\.root'):
        opened(tmp_path / 'nowhere.tar')


def test_names_of_any_bytes(tmp_path):
    options = {'format': tarfile.GNU_FORMAT, 'encoding': 'latin-1'}
    dataset = opened(write(tmp_path / 'x.tar', 'café/ü.png', 'b/0.png', **options))
    assert class_names(dataset) == ['b', 'caf\udce9']
    assert dataset.filename(1) == 'caf\udce9/\udcfc.png'


def test_labels_of_a_map(tmp_path, caplog):
    write(tmp_path / 'x.tar', 'a/0.png', 'b/0.png', 'c/0.png')
    (tmp_path / 'map.txt').write_bytes('c\r\na\r\n\r\n'.encode('utf-8-sig'))
    for class_map in (str(tmp_path / 'map.txt'), {'c': 0, 'a': 1}):
        dataset = opened(tmp_path / 'x.tar', class_map=class_map)
        assert (class_names(dataset), found(dataset)) == (['c', 'a'], [('a/0.png', 0, 1), ('c/0.png', 0, 0)])
    assert 'left out 1 of its files, the first one b/0.png' in caplog.text
    merged = opened(tmp_path / 'x.tar', class_map={'a': 1, 'b': 0, 'c': 1})
    assert (class_names(merged), [label for *_, label in found(merged)]) == (None, [1, 0, 1])
    with pytest.raises(
        ValueError, match=r"class_map={'x': 0}: .*x\.tar has images of none of its classes, but of a, b"
    ):
        opened(tmp_path / 'x.tar', class_map={'x': 0})


@pytest.mark.parametrize(
    ('class_map', 'message'),
    [
        (1, 'labels by name, or names that differ, got 1'),
        (['a', 'a'], r"names that differ, got \['a', 'a'\]"),
        ({'a': 0.5, 'b': 1}, r'the label of a must be an integer from 0, got 0\.5'),
        ({'a': 0, 'b': None}, 'the label of b must be an integer from 0, got None'),
        ({'a': -1}, 'the label of a must be an integer from 0, got -1'),
    ],
)
def test_maps_that_are_none(tmp_path, class_map, message):
    with pytest.raises(ValueError, match=message):
        opened(write(tmp_path / 'x.tar', 'a/0.png', 'b/0.png'), class_map=class_map)


def test_folders_in_class_folders_are_told_of(tmp_path, caplog):
    dataset = opened(write(tmp_path / 'x.tar', 'train/a/0.png', 'train/b/0.png', 'val/a/0.png'))
    assert class_names(dataset) == ['train', 'val']
    assert 'classes are the first folders that differ (train, val), and not the folders in them' in caplog.text


def test_links_that_are_no_images_may_lead_nowhere(tmp_path):
    with tarfile.open(write(tmp_path / 'x.tar', 'a/0.png', 'b/0.png'), 'a') as archive:
        for name, leads_to in (('notes.txt', '/home/notes.txt'), ('a/c.png', '0.png')):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, leads_to
            archive.addfile(member)
    assert [name for name, *_ in found(opened(tmp_path / 'x.tar'))] == ['a/0.png', 'a/c.png', 'b/0.png']


def test_the_digest_tells_of_other_files(tmp_path):
    names, other = ['a/0.png', 'b/0.png'], tmp_path / 'elsewhere'
    digest = opened(write(tmp_path / 'x.tar', *names)).digest()
    other.mkdir()
    assert opened(write(other / 'y.tar', *reversed(names))).digest() == digest
    for members in (['a/0.png', 'b/1.png'], ['a/0.png', ('b/0.png', png(0) + b'x')], ['a/0.png', 'c/0.png']):
        assert opened(write(tmp_path / 'x.tar', *members)).digest() != digest
