import io
import sys
import zipfile

import numpy as np
import pytest
import tifffile

from tests.data.shards import write_saved
from tests.data.trees import pixels, write_tree
from vit_efficient.data import ImageTree, class_names, create_dataset, to_array
from vit_efficient.data.sources import hugging_face, reads_files

datasets = pytest.importorskip('datasets')


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / 'tree') / 'train'


def save(folder, images, labels, **features):
    dataset = datasets.Dataset.from_dict({'image': images, 'label': labels}, datasets.Features(**features))
    dataset.save_to_disk(folder / 'train')
    return f'hfds/{folder}'


def test_a_saved_data_set_is_the_tree_it_was_made_of(tree, tmp_path):
    write_saved(tree, tmp_path / 'saved/train')
    ours, theirs = create_dataset('train', f'hfds/{tmp_path}/saved'), ImageTree(tree)
    assert len(ours) == len(theirs) == 24
    assert class_names(ours) == class_names(theirs)
    for index in (0, 9, 23):
        assert ours[index][1] == theirs[index][1]
        assert np.array_equal(ours[index][0], theirs[index][0])
    assert ours.filename(9) == 'train[9] 1.png'
    assert reads_files(ours)


@pytest.mark.parametrize('split', ['', 'train'])
def test_folders_that_the_library_passes_over_are_refused(tree, split):
    (tree / 'c1').rename(tree / '__c1')
    folder = tree.parent if split else tree
    with pytest.raises(ValueError, match=r'/train/__c1: the datasets library passes over folders whose names begin'):
        create_dataset('train', f'hfds/{folder}')


def test_files_keep_their_names(tree, tmp_path):
    dataset = create_dataset('train', f'hfds/{tree}', str(tmp_path / 'cache'))
    assert dataset.filename(9) == f'{tree}/c1/1.png'
    (tree / 'c1/1.png').unlink()
    with pytest.raises(OSError, match=r'c1/1\.png'):
        dataset[9]


def test_bytes_of_deep_images_and_labels_of_every_kind(tmp_path):
    images = [pixels(i, (9, 9, 5), 'uint16') for i in range(3)]
    files = []
    for image in images:
        tifffile.imwrite(stream := io.BytesIO(), image, photometric='minisblack', planarconfig='contig')
        files.append(stream.getvalue())
    binary, text = datasets.Value('binary'), datasets.Value('string')
    named = create_dataset('train', save(tmp_path / 'names', files, ['10', '9', '10'], image=binary, label=text))
    assert class_names(named) == ['9', '10']  # in natural order
    assert [named[index][1] for index in range(3)] == [1, 0, 1]
    assert np.array_equal(to_array(named[1][0], 5), images[1].astype(np.float32) / 65535)
    assert named.filename(1) == 'train[1]'
    names = ['ab', 'AB', '1', 'aB', '01', 'Ab', '001']
    tied = create_dataset('train', save(tmp_path / 'tied', files[:1] * 7, names, image=binary, label=text))
    assert class_names(tied) == ['001', '01', '1', 'AB', 'Ab', 'aB', 'ab']
    number = datasets.Value('int64')
    numbered = create_dataset('train', save(tmp_path / 'numbers', files, [4, 2, None], image=binary, label=number))
    assert class_names(numbered) is None
    assert numbered[0][1] == 4
    with pytest.raises(ValueError, match=r'^train\[2\]: it has no label \(label\)'):
        numbered[2]
    lacking = create_dataset('train', save(tmp_path / 'lacking', [None], [0], image=datasets.Image(), label=number))
    with pytest.raises(ValueError, match=r'^train\[0\]: it has no image \(image\)'):
        lacking[0]


