"""The data section of a recipe: each source of images trains, and a run that goes on ends as an uninterrupted one."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from tests.data.shards import write_saved, write_shards
from tests.data.trees import READABLE, UNREADABLE, write_odd_files
from tests.train.recipes import TINY, tiny_recipe, train_on_one_and_two_processes
from tests.train.test_trainer import assert_same_run, fail, same
from vit_efficient.data import SizeConfig
from vit_efficient.train import experiment, train
from vit_efficient.train.checkpoint import load_checkpoint
from vit_efficient.train.config import LossConfig
from vit_efficient.train.recipe import load_recipe, to_yaml
from vit_efficient.train.trainer import Trainer
from vit_efficient_cli import main

SKIMAGE = ('astronaut', 'chelsea', 'coffee')


@pytest.fixture(scope='module', autouse=True)
def own_caches(tmp_path_factory):
    """Neither the index of shards nor what `datasets` prepares goes to the user's folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """Three classes, each of pieces of a photograph of scikit-image: eight to train, two to validate."""
    from skimage import data

    root = tmp_path_factory.mktemp('photographs')
    for name in SKIMAGE:
        image = getattr(data, name)()
        for number in range(10):
            folder = root / ('train' if number < 8 else 'val') / name
            folder.mkdir(parents=True, exist_ok=True)
            top, left = 24 * number, 40 * number % 300
            Image.fromarray(image[top : top + 40, left : left + 48]).save(folder / f'{number}.jpg', quality=95)
    return root


@pytest.fixture(scope='module')
def odd(photographs, tmp_path_factory):
    """The same, and seven odd files in one class of each split."""
    root = tmp_path_factory.mktemp('odd')
    for file in photographs.glob('*/*/*'):
        target = root / file.relative_to(photographs)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    for split in ('train', 'val'):
        write_odd_files(root / split / SKIMAGE[0])
    return root


def folder_of(tree, _):
    return {'train': f'{tree}/train', 'val': f'{tree}/val'}


def shards_of(tree, folder):
    train, val = (write_shards(tree / split, folder, split) for split in ('train', 'val'))
    return {'train': train, 'val': val, 'args': {'classes': list(SKIMAGE)}}


def mixed_shards_of(tree, folder):
    return {**shards_of(tree, folder), 'mixed_shards': 2}


def saved_of(tree, folder):
    for split in ('train', 'val'):
        write_saved(tree / split, folder / split)
    return {'train': 'train', 'val': 'val', 'dataset': f'hfds/{folder}'}


def parquet_of(tree, folder):
    import datasets

    files = {}
    for split in ('train', 'val'):
        files[split] = f'{folder}/{split}.parquet'
        datasets.load_from_disk(str(write_saved(tree / split, folder / split))).to_parquet(files[split])
    names = {'train': 'train', 'val': 'val', 'dataset': 'hfds/parquet', 'root': f'{folder}/cache'}
    return {**names, 'args': {'data_files': files}}


def images_of(tree, folder):
    return {'train': 'train', 'val': 'validation', 'dataset': f'hfds/{tree}', 'root': f'{folder}/cache'}


def timm_of(tree, _):
    return {'train': 'train', 'val': 'val', 'dataset': 'folder', 'root': str(tree)}


def tar_of(tree, folder):
    import tarfile

    folder.mkdir()
    for split in ('train', 'val'):
        with tarfile.open(folder / f'{split}.tar', 'w') as archive:
            for file in sorted((tree / split).glob('*/*')):
                archive.add(file, file.relative_to(tree / split))
    return {'train': 'train.tar', 'val': 'val.tar', 'dataset': 'tar', 'root': str(folder)}


SOURCES = [folder_of, shards_of, mixed_shards_of, saved_of, parquet_of, images_of, timm_of, tar_of]


@pytest.fixture(params=SOURCES, ids=lambda make: make.__name__.removesuffix('_of'))
def source(request):
    return request.param


def recipe(options, output, **others):
    config = tiny_recipe('', output, checkpoint_steps=1, **others)
    for key, value in options.items():
        setattr(config.data, key, value)
    return config


