import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms.functional import to_tensor

from tests.data.trees import pixels
from vit_efficient import convert
from vit_efficient.data import (
    AffineConfig,
    AugmentConfig,
    DataConfig,
    EvalTransform,
    Preprocessing,
    SizeConfig,
    TrainTransform,
    to_array,
    transforms,
)
from vit_efficient.data.preprocessing import WholeTransform
from vit_efficient.models import save_model
from vit_efficient.train import load_model

PLAIN = Preprocessing(
    input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation='bicubic', crop_pct=0.9, crop_mode='center'
)
EVERYTHING = AugmentConfig(vflip=0.5, hue=0.1, rand_ops=3, erasing=0.5, affine=AffineConfig(20, 0.1, 0.1, 5))


def of_channels(channels):
    return replace(PLAIN, input_size=(channels, 32, 32), mean=(0.5,) * channels, std=(0.25,) * channels)


@pytest.mark.parametrize('channels', [1, 3, 5])
@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
def test_draws_are_a_function_of_seed_epoch_and_index(channels, dtype):
    image = pixels(0, (40, 50, channels), dtype)
    transform = TrainTransform(of_channels(channels), EVERYTHING, seed=7)
    keys = [(epoch, index) for epoch in range(2) for index in range(40)]
    forward = {key: transform(image, *key) for key in keys}
    again = TrainTransform(of_channels(channels), EVERYTHING, seed=7)
    np.random.seed(0)
    for key in reversed(keys):
        assert torch.equal(again(image, *key), forward[key])
    assert all(tensor.shape == (channels, 32, 32) and tensor.dtype == torch.float32 for tensor in forward.values())
    assert len({tensor.numpy().tobytes() for tensor in forward.values()}) == len(keys)
    other = TrainTransform(of_channels(channels), EVERYTHING, seed=8)
    assert not torch.equal(other(image, 0, 0), forward[0, 0])


@pytest.mark.parametrize('crop_scale', [None, [0.08, 1.0]])
@pytest.mark.parametrize('size', [(20, 24), (80, 90)])
def test_each_of_200_channels_is_what_it_is_alone(size, crop_scale):
    image = pixels(0, (*size, 200), 'float32')
    config = replace(EVERYTHING, crop_scale=crop_scale, three=True, dct_truncate=0.5, erasing=0)
    for index in range(6):
        found = TrainTransform(of_channels(200), config, 7)(image, 0, index)
        for channel in (0, 1, 127, 128, 199):
            alone = TrainTransform(of_channels(1), config, 7)(image[..., channel, None], 0, index)
            assert torch.allclose(found[channel], alone[0], atol=1e-5)


def test_one_rectangle_of_200_channels_is_erased():
    config = AugmentConfig(None, hflip=0, color_jitter=0, rand_ops=0, erasing=1)
    image = pixels(0, (32, 32, 200), 'float32')
    found = TrainTransform(of_channels(200), config, 7)(image, 0, 0)
    kept = torch.isclose(found * 0.25 + 0.5, torch.from_numpy(image).permute(2, 0, 1), atol=1e-6)
    alone = TrainTransform(of_channels(1), config, 7)(np.ones((32, 32, 1), np.float32), 0, 0)
    erased = alone[0] < 1.99
    assert 0 < erased.sum() < 32 * 32 / 2
    assert torch.equal(kept.all(0), ~erased) and kept[:, erased].float().mean() < 0.01


@pytest.mark.parametrize('size', [(32, 512), (512, 32), (16, 256), (4, 400), (4, 1000)])
@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
def test_images_of_any_aspect_are_augmented_and_erased(size, dtype):
    preprocessing = replace(PLAIN, input_size=(3, *size))
    default = TrainTransform(preprocessing, AugmentConfig(three=True), 7)
    erasing = TrainTransform(preprocessing, AugmentConfig(None, 0, color_jitter=0, rand_ops=0, erasing=1), 7)
    image, white = pixels(0, (40, 50, 3), dtype), np.full((*size, 3), 255 if dtype == 'uint8' else 1, dtype)
    shares = []
    for index in range(40):
        assert default(image, 0, index).shape == (3, *size)
        shares.append((erasing(white, 0, index) < 1.99).any(0).float().mean().item())
    assert min(shares) > 0.01 and max(shares) < 0.4


