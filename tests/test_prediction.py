"""Masks of images: whole and by tiles, what is written, and how a call goes on."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.data.trees import pixels, write_masks
from tests.train.test_masks import head_recipe
from tests.train.test_tasks import slow_resize
from vit_efficient import DenseModel, prediction, save_model
from vit_efficient.data import Preprocessing, to_array
from vit_efficient.data.files.frames import Windows
from vit_efficient.data.files.mask_files import palette
from vit_efficient.prediction import SETTINGS, Predictor, list_images, open_predictor
from vit_efficient.train import train
from vit_efficient.train.tasks import Task
from vit_efficient.train.tiles import Tiled, tile_starts
from vit_efficient_cli import main


@pytest.mark.parametrize('length', range(1, 40))
@pytest.mark.parametrize(('tile', 'overlap'), [(1, 0), (4, 0), (4, 1), (4, 3), (7, 2), (40, 10)])
def test_tiles_cover_a_length(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert starts[-1] + min(tile, length) == length
    assert all(after - before <= tile - overlap for before, after in pairwise(starts))
    assert len(starts) == max(1, math.ceil((length - overlap) / (tile - overlap)))


class OfPatches(nn.Module):
    """Logits of each patch alone: a convolution whose steps are patches; `fine` × `fine` to each."""

    def __init__(self, fine):
        super().__init__()
        self.embed, self.fine = nn.Conv2d(3, 5 * fine**2, 4, 4).double(), nn.PixelShuffle(fine)
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        return self.fine(self.embed(x))


TASK = Task('segmentation', of_pixels=True, patch_size=(4, 4))


@pytest.mark.parametrize('size', [(16, 16), (28, 52), (4, 40), (60, 8)])
@pytest.mark.parametrize(('tile', 'overlap'), [(4, 0), (8, 0.25), (16, 0), (16, 0.5), (20, 0.9), (64, 0.25)])
@pytest.mark.parametrize('fine', [1, 2])
def test_where_patches_do_not_meet_tiles_change_nothing(size, tile, overlap, fine):
    model = OfPatches(fine)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = model(x)
    model.sizes.clear()
    found = Tiled(model, TASK, tile, overlap)(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert set(model.sizes) == {tuple(min(side, tile) for side in size)}


def test_seams_are_blended():
    """Against a loop: each cell is the mean of the tiles that have it, by their distance to the tile's edge."""

    class OfTiles(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))[:, :, None, None].expand(-1, -1, x.shape[2] // 4, x.shape[3] // 4)

    x = torch.randn(1, 3, 40, 12, dtype=torch.float64)
    found = Tiled(OfTiles(), TASK, 16, 0.5)(x)
    starts, tile, shared = tile_starts(10, 4, 2), 4, 2
    for row in range(10):
        total, weights = 0.0, 0.0
        for start in starts:
            if start <= row < start + tile:
                near = min(row - start + 1, start + tile - row)
                weight = min(1.0, near / (shared + 1))
                total = total + weight * x[0, :, 4 * start : 4 * (start + tile)].mean((1, 2))
                weights += weight
        assert torch.allclose(found[0, :, row], (total / weights)[:, None].expand(-1, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ((6, 0.25), 'tile=6 must be a multiple of the patches; use 4 or 8'),
        ((0, 0.25), 'tile must be a positive integer, got tile=0'),
        ((8, 1), 'overlap must be at least 0 and below 1, got overlap=1'),
        ((8, -0.5), 'overlap must be at least 0 and below 1, got overlap=-0.5'),
    ],
)
def test_tiles_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Tiled(OfPatches(1), TASK, *options)


@pytest.mark.parametrize('size', [(16, 16), (17, 30), (5, 3)])
def test_classes_of_pixels(size):
    backbone = timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=4, depth=1, dynamic_img_size=True)
    model = DenseModel(backbone, 'linear', 4).eval()
    preprocessing = Preprocessing.of(model)
    predictor = Predictor(model, TASK, preprocessing, torch.device('cpu'))
    image = pixels(0, (*size, 3))
    found = predictor.classes(Windows.of(image))
    assert found.shape == size and found.dtype == np.uint8
    padded = np.pad(image, [(0, -size[0] % 4), (0, -size[1] % 4), (0, 0)], 'edge')
    with torch.no_grad():
        x = torch.from_numpy(padded).permute(2, 0, 1)[None] / 255
        logits = model(
            (x - torch.tensor(preprocessing.mean)[:, None, None]) / torch.tensor(preprocessing.std)[:, None, None]
        )
    maps = [np.array(slow_resize(one.tolist(), *padded.shape[:2]))[: size[0], : size[1]] for one in logits[0]]
    assert (found == np.argmax(maps, 0)).mean() > 0.99  # where two are equal but for rounding
    shares = torch.cat([strip for _, strip in predictor.shares(predictor.logits(Windows.of(image)), size)], 1)
    assert torch.allclose(shares.sum(0), torch.ones(size)) and shares.shape == (4, *size)