def stop_and_go_on(options, tmp_path, monkeypatch, stop, change=lambda config: None, **others):
    """Two runs, one of which is stopped mid-epoch and goes on with other numbers of loader processes."""

    def changed(name, **more):
        config = recipe(options, tmp_path / name, **others, **more)
        change(config)
        return config

    order = {'whole': [], 'parts': []}
    update = Trainer.update

    def recorded(self, chunk):
        name = self.folder.path.name
        if name == 'parts' and self.experiment.config.resume == 'never' and self.state.progress.updates == stop:
            fail()
        value = update(self, chunk)
        order[name].append([batch[-1].tolist() for batch in chunk])
        return value

    monkeypatch.setattr(Trainer, 'update', recorded)
    train(changed('whole'))
    config = changed('parts')
    config.data.workers = 2
    with pytest.raises(RuntimeError, match='the power is off'):
        train(config)
    config.resume, config.data.workers = 'auto', 0 if stop % 2 else 2
    result = train(config)
    assert order['parts'] == order['whole']
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')
    return result


def test_a_run_that_goes_on_reads_the_same_images_in_the_same_order(photographs, tmp_path, monkeypatch, source):
    options = source(photographs, tmp_path / 'data')
    result = stop_and_go_on(options, tmp_path, monkeypatch, stop=8)
    assert (result['train_images'], result['val_images'], result['steps']) == (24, 6, 12)


def test_a_source_does_not_change_the_weights(photographs, tmp_path):
    """Where the samples have the same numbers."""
    states = []
    for make in (folder_of, saved_of, images_of):
        train(recipe(make(photographs, tmp_path / make.__name__), tmp_path / f'run-{make.__name__}'))
        states.append(load_checkpoint(tmp_path / f'run-{make.__name__}/checkpoint.pt')['model'])
    assert same(states[0], states[1]) and same(states[0], states[2])


# --- odd files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('on_error', ['error', 'skip'])
def test_odd_files_under_each_policy(odd, tmp_path, source, on_error):
    """A corrupt, an empty, a cut and a text file; and a CMYK, a 1 × 1 and a wrongly named one, which are images."""
    config = recipe(source(odd, tmp_path / 'data'), tmp_path / 'run')
    config.data.on_error = on_error
    if on_error == 'error':
        with pytest.raises(
            ValueError, match=r'not a readable image \(.*\); data.on_error=skip goes on without it$'
        ) as error:
            train(config)
        assert '\n' not in str(error.value)
        assert any(name.split('.')[0] in str(error.value) for name in UNREADABLE)
        return
    result = train(config)
    assert (result['train_images'], result['val_images'], result['val_skipped']) == (31, 9, 4)
    assert 0 < result['train_skipped'] <= 4
    lines = (tmp_path / 'run/skipped.txt').read_text().splitlines()
    assert len(lines) == result['train_skipped'] + 4
    assert all('not a readable image' in line for line in lines)
    assert not any(Path(name).stem in line for line in lines for name in READABLE)


def test_a_sample_without_image_or_label_cannot_be_read(photographs, tmp_path):
    image = next((photographs / 'train').glob('*/*')).read_bytes()
    members = {'a__cls': b'1', 'b__jpg': image, 'c__jpg': image, 'c__cls': b'one'}
    options = {**shards_of(photographs, tmp_path), 'on_error': 'skip'}
    options['train'] = write_shards(photographs / 'train', tmp_path / 'lacking', **members)
    result = train(recipe(options, tmp_path / 'run'))
    assert result['train_images'] == 27
    found = {line.split('.tar/')[1] for line in (tmp_path / 'run/skipped.txt').read_text().splitlines()}
    possible = {
        'a: it has no image (bmp;jpeg;jpg;npy;pgm;png;ppm;tif;tiff;webp)',
        'b: it has no label (cls)',
        "c: its label (cls) is b'one', not an integer",
    }
    assert found and found <= possible


