"""Truncation as augmentation, of every kind of image, in both libraries."""

import json
import pickle
import random
from dataclasses import replace

import albumentations as A
import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from tests.data.test_transforms import PLAIN
from tests.data.trees import pixels
from vit_efficient.data import AugmentConfig, DctTruncate, TorchvisionDctTruncate, TrainTransform
from vit_efficient.dct import kept_coefficients

DTYPES = ('uint8', 'uint16', 'float32', 'float64')


def noise(shape, dtype):
    """The same in every type."""
    image = pixels(0, shape, 'float64')
    if dtype.startswith('float'):
        return image.astype(dtype)
    return (image * np.iinfo(dtype).max).round().astype(dtype)


def reference(image, ratio, block):
    """By scipy: the lowest rectangle of each block of a padded image."""
    most = 1 if image.dtype.kind == 'f' else np.iinfo(image.dtype).max
    x = image.astype('f8').reshape(*image.shape[:2], -1)
    height, width = x.shape[:2]
    p, q = (block, block) if block else (height, width)
    x = np.pad(x, ((0, -height % p), (0, -width % q), (0, 0)), mode='edge')
    blocks = x.reshape(x.shape[0] // p, p, x.shape[1] // q, q, -1)
    y = scipy.fft.dctn(blocks, axes=(1, 3), norm='ortho')
    h, w, _ = kept_coefficients(p, q, ratio=ratio)
    y[:, h:] = y[:, :, :, w:] = 0
    y = scipy.fft.idctn(y, axes=(1, 3), norm='ortho').reshape(x.shape)[:height, :width]
    return y.clip(0, most).reshape(image.shape)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(24, 32), (24, 32, 1), (24, 32, 3), (24, 32, 7), (21, 35, 3)])
@pytest.mark.parametrize('block', [None, 8])
def test_pixels(dtype, shape, block):
    image = noise(shape, dtype)
    expected = reference(image, 1 / 4, block)
    tolerance = {'uint8': 0.501, 'uint16': 0.55, 'float32': 1e-6, 'float64': 1e-13}[dtype]
    found = DctTruncate(1 / 4, block, p=1)(image=image)['image']
    assert found.dtype == image.dtype and found.shape == image.shape and found.flags.c_contiguous
    assert np.abs(found.astype('f8') - expected).max() <= tolerance
    tensor = torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)
    theirs = TorchvisionDctTruncate(1 / 4, block, p=1)(tensor)
    assert theirs.dtype == tensor.dtype
    assert np.array_equal(theirs.permute(1, 2, 0).numpy(), np.atleast_3d(found))


@pytest.mark.parametrize('transform', [DctTruncate, TorchvisionDctTruncate])
def test_one_pixel(transform):
    image = np.array([[[7, 8, 9]]], np.uint8)
    for block in (None, 16, (8, 4)):
        for order in ('square', 'zigzag'):
            if transform is DctTruncate:
                found = transform(0.01, block, order, p=1)(image=image)['image']
            else:
                found = np.asarray(transform(0.01, block, order, p=1)(Image.fromarray(image)))
            assert np.array_equal(found, image)


@pytest.mark.parametrize('dtype', ['uint16', 'float16', 'float32', 'float64'])
def test_byte_orders_and_views(dtype):
    """As they come from FITS files, memory-mapped TIFFs and flips."""
    image = noise((12, 10, 3), dtype)
    expected = DctTruncate(0.25, p=1)(image=image)['image']
    other = image.astype(image.dtype.newbyteorder('>'))
    found = DctTruncate(0.25, p=1)(image=other)['image']
    assert found.dtype == image.dtype and np.array_equal(found, expected)
    mirrored = DctTruncate(0.25, p=1)(image=other[:, ::-1])['image']
    assert np.allclose(mirrored[:, ::-1].astype(float), expected.astype(float), atol=1 if dtype == 'uint16' else 2e-3)


