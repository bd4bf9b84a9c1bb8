"""A student that hears a teacher: the losses by hand, and a run."""

import pytest
import timm
import torch
from torch.nn import functional as F

from tests.data.trees import write_tree
from tests.train.recipes import TINY, tiny_recipe
from vit_efficient import save_model
from vit_efficient.data import Preprocessing
from vit_efficient.train import train
from vit_efficient.train.config import DistillConfig, LossConfig, ModelConfig
from vit_efficient.train.hooks.attention_outputs import AttentionOutputs
from vit_efficient.train.hooks.distillation import Distillation
from vit_efficient.utils.errors import UserError

SIZE = dict(embed_dim=12, depth=1, num_heads=2, num_classes=4)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """Of other statistics and a larger image than the student's."""
    torch.manual_seed(1)
    model = timm.create_model('vit_full_tiny', img_size=32, patch_size=8, **SIZE)
    model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}
    folder = tmp_path_factory.mktemp('teacher')
    save_model(model, folder)
    return folder


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_the_loss_by_hand(teacher, kind):
    student = timm.create_model('vit_full_tiny', img_size=16, patch_size=4, **SIZE)
    preprocessing = Preprocessing.of(student)
    config = DistillConfig(str(teacher), kind=kind, weight=0.3, temperature=2.0)
    x = torch.randn(5, 3, 16, 16)
    logits = student(x)
    distillation = Distillation(config, student, preprocessing)
    loss = distillation.loss(x, logits, logits.sum())
    pixels = x * torch.tensor(preprocessing.std)[:, None, None] + torch.tensor(preprocessing.mean)[:, None, None]
    seen = F.interpolate((pixels - 0.5) / 0.25, (32, 32), mode='bilinear', antialias=True)
    taught = timm.create_model(f'local-dir:{teacher}', pretrained=True).eval()(seen).detach()
    if kind == 'hard':
        expected = -logits.log_softmax(1)[range(5), taught.argmax(1)].mean()
    else:
        p, q = (taught / 2).softmax(1), (logits / 2).softmax(1)
        expected = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss, 0.7 * logits.sum() + 0.3 * expected)
    loss.backward()
    assert all(p.grad is None for p in distillation.teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_teachers_that_do_not_fit(teacher, tmp_path):
    student = timm.create_model('vit_full_tiny', img_size=16, patch_size=4, **{**SIZE, 'num_classes': 7})
    for name, message in (
        (str(teacher), 'tells 4 classes, the student 3 and 7'),
        ('vit_of_nobody', 'distill.teacher=vit_of_nobody'),
        (str(tmp_path), 'not a model folder'),
    ):
        with pytest.raises(ValueError, match=message):
            Distillation(DistillConfig(name), student, Preprocessing.of(student))


def test_a_teacher_of_other_classes(tmp_path):
    student = timm.create_model('vit_full_tiny', img_size=16, patch_size=4, **SIZE)
    save_model(student, tmp_path, label_names=['a', 'b', 'c', 'd'])
    config, preprocessing = DistillConfig(str(tmp_path)), Preprocessing.of(student)
    Distillation(config, student, preprocessing)
    Distillation(config, student, preprocessing, classes=['a', 'b', 'c', 'd'])
    for classes, message in ((['a', 'b', 'd', 'c'], 'their order differs'), (['a', 'b', 'c', 'e'], 'missing .*d')):
        with pytest.raises(ValueError, match=f'the training set .* differ from those of distill.teacher=.*{message}'):
            Distillation(config, student, preprocessing, classes=classes)


def test_a_run(tmp_path):
    data = write_tree(tmp_path / 'data')

    def run(output, **options):
        config = tiny_recipe(data, tmp_path / output, loss=LossConfig(mixup=0.5))
        config.model = ModelConfig('vit_full_tiny', TINY)
        config.distill = DistillConfig(**options)
        result = train(config)
        return result, torch.load(tmp_path / output / 'checkpoint.pt', weights_only=True)['model']

    teacher = tmp_path / 'alone'
    _, alone = run('alone')
    result, taught = run('taught', teacher=str(teacher), kind='hard')
    _, ignorant = run('ignorant', teacher=str(teacher), weight=0.0)
    assert set(taught) == set(alone) and result['parameters'] == sum(p.numel() for p in alone.values())
    assert all(torch.equal(ignorant[name], alone[name]) for name in alone)
    assert not all(torch.equal(taught[name], alone[name]) for name in alone)
    with pytest.raises(ValueError, match='distill.weight must be between 0 and 1'):
        run('bad', teacher=str(teacher), weight=2.0)
    with pytest.raises(ValueError, match='distill has options, and no teacher'):
        run('bad', kind='hard')
    config = tiny_recipe(data, tmp_path / 'bad', distill=DistillConfig(str(teacher)), loss=LossConfig(bce=True))
    with pytest.raises(ValueError, match='loss.bce=true is too small to be heard beside a teacher; set loss.bce=false'):
        train(config)


@pytest.mark.parametrize('task', ['classification', 'segmentation'])
def test_attention_outputs_are_those_by_hand_and_are_learned(task, tmp_path):
    """The difference is part of the loss: with a weight it shrinks, and labels are learned beside it."""
    if task == 'segmentation':
        from tests.train.test_masks import mask_recipe

        config = mask_recipe(tmp_path / 'data', tmp_path / 'run')
        config.model.args['global_pool'] = ''
    else:
        config = tiny_recipe(write_tree(tmp_path / 'data'), tmp_path / 'run', loss=LossConfig())
        config.model.args['dynamic_img_size'] = True
    config.model.name, config.model.attention = 'vit_full_tiny', 'dct'
    config.model.args.update(drop_path_rate=0.0, proj_drop_rate=0.0)
    torch.manual_seed(3)
    teacher = timm.create_model('vit_full_tiny', **{**config.model.args, 'num_classes': 3})
    for block in teacher.blocks:
        block.attn.qkv.weight.data.mul_(20)
    save_model(teacher, tmp_path / 'teacher')
    config.model.init_from, config.optim.lr = str(tmp_path / 'teacher'), 1e-2
    config.distill = DistillConfig(str(tmp_path / 'teacher'), weight=0.0, outputs=50.0)
    seen, by_hand = [], []
    penalty = AttentionOutputs.penalty

    def watching(self, state, images, logits, loss):
        added = penalty(self, state, images, logits, loss) - loss
        seen.append(added.item())
        with torch.no_grad():
            pairs = []
            for model in (state.model, teacher.eval()):
                outputs = []
                hooks = [
                    block.attn.register_forward_hook(lambda module, args, output, kept=outputs: kept.append(output))
                    for block in model.blocks
                ]
                model(images)
                for hook in hooks:
                    hook.remove()
                pairs.append(outputs)
            by_hand.append(50 * sum(float(F.mse_loss(a, b)) for a, b in zip(*pairs, strict=True)) / 2)
        return loss + added

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionOutputs, 'penalty', watching)
        train(config)
    assert seen == pytest.approx(by_hand, rel=1e-4)
    assert seen[-1] < seen[0]
    config.output, config.compile = str(tmp_path / 'other'), True
    with pytest.raises(UserError, match='compile must be false for distill.outputs'):
        train(config)
    config.compile, config.model.args = False, {**config.model.args, 'depth': 1}
    config.model.init_from = ''
    with pytest.raises(UserError, match='the teacher has 2 blocks of 12 channels, .* the student 1 blocks'):
        train(config)
