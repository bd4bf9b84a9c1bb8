"""Masks of images: whole and by tiles, what is written, and how a call goes on."""

import json
import math
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image
from torch import nn

from tests.data.trees import pixels, write_masks
from tests.train.test_masks import head_recipe
from tests.train.test_tasks import slow_resize
from vit_efficient import DenseModel, prediction, prediction_costs, save_model
from vit_efficient.benchmark.live_memory import LiveMemory
from vit_efficient.data import Preprocessing, to_array
from vit_efficient.data.files.frames import Frame, Windows, read_frame
from vit_efficient.data.files.mask_files import palette
from vit_efficient.data.files.masks import read_mask
from vit_efficient.prediction import SETTINGS, Predictor, list_images, open_predictor
from vit_efficient.prediction_costs import Growth, duration
from vit_efficient.train import train
from vit_efficient.train.tasks import Task
from vit_efficient.train.tiles import Tiled, tile_starts
from vit_efficient.utils.options import parse_bytes
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
    shown = np.asarray(prediction.overlay(image, classes)).astype(float)
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
    assert 'holds masks of other settings (tile was None, is 8, overlap was None, is 0.25)' in capsys.readouterr().err
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


# --- large images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['tif', 'npy', 'jpg'])
def test_tiles_read_parts_of_the_image(run, tmp_path, monkeypatch, kind):
    """The mask is that of the image that is read whole; of a TIFF it is one, and keeps what says where it lies."""
    image, geo = pixels(0, (61, 90, 3)), (33550, 12, 3, (0.5, 0.5, 0.0))
    path = tmp_path / f'large.{kind}'
    if kind == 'tif':
        tifffile.imwrite(path, image, photometric='rgb', tile=(16, 16), extratags=[(*geo, True)], metadata=None)
    elif kind == 'npy':
        np.save(path, image)
    else:
        pytest.importorskip('pyvips')
        Image.fromarray(image).save(path)
    whole = Windows.whole(path)
    predictor, _ = open_predictor(run / 'run', 0.5, device='cpu')
    expected = predictor.classes(whole, 16)
    seen = []
    call = Windows.__call__
    monkeypatch.setattr(Windows, '__call__', lambda self, *part: seen.append(part) or call(self, *part))
    options = ['--tile', '16', '--overlap', '1/2', '--out', str(tmp_path / 'out'), '--device', 'cpu']
    assert main(['predict', str(run / 'run'), str(path), *options]) == 0
    assert len(seen) > 40 and max(height * width for _, _, height, width in seen) == 16 * 16
    mask = tmp_path / f'out/masks/large.{"tif" if kind == "tif" else "png"}'
    assert np.array_equal(read_mask(mask), expected)
    if kind == 'tif':
        assert read_frame(mask).geo == (geo,)


def test_masks_of_either_format(run, tmp_path):
    for kind in ('png', 'tif'):
        assert predict(run, tmp_path / kind, '--format', kind) == 0
    ours, theirs = (sorted((tmp_path / kind / 'masks').iterdir()) for kind in ('png', 'tif'))
    assert {path.suffix for path in theirs} == {'.tif'}
    assert all(np.array_equal(read_mask(a), read_mask(b)) for a, b in zip(ours, theirs, strict=True))


def test_growth():
    for linear, square in ((3.0, 0.0), (0.0, 2.0), (5.0, 0.25)):
        small, large = ((n, linear * n + square * n**2) for n in (10, 40))
        growth = Growth.through(small, large)
        assert (growth.linear, growth.square) == pytest.approx((linear, square))
        assert growth(1000) == pytest.approx(linear * 1000 + square * 1e6)
    assert Growth.through((10, 20.0), (40, 60.0)) == Growth(2.0, 0.0)  # what sinks is never below zero
    assert Growth.through((10, 1.0), (40, 40.0)).linear == 0


def test_live_memory():
    with LiveMemory() as memory:
        a = torch.ones(1000)
        b = (a + 1) * 2  # one of them is gone
        b.view(10, 100).add_(1)
        del a
        torch.zeros(100)
    assert memory.peak == 4 * 3000
    with LiveMemory() as memory:
        b.add_(1)
    assert memory.peak == 0