def test_out_of_range_is_clipped():
    board = (np.indices((32, 32)).sum(0) // 5 % 2 * 255).astype(np.uint8)
    found = DctTruncate(1 / 9, p=1)(image=board)['image']
    unclipped = reference(board.astype('f8') / 1e6, 1 / 9, None) * 1e6
    assert unclipped.max() > 256 and found.max() == 255
    found = DctTruncate(1 / 9, p=1)(image=board.astype('f4') / 255)['image']
    assert found.max() == 1


class TestAlbumentations:
    def test_draws_follow_the_seed(self):
        image = noise((24, 32, 3), 'uint8')
        images = []
        for seed in (1, 1, 2):
            compose = A.Compose([DctTruncate((0.05, 0.9), p=0.5), A.HorizontalFlip()], seed=seed)
            np.random.seed(seed)
            random.seed(len(images))
            images.append([compose(image=image)['image'].tobytes() for _ in range(20)])
        assert images[0] == images[1] != images[2]
        assert image.tobytes() in images[0] and len(set(images[0])) > 5

    def test_range(self):
        transform = DctTruncate((0.2, 0.3), p=1)
        ratios = []
        for _ in range(200):
            transform(image=np.zeros((4, 4), np.uint8))
            ratios.append(transform.get_applied_params()['ratio'])
        assert 0.2 <= min(ratios) < 0.21 and 0.29 < max(ratios) <= 0.3

    @pytest.mark.parametrize('options', [{}, dict(ratio=0.25, block=(8, 4), order='zigzag', p=0.3)])
    def test_serialisation(self, options):
        transform = DctTruncate(**options)
        again = A.from_dict(json.loads(json.dumps(A.to_dict(A.Compose([transform])))))
        again.set_random_seed(3)
        assert repr(again.transforms[0]) == repr(transform)
        image = noise((24, 32, 3), 'uint8')
        compose = A.Compose([pickle.loads(pickle.dumps(transform))], seed=3)
        assert all(np.array_equal(again(image=image)['image'], compose(image=image)['image']) for _ in range(5))

    def test_replay(self):
        image = noise((24, 32, 3), 'uint8')
        result = A.ReplayCompose([DctTruncate((0.01, 0.9), block=8, p=1)])(image=image)
        replay = json.loads(json.dumps(result['replay']))
        assert np.array_equal(A.ReplayCompose.replay(replay, image=image)['image'], result['image'])

    def test_only_images_change(self):
        image, mask = noise((24, 32, 3), 'uint8'), pixels(1, (24, 32))
        compose = A.Compose([DctTruncate(0.1, p=1), A.NoOp()], bbox_params=A.BboxParams('pascal_voc'))
        found = compose(image=image, mask=mask, bboxes=[[1, 2, 20, 21, 5]])
        assert np.array_equal(found['mask'], mask) and not np.array_equal(found['image'], image)
        assert np.allclose(found['bboxes'], [[1, 2, 20, 21, 5]])
        stack = np.stack([image, image[::-1]])
        assert np.array_equal(DctTruncate(0.1, p=1)(images=stack)['images'][0], found['image'])


class TestTorchvision:
    def test_sample(self):
        image = tv_tensors.Image(torch.from_numpy(noise((3, 24, 32), 'uint8')))
        sample = {
            'image': image,
            'video': tv_tensors.Video(torch.stack([image, image])),
            'mask': tv_tensors.Mask(torch.randint(0, 5, (24, 32))),
            'boxes': tv_tensors.BoundingBoxes([[1, 2, 3, 4]], format='XYXY', canvas_size=(24, 32)),
            'label': torch.tensor([3]),
        }
        found = TorchvisionDctTruncate(0.1, p=1)(sample)
        assert type(found['image']) is tv_tensors.Image and type(found['video']) is tv_tensors.Video
        assert not torch.equal(found['image'], image)
        assert torch.equal(found['video'][1], found['image'])
        assert all(found[name] is sample[name] for name in ('mask', 'boxes', 'label'))

    @pytest.mark.parametrize('shape', [(24, 32), (24, 32, 3)])
    def test_pil(self, shape):
        image = noise(shape, 'uint8')
        found = TorchvisionDctTruncate(0.1, p=1)(Image.fromarray(image))
        assert np.array_equal(np.asarray(found), DctTruncate(0.1, p=1)(image=image)['image'])
        deep = Image.fromarray(noise((24, 32), 'uint16'))
        assert TorchvisionDctTruncate(0.1, p=1)(deep).mode == deep.mode == 'I;16'
        with pytest.raises(ValueError, match=r'of mode L, RGB, I;16, got P; convert it'):
            TorchvisionDctTruncate(0.1, p=1)(Image.fromarray(image).convert('P'))

    def test_draws_follow_the_seed(self):
        transform = v2.Compose([TorchvisionDctTruncate((0.05, 0.9), p=0.5), v2.RandomHorizontalFlip()])
        image = torch.rand(3, 24, 32)
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append([transform(image).numpy().tobytes() for _ in range(20)])
        assert runs[0] == runs[1] != runs[2]
        ratios = [transform.transforms[0].make_params([])['ratio'] for _ in range(200)]
        assert 0.05 <= min(ratios) < 0.1 and 0.85 < max(ratios) <= 0.9

    def test_repr_tells_what_it_does(self):
        assert repr(TorchvisionDctTruncate(0.25, 8, 'zigzag')) == (
            'TorchvisionDctTruncate(ratio=(0.25, 0.25), block=(8, 8), order=zigzag, p=0.5)'
        )


def test_in_recipes():
    config = AugmentConfig(
        None, hflip=0, color_jitter=0, rand_ops=0, erasing=0, dct_truncate=1, dct_truncate_ratio=[0.25] * 2
    )
    image = noise((32, 32, 3), 'uint8')
    expected = torch.from_numpy(DctTruncate(0.25, p=1)(image=image)['image']).permute(2, 0, 1)
    assert torch.allclose(TrainTransform(PLAIN, config, 0)(image, 0, 0), (expected / 255 - 0.5) / 0.25, atol=1e-5)
    many = TrainTransform(replace(PLAIN, input_size=(5, 32, 32), mean=(0.5,) * 5, std=(0.25,) * 5), config, 0)
    deep = noise((32, 32, 5), 'float32')
    expected = torch.from_numpy(DctTruncate(0.25, p=1)(image=deep)['image']).permute(2, 0, 1)
    assert torch.allclose(many(deep, 0, 0), (expected - 0.5) / 0.25, atol=1e-5)


@pytest.mark.parametrize('transform', [DctTruncate, TorchvisionDctTruncate])
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'ratio': 0}, 'ratio must be a share above 0 and at most 1, .* got ratio=0'),
        ({'ratio': (0.5, 0.25)}, r'ratio=\(0.5, 0.25\)'),
        ({'ratio': (0.5, 1.25)}, r'ratio=\(0.5, 1.25\)'),
        ({'ratio': [0.1, 0.2, 0.3]}, r'ratio=\[0.1, 0.2, 0.3\]'),
        ({'ratio': '1/4'}, "ratio='1/4'"),
        ({'ratio': None}, 'ratio=None'),
        ({'block': 0}, 'block=0'),
        ({'block': 2.5}, 'block=2.5'),
        ({'order': 'spiral'}, "order must be one of square, zigzag, got order='spiral'"),
        ({'p': 1.5}, 'p=1.5'),
    ],
)
def test_bad_arguments(transform, options, message):
    with pytest.raises(ValueError, match=message):
        transform(**options)


def test_other_types_of_pixels():
    with pytest.raises(ValueError, match=r'uint8, uint16 or floating point in \[0, 1\], got torch.int32'):
        DctTruncate(p=1)(image=np.zeros((8, 8), np.int32))
    with pytest.raises(ValueError, match=r'got torch.int64'):
        TorchvisionDctTruncate(p=1)(torch.zeros(1, 8, 8, dtype=torch.int64))