def test_the_size_follows_the_epoch():
    schedule = [SizeConfig(0, [16, 24]), SizeConfig(3, [40, 40])]
    transform, plain = (TrainTransform(PLAIN, EVERYTHING, 7, *more) for more in ([schedule], []))
    image = pixels(0, (40, 50, 3))
    shapes = [tuple(transform(image, epoch, 5).shape[1:]) for epoch in range(5)]
    assert shapes == [(16, 24)] * 3 + [(40, 40)] * 2
    later = TrainTransform(PLAIN, EVERYTHING, 7, schedule[1:])
    assert torch.equal(later(image, 2, 5), plain(image, 2, 5))
    assert torch.equal(later(image, 3, 5), transform(image, 3, 5))


@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
def test_repeats_are_augmented_anew(dtype):
    transform, image = TrainTransform(PLAIN, EVERYTHING, 7), pixels(0, (40, 50, 3), dtype)
    first, *others = (transform(image, 1, 5, repeat) for repeat in range(4))
    assert torch.equal(first, transform(image, 1, 5))
    assert len({tensor.numpy().tobytes() for tensor in (first, *others)}) == 4


def test_operations_draw_independently():
    """With one seed handed to every operation, an image would be flipped on both axes or on none."""
    config = AugmentConfig(None, hflip=0.5, vflip=0.5, color_jitter=0, rand_ops=0, erasing=0)
    transform = TrainTransform(replace(PLAIN, crop_pct=1.0), config, seed=0)
    image = pixels(0, (32, 32, 3))
    plain = transform.preprocessing
    assert plain.input_size[1:] == image.shape[:2]
    kinds = set()
    base = (torch.from_numpy(image).permute(2, 0, 1) / 255 - 0.5) / 0.25
    for index in range(40):
        found = transform(image, 0, index)
        kinds |= {axes for axes in ((), (1,), (2,), (1, 2)) if torch.allclose(found, base.flip(axes), atol=1e-5)}
    assert kinds == {(), (1,), (2,), (1, 2)}


@pytest.mark.parametrize('channels', [3, 5])
def test_three_augment_draws_one_of_three_evenly(channels):
    """Of a picture of a dark, reddish half and a bright one: solarising turns them round, grey takes the red."""
    image = np.full((32, 32, channels), 10, np.uint8)
    image[:, 16:] = 250
    image[..., 0] += 5
    config = AugmentConfig(crop_scale=None, hflip=0.0, color_jitter=0.0, rand_ops=0, erasing=0.0, three=True)
    transform = TrainTransform(of_channels(channels), config, seed=0)
    found = Counter()
    for index in range(120):
        y = transform(image, 0, index)
        solarised, grey = bool(y[1, 16, 0] > y[1, 16, -1]), torch.equal(y[0], y[1])
        found['solarised' if solarised else 'grey' if grey else 'perhaps blurred'] += 1
    if channels == 5:
        assert found == {'perhaps blurred': 120}
    else:
        assert len(found) == 3 and min(found.values()) > 25


@pytest.mark.parametrize(
    'config',
    [AugmentConfig(), AugmentConfig(three=True), replace(EVERYTHING, three=True, rand_magnitude=10, dct_truncate=0.5)],
    ids=['default', 'three', 'everything'],
)
@pytest.mark.parametrize('dtype', ['uint16', 'float32'])
@pytest.mark.parametrize('channels', [1, 3, 5])
def test_augmentation_of_a_measurement_scales_with_it(channels, dtype, config):
    """12 bits of a detector lie in the lowest sixteenth of 16 bits."""
    image = pixels(0, (40, 50, channels), 'uint16') // 256 * 16
    if dtype == 'float32':
        image = image.astype(dtype) / 65535
    darker = image // 16 if dtype == 'uint16' else image / 16
    plain = replace(of_channels(channels), mean=(0.0,) * channels, std=(1.0,) * channels)
    transform = TrainTransform(plain, config, seed=7)
    for index in range(40):
        found = transform(to_array(image, channels), 0, index)
        assert found.max() > 0
        assert torch.allclose(transform(to_array(darker, channels), 0, index) * 16, found, atol=1e-6)