def test_memory_of_masks(tmp_path, monkeypatch):
    """What is foretold is near what tensors take, for exact attention and for less, whole and by tiles."""
    for options in ({}, {'attention': 'dct', 'attention_kwargs': {'keep_ratio': 1 / 16, 'place': 'block'}}):
        name = 'vit_full_tiny' if not options else 'vit_dct_tiny'
        backbone = timm.create_model(name, img_size=64, dynamic_img_size=True, depth=2, **options)
        model = DenseModel(backbone, 'multilayer', 5, width=32, layers=[0, 1]).eval()
        task = Task('segmentation', of_pixels=True, patch_size=(16, 16))
        predictor = Predictor(model, task, Preprocessing.of(model), torch.device('cpu'))
        costs = prediction_costs.Costs(predictor)
        image = np.zeros((1600, 2000, 3), np.uint8)
        for tile in (None, 512):
            with LiveMemory() as memory:
                predictor.logits(Windows.of(image), tile)
            seen = (1600, 2000) if tile is None else (512, 512)
            foretold = costs.forward(costs.patches(seen))
            if tile:
                foretold += 2 * 4 * costs.classes * costs.fine * costs.patches((1600, 2000))
            assert 0.9 * memory.peak < foretold < 1.5 * memory.peak
        frame = Frame(1600, 2000, 3)
        whole, tiled, parts = (costs.bytes(frame, *how) for how in ((None, None), (512, None), (512, 0)))
        assert costs.resident < parts < tiled <= whole
        assert parts == pytest.approx(tiled - 1.2 * 2 * image.nbytes, rel=1e-6)


