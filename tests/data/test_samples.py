from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from tests.data.test_transforms import EVERYTHING, PLAIN
from tests.data.trees import READABLE, UNREADABLE, pixels, write_odd_files, write_tree
from vit_efficient.data import (
    EpochSampler,
    EvalTransform,
    ImageTree,
    Samples,
    TrainTransform,
    check_same_classes,
    class_names,
    create_dataset,
    create_loader,
    iterate,
    labels_among,
)
from vit_efficient.data.files.images import UnfitImage
from vit_efficient.utils.packages import MissingPackage


def samples_of(dataset, transform=None, num_classes=3, **options):
    return Samples(dataset, transform or TrainTransform(PLAIN, EVERYTHING, 0), 3, num_classes, **options)


def batches(dataset, workers, epoch=0, start=0, cache=False):
    samples = samples_of(dataset, cache=cache)
    sampler = EpochSampler(len(samples))
    sampler.set_epoch(epoch, start)
    return list(iterate(create_loader(samples, sampler, 5, workers)))


def error_of(action):
    """What it raises as text. An error that is kept is a reference cycle, which holds a loader with its processes."""
    try:
        action()
    except ValueError as error:
        return str(error)


def test_batches_do_not_depend_on_workers_cache_or_start(tmp_path):
    dataset = ImageTree(write_tree(tmp_path) / 'train')
    here, there, rest = batches(dataset, 0), batches(dataset, 2), batches(dataset, 0, start=10, cache=True)
    assert len(here) == 5
    assert len(here[-1][1]) == 4
    for ours, theirs in zip(here + here[2:], there + rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(here[0][0], batches(dataset, 0, epoch=1)[0][0])


@pytest.mark.parametrize('workers', [0, 2])
def test_loader_processes_of_training_stay_and_memory_is_pinned(tmp_path, workers):
    samples = samples_of(ImageTree(write_tree(tmp_path) / 'train'))
    assert create_loader(samples, EpochSampler(len(samples)), 5, workers, pin=True).pin_memory
    loader = create_loader(samples, EpochSampler(len(samples)), 5, workers, drop_last=True)
    assert loader.persistent_workers == (workers > 0)
    if workers:
        processes = [{worker.pid for worker in iter(loader)._workers} for _ in range(2)]
        assert processes[0] == processes[1]
    assert not create_loader(samples, EpochSampler(len(samples)), 5, workers).persistent_workers
    samples.cached = {}
    assert create_loader(samples, EpochSampler(len(samples)), 5, workers).persistent_workers == (workers > 0)


def test_classes_are_in_natural_order(tmp_path):
    for name in ('10', '9', '1', '.hidden'):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels(0, (4, 4))).save(tmp_path / name / 'a.png')
    dataset = create_dataset(str(tmp_path))
    assert class_names(dataset) == ['1', '9', '10']
    labels = {dataset.filename(i): label for i, (_, label) in enumerate(dataset.samples)}
    assert labels == {'1/a.png': 0, '9/a.png': 1, '10/a.png': 2}


def test_digits_of_other_scripts_have_an_order(tmp_path):
    # The digits of Devanagari are numbers, 2 and 10; powers and circled ones are signs.
    names = ['m²', 'm', '①', 'm10', 'm9', '१०', '२', '²']
    for name in names:
        (tmp_path / name).mkdir()
        Image.fromarray(pixels(0, (4, 4))).save(tmp_path / name / 'a.png')
    assert class_names(ImageTree(tmp_path)) == ['२', '१०', 'm', 'm9', 'm10', 'm²', '²', '①']


def test_class_folders_without_an_image_are_for_evaluation(tmp_path, caplog):
    caplog.set_level('INFO', 'vit_efficient')
    for name in ('a', 'b', 'c'):
        (tmp_path / name).mkdir()
    (tmp_path / 'a' / 'notes.txt').touch()
    with pytest.raises(ValueError, match='no class folder holds an image'):
        create_dataset(str(tmp_path), key='data.val')
    Image.fromarray(pixels(0, (4, 4))).save(tmp_path / 'b' / 'a.png')
    with pytest.raises(ValueError, match='no valid file for the classes a, c'):
        create_dataset(str(tmp_path))
    dataset = create_dataset(str(tmp_path), key='data.val')
    assert (class_names(dataset), dataset[0][1]) == (['a', 'b', 'c'], 1)
    assert caplog.messages[-1] == f'{tmp_path}: no image of 2 of its 3 classes, the first one a'


def test_classes_that_tie_are_ordered_by_name(tmp_path):
    for name in ('01', '0001', '1', '001', '00001'):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels(0, (4, 4))).save(tmp_path / name / 'a.png')
    assert class_names(create_dataset(str(tmp_path))) == ['00001', '0001', '001', '01', '1']