def test_a_bright_measurement_is_clipped():
    image = pixels(0, (20, 24, 5), 'float32').round()
    found = torch.stack([TrainTransform(of_channels(5), AugmentConfig(), 7)(image, 0, index) for index in range(20)])
    assert (found.min(), found.max()) == (-2, 2)


def test_contrast_of_a_measurement_is_about_its_mean():
    config = AugmentConfig(None, hflip=0, color_jitter=0.5, rand_ops=0, erasing=0)
    image = 0.4 + 0.1 * pixels(0, (32, 32, 5), 'float32')
    image[..., 1] /= 2
    mean, spread = image.mean((0, 1)), image.std((0, 1))
    found = [TrainTransform(of_channels(5), config, 7)(image, 0, index) * 0.25 + 0.5 for index in range(200)]
    brightness = torch.stack([y.mean((1, 2)) for y in found]) / torch.from_numpy(mean)
    contrast = torch.stack([y.std((1, 2), correction=0) for y in found]) / torch.from_numpy(spread) / brightness
    for factors in (brightness, contrast):
        assert torch.allclose(factors, factors[:, :1].expand(-1, 5), rtol=1e-3)
        assert 0.5 <= factors.min() < 0.52 and 1.48 < factors.max() <= 1.501
        assert 0.95 < factors.mean() < 1.05
    assert abs(np.corrcoef(brightness[:, 0], contrast[:, 0])[0, 1]) < 0.2


@pytest.mark.parametrize('channels', [1, 3, 5])
def test_three_augment_leaves_measurements_sharp_where_it_does_not_apply(channels):
    config = AugmentConfig(crop_scale=None, hflip=0.0, color_jitter=0.0, rand_ops=0, erasing=0.0, three=True)
    transform = TrainTransform(of_channels(channels), config, seed=0)
    image = pixels(0, (32, 32, channels), 'float32')
    untouched = torch.from_numpy(image).permute(2, 0, 1)
    found = Counter()
    for index in range(300):
        y = transform(image, 0, index) * 0.25 + 0.5
        same = torch.allclose(y, untouched, atol=1e-6)
        found['same' if same else 'grey' if channels > 1 and torch.equal(y[0], y[1]) else 'blurred'] += 1
    # A blur of less than 1/3.5 pixels is none.
    expected = {'grey': (80, 120), 'same': (80, 130), 'blurred': (70, 120)}
    if channels != 3:
        expected = {'same': (180, 230), 'blurred': (70, 120)}
    assert found.keys() == expected.keys()
    assert all(low < found[kind] < high for kind, (low, high) in expected.items())


def test_without_augmentation_training_sees_the_normalised_image():
    config = AugmentConfig(None, hflip=0, color_jitter=0, rand_ops=0, erasing=0)
    image = pixels(0, (32, 32, 3))
    expected = (torch.from_numpy(image).permute(2, 0, 1) / 255 - 0.5) / 0.25
    assert torch.allclose(TrainTransform(PLAIN, config, 0)(image, 0, 0), expected, atol=1e-5)


@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('size', [(32, 32), (48, 32)])
@pytest.mark.parametrize('channels', [1, 3])
def test_evaluation_is_timms(crop_mode, size, channels):
    if crop_mode == 'border' and channels == 1:
        pytest.skip('timm pads with three colours')
    model = timm.create_model('vit_tiny_patch16_224', img_size=size, in_chans=channels, depth=1, embed_dim=12)
    preprocessing = Preprocessing.of(model, DataConfig(crop_mode=crop_mode))
    image = pixels(0, (61, 80, channels))
    theirs = create_transform(
        (channels, *size),
        is_training=False,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        interpolation='bicubic',
        crop_pct=resolve_model_data_config(model)['crop_pct'],
        crop_mode=crop_mode,
    )
    expected = theirs(Image.fromarray(image[..., 0] if channels == 1 else image))
    assert torch.equal(EvalTransform(preprocessing)(image), expected)


