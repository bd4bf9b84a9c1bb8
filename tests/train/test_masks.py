"""Segmentation of pixels: losses and accuracies against slow loops, and runs from start to end."""

import csv
import json
import math

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image

from tests.data.trees import pixels, write_masks
from tests.processes import run_python, torchrun
from tests.train.recipes import TINY, assert_same_predictions, train_on_one_and_two_processes
from tests.train.test_scale import assert_close
from tests.train.test_tasks import slow_loss, slow_resize
from tests.train.test_trainer import assert_same_run, fail, stop_after
from vit_efficient import DenseModel, save_model
from vit_efficient.data import EpochSampler, MaskedImages, Preprocessing, Samples, create_loader, eval_input
from vit_efficient.data.files.masks import read_mask
from vit_efficient.report.evaluation import SavedModel, evaluate_saved
from vit_efficient.train import Config, evaluate, train
from vit_efficient.train.boundaries import boundary_f
from vit_efficient.train.checkpoint import load_checkpoint
from vit_efficient.train.config import LossConfig, ModelConfig, OptimConfig, SchedConfig, StageConfig
from vit_efficient.train.masks import MaskLoss, PixelScore, pad_to_patches, strips, upsampled
from vit_efficient.train.recipe import to_yaml
from vit_efficient.train.tasks import Task
from vit_efficient_cli import main

CLASSES = ['background', 'green', 'blue']


def mask_recipe(folder, output, **options) -> Config:
    """16 images of many sizes in 4 batches of 4 crops of 16 px, two epochs; 5 to validate."""
    for split, count in (('train', 16), ('val', 5)):
        if not (folder / split).exists():
            write_masks(folder / split, count, odd=True)
    config = Config(
        task='segmentation',
        model=ModelConfig('vit_dct_tiny', {**TINY, 'global_pool': '', 'dynamic_img_size': True}),
        optim=OptimConfig(lr=1e-3),
        sched=SchedConfig(epochs=2, warmup_epochs=1),
        output=str(output),
        device='cpu',
        threads=1,
        log_every=1,
    )
    data = config.data
    data.dataset, data.train, data.val = 'masks', f'{folder}/train', f'{folder}/val'
    data.args = {'classes': CLASSES, 'ignore_index': 255}
    data.batch_size, data.workers = 4, 0
    data.augment.crop_zoom = [0.8, 1.25]
    for key, value in options.items():
        setattr(config, key, value)
    return config