def test_a_limit_of_memory(run, tmp_path, monkeypatch, capsys):
    """An image that takes more is refused before it is decoded, and the tile that is named stays within the limit."""
    size = 4000, 6000
    path = tmp_path / 'large.npy'
    np.lib.format.open_memmap(path, 'w+', np.uint8, (*size, 3)).flush()
    monkeypatch.setattr(prediction_costs, 'resident_of_its_own', lambda: 0)
    command = ['predict', str(run / 'run'), str(path), '--out', str(tmp_path / 'out'), '--device', 'cpu']
    with monkeypatch.context() as patch:
        patch.setattr(Windows, 'whole', None)
        assert main([*command, '--memory', '2GB']) == 2
    said = capsys.readouterr().err
    found = re.search(
        r'6000 × 4000 px whole take about [\d.]+ GiB of memory, and --memory is 1\.86 GiB; --tile (\d+)', said
    )
    predictor, _ = open_predictor(run / 'run', device='cpu')
    costs, frame = prediction_costs.Costs(predictor), Frame(*size, 3)
    assert costs.bytes(frame, int(found[1]), 0) <= 2e9 < costs.bytes(frame, None)
    assert costs.tile_within(path, frame, 'auto', 0, int(2e9)) == int(found[1])
    assert costs.tile_within(path, frame, 'auto', 0, int(4e12)) is None
    with pytest.raises(ValueError, match='by tiles of 512 px take about .* no tile stays within it'):
        costs.tile_within(path, frame, 512, 0, 1000)
    assert main([*command, '--memory', '1']) == 2 and 'no tile stays within it' in capsys.readouterr().err
    assert not list((tmp_path / 'out').rglob('masks/*'))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--tile', 'auto'], '--tile auto takes the largest tile within a limit; set --memory'),
        (['--tile', '7'], 'tile=7 must be a multiple of the patches; use 6 or 8'),
        (['--tile', 'wide'], "--tile must be a positive integer, got --tile='wide'"),
        (['--memory', 'much'], "--memory must be a size such as 4GB or 512MiB, got 'much'"),
        (['--tile', 'null'], '--tile must be a positive integer, got --tile=None'),
        (['--overlap', '7'], 'overlap must be at least 0 and below 1, got overlap=7'),
        (['--memory', '0.4'], "--memory must be a size such as 4GB or 512MiB, got '0.4'"),
        (['--memory', '9' * 320], '--memory must be a size such as 4GB or 512MiB'),
        (['--memory', '0GB'], "--memory must be a size such as 4GB or 512MiB, got '0GB'"),
    ],
)
def test_limits_that_do_not_fit(run, tmp_path, capsys, options, message):
    assert predict(run, tmp_path / 'out', *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_tiles_within_a_limit(run, tmp_path, capsys):
    assert predict(run, tmp_path / 'out', '--tile', 'auto', '--memory', '64GB') == 0
    assert capsys.readouterr().err.count('.jpg: whole') == 5
    assert predict(run, tmp_path / 'whole') == 0
    masks = [sorted((tmp_path / name / 'masks').iterdir()) for name in ('out', 'whole')]
    assert all(np.array_equal(read_mask(a), read_mask(b)) for a, b in zip(*masks, strict=True))


def test_long_images_are_told_of(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prediction, '_LARGE', 10)
    monkeypatch.setattr(prediction, '_LONG', 0)
    assert predict(run, tmp_path / 'out') == 0
    assert re.search(r'0\.jpg: \d+ patches, whole: about \d+ s; --tile takes less', capsys.readouterr().err)
    assert [duration(seconds) for seconds in (12, 600, 9000)] == ['12 s', '10 min', '2.5 h']


def test_sizes_in_bytes():
    for text, expected in (('1GB', 10**9), ('1.5 GiB', 3 * 2**29), ('512', 512), ('2kb', 2000), ('3MiB', 3 * 2**20)):
        assert parse_bytes('--memory', text) == expected


@pytest.mark.parametrize('kind', ['cut.jpg', 'cut.png', 'deflated.tif', 'plain.tif'])
def test_damage_that_shows_in_a_part_is_skipped_too(run, tmp_path, capsys, kind):
    folder = tmp_path / 'images'
    folder.mkdir()
    image = pixels(0, (64, 80, 3))
    if kind.endswith('tif'):
        options = dict(compression='zlib') if kind == 'deflated.tif' else {}
        tifffile.imwrite(folder / kind, image, photometric='rgb', tile=(16, 16), **options)
    else:
        pytest.importorskip('pyvips')
        Image.fromarray(image).save(folder / kind)
    content = (folder / kind).read_bytes()
    middle = len(content) // 2
    (folder / kind).write_bytes(content[:middle] if 'cut' in kind or 'plain' in kind else content[:middle] + bytes(200))
    Image.fromarray(image).save(folder / 'z.png')
    command = [
        'predict',
        str(run / 'run'),
        str(folder),
        '--out',
        str(tmp_path / 'out'),
        '--device',
        'cpu',
        '--tile',
        '8',
    ]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and f'{folder / kind}: not a readable image' in said and '--on-error skip' in said
    assert main([*command, '--on-error', 'skip']) == 0
    assert '1 of 2 masks written' in capsys.readouterr().out
    assert [path.name for path in (tmp_path / 'out/masks').iterdir()] == ['z.png']


def test_masks_are_not_taken_for_those_of_other_images(run, tmp_path, capsys):
    for name, seed in (('a', 0), ('b', 1)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels(seed, (20, 24, 3))).save(tmp_path / name / '0.png')
    command = ['predict', str(run / 'run'), '--out', str(tmp_path / 'out'), '--device', 'cpu']
    assert main([*command, str(tmp_path / 'a')]) == 0
    assert main([*command, str(tmp_path / 'b')]) == 2
    said = capsys.readouterr().err
    assert f'out/masks/0.png: is the mask of another image than {tmp_path / "b/0.png"}; remove it, or name' in said
    (tmp_path / 'out/masks/0.png').unlink()
    assert main([*command, str(tmp_path / 'b')]) == 0
    assert main([*command, str(tmp_path / 'b')]) == 0 and '1 were there' in capsys.readouterr().out


def test_masks_are_not_taken_for_those_of_another_preprocessing(run, tmp_path, capsys):
    shutil.copytree(run / 'run', tmp_path / 'run')
    images = [str(run / 'data/val/images'), '--out', str(tmp_path / 'out'), '--device', 'cpu']
    assert main(['predict', str(tmp_path / 'run'), *images]) == 0
    path = tmp_path / 'run/model/config.json'
    config = json.loads(path.read_text())
    config['pretrained_cfg']['mean'] = [0.0, 0.0, 0.0]
    path.write_text(json.dumps(config))
    assert main(['predict', str(tmp_path / 'run'), *images]) == 2
    assert 'holds masks of other settings (model was ' in capsys.readouterr().err


def test_what_a_refusal_names_can_be_done_in_the_same_folder(run, tmp_path, capsys):
    assert predict(run, tmp_path / 'out', '--memory', '1MB') == 2
    assert 'no tile stays within it' in capsys.readouterr().err
    assert predict(run, tmp_path / 'out', '--tile', '8') == 0


def test_masks_are_not_predicted_of_masks(run, tmp_path, capsys):
    images = write_masks(tmp_path / 'data', 3) / 'images'
    command = ['predict', str(run / 'run'), str(images), '--out', str(images / 'found'), '--device', 'cpu']
    assert main(command) == main(command) == 0
    assert '0 of 3 masks written' in capsys.readouterr().out
