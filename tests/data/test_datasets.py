import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from tests.data.test_transforms import EVERYTHING, PLAIN
from tests.data.trees import pixels, write_tree
from vit_efficient.data import (
    EpochSampler,
    ImageTree,
    Samples,
    TrainTransform,
    check_same_classes,
    class_names,
    create_dataset,
    create_loader,
    iterate,
)


def batches(dataset, workers, epoch=0, start=0, cache=False):
    samples = Samples(dataset, TrainTransform(PLAIN, EVERYTHING, 0), 3, 3, cache)
    sampler = EpochSampler(len(samples))
    sampler.set_epoch(epoch, start)
    return list(iterate(create_loader(samples, sampler, 5, workers)))


def test_batches_do_not_depend_on_workers_cache_or_start(tmp_path):
    dataset = ImageTree(write_tree(tmp_path) / 'train')
    here, there, rest = batches(dataset, 0), batches(dataset, 2), batches(dataset, 0, start=10, cache=True)
    assert len(here) == 5
    assert len(here[-1][1]) == 4
    for ours, theirs in zip(here + here[2:], there + rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(here[0][0], batches(dataset, 0, epoch=1)[0][0])


def test_classes_are_in_natural_order(tmp_path):
    for name in ('10', '9', '1', '.hidden'):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels(0, (4, 4))).save(tmp_path / name / 'a.png')
    dataset = create_dataset(str(tmp_path))
    assert class_names(dataset) == ['1', '9', '10']
    labels = {dataset.filename(i): label for i, (_, label) in enumerate(dataset.samples)}
    assert labels == {'1/a.png': 0, '9/a.png': 1, '10/a.png': 2}


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        ([], 'no such data folder'),
        (['data/'], 'the data folder is empty'),
        (['data/readme.txt'], 'holds no class folders'),
        (['data/cat/', 'data/dog/a.txt'], 'data: .*cat, dog'),
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
    with pytest.raises(ValueError, match=r'^\S*/c1/3\.png: not a readable image') as error:
        batches(ImageTree(root), workers)
    assert '\n' not in str(error.value)


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
        Samples(TensorDataset(torch.zeros(2, 3, 4, 4), torch.zeros(2)), None, 3, 2).decode(0)


def test_different_classes_are_named():
    check_same_classes(None, ['a'], 'x', 'y')
    check_same_classes(['a', 'b'], ['a', 'b'], 'x', 'y')
    with pytest.raises(ValueError, match=r"of y \(1\) differ from those of x \(2\): missing \['b'\], unexpected \[\]"):
        check_same_classes(['a', 'b'], ['a'], 'x', 'y')
    with pytest.raises(ValueError, match='their order differs'):
        check_same_classes(['a', 'b'], ['b', 'a'], 'x', 'y')
