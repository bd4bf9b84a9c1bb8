"""Healing: what a student is given and compares, against slow loops in float64, and low-rank updates."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from vit_efficient import convert
from vit_efficient.healing import (
    ALIGN,
    RECOVER,
    FeatureLoss,
    Student,
    Teacher,
    converted_parts,
    on_grid,
    part_loss,
    tokens_after,
)
from vit_efficient.low_rank import add_low_rank, merge_low_rank
from vit_efficient.utils.errors import UserError


def tiny(registers=0, **options):
    """A timm ViT in float64 for images of 28 × 52 px, patches of 4: a grid of 7 × 13."""
    torch.manual_seed(0)
    given = dict(img_size=(28, 52), patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=0)
    return VisionTransformer(**given, reg_tokens=registers, **options).double().eval()


def slow_loss(weights, taught, found, prefix):
    """The loss of one set of tokens, token by token."""
    total = {name: [] for name in ('prefix', 'patch', 'centred', 'smooth')}
    for a, b in zip(taught, found, strict=True):
        mean = sum(a[prefix:]) / len(a[prefix:])
        for n in range(len(a)):
            cosine = (a[n] @ b[n]) / (a[n].norm() * b[n].norm())
            total['prefix' if n < prefix else 'patch'].append(1 - cosine)
            if n >= prefix:
                x, y = a[n] - mean, b[n] - mean
                total['centred'].append(1 - (x @ y) / (x.norm() * y.norm()))
                scale = math.sqrt(float(a[n] @ a[n]) / len(a[n]))
                for u, v in zip(a[n] / scale, b[n] / scale, strict=True):
                    far = abs(u - v)
                    total['smooth'].append(far**2 / 2 if far < 1 else far - 0.5)
    return sum(weights[name] * sum(values) / len(values) for name, values in total.items() if values)


@pytest.mark.parametrize('prefix', [0, 1, 5])
@pytest.mark.parametrize('images', [1, 3])
def test_the_loss_is_that_of_slow_loops_and_so_is_its_gradient(prefix, images):
    torch.manual_seed(1)
    sets = [torch.randn(images, prefix + 91, 6, dtype=torch.float64) for _ in range(4)]
    sets[0][:, prefix] *= 100  # an outlier
    final, found, block, block_found = sets
    ours = [found.requires_grad_(), block_found.requires_grad_()]
    weights = {'prefix': 0.5, 'patch': 2.0, 'centred': 1.5, 'smooth': 3.0}
    loss = FeatureLoss(**weights, blocks=0.25)([final, block], ours, prefix)
    slow = slow_loss(weights, final, found, prefix) + 0.25 * slow_loss(weights, block, block_found, prefix)
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=1e-12)
    for ours_grad, theirs in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(slow, ours), strict=True):
        torch.testing.assert_close(ours_grad, theirs, rtol=1e-9, atol=1e-12)


def test_a_token_of_large_norm_does_not_rule():
    torch.manual_seed(2)
    taught = torch.randn(1, 40, 8, dtype=torch.float64)
    found = taught + 0.1 * torch.randn_like(taught)
    before = FeatureLoss(centred=0.0)([taught], [found], 1)
    for each in (taught, found):
        each[:, 7] *= 1000
    torch.testing.assert_close(FeatureLoss(centred=0.0)([taught], [found], 1), before)


@pytest.mark.parametrize('registers', [0, 4])
@pytest.mark.parametrize('size', [(28, 52), (28, 28)])
def test_tokens_after_blocks_are_those_of_the_model(registers, size):
    model = tiny(registers, dynamic_img_size=True)
    images, seen = torch.randn(2, 3, *size, dtype=torch.float64), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, output, i=i: seen.update({i: output}))
    final, first, last = tokens_after(on_grid(model), images, [0, 2])
    torch.testing.assert_close(final, model.norm(seen[2]))
    torch.testing.assert_close((first, last), (seen[0], seen[2]))


@pytest.mark.parametrize(
    ('attention', 'options', 'name'),
    [
        ('dct', {'keep_ratio': 0.25}, 'blocks.1.attn'),
        ('dct', {'keep_ratio': 0.25, 'place': 'kv'}, 'blocks.1.attn'),
        ('dct', {'keep_ratio': 0.25, 'place': 'block'}, 'blocks.1'),
        ('combiner', {'window_size': 4, 'cell_size': 2}, 'blocks.1.attn'),
    ],
)
def test_a_part_is_given_what_that_of_the_teacher_is_given(attention, options, name):
    teacher = tiny(1)
    student = Student(convert(copy.deepcopy(teacher), attention, layers=1, **options))
    teacher = Teacher(teacher)
    student.begin(ALIGN, teacher)
    assert student.parts == [name]
    images = torch.randn(2, 3, 28, 52, dtype=torch.float64)
    given, taught = teacher.parts(images, student.parts)
    # By hand: the tokens before block 1, its norm, and its attention; of a block all that it adds.
    x = tokens_after(teacher.model, images, [0])[1]
    block, grid = teacher.model.blocks[1], teacher.model.grid_of(28, 52)
    expected = block(x, grid) - x if name == 'blocks.1' else block.attn(block.norm1(x), grid)
    torch.testing.assert_close(taught, [expected])
    (found,) = student(images, given)
    changed = student.backbone.blocks[1]
    by_hand = changed(x, grid) - x if name == 'blocks.1' else changed.attn(changed.norm1(x), grid)
    torch.testing.assert_close(found, by_hand)
    loss = part_loss(taught, [found])
    torch.testing.assert_close(loss, (found - expected).square().mean() / expected.square().mean())
    loss.backward()
    learns = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert learns == {f'backbone.blocks.1.attn.{each}' for each in _of_attention(changed)}
    assert {name for name, parameter in student.named_parameters() if parameter.requires_grad} == learns
    student.begin(RECOVER, teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())


def _of_attention(block):
    return [name for name, _ in block.attn.named_parameters()]


def test_what_does_not_learn_in_the_model_does_not_learn_in_the_student():
    model = convert(tiny(), 'dct', keep_ratio=0.25)
    model.pos_embed.requires_grad_(False)
    student, teacher = Student(model), Teacher(tiny())
    for kind in (ALIGN, RECOVER):
        student.begin(kind, teacher)
        assert not model.pos_embed.requires_grad and model.blocks[0].attn.proj.weight.requires_grad


def test_what_is_the_same_has_nothing_to_align():
    student, teacher = Student(tiny()), Teacher(tiny())
    assert converted_parts(student.backbone, teacher.model) == []
    with pytest.raises(UserError, match='nothing was converted'):
        student.begin(ALIGN, teacher)


def test_a_teacher_stays_as_it_is():
    teacher = Teacher(tiny())
    images, before = torch.randn(1, 3, 28, 52, dtype=torch.float64), teacher.digest
    assert not any(each.requires_grad for each in (*teacher.tokens(images, [1]), *teacher.model.parameters()))
    teacher.parts(images, ['blocks.0.attn'])
    assert not teacher.model.blocks[0].attn._forward_hooks
    assert teacher.current_digest() == before
    teacher.model.norm.bias.data[0] += 1
    assert teacher.current_digest() != before


def test_features_of_a_smaller_image_are_resized_to_the_patches_of_the_larger():
    model = tiny(dynamic_img_size=True)
    small, whole = Teacher(model, size=(16, 32)), Teacher(copy.deepcopy(model))
    images = torch.randn(2, 3, 28, 52, dtype=torch.float64)
    (tokens,) = small.tokens(images)
    assert tokens.shape == whole.tokens(images)[0].shape
    reduced = F.interpolate(images, (16, 32), mode='bicubic', antialias=True)
    (seen,) = tokens_after(model, reduced)
    torch.testing.assert_close(tokens[:, :1], seen[:, :1])
    maps = seen[:, 1:].transpose(1, 2).unflatten(2, (4, 8)).float()
    resized = F.interpolate(maps, (7, 13), mode='bilinear', antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[:, 1:], resized.double())


def test_a_low_rank_update_starts_at_nothing_and_merges_to_the_same():
    model, images = on_grid(tiny()), torch.randn(1, 3, 28, 52, dtype=torch.float64)
    before, names = model.forward_features(images), [*model.state_dict()]
    add_low_rank(model, 2)
    torch.testing.assert_close(model.forward_features(images), before)
    student = Student(model)
    student.begin(RECOVER, Teacher(tiny()))
    learns = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert len(learns) == 2 * 4 * 3 and all(name.endswith(('.up', '.down')) for name in learns)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith('.up'):
            parameter.data.normal_()
    changed = model.forward_features(images)
    assert (changed - before).abs().max() > 0.1
    merge_low_rank(model)
    torch.testing.assert_close(model.forward_features(images), changed)
    assert sorted(model.state_dict()) == sorted(names)
    with pytest.raises(UserError, match=r'heal.lora=\d+ is above the width of all layers, 24 at most'):
        add_low_rank(model, 25)


def test_layers_that_are_fixed_stay_so():
    model = on_grid(tiny())
    model.blocks[0].requires_grad_(False)
    student = Student(model)
    student.begin(RECOVER, Teacher(tiny()))
    learns = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert learns and not any(name.startswith('backbone.blocks.0.') for name in learns)


def test_models_without_one_grid_are_refused():
    with pytest.raises(UserError, match='on one grid of patches, which a VisionTransformerSAM lacks'):
        Student(timm.create_model('samvit_base_patch16_224', depth=1, embed_dim=24, num_heads=2))
    with pytest.raises(UserError, match=r'heal.blocks: the model has blocks 0 … 2, got 3'):
        Student(tiny(), [3])
