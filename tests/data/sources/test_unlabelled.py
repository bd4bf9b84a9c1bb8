"""Images without labels: which are found, in which order, and which are held out."""

import os
import random

import pytest
from PIL import Image

from vit_efficient.data.sources import create_dataset
from vit_efficient.data.sources.unlabelled import UnlabelledImages
from vit_efficient.utils.errors import UserError


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4), (len(name), 0, 0)).save(path)


@pytest.fixture
def root(tmp_path):
    write(
        tmp_path / 'images', 'b.png', '10.png', '2.png', 'deep/er/1.jpg', 'deep/x.png', '.hidden.png', '__MACOSX/a.png'
    )
    (tmp_path / 'images/notes.txt').write_text('none')
    return tmp_path / 'images'


def test_a_folder_is_read_deep_and_flat_in_natural_order(root):
    dataset = UnlabelledImages(root)
    assert dataset.names == ['2.png', '10.png', 'b.png', 'deep/er/1.jpg', 'deep/x.png']
    image, label = dataset[3]
    assert image.size == (4, 4) and label == 0
    assert dataset.filename(1) == '10.png'
    assert create_dataset('images', 'images', str(root.parent)).names == dataset.names


def test_links_are_followed_and_a_ring_ends(root):
    os.symlink(root, root / 'deep/again')
    other = root.parent / 'elsewhere'
    write(other, 'c.png')
    os.symlink(other, root / 'linked')
    assert UnlabelledImages(root).names == ['2.png', '10.png', 'b.png', 'deep/er/1.jpg', 'deep/x.png', 'linked/c.png']


def test_a_list_names_files_beside_it_and_may_repeat_them(root):
    (root / 'some.txt').write_text('deep/x.png\n\n2.png\ndeep/x.png\n')
    dataset = UnlabelledImages(root / 'some.txt')
    assert dataset.names == ['deep/x.png', '2.png', 'deep/x.png']
    assert dataset[0][0].size == (4, 4)


@pytest.mark.parametrize('count', [2, 10, 25])
def test_what_is_held_out_and_the_rest_are_all(tmp_path, count):
    write(tmp_path, *(f'{i}.png' for i in random.Random(0).sample(range(100), count)))
    every = min(10, count)
    whole = UnlabelledImages(tmp_path).names
    held, rest = UnlabelledImages(tmp_path, every=every), UnlabelledImages(tmp_path, without_every=every)
    assert held.names == whole[every - 1 :: every] and sorted(held.names + rest.names) == sorted(whole)
    assert len({each.digest() for each in (held, rest, UnlabelledImages(tmp_path))}) == 3


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('nowhere', {}, 'nowhere: no such folder of images'),
        ('2.png', {}, '2.png: a file, and neither a folder nor a list, .txt'),
        ('empty', {}, r'empty: no image in it \(files that are read end in'),
        ('empty.txt', {}, 'empty.txt: no image in it'),
        ('wrong.txt', {}, 'wrong.txt: there is no file .*gone.png, which it lists'),
        ('', {'every': 1}, 'every must be an integer of at least 2, got every=1'),
        ('', {'every': 6}, 'of 5 images, every 6th is none'),
        ('', {'every': 2, 'without_every': 2}, 'give every=2 or without_every=2, not both'),
    ],
)
def test_what_is_refused(root, name, options, message):
    (root / 'empty').mkdir()
    (root / 'empty.txt').write_text('\n')
    (root / 'wrong.txt').write_text('2.png\ngone.png\n')
    with pytest.raises(UserError, match=message):
        UnlabelledImages(root / name, **options)