def test_colours_are_those_of_pascal_voc():
    assert palette(4) == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert palette(16)[-3:] == [192, 128, 128] and len(set(zip(*[iter(palette(256))] * 3, strict=True))) == 256


def test_images_and_their_names(tmp_path):
    for name in ('a/10.png', 'a/2.png', 'a/b/c.png', 'a/.hidden.png', 'd.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    jobs = list_images([tmp_path / 'a', tmp_path / 'd.png'])
    assert [job.name for job in jobs] == ['2', '10', 'b/c', 'd']
    assert jobs[3].path == tmp_path / 'd.png'
    assert list_images([tmp_path / 'd.png', tmp_path / 'd.png']) == jobs[3:]
    Image.new('RGB', (8, 8)).save(tmp_path / 'a/b/d.png')
    with pytest.raises(ValueError, match=r'd\.png: .*d\.png has the same name, and so would its mask'):
        list_images([tmp_path / 'a/b', tmp_path / 'd.png'])
    with pytest.raises(ValueError, match='nowhere: no such image or folder of images'):
        list_images([tmp_path / 'nowhere'])
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='empty: no image in it'):
        list_images([tmp_path / 'empty'])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    config = head_recipe(folder / 'data', folder / 'run')
    config.sched.epochs, config.eval_every = 1, 1
    train(config)
    return folder


def predict(run, out, *more):
    return main(
        ['predict', str(run / 'run'), str(run / 'data/val/images'), '--out', str(out), '--device', 'cpu', *more]
    )


def test_masks_overlays_and_probabilities(run, tmp_path, capsys):
    assert predict(run, tmp_path / 'out', '--overlays', '--probabilities') == 0
    assert f'5 of 5 masks written to {tmp_path / "out/masks"}\n' in capsys.readouterr().out
    predictor, _ = open_predictor(run / 'run', device='cpu')
    for name in ('0', '1', '2', '10', '11'):
        image = Image.open(run / f'data/val/images/{name}.jpg')
        mask = Image.open(tmp_path / f'out/masks/{name}.png')
        assert mask.mode == 'P' and mask.size == image.size and mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
        assert np.array_equal(mask, predictor.classes(Windows.of(to_array(image, 3))))
        shares = np.load(tmp_path / f'out/probabilities/{name}.npy')
        assert shares.shape == (3, *image.size[::-1]) and shares.dtype == np.float16
        assert np.allclose(shares.sum(0, dtype=np.float32), 1, atol=2e-3)
        assert Image.open(tmp_path / f'out/overlays/{name}.jpg').size == image.size


@pytest.mark.parametrize('channels', [1, 3, 5])
@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
def test_overlays(channels, dtype):
    image, classes = pixels(0, (5, 7, channels), dtype), pixels(1, (5, 7), 'uint8') % 3
    shown = np.asarray(prediction._overlay(image, classes)).astype(float)
    colours = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]])[classes]
    own = (image if dtype == 'uint8' else 255 * image)[..., [0, 1, 2] if channels > 1 else [0, 0, 0]]
    expected = np.where(classes[..., None] > 0, own / 2 + colours / 2, own)
    assert abs(shown - expected).max() <= 1


def test_by_tiles(run, tmp_path):
    assert predict(run, tmp_path / 'whole') == predict(run, tmp_path / 'one', '--tile', '64') == 0
    assert predict(run, tmp_path / 'tiles', '--tile', '8', '--overlap', '1/2') == 0
    whole, one, tiles = (
        [np.asarray(Image.open(path)) for path in sorted((tmp_path / n).glob('masks/*'))]
        for n in ('whole', 'one', 'tiles')
    )
    assert all(map(np.array_equal, whole, one))
    assert len(tiles) == 5 and all(a.shape == b.shape for a, b in zip(whole, tiles, strict=True))