# --- measurements ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('suffix', ['tif', 'npy'])
@pytest.mark.parametrize(
    ('channels', 'dtype'), [(1, 'uint16'), (3, 'uint16'), (5, 'uint8'), (5, 'uint16'), (5, 'float32')]
)
@pytest.mark.parametrize('first', [False, True], ids=['last', 'first'])
def test_many_channels_and_bits_train(photographs, tmp_path, suffix, channels, dtype, first):
    """Photographs, shifted and rescaled, make the channels; each has its own statistics."""
    means = [0.2 + 0.1 * channel for channel in range(channels)]
    for file in photographs.glob('*/*/*'):
        rgb = np.asarray(Image.open(file)).astype(np.float32) / 255
        image = np.stack([np.roll(rgb[..., c % 3], c, 1) * (1 - 0.1 * c) for c in range(channels)], 2)
        image = image.astype(dtype) if dtype == 'float32' else (image * np.iinfo(dtype).max).astype(dtype)
        image = np.ascontiguousarray(image.transpose(2, 0, 1)) if first else image
        target = tmp_path / file.relative_to(photographs).with_suffix(f'.{suffix}')
        target.parent.mkdir(parents=True, exist_ok=True)
        if suffix == 'npy':
            np.save(target, image)
        else:
            planar = None if channels == 1 else 'separate' if first else 'contig'
            tifffile.imwrite(target, image.squeeze(), photometric='minisblack', planarconfig=planar)
    config = recipe({**folder_of(tmp_path, None), 'mean': means, 'std': [0.3] * channels}, tmp_path / 'run')
    config.model.args['in_chans'] = channels
    result = train(config)
    assert (result['steps'], result['val_images']) == (12, 6)
    saved = json.loads((tmp_path / 'run/model/config.json').read_text())['pretrained_cfg']
    assert saved['mean'] == means and saved['input_size'] == [channels, 16, 16]


# --- repeats, sizes, layout -----------------------------------------------------------------------------------------


def repeats(config):
    config.data.repeats = 3


def sizes(config):
    config.model.args['dynamic_img_size'] = True
    config.data.schedule = [SizeConfig(0, [8, 12]), SizeConfig(1, [20, 20])]


def channels_last(config):
    config.channels_last = True


def everything(config):
    for change in (repeats, sizes, channels_last):
        change(config)
    config.data.mixed_shards = 3


@pytest.mark.parametrize('stop', [3, 9])
@pytest.mark.parametrize('change', [repeats, sizes, channels_last, everything], ids=lambda change: change.__name__)
def test_options_go_on_as_well(photographs, tmp_path, monkeypatch, change, stop):
    shapes = []
    update = Trainer.update

    def seen(self, chunk):
        shapes.extend(tuple(images.shape) for images, *_ in chunk)
        return update(self, chunk)

    monkeypatch.setattr(Trainer, 'update', seen)
    stop_and_go_on(shards_of(photographs, tmp_path / 'data'), tmp_path, monkeypatch, stop, change)
    if change is sizes:
        assert shapes[:12] == [(4, 3, 8, 12)] * 6 + [(4, 3, 20, 20)] * 6


def test_repeats_share_the_batch_and_differ(photographs, tmp_path, monkeypatch):
    seen = []
    update = Trainer.update
    monkeypatch.setattr(Trainer, 'update', lambda self, chunk: seen.extend(chunk) or update(self, chunk))
    config = recipe(folder_of(photographs, None), tmp_path / 'run', loss=LossConfig(0.0))
    config.data.repeats = 2
    assert train(config)['steps'] == 12
    for images, labels, indices in seen:
        assert indices[0] == indices[1] != indices[2] == indices[3]
        assert labels[0] == labels[1]
        assert not torch.equal(images[0], images[1])
    whole = torch.cat([indices for *_, indices in seen[:6]])
    assert len(set(whole.tolist())) == 12


@pytest.mark.distributed
def test_two_processes_see_the_same_repeats_and_sizes(photographs, tmp_path):
    options = shards_of(photographs, tmp_path / 'data')

    def make(output):
        config = recipe(options, output)
        everything(config)
        config.model.args |= {'drop_path_rate': 0.0, 'proj_drop_rate': 0.0}
        return config

    train_on_one_and_two_processes(make, tmp_path, batch_size=8)
    one, two = (load_checkpoint(tmp_path / name / 'checkpoint.pt')['model'] for name in '12')
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=1e-5), key


