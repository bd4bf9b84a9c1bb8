"""What works without the optional packages, and what is said where one of them is needed."""

import subprocess
import sys

import pytest

WITHOUT_TRAIN = r"""
import io, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('albumentations', 'cv2', 'matplotlib', 'omegaconf', 'tensorboard', 'tifffile'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Missing())

import timm
import torch
from PIL import Image

import vit_efficient
from vit_efficient_cli import main

model = timm.create_model('vit_tiny_patch16_224', img_size=64)
vit_efficient.convert(model, 'dct')
vit_efficient.save_model(model, 'folder')
model = timm.create_model('local-dir:folder', pretrained=True)
assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
assert vit_efficient.count_flops(model, input_size=(3, 64, 64)).total > 0
assert main(['table', 'flops', '--models', 'vit_dct_tiny', '--img-sizes', '64']) == 0
layer = ['benchmark', 'layer', '--attentions', 'dct', '--tokens', '16', '--dim', '16', '--heads', '2', '--rounds', '1']
assert main([*layer, '--no-memory']) == 0
Image.new('RGB', (8, 8)).save('image.png')
Image.new('I;16', (8, 8)).save('image.tif')
open('recipe.yaml', 'w').write('model: {name: vit_dct_tiny}')
for command in (
    ['train', 'recipe.yaml'],
    ['truncate', 'image.png'],
    ['truncate', 'image.tif'],
    [*layer, '--out', 'table.md'],
):
    assert main(command) == 2
for name in ('TrainTransform', 'DctTruncate', 'MegapixelMnist'):
    try:
        getattr(vit_efficient.data, name)
    except ImportError as error:
        print(error, file=sys.stderr)
"""


@pytest.fixture(scope='module')
def said(tmp_path_factory):
    command = [sys.executable, '-c', WITHOUT_TRAIN]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path_factory.mktemp('without'))
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if 'pip install' in line]


def test_the_extra_is_named_by_what_needs_it(said):
    expected = [
        ('vit-efficient train: error: recipes are read with', 'omegaconf'),
        ('vit-efficient truncate: error: plots are drawn with', 'matplotlib'),
        ('vit-efficient truncate: error: image.tif: TIFFs are read by', 'tifffile'),
        ('vit-efficient benchmark: error: the plot beside --out is drawn with', 'matplotlib'),
        ('images are augmented by', 'albumentations'),
        ('images are augmented by', 'albumentations'),
        ('canvases are drawn with', 'albumentations'),
    ]
    how = "package, which is not installed: pip install 'vit-efficient[train]'"
    assert said == [f'{purpose} the {package} {how}' for purpose, package in expected]