def test_evaluation_by_tiles(run, capsys):
    said = []
    for more in ([], ['--tile', '64'], ['--tile', '8', '--overlap', '1/2']):
        command = ['evaluate', str(run / 'run'), '--data', str(run / 'data/val'), '--device', 'cpu']
        assert main([*command, *more]) == 0
        said.append(capsys.readouterr().out.partition(' on 5 images')[0])
    assert said[0] == said[1] != said[2]
    assert main([*command, '--tile', '7']) == 2
    assert 'tile=7 must be a multiple of the patches; use 6 or 8' in capsys.readouterr().err


def test_goes_on_where_it_stopped(run, tmp_path, capsys, monkeypatch):
    written, write = [], prediction.write_mask

    def stop(path, *arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prediction, 'write_mask', stop)
        assert predict(run, tmp_path / 'out') == 130
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in written}
    assert predict(run, tmp_path / 'out') == 0
    assert '3 of 5 masks written' in (said := capsys.readouterr().out) and '2 were there' in said
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(list((tmp_path / 'out/masks').iterdir())) == 5


def test_masks_of_other_settings_are_not_mixed(run, tmp_path, capsys):
    assert predict(run, tmp_path / 'out') == 0
    assert predict(run, tmp_path / 'out', '--tile', '8') == 2
    assert 'holds masks of other settings (overlap was None, is 0.25, tile was None, is 8)' in capsys.readouterr().err
    (tmp_path / 'out' / SETTINGS).write_text('[1]')
    assert predict(run, tmp_path / 'out') == 2
    assert 'is not what `vit-efficient predict` writes' in capsys.readouterr().err
    (tmp_path / 'out' / SETTINGS).unlink()
    assert predict(run, tmp_path / 'out') == 2
    assert 'holds masks, and does not say of which model' in capsys.readouterr().err


def test_images_that_cannot_be_read(run, tmp_path, capsys):
    images = write_masks(tmp_path / 'data', 3) / 'images'
    (images / '1.jpg').write_bytes(b'no image')
    command = ['predict', str(run / 'run'), str(images), '--out', str(tmp_path / 'out'), '--device', 'cpu']
    assert main(command) == 2
    assert f'{images}/1.jpg: not a readable image (unknown format); --on-error skip goes on' in capsys.readouterr().err
    assert main([*command, '--on-error', 'skip']) == 0
    said = capsys.readouterr()
    assert '1 cannot be read' in said.out and f'skipped: {images}/1.jpg: not a readable image' in said.err
    assert sorted(path.name for path in (tmp_path / 'out/masks').iterdir()) == ['0.png', '2.png']


def test_images_that_do_not_fit_are_never_skipped(run, tmp_path, capsys):
    np.save(tmp_path / 'five.npy', pixels(0, (8, 9, 5)))
    command = [
        'predict',
        str(run / 'run'),
        str(tmp_path / 'five.npy'),
        '--out',
        str(tmp_path / 'out'),
        '--device',
        'cpu',
    ]
    assert main([*command, '--on-error', 'skip']) == 2
    assert 'five.npy: it has 5 channels, the model takes 3' in capsys.readouterr().err


def test_models_that_tell_no_pixels(tmp_path, capsys):
    save_model(timm.create_model('vit_tiny_patch16_224', depth=1, embed_dim=12, num_heads=1), tmp_path / 'model')
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    assert main(['predict', str(tmp_path / 'model'), str(tmp_path / 'a.png'), '--out', str(tmp_path / 'out')]) == 2
    assert 'it was trained for task=classification; masks are of models of segmentation' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_a_model_folder_of_many_classes(tmp_path):
    backbone = timm.create_model(
        'vit_tiny_patch16_224', img_size=16, patch_size=4, depth=1, embed_dim=12, num_heads=1, dynamic_img_size=True
    )
    save_model(DenseModel(backbone, 'linear', 300), tmp_path / 'model')
    Image.fromarray(pixels(0, (9, 7, 3))).save(tmp_path / 'a.png')
    command = ['predict', str(tmp_path / 'model'), str(tmp_path / 'a.png'), '--out', str(tmp_path / 'out')]
    assert main([*command, '--device', 'cpu', '--overlays']) == 0
    assert np.asarray(Image.open(tmp_path / 'out/masks/a.png')).dtype == np.uint16
    assert json.loads((tmp_path / 'out' / SETTINGS).read_text())['tile'] is None
