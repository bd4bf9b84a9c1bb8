import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from timm.data.readers.reader import Reader

from tests.data.jpegs import jpeg, photograph
from tests.data.trees import write_tree
from vit_efficient.data import (
    DataConfig,
    ImageTree,
    Preprocessing,
    ReaderImages,
    SizeConfig,
    create_dataset,
    eval_input,
    input_shape,
    read_coefficients,
    train_input,
)
from vit_efficient.models import save_model
from vit_efficient.train import Config, train
from vit_efficient.train.config import LossConfig, ModelConfig, SchedConfig
from vit_efficient.train.rules import validate
from vit_efficient_cli import main

NAME = 'vit_tiny_patch16_224'
ARGS = {'img_size': 64, 'patch_size': 16, 'embed_dim': 12, 'depth': 1, 'num_heads': 2}
OF_COEFFICIENTS, EMBED = 'vit_full_tiny', {'patch_embed': 'dct', 'patch_keep': 8, 'patch_input': 'coefficients'}
STILL = {'crop_scale': None, 'color_jitter': 0.0, 'rand_ops': 0, 'erasing': 0.0}


def test_that_edges_are_not_seen_is_said_once(caplog):
    model = timm.create_model(NAME, **{**ARGS, 'img_size': (70, 65)})
    Preprocessing.of(model), Preprocessing.of(model)
    assert caplog.text.count('6 rows at the lower edge and 1 columns at the right are not seen') == 1
    Preprocessing.of(timm.create_model(NAME, **ARGS))
    Preprocessing.of(timm.create_model(NAME, **ARGS, dynamic_img_size=True), DataConfig(img_size=[70, 67]))
    assert '67' not in caplog.text


def test_what_is_scaled_is_enough_for_every_size():
    pytest.importorskip('simplejpeg')
    model = of_pixels()
    preprocessing = Preprocessing.of(model)
    for schedule, largest in (
        ([], (64, 64)),
        ([SizeConfig(2, [32, 96])], (64, 96)),
        ([SizeConfig(0, [32, 32])], (32, 32)),
        ([SizeConfig(0, [32, 48]), SizeConfig(1, [80, 16])], (80, 48)),
    ):
        config = DataConfig(decode='scaled', schedule=schedule)
        dataset = ReaderImages(Reader())
        loader = train_input(dataset, model, preprocessing, config, 0)[0].loader
        assert (loader.height, loader.width) == largest


def of_coefficients(classes=3):
    torch.manual_seed(0)
    return timm.create_model(OF_COEFFICIENTS, **ARGS, **EMBED, num_classes=classes)


def of_pixels(classes=3):
    return timm.create_model(NAME, **ARGS, num_classes=classes)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """JPEGs of 100 × 140 pixels, with the labels that are their left, middle and right."""
    root = tmp_path_factory.mktemp('photographs')
    for split, count in (('train', 4), ('val', 2)):
        for label in range(3):
            folder = root / split / f'c{label}'
            folder.mkdir(parents=True)
            for number in range(count):
                cut = photograph()[100 * (number % 4) :, 150 * label :][:100, :140]
                (folder / f'{number}.jpg').write_bytes(jpeg(np.ascontiguousarray(cut)))
    return root


def recipe(photographs, output, decode='coefficients'):
    config = Config(
        model=ModelConfig(OF_COEFFICIENTS, {**ARGS, **EMBED})
        if decode == 'coefficients'
        else ModelConfig(NAME, dict(ARGS)),
        sched=SchedConfig(epochs=2, warmup_epochs=1),
        loss=LossConfig(mixup=0.8),
        output=str(output),
        device='cpu',
        threads=1,
    )
    data = config.data
    data.train, data.val, data.decode = f'{photographs}/train', f'{photographs}/val', decode
    data.batch_size, data.workers = 4, 0
    for key, value in STILL.items():
        setattr(data.augment, key, value)
    return config


def test_training_and_evaluation_on_coefficients(photographs, tmp_path):
    found = [train(recipe(photographs, tmp_path / str(number))) for number in range(2)]
    losses = [
        [line.get('loss') for line in map(json.loads, (tmp_path / str(number) / 'metrics.jsonl').open())]
        for number in range(2)
    ]
    assert losses[0] == losses[1]
    assert found[0]['val_images'] == 6 and found[0]['steps'] == 6


def test_an_image_that_has_no_coefficients_is_named(photographs, tmp_path):
    with pytest.raises(ValueError, match=r'0\.png: not a JPEG.*data\.decode=pixels'):
        train(recipe(write_tree(tmp_path / 'pngs'), tmp_path / 'run'))


def test_training_on_reduced_images(photographs, tmp_path):
    config = recipe(photographs, tmp_path / 'run', 'scaled')
    assert train(config)['val_images'] == 6
    main(['evaluate', str(tmp_path / 'run'), '--data', f'{photographs}/val'])


