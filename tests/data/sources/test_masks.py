"""Images and masks from folders, lists, COCO's files, shards and saved data sets."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.shards import add
from tests.data.trees import write_masks
from vit_efficient.data import MaskedImages, class_names, create_dataset, has_masks

NAMES = ['ground', 'roof', 'water']


@pytest.fixture
def root(tmp_path):
    return write_masks(tmp_path / 'data', 4)


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for index in range(len(theirs)):
        (image, label, classes), expected = ours[index], theirs[index]
        assert np.array_equal(image, expected[0]) and label == 0 and np.array_equal(classes, expected[2])


def test_folders(root):
    dataset = MaskedImages(root, NAMES, ignore_index=255)
    assert len(dataset) == 4 and class_names(dataset) == NAMES and has_masks(dataset)
    assert [dataset.filename(i) for i in range(4)] == [f'images/{i}.jpg' for i in (0, 1, 2, 10)]
    image, _, classes = dataset[3]
    assert np.array_equal(image, Image.open(root / 'images/10.jpg'))
    values = np.array(Image.open(root / 'masks/10.png')).astype(int)
    assert np.array_equal(classes, np.where(values == 255, -1, values)) and classes.dtype == np.int16


def test_folders_of_other_names_in_folders_and_with_a_suffix(root):
    (root / 'images').rename(root / 'photos')
    (root / 'masks').rename(root / 'truth')
    for folder in ('photos', 'truth'):
        (root / folder / 'far').mkdir()
    (root / 'photos/2.jpg').rename(root / 'photos/far/2.jpg')
    for mask in list(root.glob('truth/*.png')):
        mask.rename(root / 'truth' / ('far' if mask.stem == '2' else '') / f'{mask.stem}_mask.png')
    dataset = MaskedImages(root, 3, 'photos', 'truth', '_mask', ignore_index=255)
    assert {dataset.pairs[i] for i in range(4)} == {
        ('photos/0.jpg', 'truth/0_mask.png'),
        ('photos/1.jpg', 'truth/1_mask.png'),
        ('photos/10.jpg', 'truth/10_mask.png'),
        ('photos/far/2.jpg', 'truth/far/2_mask.png'),
    }
    assert class_names(dataset) == ['0', '1', '2']


@pytest.mark.parametrize('ending', ['csv', 'tsv'])
@pytest.mark.parametrize('header', [True, False])
def test_lists(root, ending, header):
    between = ',' if ending == 'csv' else '\t'
    lines = [between.join((f'images/{i}.jpg', f'masks/{i}.png')) for i in (10, 0)]
    (root / f'some.{ending}').write_text('\n'.join([between.join(('image', 'mask'))] * header + lines) + '\n')
    dataset = create_dataset(f'some.{ending}', 'masks', str(root), args={'classes': 3, 'ignore_index': 255})
    assert dataset.pairs == [('images/10.jpg', 'masks/10.png'), ('images/0.jpg', 'masks/0.png')]
    same([dataset[1]], [MaskedImages(root, 3, ignore_index=255)[0]])


def test_coco_panoptic(root):
    """Segments of two categories, whose numbers are not classes, and a part without a segment."""
    told = {'categories': [{'id': 7, 'name': 'sky'}, {'id': 3, 'name': 'cat'}], 'annotations': []}
    expected = []
    for i, name in enumerate((0, 1, 2, 10)):
        segments = {65_536 + 5: 7, 300: 3, 2: 3}
        which = np.random.default_rng(i).integers(0, 4, (20, 24))
        ids = np.array([0, *segments])[which]
        expected.append(np.array([-1, 1, 0, 0])[which])
        Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)).save(
            root / f'masks/{name}.png'
        )
        infos = [{'id': number, 'category_id': category} for number, category in segments.items()]
        told['annotations'].append({'file_name': f'{name}.png', 'segments_info': infos})
    (root / 'panoptic.json').write_text(json.dumps(told))
    dataset = MaskedImages(root, annotations=str(root / 'panoptic.json'))
    assert dataset.classes == ['cat', 'sky']
    assert all(np.array_equal(dataset[i][2], expected[i]) for i in range(4))
    told['annotations'][2]['segments_info'].pop()
    (root / 'panoptic.json').write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r'masks/2\.png: its mask holds 2, of which annotations has no class'):
        MaskedImages(root, annotations=str(root / 'panoptic.json'))[2]
    told['annotations'].pop()
    (root / 'panoptic.json').write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r'there is no annotation with file_name 10\.png, of images/10\.jpg'):
        MaskedImages(root, annotations=str(root / 'panoptic.json'))
    told['annotations'][0]['segments_info'][0]['category_id'] = 4
    (root / 'panoptic.json').write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r'segment 65541 of 0\.png has category 4, not listed'):
        MaskedImages(root, annotations=str(root / 'panoptic.json'))


def test_coco_masks_of_one_name_in_two_folders(root):
    told = {'categories': [{'id': 1, 'name': 'x'}, {'id': 2, 'name': 'y'}], 'annotations': []}
    for folder in ('images', 'masks'):
        for path in root.glob(f'{folder}/*'):
            path.unlink()
        for inner in 'ab':
            (root / folder / inner).mkdir()
            Image.new('RGB', (4, 4), (7, 0, 0)).save(root / folder / inner / '1.png')
    for number, inner in enumerate('ab', 1):
        told['annotations'].append({'file_name': f'{inner}/1.png', 'segments_info': [{'id': 7, 'category_id': number}]})
    (root / 'panoptic.json').write_text(json.dumps(told))
    dataset = MaskedImages(root, annotations=str(root / 'panoptic.json'))
    assert [dataset[i][2].max() for i in range(2)] == [0, 1]
    del told['annotations'][1]
    told['annotations'][0]['file_name'] = '1.png'
    (root / 'panoptic.json').write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r'1\.png may be masks/a/1\.png or masks/b/1\.png; name them with'):
        MaskedImages(root, annotations=str(root / 'panoptic.json'))
    told['annotations'].append(told['annotations'][0])
    (root / 'panoptic.json').write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r'1\.png has two annotations'):
        MaskedImages(root, annotations=str(root / 'panoptic.json'))


def test_shards(root, tmp_path):
    with tarfile.open(tmp_path / 'all.tar', 'w') as archive:
        for name in (0, 1, 2, 10):
            add(archive, f'{name}.jpg', (root / f'images/{name}.jpg').read_bytes())
            add(archive, f'{name}.seg.png', (root / f'masks/{name}.png').read_bytes())
    args = {'target_key': 'seg.png', 'classes': NAMES, 'ignore_index': 255}
    dataset = create_dataset(str(tmp_path / 'all.tar'), args=args)
    assert has_masks(dataset) and class_names(dataset) == NAMES
    same(dataset, MaskedImages(root, NAMES, ignore_index=255))
    other = create_dataset(str(tmp_path / 'all.tar'), args={**args, 'ignore_index': [255, 254]})
    assert other.digest() != dataset.digest()


def test_images_and_masks_of_one_ending_in_shards(root, tmp_path):
    with tarfile.open(tmp_path / 'all.tar', 'w') as archive:
        for name in (0, 1):
            for folder, ending in (('images', 'jpg'), ('masks', 'png')):
                add(archive, f'{name}.{ending}', next(root.glob(f'{folder}/{name}.*')).read_bytes())
    dataset = create_dataset(str(tmp_path / 'all.tar'), args={'target_key': 'png', 'classes': 3, 'ignore_index': 255})
    same(dataset, [MaskedImages(root, 3, ignore_index=255)[i] for i in range(2)])


def test_saved_data_sets(root, tmp_path):
    datasets = pytest.importorskip('datasets')
    files = [
        [str(root / f'{folder}/{name}.{ending}') for name in (0, 1, 2, 10)]
        for folder, ending in (('images', 'jpg'), ('masks', 'png'))
    ]
    features = datasets.Features(image=datasets.Image(), annotation=datasets.Image())
    columns = [[{'bytes': Path(path).read_bytes(), 'path': path} for path in paths] for paths in files]
    saved = datasets.Dataset.from_dict(dict(zip(('image', 'annotation'), columns, strict=True)), features)
    saved.save_to_disk(tmp_path / 'saved/train')
    args = {'target_key': 'annotation', 'classes': NAMES, 'ignore_index': 255}
    dataset = create_dataset('train', f'hfds/{tmp_path}/saved', args=args)
    assert has_masks(dataset) and class_names(dataset) == NAMES and dataset.digest()
    same(dataset, MaskedImages(root, NAMES, ignore_index=255))
    with pytest.raises(ValueError, match='which classes there are is not known'):
        create_dataset('train', f'hfds/{tmp_path}/saved', args={'target_key': 'annotation'})


def test_arguments_of_masks_where_there_are_labels(tmp_path, root):
    with tarfile.open(tmp_path / 'all.tar', 'w') as archive:
        add(archive, '0.jpg', (root / 'images/0.jpg').read_bytes())
        add(archive, '0.cls', b'1')
    with pytest.raises(ValueError, match='ShardReader of labels has no option .ignore_index.'):
        create_dataset(str(tmp_path / 'all.tar'), args={'ignore_index': 255})


def test_what_weights_depend_on(root):
    one = MaskedImages(root, NAMES, ignore_index=255)
    assert one.digest() == MaskedImages(root, NAMES, ignore_index=[255]).digest()
    assert one.digest() != MaskedImages(root, NAMES, values={0: 0, 1: 1, 2: 1, 255: None}).digest()
    (root / 'images/1.jpg').rename(root / 'images/5.jpg')
    (root / 'masks/1.png').rename(root / 'masks/5.png')
    assert one.digest() != MaskedImages(root, NAMES, ignore_index=255).digest()


def too_large(root):
    Image.fromarray(np.full((20, 24), 9, np.uint8)).save(root / 'masks/0.png')


def empty(root):
    for mask in root.glob('masks/*'):
        mask.unlink()


FAULTS = [
    (lambda root: (root / 'masks/2.png').unlink(), r'images/2\.jpg has no mask \(masks/2\.…\), as 1 of 4'),
    (lambda root: (root / 'images/2.jpg').unlink(), r'masks/2\.png has no image \(images/2\.…\), as 1 of 4'),
    (
        lambda root: Image.new('L', (3, 3)).save(root / 'images/2.png'),
        r'images/2\.png: .*images/2\.jpg has the same name up to the ending',
    ),
    (empty, 'masks: no image in it'),
    (
        lambda root: (root / 'masks').rename(root / 'truth'),
        "holds no folder 'masks'; it must hold one of images and one of masks",
    ),
    (too_large, r'masks/0\.png: its mask holds 9, its classes are 0 to 2'),
    (lambda root: (root / 'masks/0.png').write_bytes(b'\x89PNG'), r'masks/0\.png: not a readable image'),
]


@pytest.mark.parametrize(('spoil', 'message'), FAULTS)
def test_faults_are_named(root, spoil, message):
    spoil(root)
    with pytest.raises(ValueError, match=message):
        create_dataset(str(root), 'masks', args={'classes': 3, 'ignore_index': 255})[0]


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ({}, 'which classes there are is not known; set data.args.classes'),
        ({'classes': ['a', 'a']}, "classes has 'a' twice"),
        ({'classes': 0}, 'classes must be a list of names, a text file of them, or their number, got 0'),
        ({'classes': 3, 'ignore_idx': 255}, "MaskedImages has no option 'ignore_idx'; did you mean ignore_index?"),
        ({'classes': 3, 'mask_suffix': '_m'}, r"masks/0\.png: its name does not end in mask_suffix='_m'"),
        ({'classes': 3, 'mask_suffix': 5}, 'mask_suffix must be a text, got 5'),
        ({'classes': 3, 'images': None}, 'images must be a text, got None'),
        ({'annotations': 'none.json'}, r'annotations=none\.json: not a file of COCO.s panoptic format'),
        ({'annotations': 'none.json', 'ignore_index': 0}, 'annotations say what masks hold; leave ignore_index'),
    ],
)
def test_arguments_that_do_not_fit(root, args, message):
    with pytest.raises(ValueError, match=message):
        create_dataset(str(root), 'masks', args=args)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'the list is empty'),
        ('images/0.jpg\n', r"line 1 must have an image and its mask, got \['images/0.jpg'\]"),
        ('image,mask\nimages/0.jpg,masks/7.png\n', r'line 2: .*masks/7\.png: there is no such file'),
        ('images/0.jpg,masks/0.png\nimages/0.jpg, masks/0.png\n', 'line 2: images/0.jpg is in it twice, .* the same'),
        (
            'images/0.jpg,masks/0.png\nimages/0.jpg,masks/1.png\n',
            r'line 2: images/0\.jpg is in it twice, further up with another mask, masks/0\.png',
        ),
    ],
)
def test_lists_that_do_not_fit(root, text, message):
    (root / 'list.csv').write_text(text)
    with pytest.raises(ValueError, match=message):
        MaskedImages(root / 'list.csv', 3)


def test_a_path_that_is_neither(root):
    with pytest.raises(ValueError, match=r'images/0\.jpg: a list of images and masks is a \.csv or \.tsv file'):
        MaskedImages(root / 'images/0.jpg', 3)
    with pytest.raises(ValueError, match='nowhere: no such folder, nor a list'):
        MaskedImages(root / 'nowhere', 3)


def test_names_of_classes_come_with_a_palette(root):
    (root / 'palette.txt').write_text('0 0 0 ground\n9 0 0 roof\n')
    for mask in root.glob('masks/*.png'):
        which = np.array(Image.open(mask)) % 2
        Image.fromarray(np.array([[0, 0, 0], [9, 0, 0]], np.uint8)[which]).save(mask)
    dataset = MaskedImages(root, palette=str(root / 'palette.txt'))
    assert dataset.classes == ['ground', 'roof'] and set(np.unique(dataset[0][2])) == {0, 1}
    assert MaskedImages(root, palette=[[0, 0, 0], [9, 0, 0]]).classes == ['0', '1']
    assert MaskedImages(root, ['a', 'b'], palette=[[0, 0, 0], [9, 0, 0]]).classes == ['a', 'b']