def test_hidden_files_are_no_images(tmp_path, caplog):
    root = write_tree(tmp_path) / 'train'
    (root / 'c1' / '.checkpoints').mkdir()
    for name in ('._0.png', '.DS_Store', '.checkpoints/0.png', 'Thumbs.db', 'NOTES.TXT', 'boxes.xml'):
        (root / 'c1' / name).write_bytes(b'nothing')
    assert len(ImageTree(root)) == 24
    hidden = write_tree(tmp_path / '.hidden') / 'train'
    assert len(ImageTree(hidden)) == 24
    assert caplog.text == ''


def test_files_of_other_types_are_named_once(tmp_path, caplog):
    root = write_tree(tmp_path) / 'train'
    for name in ('c1/0.gif', 'c1/1.JFIF', 'c2/n01440764_18'):
        (root / name).write_bytes(b'an image')
    assert len(ImageTree(root)) == 24
    (record,) = caplog.records
    assert (record.name, record.levelname) == ('vit_efficient.data.sources.folders', 'WARNING')
    line = record.getMessage()
    assert '\n' not in line
    assert line.startswith(f'{root}: left out 3 of its files, the first one {root}/c1/0.gif (files that are read end')
    assert '.jpg' in line


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        ([], 'no such data folder'),
        (['data/'], 'the data folder is empty'),
        (['data/readme.txt'], 'holds no class folders'),
        (['data/cat/', 'data/dog/a.txt'], r'data: .*cat, dog \(files that are read end in \.bmp, '),
    ],
)
def test_a_folder_without_images_is_named(tmp_path, make, message):
    for name in make:
        path = tmp_path / name
        (path if name.endswith('/') else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith('/'):
            path.touch()
    with pytest.raises(ValueError, match=message) as error:
        create_dataset(str(tmp_path / 'data'))
    assert str(tmp_path / 'data') in str(error.value)
    assert '\n' not in str(error.value)


def test_an_unset_folder_is_named_by_its_key():
    with pytest.raises(ValueError, match=r'data\.val is not set'):
        create_dataset('', key='data.val')


@pytest.mark.parametrize('workers', [0, 1])
def test_a_corrupt_image_is_named_in_one_line(tmp_path, workers):
    root = write_tree(tmp_path) / 'train'
    (root / 'c1' / '3.png').write_bytes(b'nothing')
    message = error_of(lambda: batches(ImageTree(root), workers))
    assert message.startswith(f'{root}/c1/3.png: not a readable image')
    assert '\n' not in message


def test_timm_data_sets_do_not_skip_corrupt_images(tmp_path):
    root = write_tree(tmp_path)
    dataset = create_dataset('train', dataset='torch/folder', root=str(root))
    assert len(dataset) == 24
    ours = create_dataset('train', dataset='folder', root=str(root))
    assert class_names(ours) == ['c0', 'c1', 'c2']
    image, label = ours[23]
    assert (image.size, label) == ((24, 20), 2)
    (root / 'train' / 'c2' / '7.png').write_bytes(b'nothing')
    with pytest.raises(ValueError, match=r'c2/7\.png'):
        ours[23]
    with pytest.raises(ValueError, match='dataset=torch/nothing'):
        create_dataset('train', dataset='torch/nothing')


@pytest.mark.parametrize('name', ['torch/cifar10', 'torch/image_folder', 'foo/bar'])
def test_a_data_set_that_needs_a_root_says_so(name):
    with pytest.raises(ValueError, match=rf'^data\.dataset={name}, split train: .* \(data\.root is not set') as error:
        create_dataset('train', dataset=name)
    assert '\n' not in str(error.value)


def test_any_torch_data_set_of_images_and_labels():
    images = [Image.fromarray(pixels(i, (10, 12, 3))) for i in range(4)]
    pairs = [(image if i % 2 else np.asarray(image), i % 3) for i, image in enumerate(images)]
    samples = Samples(pairs, TrainTransform(PLAIN, EVERYTHING, 0), 3, 3)
    tensor, label, index = samples[0, 1]
    assert (tensor.shape, label, index) == ((3, 32, 32), 1, 1)
    assert samples.filename(2) == '2'
    with pytest.raises(ValueError, match='sample 2: its label 2 is not among the 2 classes'):
        Samples(pairs, None, 3, 2).decode(2)
    with pytest.raises(ValueError, match='sample 0: an image must be'):
        Samples(TensorDataset(torch.zeros(2, 3, 4, 4), torch.zeros(2).long()), None, 3, 2).decode(0)


def test_different_classes_are_named():
    check_same_classes(None, ['a'], 'x', 'y')
    check_same_classes(['a', 'b'], ['a', 'b'], 'x', 'y')
    with pytest.raises(ValueError, match=r"of y \(1\) differ from those of x \(2\): missing \['b'\], unexpected \[\]"):
        check_same_classes(['a', 'b'], ['a'], 'x', 'y')
    with pytest.raises(ValueError, match='their order differs'):
        check_same_classes(['a', 'b'], ['b', 'a'], 'x', 'y')


def test_a_data_set_may_lack_classes(caplog):
    caplog.set_level('INFO', 'vit_efficient')
    assert labels_among(['a', 'b'], ['a', 'b'], 'x', 'y') is labels_among(None, ['b'], 'x', 'y') is None
    assert not caplog.messages
    assert labels_among(['9', '10', 'b', 'c'], ['10', 'c'], 'the model', 'y') == [1, 3]
    assert caplog.messages == ['y has no image of 2 of the 4 classes of the model: 9, b']
    for ours, theirs, what in (
        (['a', 'b'], ['a', 'c'], r"missing \['b'\], unexpected \['c'\]"),
        (['a', 'b', 'c'], ['b', 'a'], r"missing \['c'\], unexpected \[\]"),
        (['a', 'b'], ['b', 'a'], 'their order differs'),
    ):
        with pytest.raises(ValueError, match=what):
            labels_among(ours, theirs, 'x', 'y')

    pairs = [(pixels(i, (4, 4, 3)), i, np.array([[i, 1 - i]])) for i in range(2)] + [(pixels(2, (4, 4, 3)), 2)]
    samples = samples_of(pairs, num_classes=4, labels=[1, 3])
    assert [samples.decode(i)[1] for i in range(2)] == [1, 3]
    with pytest.raises(ValueError, match='sample 2: its label 2 is not among the 2 classes of the data set'):
        samples.decode(2)
    samples = samples_of(pairs, num_classes=4, labels=[1, 3], check_target=lambda image, target: None)
    assert samples.decode(1)[2].tolist() == [[3, 1]]


@pytest.mark.parametrize(
    'label', [1, True, np.int64(1), np.uint8(1), np.bool_(True), np.array(1), torch.tensor(1), torch.tensor(True)]
)
def test_labels_are_integers_of_any_library(label):
    found = samples_of([(pixels(0, (4, 4, 3)), label)]).decode(0)[1]
    assert (found, type(found)) == (1, int)


@pytest.mark.parametrize(
    'label',
    [
        *(None, 0.7, 1.0, float('nan'), '1', b'1', [1], (0, 1), {'label': 1}, np.eye(2)[1], np.array([1])),
        *(np.float32(0.7), np.array(0.7), np.str_('1'), torch.eye(2)[1], torch.tensor(0.7), torch.tensor([1])),
    ],
)
@pytest.mark.parametrize('on_error', ['error', 'skip'])
def test_labels_of_other_types_are_refused(label, on_error):
    with pytest.raises(ValueError, match='^sample 0: its label must be an integer, got ') as error:
        samples_of([(pixels(0, (4, 4, 3)), label)], on_error=on_error).decode(0)
    assert '\n' not in str(error.value)


# --- on_error -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    """24 images and seven odd files."""
    root = write_tree(tmp_path_factory.mktemp('odd')) / 'train'
    write_odd_files(root / 'c1')
    return ImageTree(root)


def indices_of(dataset, names):
    return [index for index in range(len(dataset)) if Path(dataset.filename(index)).name in names]


@pytest.mark.parametrize('transform', [TrainTransform(PLAIN, EVERYTHING, 0), EvalTransform(PLAIN)])
@pytest.mark.parametrize('name', READABLE)
def test_odd_images_are_images(odd, name, transform):
    (index,) = indices_of(odd, [name])
    for on_error in ('error', 'skip'):
        image, label, _ = samples_of(odd, transform, on_error=on_error)[0, index]
        assert (image.shape, label) == ((3, 32, 32), 1)
        assert image.isfinite().all()


@pytest.mark.parametrize('name', UNREADABLE)
def test_what_cannot_be_read_is_named_under_each_policy(odd, name):
    (index,) = indices_of(odd, [name])
    reason = f'{odd.root}/c1/{name}: not a readable image'
    with pytest.raises(ValueError, match=rf'^{reason} \(.*\); data.on_error=skip goes on without it$'):
        samples_of(odd)[0, index]
    found = samples_of(odd, on_error='skip')[0, index]
    assert found.index == index
    assert found.reason.startswith(reason) and found.reason.count(name) == 1


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('cache', [False, True])
def test_another_image_of_the_batch_takes_the_place_in_training(odd, workers, cache):
    samples = samples_of(odd, on_error='skip', cache=cache)
    sampler = EpochSampler(len(samples))
    loader = create_loader(samples, sampler, 5, workers, drop_last=True)
    bad = indices_of(odd, UNREADABLE)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = [index for _, index in sampler][:30]
        unreadable = {}
        found = list(iterate(loader, unreadable))
        assert len(found) == 6
        assert sorted(unreadable) == sorted(set(bad) & set(order))
        for number, (images, labels, indices) in enumerate(found):
            asked = order[5 * number : 5 * number + 5]
            good = [index for index in asked if index not in bad]
            taken = cycle(good)
            assert indices.tolist() == [index if index in good else next(taken) for index in asked]
            for image, label, index in zip(images, labels, indices.tolist(), strict=True):
                expected = samples[epoch, index]
                assert torch.equal(image, samples.normalize(expected[0])) and label == expected[1]


@pytest.mark.parametrize('workers', [0, 2])
def test_evaluation_leaves_out_what_cannot_be_read(odd, workers):
    samples = samples_of(odd, EvalTransform(PLAIN), on_error='skip')
    unreadable = {}
    found = list(iterate(create_loader(samples, EpochSampler(31, shuffle=False), 2, workers), unreadable))
    bad = indices_of(odd, UNREADABLE)
    assert sorted(unreadable) == bad
    assert [index for *_, indices in found for index in indices.tolist()] == [i for i in range(31) if i not in bad]


@pytest.mark.parametrize('workers', [0, 1])
def test_a_batch_without_an_image_is_an_error(odd, workers):
    samples = samples_of(odd, on_error='skip')
    keys = [(0, index) for index in indices_of(odd, UNREADABLE)[:2]]
    message = error_of(lambda: list(iterate(create_loader(samples, keys, 2, workers, drop_last=True))))
    assert message.startswith(f'nothing in a batch of 2 can be read; the first one: {odd.root}/c1/corrupt.png: not a')
    assert '\n' not in message


class Failing(torch.utils.data.Dataset):
    def __init__(self, *items):
        self.items = items
        self.reads = 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads += 1
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def test_files_of_any_data_set_are_skipped_and_faults_of_others_are_not(tmp_path):
    write_odd_files(tmp_path)
    image = Image.fromarray(pixels(0, (9, 9, 3)))
    dataset = Failing(
        (image, 0),
        OSError(5, 'Input/output error'),
        SyntaxError('broken PNG file'),
        EOFError(),
        (Image.open(tmp_path / 'truncated.jpg'), 0),  # not decoded yet
    )
    samples = samples_of(dataset, on_error='skip', cache=True)
    reasons = [samples[0, index].reason for index in range(1, 5)]
    assert reasons[:3] == ['sample 1: [Errno 5] Input/output error', 'sample 2: broken PNG file', 'sample 3: EOFError']
    assert 'truncated' in reasons[3]
    # A cache keeps that, too.
    dataset.reads = 0
    assert [samples[1, index].reason for index in range(1, 5)] == reasons
    assert dataset.reads == 0
    assert len(samples.spread(5)) == 1
    with pytest.raises(ValueError, match='none of 2 samples can be read; the first one: sample 0: gone'):
        samples_of(Failing(OSError('gone'), OSError('lost')), on_error='skip').spread(5)

    misfits = [
        ((image, 3), 'sample 0: its label 3 is not among the 3 classes'),
        ((np.zeros((4, 4, 5), np.uint8), 0), 'sample 0: it has 5 channels, the model takes 3'),
        ((np.full((4, 4, 3), np.nan, np.float32), 0), 'sample 0: it holds values that are not finite'),
        ((np.zeros((4, 4, 3), np.int64), 0), 'sample 0: samples must be uint8'),
    ]
    for item, message in misfits:
        with pytest.raises(ValueError, match=message):
            samples_of(Failing(item), on_error='skip')[0, 0]
    for error in (
        MissingPackage('TIFFs are read by tifffile'),
        UnfitImage('a volume'),
        OSError(24, 'Too many open files'),
        OSError(12, 'Cannot allocate memory'),
    ):
        with pytest.raises(ValueError, match=f'^sample 0: .*{str(error)[-15:]}$'):
            samples_of(Failing(error), on_error='skip')[0, 0]
    with pytest.raises(KeyError):
        samples_of(Failing(KeyError('a slip in the code')), on_error='skip')[0, 0]
    with pytest.raises(ValueError, match="on_error must be one of error, skip, got on_error='ignore'"):
        samples_of(dataset, on_error='ignore')


@pytest.mark.parametrize('on_error', ['error', 'skip'])
@pytest.mark.parametrize('name', [None, 'folder'])
def test_images_beyond_the_limit_of_pil_are_not_corrupt(tmp_path, monkeypatch, on_error, name):
    root = write_tree(tmp_path)
    dataset = create_dataset('train', name, str(root)) if name else create_dataset(str(root / 'train'))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ValueError, match=r'c0/0\.png: PIL decodes at most 200 pixels, twice PIL\.Image\.MAX') as error:
        samples_of(dataset, on_error=on_error)[0, 0]
    assert 'not a readable image' not in str(error.value) and 'on_error' not in str(error.value)
    assert str(error.value).count('0.png') == 1