def test_channels_last_is_what_the_model_sees(photographs, tmp_path, monkeypatch):
    found = []
    build = experiment.create_model

    def watched(*args):
        model = build(*args)
        model.patch_embed.register_forward_pre_hook(
            lambda module, inputs: found.append((inputs[0], module.proj.weight)) if module.training else None
        )
        return model

    monkeypatch.setattr(experiment, 'create_model', watched)
    for name in ('plain', 'last'):
        train(recipe(folder_of(photographs, None), tmp_path / name, channels_last=name == 'last'))
        for tensor in found[0]:
            assert tensor.is_contiguous(memory_format=torch.channels_last) == (name == 'last')
        found.clear()
    states = [load_checkpoint(tmp_path / name / 'checkpoint.pt')['model'] for name in ('plain', 'last')]
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], atol=1e-3), key


@pytest.mark.parametrize('embed', [{}, {'patch_embed': 'dct'}])
@pytest.mark.parametrize('name', ['vit_dct_tiny', 'vit_pool_tiny', 'vit_treeformer_tc_tiny'])
def test_sizes_and_layouts_fit_the_models(photographs, tmp_path, name, embed):
    config = recipe(folder_of(photographs, None), tmp_path / 'run')
    config.model.name = name
    config.model.args = {**TINY, **embed}
    sizes(config)
    config.channels_last = True
    assert train(config)['steps'] == 12


@pytest.mark.parametrize('make', [shards_of, saved_of, tar_of])
def test_jpegs_are_scaled_while_they_are_decoded(photographs, tmp_path, make):
    pytest.importorskip('simplejpeg')
    config = recipe(make(photographs, tmp_path / 'data'), tmp_path / 'run')
    config.data.decode = 'scaled'
    sizes(config)
    assert train(config)['steps'] == 12


def test_repeats_of_odd_files(odd, tmp_path):
    config = recipe({**shards_of(odd, tmp_path / 'data'), 'on_error': 'skip'}, tmp_path / 'run')
    everything(config)
    config.data.batch_size = 6  # two images
    result = train(config)
    assert result['val_skipped'] == 4


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('data.repeats=0', r'data\.repeats must be at least 1, got 0'),
        ('data.mixed_shards=0', r'data\.mixed_shards must be at least 1, got 0'),
        ('data.mixed_shards=2', r'data\.mixed_shards=2 is for shards, ImageTree has none'),
        ('data.schedule=[{epoch: 2, img_size: [8, 8]}]', r'data\.schedule\[0\]\.epoch must be at least 0, and below'),
        (
            'data.schedule=[{epoch: 1, img_size: [8, 8]}, {epoch: 1, img_size: [8, 8]}]',
            r'data\.schedule\[1\]\.epoch must be above the one before, and below sched\.epochs=2, got 1',
        ),
        ('data.schedule=[{epoch: 1, img_size: [8]}]', r'data\.schedule\[0\]\.img_size must be height and .* got \[8\]'),
        ('data.schedule=[{epoch: 1, size: 8}]', r'unknown key data.schedule\[0\].size'),
        ('data.schedule=8', r'data\.schedule'),
        (
            'data.schedule=[{epoch: 1, img_size: [8, 8]}]',
            r'does not take images of 8×8 .*\(data\.schedule; try model\.args\.dynamic_img_size=true\)',
        ),
        ('data.train=http://host/a.tar', r'^data\.train: http://host/a\.tar: shards that come as a stream have no'),
        (
            'data.train=shards-{0..2}.tar',
            r'^data\.train: .*: there is no file for 3 of 3 shards, such as shards-0\.tar',
        ),
        ('data.dataset=wds/x', r'data\.dataset=wds/x'),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(photographs, tmp_path, change, message):
    config = recipe(folder_of(photographs, None), tmp_path / 'run')
    (tmp_path / 'recipe.yaml').write_text(to_yaml(config))
    with pytest.raises(ValueError, match=message) as error:
        train(load_recipe(tmp_path / 'recipe.yaml', [change]))
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'run').exists()


def test_shards_are_evaluated_from_the_command_line(photographs, tmp_path, capsys):
    options = shards_of(photographs, tmp_path / 'data')
    result = train(recipe(options, tmp_path / 'run'))
    assert main(['evaluate', str(tmp_path / 'run'), '--data', options['val'], '--device', 'cpu']) == 0
    output = capsys.readouterr().out
    assert 'on 6 images' in output
    assert float(output.split()[1]) == pytest.approx(result['top1'], abs=0.005)