def test_evaluation_of_deep_images_has_the_same_geometry():
    image = pixels(0, (61, 80, 3))
    # Bilinear, since PIL clips the overshoot of bicubic after each axis.
    transform = EvalTransform(replace(PLAIN, interpolation='bilinear'))
    difference = transform(image.astype(np.float32) / 255) - transform(image)
    # PIL rounds to 8 bits between the axes.
    assert difference.abs().max() <= 2 / 255 / 0.25
    many = EvalTransform(replace(of_channels(6), interpolation='bilinear'))(np.concatenate([image, image], 2))
    assert torch.allclose(many[:3], transform(image.astype(np.float32) / 255), atol=1e-6)


@pytest.mark.parametrize('channels', [1, 2, 3, 5])
def test_lanczos_of_deep_images_is_that_of_photographs(channels):
    """In evaluation; training takes what OpenCV calls so, which does not antialias."""
    image = pixels(0, (48, 60, channels)) // 2 + 60
    preprocessing = replace(of_channels(channels), interpolation='lanczos')
    found = EvalTransform(preprocessing)(image.astype(np.float32) / 255)
    single = EvalTransform(replace(of_channels(1), interpolation='lanczos'))
    expected = torch.cat([single(image[..., [channel]]) for channel in range(channels)])
    assert found.shape == (channels, 32, 32)
    assert (found - expected).abs().max() < 0.02  # which are rounded to 8 bits, and divided by 0.25
    for crop_scale in (None, (0.2, 0.5)):
        config = AugmentConfig(crop_scale, hflip=0, color_jitter=0, rand_ops=0, erasing=0)
        drawn = TrainTransform(preprocessing, config, 0)(image.astype(np.float32) / 255, 0, 0)
        assert drawn.shape == (channels, 32, 32) and torch.isfinite(drawn).all()


@pytest.mark.parametrize('interpolation', ['bicubic', 'lanczos'])
@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('how', ['crop', 'squash', 'center'])
def test_training_and_evaluation_clip_what_resizing_overshoots(interpolation, channels, how):
    image = np.zeros((12, 12, channels), np.float32)
    image[3:8, 3:8] = 1
    preprocessing = Preprocessing(
        (channels, 64, 64), (0.0,) * channels, (1.0,) * channels, interpolation, 1.0, 'center'
    )
    preprocessing = replace(preprocessing, crop_mode='squash' if how == 'squash' else 'center')
    config = AugmentConfig((0.8, 1) if how == 'crop' else None, hflip=0, color_jitter=0, rand_ops=0, erasing=0)
    for transform in (TrainTransform(preprocessing, config, 0), EvalTransform(preprocessing)):
        found = transform(image, 0, 0)
        assert found.min() == 0 and found.max() == 1


def test_clipping_draws_nothing():
    """What is drawn for an image of more than 8 bits is what was drawn before there was something to clip."""
    compose = transforms._compose(of_channels(5), AugmentConfig(), photograph=False)
    [clip] = [step for step in compose.transforms if type(step) is transforms._Clip]
    clip.set_random_state(np.random.default_rng(0), random.Random(0))
    state = clip.py_random.getstate()
    assert clip(image=np.full((4, 4, 5), 2, np.float32))['image'].max() == 1
    assert clip.py_random.getstate() == state


def test_borders_need_a_colour():
    with pytest.raises(ValueError, match='crop_mode=border'):
        EvalTransform(replace(of_channels(5), crop_mode='border'))(pixels(0, (20, 20, 5)))


def test_statistics_fit_the_channels_of_the_model():
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, in_chans=5, depth=1, embed_dim=12)
    assert Preprocessing.of(model).mean == (0.5,) * 5
    with pytest.raises(ValueError, match=r'data.mean must have one value per channel of the model \(5\), got \[0.5\]'):
        Preprocessing.of(model, DataConfig(mean=[0.5]))
    with pytest.raises(ValueError, match=r'data\.std must be above 0'):
        Preprocessing.of(model, DataConfig(std=[0.0] * 5))
    with pytest.raises(ValueError, match=r'data\.interpolation must be one of'):
        Preprocessing.of(model, DataConfig(interpolation='cubic'))