def test_other_columns(tree, tmp_path):
    folder = write_saved(tree, tmp_path / 'saved/train')
    renamed = datasets.load_from_disk(str(folder)).rename_columns({'image': 'picture', 'label': 'kind'})
    renamed.save_to_disk(tmp_path / 'renamed/train')
    name = f'hfds/{tmp_path}/renamed'
    dataset = create_dataset('train', name, args={'input_key': 'picture', 'target_key': 'kind'})
    assert dataset[23][1] == 2
    for args, message in [
        ({}, r"there is no column 'image' \(input_key, target_key\), only picture, kind"),
        ({'input_key': 'kind', 'target_key': 'kind'}, "column 'kind' must hold images or the bytes of image files, it"),
        (
            {'input_key': 'picture', 'target_key': 'picture'},
            'what it has for labels are images, which are read as masks',
        ),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            create_dataset('train', name, args=args)
        assert str(error.value).startswith(f'data.dataset={name}, split train: ')


def test_what_cannot_be_opened_is_named(tree, tmp_path, monkeypatch):
    folder = write_saved(tree, tmp_path / 'saved/train')
    (tmp_path / 'empty').mkdir()
    cache = str(tmp_path / 'cache')
    for name, message in [
        (f'hfds/{folder}', rf'is a single split, as a saved data set; its name is hfds/{tmp_path}/saved, split train'),
        (f'hfds/{tmp_path}/empty', 'split train: '),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            create_dataset('train', name, cache)
        assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='it is a stream, its samples have no index; leave streaming out'):
        create_dataset('train', f'hfds/{tree}', cache, args={'streaming': True})
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ValueError, match=r"split train: hfds/… needs .* pip install 'vit-efficient\[hf\]'"):
        create_dataset('train', f'hfds/{tmp_path}/saved')


def test_the_causes_of_an_error_are_told(tree, tmp_path):
    with zipfile.ZipFile(tmp_path / 'train.zip', 'w') as archive:
        for name in ('a/0.png', 'b/0.png'):
            archive.write(tree / 'c0/0.png', name)
    (tmp_path / 'csv').mkdir()
    (tmp_path / 'csv/train.csv').write_text('image,label\nx,1\ny,1,2,3\n')
    (tmp_path / 'json').mkdir()
    (tmp_path / 'json/train.json').write_text('{"image": 1, "label":')
    (tmp_path / 'zip').mkdir()
    (tmp_path / 'train.zip').rename(tmp_path / 'zip/train.zip')
    for folder, cause in (
        ('zip', 'Invalid string class label'),
        ('csv', 'Expected 2 fields in line 3, saw 4'),
        ('json', 'JSON parse error'),
    ):
        with pytest.raises(ValueError, match=cause) as error:
            create_dataset('train', f'hfds/{tmp_path}/{folder}', str(tmp_path / 'cache'))
        assert '\n' not in str(error.value) and 'data.root' not in str(error.value)


def test_reasons_are_said_once():
    inner, outer = ValueError('the file\nis damaged'), RuntimeError('cannot open: the file is damaged')
    outer.__cause__ = inner
    assert hugging_face._reasons(outer) == 'cannot open: the file is damaged'
    (last := KeyError()).__cause__ = OSError('gone')
    assert hugging_face._reasons(last) == 'KeyError: gone'


def test_the_digest_tells_of_other_files(tree, tmp_path):
    def digest(name, order=slice(None)):
        folder = tmp_path / name / 'train'
        dataset = datasets.load_from_disk(str(write_saved(tree, tmp_path / 'plain' / name)))
        dataset.select(range(24)[order]).save_to_disk(folder)
        return create_dataset('train', f'hfds/{folder.parent}').digest()

    first = digest('first')
    assert digest('again') == first
    assert digest('fewer', slice(23)) != first and digest('reversed', slice(None, None, -1)) != first
    (tree / 'c1/1.png').rename(tree / 'c1/one.png')
    renamed = digest('renamed')
    (tree / 'c1/one.png').write_bytes((tree / 'c1/one.png').read_bytes() + b'x')
    longer = digest('longer')
    (tree / 'c1/one.png').rename(tree / 'c2/one.png')
    assert len({first, renamed, longer, digest('moved')}) == 4


def test_the_digest_of_files_and_of_bytes(tree, tmp_path):
    ours = [create_dataset('train', f'hfds/{tree}', str(tmp_path / f'cache{number}')).digest() for number in range(2)]
    assert ours[0] == ours[1]
    text, binary = datasets.Value('string'), datasets.Value('large_binary')
    digests = []
    for number, (files, labels) in enumerate([([b'a', b'b'], 'xy'), ([b'a', b'bc'], 'xy'), ([b'a', b'b'], 'xx')]):
        name = save(tmp_path / str(number), files, list(labels), image=binary, label=text)
        digests.append(create_dataset('train', name).digest())
    assert len({*digests, *ours}) == 4