# --- against slow loops -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('grid', 'size'), [((2, 3), (7, 10)), ((3, 2), (12, 5)), ((1, 1), (4, 3)), ((4, 4), (16, 16))])
def test_upsampling_whole_and_in_strips(grid, size):
    patch = (4, 4)
    logits = torch.randn(2, 3, *(-(-side // 4) for side in size), dtype=torch.float64)
    found = upsampled(logits, size, patch)
    padded = [4 * side for side in logits.shape[2:]]
    for image in range(2):
        for k in range(3):
            expected = np.array(slow_resize(logits[image, k].tolist(), *padded))[: size[0], : size[1]]
            assert np.allclose(found[image, k], expected, rtol=0, atol=1e-12)
    for most in (1, 2 * 3 * 16 * 2, 2**20):
        parts = list(strips(logits, size, patch, most))
        assert [row for rows, _ in parts for row in range(size[0])[rows]] == list(range(size[0]))
        assert torch.allclose(torch.cat([part for _, part in parts], 2), found, rtol=0, atol=1e-12)
    assert len(list(strips(logits, size, patch, 1))) == size[0]


def test_padding_repeats_the_edges():
    images = torch.randn(2, 3, 7, 13)
    padded = pad_to_patches(images, (4, 8))
    assert padded.shape == (2, 3, 8, 16)
    assert torch.equal(padded[..., :7, :13], images)
    assert torch.equal(padded[..., 7, :13], images[..., 6, :]) and torch.equal(padded[..., :7, 15], images[..., 12])
    assert pad_to_patches(images, (7, 13)) is images


def slow_mask_loss(kind, logits, classes, weights, smoothing):
    total = 0.0
    for image, mask in zip(logits.tolist(), classes.tolist(), strict=True):
        kinds, cells = len(image), []
        for row, line in enumerate(mask):
            for column, label in enumerate(line):
                cells.append(([image[k][row][column] for k in range(kinds)], label))
        if kind != 'dice':
            for scores, label in cells:
                if label >= 0:
                    log_sum = math.log(sum(map(math.exp, scores)))
                    smooth = sum(weights[k] * (log_sum - scores[k]) for k in range(kinds)) / kinds
                    own = weights[label] * (log_sum - scores[label])
                    total += ((1 - smoothing) * own + smoothing * smooth) / len(cells)
        if kind != 'cross_entropy':
            lost = []
            for k in range(kinds):
                shares = [
                    (math.exp(scores[k]) / sum(map(math.exp, scores)), label == k)
                    for scores, label in cells
                    if label >= 0
                ]
                if any(is_k for _, is_k in shares):
                    both = sum(share for share, is_k in shares if is_k)
                    lost.append((weights[k], 1 - 2 * both / sum(share + is_k for share, is_k in shares)))
            if lost:
                total += sum(w * each for w, each in lost) / sum(w for w, _ in lost)
    return total / len(logits)


@pytest.mark.parametrize('kind', ['cross_entropy', 'dice', 'both'])
@pytest.mark.parametrize('weights', [None, [0.5, 2.0, 1.0, 3.0]])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_losses(kind, weights, smoothing):
    logits = torch.randn(3, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    classes = torch.randint(-1, 3, (3, 5, 7), dtype=torch.int16)  # no pixel of class 3
    classes[2] = -1
    loss = MaskLoss(kind, weights, smoothing)(logits, classes)
    assert loss.item() == pytest.approx(
        slow_mask_loss(kind, logits, classes, weights or [1.0] * 4, smoothing), rel=1e-12
    )
    loss.backward()
    assert logits.grad.isfinite().all() and logits.grad[2].eq(0).all() and logits.grad[0].ne(0).any()
    assert logits.grad.movedim(1, -1)[classes == -1].eq(0).all()
    parts = [MaskLoss(kind, weights, smoothing)(logits[i : i + 1], classes[i : i + 1]) for i in range(3)]
    assert loss.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-12)
    function = MaskLoss(kind, weights, smoothing)
    assert torch.autograd.gradcheck(lambda x: function(x, classes), logits)


def test_scores_of_pixels():
    logits, classes = torch.randn(3, 2, 3, dtype=torch.float64), torch.randint(-1, 3, (7, 10), dtype=torch.int16)
    score = PixelScore.of(logits, classes, (4, 4))
    maps = [np.array(slow_resize(logits[k].tolist(), 8, 12))[:7, :10] for k in range(3)]
    confusion, lost, shares = np.zeros((3, 3), int), 0.0, []
    for row in range(7):
        for column in range(10):
            scores, label = [maps[k][row, column] for k in range(3)], classes[row, column].item()
            if label >= 0:
                best = int(np.argmax(scores))
                confusion[label, best] += 1
                lost += slow_loss(scores, label, 0) / 70
                shares.append([math.exp(scores[k]) / sum(map(math.exp, scores)) for k in (best, label)])
    assert score.confusion.tolist() == confusion.tolist()
    assert score.loss.item() == pytest.approx(lost, rel=1e-12)
    accuracy, outlines, *probabilities = (number.item() for number in score.numbers())
    assert accuracy == pytest.approx(100 * confusion.trace() / confusion.sum(), rel=1e-12)
    assert outlines == pytest.approx(100 * boundary_f(np.argmax(maps, 0), classes.numpy()), nan_ok=True)
    assert probabilities == pytest.approx(np.mean(shares, 0).tolist(), rel=1e-12)


def test_evaluation_of_whole_images(tmp_path):
    """One confusion matrix over all pixels that count, of images of several sizes, none of whole patches."""
    dataset = MaskedImages(write_masks(tmp_path / 'val', 5, odd=True), CLASSES, ignore_index=255)
    options = {**TINY, 'global_pool': '', 'num_classes': 3, 'dynamic_img_size': True}
    model = timm.create_model('vit_full_tiny', **options).eval()
    torch.nn.init.normal_(model.head.weight)
    preprocessing = Preprocessing.of(model)
    task = Task.of('segmentation', model, preprocessing, dataset.classes, 1.0, of_pixels=True)
    assert (task.none, task.patch_size) == (0, (4, 4))
    inputs = eval_input(dataset, model, preprocessing, 'pixels', whole=True)
    samples = Samples(*inputs, 3, 3, check_target=task.check_target)
    found = evaluate(model, create_loader(samples, EpochSampler(5, shuffle=False), 1), task=task)
    confusion, outlines = torch.zeros(3, 3, dtype=torch.int64), []
    with torch.no_grad():
        for i in range(5):
            image, mask = (torch.from_numpy(np.array(part)) for part in (dataset[i][0], dataset[i][2]))
            height, width = mask.shape
            whole = (image.permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
            whole = pad_to_patches(whole, (4, 4))
            logits = model(whole)[0, 1:].T.unflatten(1, (whole.shape[2] // 4, whole.shape[3] // 4))
            predicted = np.argmax([slow_resize(one.tolist(), *whole.shape[2:]) for one in logits], 0)[:height, :width]
            outlines.append(boundary_f(predicted, mask.numpy()))
            for label, best in zip(mask.flatten().tolist(), predicted.flatten().tolist(), strict=True):
                if label >= 0:
                    confusion[label, best] += 1
    assert found.confusion.tolist() == confusion.tolist()
    shares = [confusion[k, k] / (confusion[k].sum() + confusion[:, k].sum() - confusion[k, k]) for k in range(3)]
    assert found.miou == pytest.approx(100 * np.mean(shares))
    assert found.foreground_miou == pytest.approx(100 * np.mean(shares[1:]))
    assert found.pixel_accuracy == pytest.approx(100 * confusion.trace().item() / confusion.sum().item())
    assert found.columns == ('index', 'pixel_accuracy', 'boundary_f', 'pixel_probability', 'pixel_label_probability')
    assert found.boundary_f == pytest.approx(100 * np.mean(outlines), rel=1e-5)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_behind(tmp_path, capsys):
    (tmp_path / 'recipe.yaml').write_text(to_yaml(mask_recipe(tmp_path / 'data', tmp_path / 'run')))
    assert main(['train', str(tmp_path / 'recipe.yaml')]) == 0
    assert 'foreground mIoU' in capsys.readouterr().out
    result = json.loads((tmp_path / 'run/result.json').read_text())
    names = ['foreground_miou', 'miou', 'pixel_accuracy', 'boundary_f']
    assert [name for name in result if name in [*names, 'top1', 'patch_accuracy']] == names
    rows = list(csv.DictReader((tmp_path / 'run/predictions.csv').open()))
    of_pixels = ['pixel_accuracy', 'boundary_f', 'pixel_probability', 'pixel_label_probability']
    assert list(rows[0]) == ['index', 'file', *of_pixels]
    assert [row['file'] for row in rows] == [f'images/{i}.jpg' for i in (0, 1, 2, 10, 11)]
    model = timm.create_model(f'local-dir:{tmp_path / "run/model"}', pretrained=True).eval()
    assert model.pretrained_cfg['label_names'] == CLASSES
    for path in (tmp_path / 'run', tmp_path / 'run/model'):
        assert main(['evaluate', str(path), '--data', str(tmp_path / 'data/val'), '--device', 'cpu']) == 0
        assert (
            f'mIoU {result["miou"]:.2f} %, pixel accuracy {result["pixel_accuracy"]:.2f} %' in capsys.readouterr().out
        )


def test_pixels_are_learned(tmp_path):
    config = mask_recipe(tmp_path / 'data', tmp_path / 'run', loss=LossConfig(0.0, masks='both'))
    config.model.args |= {'embed_dim': 24, 'patch_size': 2}
    config.optim.lr, config.sched.epochs, config.eval_every = 1e-2, 20, 20
    config.data.augment.rand_ops, config.data.augment.erasing = 0, 0.0
    result = train(config)
    assert result['miou'] > 75 and result['foreground_miou'] > 65


def test_masks_that_do_not_fit_are_never_skipped(tmp_path):
    """Those that cannot be read are."""
    config = mask_recipe(tmp_path / 'data', tmp_path / 'run')
    config.data.on_error = 'skip'
    (tmp_path / 'data/val/masks/1.png').write_bytes(b'no image')
    assert train(config)['val_skipped'] == 1
    Image.fromarray(np.full((20, 24), 77, np.uint8)).save(tmp_path / 'data/val/masks/1.png')
    config.output = str(tmp_path / 'again')
    with pytest.raises(ValueError, match=r'masks/1\.png: its mask holds 77, its classes are 0 to 2; pixels [^;]*$'):
        train(config)


@pytest.mark.parametrize('change', [{'masks': 'dice'}, {'class_weights': [1.0, 2.0, 3.0]}])
def test_losses_of_masks_without_masks(tmp_path, change):
    config = mask_recipe(tmp_path / 'data', tmp_path / 'run')
    config.loss, config.model.args['num_classes'], config.data.crop_pct = LossConfig(**change), 3, 1.0
    items = [(np.zeros((16, 16, 3), np.uint8), 0, np.zeros((4, 4), int))] * 4
    with pytest.raises(ValueError, match=f'loss.{next(iter(change))} must be .* for data without masks'):
        train(config, items, items)


STILL = dict(crop_scale=None, crop_zoom=None, hflip=0.0, rand_ops=0, erasing=0.0, color_jitter=0.0)


def head_recipe(folder, output, **options):
    """A frozen model and a head, on images that nothing is drawn for."""
    config = mask_recipe(folder, output, **options)
    config.model.head, config.model.head_args, config.model.freeze = 'multilayer', {'width': 16, 'dropout': 0.0}, True
    config.model.args |= {'drop_path_rate': 0.5, 'patch_size': 2}
    for name, value in STILL.items():
        setattr(config.data.augment, name, value)
    return config


def test_a_head_on_a_frozen_backbone(tmp_path):
    config = head_recipe(tmp_path / 'data', tmp_path / 'run')
    config.model.attention, config.model.attention_kwargs = 'combiner', {'window_size': 2, 'cell_size': 2}
    config.optim.lr, config.sched.epochs, config.eval_every = 1e-2, 20, 20
    result = train(config)
    assert result['foreground_miou'] > 30
    model = timm.create_model(f'local-dir:{tmp_path / "run/model"}', pretrained=True)
    assert [name for name, _ in model.backbone.attention_spec()] == ['combiner'] * 2
    torch.manual_seed(0)
    config.output = str(tmp_path / 'again')
    config.sched.epochs = 1
    train(config)
    again = timm.create_model(f'local-dir:{tmp_path / "again/model"}', pretrained=True)
    ours, theirs = model.backbone.state_dict(), again.backbone.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(model.head.project.weight, again.head.project.weight)


def test_cached_features_are_what_the_backbone_gives(tmp_path, monkeypatch):
    seen = []
    features = DenseModel.features
    monkeypatch.setattr(DenseModel, 'features', lambda self, x: seen.append(len(x)) or features(self, x))
    plain, cached = (head_recipe(tmp_path / 'data', tmp_path / name) for name in ('plain', 'cached'))
    for config in (plain, cached):
        config.optim.opt, config.sched.epochs, config.eval_every = 'sgd', 3, 3
    cached.data.cache_features = 'memory'
    train(plain)
    seen.clear()
    train(cached)
    assert sum(seen) == 16 + 5 + 1 + 2 + 2  # trained on, validated on; tried before: blank ones, and two of any size
    one, two = (load_checkpoint(tmp_path / name / 'checkpoint.pt')['model'] for name in ('plain', 'cached'))
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)
    assert any(not torch.equal(one[name], two[name]) for name in one)  # they are kept in half precision


def test_cached_features_go_on_where_they_stopped(tmp_path, monkeypatch):
    def recipe(folder, **options):
        config = head_recipe(tmp_path / 'data', tmp_path / folder, **options)
        config.data.cache_features = 'memory'
        return config

    train(recipe('whole'))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_after(patch, 2, fail)
        train(recipe('parts', checkpoint_steps=1))
    train(recipe('parts', resume='auto'))
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


def test_features_in_a_folder_serve_other_runs(tmp_path, monkeypatch):
    """Of training and validation images; weights are those of features in memory, and damage is mended."""
    seen = []
    features = DenseModel.features
    monkeypatch.setattr(DenseModel, 'features', lambda self, x: seen.append(len(x)) or features(self, x))

    def run(name, place, seed=0, **args):
        config = head_recipe(tmp_path / 'data', tmp_path / name, seed=seed)
        config.data.cache_features = place
        config.model.args |= args
        seen.clear()
        return train(config), sum(seen) - 1 - 2 - 2  # less what is tried before

    folder = str(tmp_path / 'features')
    run('memory', 'memory')
    # The seed draws the weights of the backbone too, which stand for pretrained ones here.
    first, computed = run('first', folder)
    assert computed == 16 + 5 and len(list((tmp_path / 'features').rglob('*.npz'))) == 21
    one, two = (load_checkpoint(tmp_path / name / 'checkpoint.pt')['model'] for name in ('memory', 'first'))
    assert all(torch.equal(one[name], two[name]) for name in one)
    damaged, zeroed, emptied = sorted((tmp_path / 'features').rglob('*.npz'))[3:6]
    damaged.write_bytes(damaged.read_bytes()[:100])
    zeroed.write_bytes(zeroed.read_bytes()[:200] + bytes(zeroed.stat().st_size - 200))
    emptied.write_bytes(b'')
    again, computed = run('again', folder)
    assert computed == 3
    assert_same_run(tmp_path / 'first', tmp_path / 'again')
    for name in ('foreground_miou', 'pixel_accuracy', 'boundary_f'):
        assert again[name] == first[name]
    assert run('seed', folder, seed=1)[1] == run('other', folder, patch_size=4)[1] == 21
    model = timm.create_model(f'local-dir:{tmp_path / "first/model"}', pretrained=True)
    found = evaluate_saved(SavedModel(tmp_path / 'first'), str(tmp_path / 'data/val'))
    assert found.foreground_miou == pytest.approx(first['foreground_miou']) and model.frozen is False


def test_a_run_from_reduced_images_with_an_upsampler(tmp_path):
    """It starts from one that was trained, and says where it has none."""

    def recipe(output, **options):
        config = head_recipe(tmp_path / 'data', tmp_path / output)
        config.model.reduce, config.model.args['img_size'], config.model.head_args['upscale'] = 2, 8, 4
        for name, value in options.items():
            setattr(config.model, name, value)
        return config

    train(recipe('half'))
    config = recipe('lacking', upsample=True, init_from=str(tmp_path / 'half'))
    with pytest.raises(ValueError, match='half has no upsampler for model.reduce=2, which model.upsample asks for'):
        train(config)
    args = dict(img_size=8, patch_size=2, dynamic_img_size=True, depth=2, embed_dim=16, num_heads=2)
    model = DenseModel(timm.create_model('vit_full_tiny', **args), 'multilayer', 3, 2, True, width=8)
    torch.nn.init.normal_(model.upsampler.queries.weight)
    save_model(model, tmp_path / 'trained')
    config = recipe('upsampled', upsample=True, init_from=str(tmp_path / 'trained'), name='vit_full_tiny', args=args)
    train(config)
    found = timm.create_model(f'local-dir:{tmp_path / "upsampled/model"}', pretrained=True)
    assert torch.equal(found.upsampler.queries.weight, model.upsampler.queries.weight)
    assert found.head.mix[0].conv.weight.shape[0] == 16  # of the recipe


def test_a_run_goes_on_from_the_head_of_another(tmp_path, caplog):
    """First the head alone, then all."""
    first = head_recipe(tmp_path / 'data', tmp_path / 'first')
    train(first)
    config = head_recipe(tmp_path / 'data', tmp_path / 'second')
    config.model.init_from, config.model.freeze = str(tmp_path / 'first'), False
    config.optim.opt, config.optim.lr, config.sched.epochs = 'sgd', 1e-9, 1
    train(config)
    assert 'the head goes on from there' in caplog.text
    one, two = (load_checkpoint(tmp_path / name / 'checkpoint.pt')['model'] for name in ('first', 'second'))
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    config.model.head_args, config.output = {'width': 8}, str(tmp_path / 'third')
    train(config)
    assert "the head is new, since that one is of {'head': 'multilayer', 'head_args': {'width': 16" in caplog.text


def test_stages_do_not_change_what_is_frozen(tmp_path):
    config = head_recipe(tmp_path / 'data', tmp_path / 'run')
    config.stages = [StageConfig(1), StageConfig(1, attention='linformer')]
    with pytest.raises(ValueError, match='stages must not change the model with model.freeze=true'):
        train(config)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'data.augment.hflip': 0.5}, 'data.augment.hflip must be 0.0 for data.cache_features: each image goes once'),
        ({'data.augment.color_jitter': 0.5}, 'data.augment.color_jitter must be 0.0 for data.cache_features'),
        ({'model.freeze': False}, 'model.freeze must be True for data.cache_features'),
        ({'data.cache_features': 'true'}, "data.cache_features must be '', memory, or a folder, got 'true'"),
        ({'data.cache_features': __file__}, 'data.cache_features=.*: cannot be a folder'),
        (
            {'model.reduce': 2, 'model.upsample': True},
            'an upsampler that nobody has trained would stay; name the folder',
        ),
        ({'model.head': '', 'model.head_args': {}}, 'model.freeze must be False for no model.head, which it is of'),
        ({'task': 'both'}, 'model.head=multilayer is for task=segmentation, got task=both'),
        ({'model.head_args': {'width': 0}}, r"model.head=multilayer, model.head_args=\{'width': 0\}: width must be"),
        ({'model.name': 'resnet18', 'model.args': {}}, 'model.head=multilayer, .*: cannot convert a ResNet'),
    ],
)
def test_heads_that_do_not_fit_are_named(tmp_path, change, message):
    config = head_recipe(tmp_path / 'data', tmp_path / 'run')
    config.data.cache_features = 'memory'
    for key, value in change.items():
        *sections, name = key.split('.')
        section = config
        for each in sections:
            section = getattr(section, each)
        setattr(section, name, value)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('ending', ['npy', 'tif'])
def test_five_deep_channels(tmp_path, ending):
    for split, count in (('train', 8), ('val', 3)):
        root = write_masks(tmp_path / 'data' / split, count, odd=True)
        for path in root.glob('images/*'):
            deep = pixels(int(path.stem), (*np.array(Image.open(path)).shape[:2], 5), 'uint16')
            if ending == 'npy':
                np.save(path.with_suffix('.npy'), deep)
            else:
                options = dict(photometric='minisblack', planarconfig='contig')
                tifffile.imwrite(path.with_suffix('.tif'), deep, **options)
            path.unlink()
    config = mask_recipe(tmp_path / 'data', tmp_path / 'run')
    config.model.args['in_chans'] = 5
    result = train(config)
    assert 0 < result['pixel_accuracy'] <= 100


def test_going_on_mid_epoch_gives_the_same_weights(tmp_path, monkeypatch):
    def recipe(folder, **options):
        config = mask_recipe(
            tmp_path / 'data', tmp_path / folder, grad_accum=2, loss=LossConfig(masks='both'), **options
        )
        config.model.args['drop_path_rate'] = 0.2
        return config

    train(recipe('whole'))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_after(patch, 2, fail)
        train(recipe('parts', checkpoint_steps=1))
    assert load_checkpoint(tmp_path / 'parts/checkpoint.pt')['progress']['updates'] == 1
    config = recipe('parts', resume='auto')
    config.data.workers = 1
    train(config)
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.distributed
def test_two_processes_reach_the_weights_of_one(tmp_path):
    def recipe(output):
        return mask_recipe(tmp_path / 'data', output, sched=SchedConfig(epochs=1, warmup_epochs=1))

    train_on_one_and_two_processes(recipe, tmp_path, batch_size=4)
    one, two = (load_checkpoint(tmp_path / count / 'checkpoint.pt')['model'] for count in '12')
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    areas = [(tmp_path / count / 'class_areas.csv').read_text() for count in '12']
    assert areas[0] == areas[1] and areas[0].startswith('index,class,labelled,predicted,both\n')
    one, two = (json.loads((tmp_path / count / 'result.json').read_text()) for count in '12')
    for name in ('foreground_miou', 'miou', 'pixel_accuracy', 'boundary_f'):
        assert one[name] == pytest.approx(two[name])
    assert_same_predictions(tmp_path / '1', tmp_path / '2')


@pytest.mark.distributed
def test_two_processes_compute_what_one_does(tmp_path):
    """In float64, with a head, dropout, stochastic depth and crops: nothing but rounding differs."""
    paths = {}
    for share, grad_accum in (('one', 4), ('two', 2)):
        config = mask_recipe(tmp_path / 'data', tmp_path / share, grad_accum=grad_accum, loss=LossConfig(masks='both'))
        config.data.batch_size, config.clip_grad, config.sched.epochs = 1, 0.5, 3
        config.model.head, config.model.head_args = 'multilayer', {'width': 16}
        config.model.args['drop_path_rate'] = 0.2
        paths[share] = tmp_path / f'{share}.yaml'
        paths[share].write_text(to_yaml(config))
    run_python('tests/train/double.py', str(paths['one']))
    torchrun('tests/train/double.py', str(paths['two']))
    one, two = (load_checkpoint(tmp_path / share / 'checkpoint.pt') for share in paths)
    assert one['progress']['updates'] == 12
    for state in (one, two):
        del state['progress']['train_seconds'], state['identity']
    for name in ('model', 'optimizer', 'progress'):
        assert_close(one[name], two[name], name)
    assert_same_predictions(tmp_path / 'one', tmp_path / 'two')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'task': 'classification'},
            'task=classification needs labels, and the data have masks; set task=segmentation',
        ),
        ({'task': 'both'}, 'task=both needs labels, and the data have masks'),
        (
            {'data.img_size': [18, 16]},
            r'data.img_size=\[18, 16\] must be multiples of the patches, \[4, 4\], for masks',
        ),
        ({'loss.mixup': 0.5}, 'loss.mixup must be 0.0 for masks: each pixel has one class; got 0.5'),
        ({'loss.bce': True}, 'loss.bce must be False for masks'),
        ({'data.decode': 'scaled'}, 'data.decode must be pixels for masks'),
        ({'loss.class_weights': [1.0, 2.0]}, 'loss.class_weights has 2 numbers for 3 classes'),
        ({'model.args': {**TINY, 'dynamic_img_size': True}}, "set model.args.global_pool to ''"),
        (
            {'data.args': {'classes': 2, 'ignore_index': 255}},
            r'masks/\d+\.png: its mask holds 2, its classes are 0 to 1',
        ),
        ({'data.args': {'classes': 3}}, r'masks/\d+\.png: its mask holds 255, its classes are 0 to 2'),
        (
            {'data.eval_batch_size': 2},
            'data.eval_batch_size=2: validation images of several sizes, such as .*; set it to 1',
        ),
        ({'model.args': {**TINY, 'global_pool': ''}}, 'does not take whole validation images, .*dynamic_img_size=true'),
        ({'data.crop_pct': 0.5}, 'data.crop_pct must be null for masks'),
        (
            {'data.args': {'classes': 3, 'ignore_index': 255, 'values': {0: None, 1: None, 2: None}}},
            'none of the pixels',
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    config = mask_recipe(tmp_path / 'data', tmp_path / 'run')
    for key, value in change.items():
        section, _, name = key.rpartition('.')
        setattr(getattr(config, section) if section else config, name, value)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not (tmp_path / 'run').exists() or 'none of the pixels' in message


def test_a_mask_of_another_size_than_its_image(tmp_path):
    config = mask_recipe(tmp_path / 'data', tmp_path / 'run')
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / 'data/val/masks/2.png')
    with pytest.raises(ValueError, match=r'images/2\.jpg: its mask has 9×9 pixels, the image has \d+×\d+'):
        train(config)


