from pathlib import Path

import pytest
import timm

import vit_efficient
from vit_efficient.report.parts import explanation, model_title
from vit_efficient.report.runs import Entry
from vit_efficient.train import Config
from vit_efficient.utils.files import write_json

pytestmark = pytest.mark.once


def test_how_many_images_were_skipped(tmp_path):
    result = {'val_images': 9, 'environment': {}}
    configs = [Config(output=str(tmp_path / str(seed))) for seed in (0, 1)]
    for config, skipped in zip(configs, ({}, {'train_skipped': 3, 'val_skipped': 4}), strict=True):
        write_json(Path(config.output) / 'result.json', skipped | result)
    text = explanation([Entry(tmp_path, configs)])
    assert 'A run skipped up to 3 training and 4 validation images that cannot be read. ' in text
    assert 'skipped' not in explanation([Entry(tmp_path, configs[:1])])


SMALL = dict(img_size=32, patch_size=8, embed_dim=16, num_heads=2, depth=4)


@pytest.mark.parametrize(
    'name, arguments, stages, title',
    [
        ('vit_dct_tiny', {}, [], 'vit_dct_tiny'),
        ('vit_tiny_patch16_224', {}, [], 'vit_tiny_patch16_224'),
        ('vit_tiny_patch16_224', {}, [('dct', None)], 'vit_tiny_patch16_224 → dct'),
        ('vit_tiny_patch16_224', {}, [('dct', [2, 3])], 'vit_tiny_patch16_224 → dct in 2-3'),
        ('vit_dct_tiny', {}, [('full', None)], 'vit_dct_tiny → full'),
        ('vit_full_tiny', {}, [('pool', [0, 1, 3]), ('dct', [2])], 'vit_full_tiny → pool in 0-1, 3, dct in 2'),
        ('vit_full_tiny', {'attention': 'dct'}, [], 'vit_full_tiny → dct'),
        ('vit_converted', {'base': 'deit_tiny_patch16_224', 'attention': 'dct'}, [], 'deit_tiny_patch16_224 → dct'),
    ],
)
def test_what_a_model_has_become(name, arguments, stages, title, tmp_path):
    """By the name of its recipe, and of a folder, which says nothing of it."""
    model = timm.create_model(name, **SMALL, **arguments)
    for attention, layers in stages:
        vit_efficient.convert(model, attention, layers)
    vit_efficient.save_model(model, tmp_path)
    for called in (name, f'local-dir:{tmp_path}'):
        assert model_title(called, timm.create_model(f'local-dir:{tmp_path}', pretrained=True)) == title


def test_a_model_that_is_no_vision_transformer():
    assert model_title('resnet18', timm.create_model('resnet18')) == 'resnet18'
