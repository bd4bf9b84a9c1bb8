"""Batches on their way to the device: bytes until they are there, one ahead of what is computed."""

import logging

import albumentations as A
import numpy as np
import pytest
import torch
from torchvision.transforms import Normalize

from tests.data.streams import stand_in_for_streams
from tests.data.test_transforms import EVERYTHING, PLAIN
from tests.data.trees import pixels, write_odd_files, write_tree
from vit_efficient.data import (
    EpochSampler,
    EvalTransform,
    ImageTree,
    Samples,
    TrainTransform,
    create_loader,
    iterate,
    limit_workers,
)
from vit_efficient.data.preprocessing import Normalization

CPU = torch.device('cpu')


def test_no_more_workers_than_cores(monkeypatch, caplog):
    caplog.set_level(logging.INFO, 'vit_efficient')
    monkeypatch.setattr('vit_efficient.data.batches.available_cores', lambda: 2)
    assert [limit_workers(workers, 'data.workers') for workers in (0, 2)] == [0, 2] and not caplog.records
    assert limit_workers(8, 'data.workers') == 2
    assert [record.message for record in caplog.records] == [
        'data.workers=8: 2 load images, as many as there are cores'
    ]


def loader_of(dataset, transform=None, workers=0, **options):
    samples = Samples(dataset, transform or EvalTransform(PLAIN), 3, 3, **options)
    return create_loader(samples, EpochSampler(len(samples), shuffle=False), 4, workers)


@pytest.mark.parametrize('channels', [1, 3])
def test_bytes_are_normalised_as_by_albumentations(channels):
    rng = np.random.default_rng(0)
    every_byte = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(channels, 2)
    for mean, std in rng.uniform(0.05, 1, (20, 2, channels)).tolist():
        expected = A.Normalize(mean, std, max_pixel_value=255.0)(image=every_byte)['image'].reshape(16, 16, channels)
        found = Normalization(tuple(mean), tuple(std), by_factor=True)(torch.from_numpy(every_byte).permute(2, 0, 1))
        assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1))
        near = Normalization(tuple(mean), tuple(std))(torch.from_numpy(every_byte).permute(2, 0, 1))
        torch.testing.assert_close(found, near, rtol=1e-6, atol=1e-6)
    measured = torch.rand(channels, 3, 4)
    assert Normalization((0.5,) * channels, (0.1,) * channels)(measured) is measured


@pytest.mark.parametrize('transform', [TrainTransform(PLAIN, EVERYTHING, 0), EvalTransform(PLAIN)])
@pytest.mark.parametrize('workers', [0, 2])
def test_images_of_8_bits_leave_the_loader_as_bytes(tmp_path, transform, workers):
    dataset = ImageTree(write_tree(tmp_path) / 'train')
    loader = loader_of(dataset, transform, workers)
    for sent, given, left in zip(loader, iterate(loader), iterate(loader, device=CPU, normalize=False), strict=True):
        assert sent[0].dtype == left[0].dtype == torch.uint8
        assert given[0].dtype == torch.float32
        assert torch.equal(loader.dataset.normalize(sent[0]), given[0])
        for index, image in zip(given[-1].tolist(), given[0], strict=True):
            assert torch.equal(image, transform(np.asarray(dataset[index][0]), 0, index))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_batch_of_bytes_and_measurements_is_of_floats(workers):
    images = [pixels(0, (40, 40, 3)), pixels(1, (40, 40, 3), 'uint16'), pixels(2, (40, 40, 3)), pixels(3, (40, 40, 3))]
    loader = loader_of([(image, 0) for image in images], workers=workers)
    ((sent, *_),) = loader
    ((given, *_),) = iterate(loader)
    assert torch.equal(sent, given)
    assert torch.equal(given[0], EvalTransform(PLAIN)(images[0]))


def test_the_next_batch_is_copied_before_one_is_given(tmp_path, monkeypatch):
    loader = loader_of(ImageTree(write_tree(tmp_path, train=3) / 'train'))  # 4, 4 and 1
    expected = list(iterate(loader))
    calls = stand_in_for_streams(monkeypatch)
    given = iterate(loader, None, CPU)
    for number, batch in enumerate(expected):
        found = next(given)
        assert all(torch.equal(a, b) for a, b in zip(found, batch, strict=True))
        # Images and labels; the indices stay on the host.
        later = ['wait', 'use', 'use', 'copy'] * min(number + 1, 2) + ['wait', 'use', 'use'] * (number == 2)
        assert calls == ['copy', *later]
    assert next(given, None) is None


def test_what_is_skipped_is_known_when_its_batch_is_given(tmp_path, monkeypatch):
    write_odd_files(write_tree(tmp_path) / 'train/c1')
    loader = loader_of(ImageTree(tmp_path / 'train'), on_error='skip')
    stand_in_for_streams(monkeypatch)
    ahead, here = {}, {}
    for ours, theirs in zip(iterate(loader, ahead, CPU), iterate(loader, here), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert ahead == here
    assert len(here) == 4


def test_an_error_is_raised_at_its_turn_and_an_interrupt_at_once(monkeypatch):
    stand_in_for_streams(monkeypatch)

    class Damaged(list):
        def __getitem__(self, index):
            if index >= 4:
                raise self.error
            return super().__getitem__(index)

    dataset = Damaged([(pixels(0, (40, 40, 3)), 0)] * 8)
    dataset.error = OSError('gone')
    given = iterate(loader_of(dataset), None, CPU)
    next(given)
    with pytest.raises(ValueError, match='sample 4: gone'):
        next(given)
    dataset.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        next(iterate(loader_of(dataset), None, CPU))


@pytest.mark.cuda
def test_copies_on_a_gpu_are_what_is_on_the_host(tmp_path):
    device = torch.device('cuda', 0)
    samples = Samples(ImageTree(write_tree(tmp_path) / 'train'), EvalTransform(PLAIN), 3, 3)
    loader = create_loader(samples, EpochSampler(len(samples), shuffle=False), 4, 2, pin=True)
    busy = torch.randn(4096, 4096, device=device)
    for ours, theirs in zip(iterate(loader, None, device), iterate(loader), strict=True):
        for _ in range(20):  # the device is behind when the next copy begins
            busy = busy @ busy / 64
        assert ours[0].device == device and ours[-1].device.type == 'cpu'
        assert torch.equal(ours[1].cpu(), theirs[1])
        torch.testing.assert_close(ours[0].cpu(), theirs[0], rtol=1e-6, atol=1e-6)


def test_a_transform_of_others_is_called_as_it_is():
    """Whatever attributes it has, and whatever the data set of a loader of others has."""

    class Mine:
        normalize = Normalize([0.5] * 3, [0.5] * 3)

        def __call__(self, image, *key):
            return self.normalize(torch.from_numpy(image).permute(2, 0, 1).float() / 255)

    class Blacks(torch.utils.data.Dataset):
        normalize = True

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return np.zeros((4, 4, 3), np.uint8), i

    samples = Samples(Blacks(), Mine(), 3, 5)
    for images, *_ in (*iterate(create_loader(samples, [(0, 0), (0, 1)], 2)), *samples.readable(2)):
        assert (images == -1).all()
    ((images, _),) = iterate(torch.utils.data.DataLoader(Blacks(), 2))
    assert images.dtype == torch.uint8

    class Doubled(EvalTransform):
        def __call__(self, image, *key):
            return 2 * super().__call__(image, *key)

    image, *_ = next(Samples(Blacks(), Doubled(PLAIN), 3, 5).readable(1))
    assert torch.equal(image, 2 * EvalTransform(PLAIN)(np.zeros((4, 4, 3), np.uint8)))