def test_masks_are_asked_for_in_both_sets(tmp_path):
    config = mask_recipe(tmp_path / 'data', tmp_path / 'run')
    with pytest.raises(ValueError, match='data.train has masks and data.val has none; give both the same kind'):
        train(config, val_set=[(np.zeros((16, 16, 3), np.uint8), 0)])


def test_own_images_in_three_commands(tmp_path, capsys):
    """Sixty pairs of odd sizes, with five channels of 16 bits and a class that is left out, by the shipped recipe."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 45), ('val', 15)):
        for folder in ('images', 'masks'):
            (tmp_path / split / folder).mkdir(parents=True)
        for number in range(count):
            size = rng.integers(20, 60, 2)
            mask = np.zeros(size, np.uint8)
            top, left = rng.integers(0, size - 12)
            mask[top : top + 12, left : left + 12] = 1
            image = rng.integers(0, 9000, (*size, 5)).astype(np.uint16)
            image[mask == 1, 3] += 40000
            mask[:, 0] = 7
            tifffile.imwrite(
                tmp_path / f'{split}/images/{number}.tif', image, photometric='minisblack', planarconfig='contig'
            )
            Image.fromarray(mask).save(tmp_path / f'{split}/masks/{number}.png')
    small = ['img_size=32', 'patch_size=4', 'depth=2', 'embed_dim=32', 'num_heads=2', 'in_chans=5', 'pretrained=false']
    recipe = [f'model.args.{option}' for option in small]
    recipe += [f'data.train={tmp_path}/train', f'data.val={tmp_path}/val', 'data.args.classes=[none,vessel]']
    recipe += ['data.args.ignore_index=7', 'data.img_size=[32,32]', 'data.workers=0', f'output={tmp_path}/run']
    recipe += ['sched.epochs=8', 'optim.lr=3e-3', 'eval_every=8', 'device=cpu', 'model.head_args.width=16']
    recipe += ['data.augment.color_jitter=0', 'data.mean=[0.1,0.1,0.1,0.1,0.1]', 'data.std=[0.2,0.2,0.2,0.2,0.2]']
    assert main(['train', 'recipes/masks.yaml', *recipe]) == 0
    result = json.loads((tmp_path / 'run/result.json').read_text())
    assert result['foreground_miou'] > 60
    capsys.readouterr()
    assert main(['evaluate', f'{tmp_path}/run', '--data', f'{tmp_path}/val', '--device', 'cpu']) == 0
    assert f'foreground mIoU {result["foreground_miou"]:.2f} %' in capsys.readouterr().out
    out = tmp_path / 'out'
    assert main(['predict', f'{tmp_path}/run', f'{tmp_path}/val/images', '--out', str(out), '--device', 'cpu']) == 0
    for path in sorted((tmp_path / 'val/masks').iterdir()):
        found, truth = read_mask(out / f'masks/{path.stem}.tif'), read_mask(path)
        assert found.shape == truth.shape and set(np.unique(found)) <= {0, 1}


@pytest.mark.parametrize(
    ('break_it', 'message'),
    [
        (lambda root: (root / 'masks/1.png').unlink(), r'images/1\.jpg has no mask'),
        (lambda root: (root / 'images/1.jpg').unlink(), r'masks/1\.png has no image'),
        (lambda root: [path.unlink() for path in root.glob('masks/*')], 'masks: no image in it'),
        (lambda root: Image.new('L', (3, 3)).save(root / 'masks/1.png'), r'images/1\.jpg: its mask has 3×3 pixels'),
        (lambda root: Image.new('L', (24, 20), 9).save(root / 'masks/1.png'), r'masks/1\.png: its mask holds 9'),
        (lambda root: (root / 'masks/1.png').write_bytes(b'none'), r'masks/1\.png: not a readable'),
    ],
)
def test_each_fault_of_the_data_is_named(tmp_path, break_it, message):
    for split in ('train', 'val'):
        write_masks(tmp_path / f'data/{split}', 4)
    break_it(tmp_path / 'data/val')
    config = mask_recipe(tmp_path / 'data', tmp_path / 'run')
    with pytest.raises(ValueError, match=message):
        train(config)