def test_what_each_way_gives(photographs):
    dataset, config = ImageTree(photographs / 'val'), DataConfig(img_size=[32, 48])
    model = of_pixels()
    preprocessing = Preprocessing.of(model, config)
    read = {}
    for config.decode in ('pixels', 'scaled'):
        config.augment = replace(config.augment, crop_scale=None)
        for name, (found, transform) in {
            'train': train_input(dataset, model, preprocessing, config, 0),
            'eval': eval_input(dataset, model, preprocessing, config.decode),
        }.items():
            image = np.asarray(found[0][0])
            read[config.decode, name] = image.shape[:2]
            assert transform(image, 0, 0).shape == input_shape(model, preprocessing) == (3, 32, 48)
    assert read == {
        ('pixels', 'train'): (100, 140),
        ('pixels', 'eval'): (100, 140),
        ('scaled', 'train'): (50, 70),
        ('scaled', 'eval'): (50, 70),
    }
    assert np.asarray(dataset[0][0]).shape[:2] == (100, 140)  # the data set itself is unchanged

    config.augment = replace(config.augment, crop_scale=[0.3, 1.0])
    config.decode = 'scaled'
    assert train_input(dataset, model, preprocessing, config, 0)[0][0][0].shape[:2] == (100, 140)

    model = of_coefficients()
    preprocessing = Preprocessing.of(model)
    config.decode = 'coefficients'
    found, transform = eval_input(dataset, model, preprocessing, 'coefficients')
    assert input_shape(model, preprocessing) == (3, 32, 32)
    path = photographs / 'val' / found.filename(0)
    whole = read_coefficients(path, 16, 8, 3, preprocessing.mean, preprocessing.std).view(3, 6, 8, 8, 8)
    centre = whole[:, 1:5, :, 2:6].reshape(3, 32, 32)
    assert torch.allclose(transform(found[0][0]), centre, atol=1e-5)


def test_images_of_timms_readers(photographs):
    model = of_coefficients()
    dataset = create_dataset('val', 'folder', str(photographs))
    found, transform = eval_input(dataset, model, Preprocessing.of(model), 'coefficients')
    assert transform(found[0][0]).shape == (3, 32, 32)
    (photographs / 'val/c0/0.jpg').write_bytes((photographs / 'val/c0/1.jpg').read_bytes()[:-900])
    try:
        with pytest.raises(ValueError, match=r'0\.jpg: .*truncated'):
            found[0]
    finally:
        (photographs / 'val/c0/0.jpg').write_bytes((photographs / 'train/c0/0.jpg').read_bytes())


def test_way_and_model_must_fit(photographs):
    dataset = ImageTree(photographs / 'val')
    for decode in ('pixels', 'scaled'):
        with pytest.raises(ValueError, match=f'data.decode={decode} gives pixels.*set data.decode=coefficients'):
            eval_input(dataset, of_coefficients(), Preprocessing.of(of_coefficients()), decode)
    with pytest.raises(ValueError, match=r'this one takes pixels; use data\.decode=pixels or scaled'):
        eval_input(dataset, of_pixels(), Preprocessing.of(of_pixels()), 'coefficients')
    model = of_coefficients()
    with pytest.raises(
        ValueError, match=r'data\.decode is for image files, list gives images that are decoded already'
    ):
        eval_input([], model, Preprocessing.of(model), 'coefficients')


def test_a_missing_library_is_an_error_of_the_recipe(photographs, monkeypatch):
    monkeypatch.setitem(sys.modules, 'simplejpeg', None)
    with pytest.raises(ValueError, match=r'data\.decode: .*simplejpeg.*vit-efficient\[jpeg\]'):
        eval_input(ImageTree(photographs / 'val'), of_pixels(), Preprocessing.of(of_pixels()), 'scaled')


@pytest.mark.parametrize(
    ('section', 'key', 'value'),
    [
        ('data.augment', 'crop_scale', [0.5, 1.0]),
        ('data.augment', 'color_jitter', 0.3),
        ('data.augment', 'rand_ops', 2),
        ('data.augment', 'erasing', 0.25),
        ('data.augment.affine', 'rotate', 5.0),
        ('data', 'crop_pct', 0.9),
        ('loss', 'cutmix', 1.0),
        ('', 'task', 'segmentation'),
    ],
)
def test_augmentation_that_coefficients_do_not_allow_is_named(photographs, section, key, value):
    config = recipe(photographs, 'run')
    validate(config)
    part = config
    for name in filter(None, section.split('.')):
        part = getattr(part, name)
    setattr(part, key, value)
    with pytest.raises(
        ValueError, match=rf'^{f"{section}.{key}".strip(".")} must be .* for data\.decode=coefficients|task'
    ):
        validate(config)
    config.data.decode = 'jpeg'
    with pytest.raises(ValueError, match=r"data\.decode must be pixels, scaled or coefficients, got 'jpeg'"):
        validate(config)


def test_the_command_evaluates_a_model_of_coefficients(photographs, tmp_path, capsys):
    """Whatever its recipe says, or without one."""
    save_model(of_coefficients(), tmp_path)
    main(['evaluate', str(tmp_path), '--data', f'{photographs}/val'])
    assert 'on 6 images' in capsys.readouterr().out
