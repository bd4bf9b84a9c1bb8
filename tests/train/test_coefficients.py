"""From the file to the weights without pixels: a model of coefficients trained on JPEGs, against the one of pixels."""

import pytest
import timm
import torch
from PIL import Image
from skimage import data as photographs

from vit_efficient.data import Preprocessing, create_dataset, eval_input, to_array
from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.train import load_model, train
from vit_efficient.train.config import Config, ModelConfig, SchedConfig, StageConfig
from vit_efficient_cli import main

ARGS = dict(img_size=[96, 128], patch_size=16, embed_dim=24, depth=2, num_heads=2)
CUT = dict(patch_embed='dct', patch_keep=[8, 4, 4], patch_color='ycbcr')


@pytest.fixture(scope='module')
def jpegs(tmp_path_factory):
    """Crops of two photographs as classes, with odd sizes and chroma of half the resolution."""
    root = tmp_path_factory.mktemp('jpegs')
    for split, count in (('train', 8), ('val', 4)):
        for name in ('astronaut', 'coffee'):
            (root / split / name).mkdir(parents=True)
            image = Image.fromarray(getattr(photographs, name)())
            for i in range(count):
                left, top = 10 * i, 7 * i
                crop = image.crop((left, top, left + 150 + i, top + 117 + i))
                crop.save(root / split / name / f'{i}.jpg', quality=80 + i, subsampling=2)
    return root


def recipe(jpegs, output, **model):
    augment = AugmentConfig(crop_scale=None, color_jitter=0.0, rand_ops=0, erasing=0.0)
    return Config(
        model=ModelConfig('vit_full_tiny', {**ARGS, **CUT, **model}),
        data=DataConfig(
            train=f'{jpegs}/train',
            val=f'{jpegs}/val',
            batch_size=4,
            workers=0,
            decode='coefficients',
            augment=augment,
        ),
        sched=SchedConfig(epochs=2, warmup_epochs=0),
        output=str(output),
        device='cpu',
        threads=1,
    )


def test_trains_evaluates_and_agrees_with_pixels(jpegs, tmp_path, capsys):
    result = train(recipe(jpegs, tmp_path / 'run', patch_input='coefficients'))
    assert result['val_images'] == 8
    model = load_model(tmp_path / 'run').eval()
    assert model.patch_embed.input == 'coefficients' and model.patch_embed.keep == (8, 8)
    assert main(['evaluate', str(tmp_path / 'run'), '--data', f'{jpegs}/val']) == 0
    assert f'{result["top1"]:.2f}' in capsys.readouterr().out

    pixels = timm.create_model('vit_full_tiny', **ARGS, **CUT, num_classes=2).eval()
    pixels.load_state_dict(model.state_dict())
    preprocessing = Preprocessing.of(model)
    dataset, transform = eval_input(create_dataset(f'{jpegs}/val'), model, preprocessing, 'coefficients')
    for index in range(len(dataset)):
        y = transform(dataset[index][0])
        assert y.shape == (3, 48, 64)
        image = to_array(create_dataset(f'{jpegs}/val')[index][0], 3)
        rows, columns = image.shape[0] // 16, image.shape[1] // 16
        top, left = 16 * ((rows - 6) // 2), 16 * ((columns - 8) // 2)
        crop = torch.tensor(image[top : top + 96, left : left + 128]).permute(2, 0, 1) / 255
        x = (crop - torch.tensor(preprocessing.mean)[:, None, None]) / torch.tensor(preprocessing.std)[:, None, None]
        of_pixels, of_coefficients = pixels.patch_embed(x[None]), model.patch_embed(y[None])
        # libjpeg rounds, clamps and interpolates chroma, of which 4 × 4 coefficients see little.
        assert (of_pixels - of_coefficients).norm() < 0.03 * of_pixels.norm()


def test_the_input_must_be_what_the_model_takes(jpegs, tmp_path):
    with pytest.raises(ValueError, match='data.decode=coefficients needs a model'):
        train(recipe(jpegs, tmp_path / 'run'))
    config = recipe(jpegs, tmp_path / 'run', patch_input='coefficients')
    config.data.decode = 'pixels'
    with pytest.raises(ValueError, match='data.decode=pixels gives pixels'):
        train(config)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('stages', [[], [StageConfig(1), StageConfig(1, freeze=True)]])
def test_a_learned_cut_is_read_off_the_files(jpegs, tmp_path, stages):
    config = recipe(jpegs, tmp_path / 'run', patch_input='coefficients', patch_window=True)
    config.truncation.penalty, config.optim.lr, config.stages = 10.0, 0.2, stages
    train(config)
    model = load_model(tmp_path / 'run').eval()
    assert model.patch_embed.keep < (8, 8)
    assert main(['evaluate', str(tmp_path / 'run'), '--data', f'{jpegs}/val']) == 0
    f, g = model.patch_embed.keep
    assert model(torch.zeros(1, 3, 6 * f, 8 * g)).shape == (1, 2)