def test_large_images_are_antialiased():
    """A chequerboard of single pixels is grey from afar."""
    board = np.indices((512, 512)).sum(0) % 2 * 255
    image = np.stack([board] * 3, 2).astype(np.uint8)
    config = AugmentConfig([0.9, 1.0], hflip=0, color_jitter=0, rand_ops=0, erasing=0)
    assert (TrainTransform(PLAIN, config, 0)(image, 0, 0) * 0.25).abs().max() < 0.1
    assert to_tensor(image).std() > 0.4


@pytest.mark.parametrize('name', ['vit_dct_tiny', 'vit_tiny_patch16_224'])
def test_the_size_of_a_saved_model(name, tmp_path):
    """That of its images, where it takes any; that of its grid, where it takes no other or was given another since."""

    def save(size=None, **options):
        model = timm.create_model(name, patch_size=8, embed_dim=12, depth=1, num_heads=2, **options)
        if size:
            model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, *size)}
        save_model(model, tmp_path)
        return model

    def size_of(model, **options):
        return Preprocessing.of(model, DataConfig(**options)).input_size[1:]

    for size in ((64, 64), (32, 64)):
        save(size, img_size=32, dynamic_img_size=True)
        model = load_model(tmp_path)
        assert size_of(model) == size and size_of(model, img_size=[16, 8]) == (16, 8)
        assert size_of(load_model(tmp_path, img_size=(48, 96))) == (48, 96)
        model.set_input_size((96, 48))
        assert size_of(model) == (96, 48)
    model = load_model(tmp_path)
    if 'dct' not in name:
        save_model(convert(model, 'dct'), tmp_path)
        assert size_of(model) == size_of(load_model(tmp_path)) == (32, 64)
    save((64, 96), dynamic_img_size=True)
    assert size_of(load_model(tmp_path)) == (64, 96)
    assert size_of(load_model(tmp_path, img_size=32)) == (32, 32)
    for options in ({'dynamic_img_size': True}, {}):
        assert size_of(save(img_size=32, **options)) == size_of(load_model(tmp_path)) == (32, 32)
    save((64, 64), img_size=32)
    assert size_of(load_model(tmp_path)) == (32, 32)


# --- masks ------------------------------------------------------------------------------------------------------------

STILL = AugmentConfig(None, hflip=0, color_jitter=0, rand_ops=0, erasing=0)
MOVED = replace(EVERYTHING, rand_ops=0, erasing=0, color_jitter=0, hue=0)


