import os

import pytest
from PIL import Image

from tests.data.trees import pixels
from vit_efficient.data import ImageTree, class_names, create_dataset
from vit_efficient.data.sources.folders import is_hidden


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(0, (4, 4))).save(root / name, 'png')


def found(dataset):
    return [(dataset.filename(index), dataset[index][1]) for index in range(len(dataset))]


@pytest.mark.parametrize(
    ('name', 'hidden'),
    [
        *(('a/0.png', False), ('./a/0.png', False), ('../a/0.png', False), ('a.b/0.x.png', False), ('a/', False)),
        *(('a/._0.png', True), ('.git/0.png', True), ('./.git/0.png', True), ('a/.b/c/0.png', True)),
        *(('__MACOSX/a/._0.png', True), ('a/__MACOSX/0.png', True), ('a__MACOSX/0.png', False), ('.DS_Store', True)),
    ],
)
def test_hidden_paths(name, hidden):
    assert is_hidden(name) == hidden


@pytest.mark.parametrize(
    ('link', 'target'),
    [('a/up', '..'), ('a/x/here', '.'), ('a/x/a', '../../a'), ('b/top', '/'), ('b/out', '../..'), ('a/self', 'self')],
)
def test_a_link_to_a_folder_around_it_adds_nothing(tmp_path, link, target):
    write(tmp_path, 'a/0.png', 'a/x/1.png', 'b/2.png')
    (tmp_path / link).symlink_to(target)
    assert found(ImageTree(tmp_path)) == [('a/0.png', 0), ('a/x/1.png', 0), ('b/2.png', 1)]


def test_links_to_folders_elsewhere_are_followed_once(tmp_path):
    root, store = tmp_path / 'root', tmp_path / 'store'
    write(store, 'cats/0.png', 'cats/more/1.png', 'dog/2.png')
    write(root, 'a/first/3.png')
    (root / 'cat').symlink_to(store / 'cats')
    (root / 'a' / 'dog').symlink_to('../../store/dog')
    (root / 'a' / 'also').symlink_to('first')
    (root / 'a' / 'again').symlink_to(store / 'dog')
    names = [('a/again/2.png', 0), ('a/first/3.png', 0), ('cat/0.png', 1), ('cat/more/1.png', 1)]
    assert found(ImageTree(root)) == names
    linked = tmp_path / 'linked'
    linked.symlink_to(root)
    assert found(ImageTree(linked)) == names


@pytest.mark.parametrize(('link', 'target'), [('c', 'a'), ('a/x', '../b'), ('b/x', '../a/in'), ('c', 'a/in')])
def test_a_folder_in_two_classes_is_refused(tmp_path, link, target):
    write(tmp_path, 'a/in/0.png', 'b/1.png')
    (tmp_path / link).symlink_to(target)
    real = (tmp_path / link).resolve()
    with pytest.raises(ValueError, match=r'is in two classes, \w and \w, by a link; remove the link') as error:
        ImageTree(tmp_path)
    assert str(real) in str(error.value)


def test_what_is_left_out_is_told(tmp_path, caplog):
    write(tmp_path, 'a/0.png', 'b/1.PNG', 'readme.png', '__MACOSX/a/2.png')
    assert found(ImageTree(tmp_path)) == [('a/0.png', 0), ('b/1.PNG', 1)]
    assert caplog.messages[0].startswith(f'{tmp_path}: left out 1 of its files, the first one {tmp_path}/readme.png (')
    with pytest.raises(ValueError, match=r'0\.png: is a file, and no folder of class folders'):
        ImageTree(tmp_path / 'a/0.png')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may list any folder')
def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    write(tmp_path, 'a/0.png', 'b/closed/1.png')
    (tmp_path / 'b/closed').chmod(0)
    with pytest.raises(ValueError, match=r'b/closed: cannot list it \(Permission denied\)'):
        ImageTree(tmp_path)


def test_folders_that_look_like_shards(tmp_path):
    write(tmp_path / 'images.tar', 'a/0.png', 'b/1.png')
    write(tmp_path / 'old.tar.gz', 'a/0.png')
    assert len(create_dataset(f'{tmp_path}/images.tar')) == 2
    assert len(create_dataset(f'{tmp_path}/old.tar.gz')) == 1


def test_folders_that_timm_finds_are_read_as_ours(tmp_path):
    names = ['A', 'a', '01', '1', '001']
    for split in ('train', 'validation'):
        write(tmp_path / split, *(f'{name}/{number}.png' for name in names for number in range(2)), 'a/._9.png')
        Image.fromarray(pixels(0, (4, 4))).save(tmp_path / split / 'a/3.tif')
    for split in ('train', 'val'):  # timm knows other names of val
        dataset = create_dataset(split, 'folder', str(tmp_path))
        assert class_names(dataset) == ['001', '01', '1', 'A', 'a']
        assert len(dataset) == 11


def test_the_root_is_hinted_at_where_it_matters(tmp_path):
    for name, root, end in (
        ('torch/nothing', '', 'Unknown torchvision dataset nothing'),
        ('torch/fashion_mnist', '', r'\(data\.root is not set: it names the folder that holds the data set\)'),
        ('folder', f'{tmp_path}/no', rf'\(data\.root={tmp_path}/no: there is no such folder\)'),
    ):
        with pytest.raises(ValueError, match=rf'^data\.dataset={name}, split train: .*{end}$'):
            create_dataset('train', name, root)