def image_and_mask(channels, dtype, size=(40, 50)):
    """A mask of stripes, and an image that shows its classes, as levels, in each channel."""
    mask = (np.add.outer(np.arange(size[0]), np.arange(size[1])) // 40 % 3).astype(np.int16)
    image = np.repeat(mask[..., None] * (100 if dtype == 'uint8' else 0.4), channels, 2).astype(dtype)
    return image, mask


@pytest.mark.parametrize('channels', [1, 3, 5])
@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
@pytest.mark.parametrize('zoom', [None, [0.5, 2.0]])
def test_masks_move_with_pixels(channels, dtype, zoom):
    image, mask = image_and_mask(channels, dtype, (160, 200))
    transform = TrainTransform(of_channels(channels), replace(MOVED, crop_zoom=zoom), seed=3)
    beside = seen = 0
    for index in range(20):
        moved, classes = transform.pixels_and_mask(image, mask, 0, index)
        assert torch.equal(moved, transform.pixels(image, 0, index))  # with the same draws
        assert classes.shape == (32, 32) and classes.dtype == torch.int16
        assert set(classes.unique().tolist()) <= {-1, 0, 1, 2}
        beside += (classes == -1).sum().item()
        levels = (
            moved.float() if moved.dtype == torch.uint8 else (moved * 0.25 + 0.5) * (255 if dtype == 'uint8' else 250)
        )
        counts = classes >= 0
        counts[:2] = counts[-2:] = counts[:, :2] = counts[:, -2:] = False
        # Where the classes around a pixel are one, which resampling leaves as it is.
        alike = counts & (torch.nn.functional.max_pool2d(-classes[None].float(), 5, 1, 2)[0] == -classes)
        alike &= torch.nn.functional.max_pool2d(classes[None].float(), 5, 1, 2)[0] == classes
        seen += alike.sum().item()
        apart = (levels[:, alike] - 100 * classes[alike]).abs()
        assert apart.numel() == 0 or (apart.mean() < 3 and apart.max() < 50)
    assert beside and seen > 20 * 100


def test_a_mask_of_the_size_of_the_crop_stays_as_it_is():
    image, mask = image_and_mask(3, 'uint8', (32, 32))
    moved, classes = TrainTransform(PLAIN, STILL, 0).pixels_and_mask(image, mask)
    assert np.array_equal(moved.permute(1, 2, 0), image) and np.array_equal(classes, mask)
    moved, classes = TrainTransform(PLAIN, replace(STILL, crop_zoom=[1, 1]), 0).pixels_and_mask(image, mask)
    assert np.array_equal(moved.permute(1, 2, 0), image) and np.array_equal(classes, mask)


@pytest.mark.parametrize('size', [(32, 32), (64, 40), (20, 90), (7, 9)])
@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
def test_a_window_at_zoom_one_holds_pixels_as_they_are(size, dtype):
    image, mask = image_and_mask(3, dtype, size)
    image[..., 0] = pixels(0, size, dtype) // 2 if dtype == 'uint8' else pixels(0, size, dtype)
    transform = TrainTransform(PLAIN, replace(STILL, crop_zoom=[1, 1]), 5)
    seen = set()
    for index in range(10):
        moved, classes = transform.pixels_and_mask(image, mask, 0, index)
        found = moved.permute(1, 2, 0).numpy() if dtype == 'uint8' else moved.permute(1, 2, 0).numpy() * 0.25 + 0.5
        inside = (classes >= 0).numpy()
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert inside.sum() == len(rows) * len(columns) == min(size[0], 32) * min(size[1], 32)
        part = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        places = [
            (top, left)
            for top in range(size[0] - len(rows) + 1)
            for left in range(size[1] - len(columns) + 1)
            if np.allclose(image[top : top + len(rows), left : left + len(columns)], part, atol=1e-6)
        ]
        ((top, left),) = places
        assert np.array_equal(
            mask[top : top + len(rows), left : left + len(columns)], classes[inside].reshape(part.shape[:2])
        )
        filled = found[~inside]
        assert np.allclose(filled, 128 if dtype == 'uint8' else 0.5)
        seen.add((top, left, rows[0], columns[0]))
    assert len(seen) > (3 if size != (32, 32) else 0)


@pytest.mark.parametrize('channels', [1, 3, 5])
@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
def test_whole_images_stay_as_they_are(channels, dtype):
    image, mask = image_and_mask(channels, dtype, (7, 13))
    preprocessing = of_channels(channels)
    moved, classes = WholeTransform(preprocessing).pixels_and_mask(image, mask)
    assert np.array_equal(classes, mask)
    scaled = image / 255 if dtype == 'uint8' else image
    found = WholeTransform(preprocessing).normalize(moved)
    assert np.allclose(found.permute(1, 2, 0), (scaled - 0.5) / 0.25, atol=1e-6)


def test_a_tensor_does_not_share_the_pixels_of_its_image():
    """Which PyTorch would warn of: those of a PIL image may not be written to."""
    still = AugmentConfig(crop_scale=None, hflip=0, color_jitter=0, rand_ops=0, erasing=0)
    transform = TrainTransform(replace(PLAIN, input_size=(3, 20, 24), crop_pct=1.0), still, seed=0)
    image = np.asarray(Image.fromarray(pixels(0, (20, 24, 3))))
    assert not image.flags.writeable
    before = image.copy()
    transform.pixels(image).zero_()
    assert np.array_equal(image, before)
