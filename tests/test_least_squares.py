"""Least squares: against PyTorch's own solver, on students whose loss is known, and on blocks of all kinds."""

import copy
import weakref

import pytest
import timm
import torch

from tests.test_healing import tiny
from vit_efficient import convert, least_squares
from vit_efficient.healing import on_grid, tokens_after
from vit_efficient.least_squares import HELD_OUT, LAYERS, _System, solve
from vit_efficient.utils.errors import UserError


def pictures(count=8, size=(28, 52)):
    torch.manual_seed(5)
    return [torch.randn(3, *size, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('scaled', [True, False])
def test_a_system_is_that_of_a_slow_solver(bias, scaled):
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 3, bias=bias).double().requires_grad_(False)
    scale = torch.tensor([0.1, 2.0, -1.0], dtype=torch.float64) if scaled else None
    fitted, held_out = _System(linear, scale), _System(linear, scale)
    rows = []
    for system in (fitted, fitted, held_out):
        inputs, target = (torch.randn(1, 40, width, dtype=torch.float64) for width in (5, 3))
        wanted = target + 0.3 * torch.randn_like(target)
        system.add(inputs, wanted, target)
        rows.append((inputs[0], wanted[0], target[0].square().mean(1, keepdim=True).rsqrt()))
    columns = [torch.cat([each[k] for each in rows[:2]]) for k in range(3)]
    inputs, wanted, weight = columns
    lacking = (wanted if scale is None else wanted / scale) - linear(inputs)
    design = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1) if bias else inputs
    design, lacking = weight * design, weight * lacking
    ridge = 0.1 * design.square().sum() / design.shape[1]
    # A ridge is rows of its own, whose targets are 0.
    extra = ridge.sqrt() * torch.eye(design.shape[1], dtype=torch.float64)
    stacked = torch.cat([design, extra]), torch.cat([lacking, torch.zeros(len(extra), 3, dtype=torch.float64)])
    slow = torch.linalg.lstsq(*stacked).solution
    solution = fitted.solution(0.1)
    torch.testing.assert_close(solution, slow, rtol=1e-9, atol=1e-12)

    inputs, wanted, weight = rows[2]
    before = (weight * (wanted - linear(inputs) * (1 if scale is None else scale))).square().mean()
    assert held_out.error() == pytest.approx(float(before))
    changed = copy.deepcopy(linear)
    changed.weight += solution[:5].T
    if bias:
        changed.bias += solution[5]
    after = (weight * (wanted - changed(inputs) * (1 if scale is None else scale))).square().mean()
    assert held_out.error(solution) == pytest.approx(float(after))
    fitted.apply(solution)
    torch.testing.assert_close(linear.weight, changed.weight)


@torch.no_grad()
def _error(student, teacher, image):
    ours, theirs = (tokens_after(model, image[None])[0] for model in (student, teacher))
    return float((ours - theirs).square().mean() / theirs.square().mean())


@pytest.mark.parametrize('options', [{}, {'init_values': 0.1}, {'init_values': 0.1, 'reg_tokens': 4}])
def test_what_was_changed_in_the_layers_that_are_solved_for_comes_back(options):
    teacher = on_grid(tiny(options.pop('reg_tokens', 0), **options))
    student = copy.deepcopy(teacher)
    torch.manual_seed(1)
    for block in student.blocks:
        for name in LAYERS:
            layer = block.get_submodule(name)
            layer.weight.data.mul_(0.5)
            layer.bias.data.normal_()
    image = pictures(1)[0]
    assert _error(student, teacher, image) > 0.1
    found = solve(student, teacher, pictures(16), ridge=1e-6)
    assert [each.layer for each in found] == [f'blocks.{i}.{name}' for i in range(3) for name in LAYERS]
    assert _error(student, teacher, image) < 1e-3
    assert all(each.after < each.before for each in found)


@pytest.mark.parametrize(
    ('attention', 'options'),
    [
        ('dct', {'keep_ratio': 0.25}),
        ('dct', {'keep_ratio': 0.25, 'place': 'kv'}),
        ('dct', {'keep_ratio': 0.25, 'place': 'block'}),
        ('merge', {'keep_ratio': 0.25, 'place': 'block'}),
        ('combiner', {'window_size': 4, 'cell_size': 2}),
        ('linformer', {'keep_ratio': 0.25}),
    ],
)
def test_a_converted_model_is_nearer_to_what_it_was(attention, options):
    teacher = tiny(1, init_values=0.5)
    for parameter in teacher.parameters():
        parameter.data.mul_(2)
    student = convert(copy.deepcopy(teacher), attention, **options)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    new = pictures(20)[16:]
    errors = [_error(student, on_grid(teacher), image) for image in new]
    solve(student, on_grid(teacher), pictures(16))
    assert sum(_error(student, teacher, image) for image in new) < sum(errors)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(any(f'.{layer}.' in name for layer in LAYERS) for name in changed)


def test_of_large_images_some_tokens_count(monkeypatch):
    """All of them, if so many are wanted; fewer give nearly the same."""
    teacher, found = on_grid(tiny(init_values=0.5)), {}
    for parameter in teacher.parameters():
        parameter.data.mul_(2)
    *images, image = pictures(49)
    for tokens in (92, 47, 30):  # of 1 + 7 × 13: a step of 1, 1 and 3
        monkeypatch.setattr(least_squares, 'TOKENS', tokens)
        student = convert(copy.deepcopy(teacher), 'subsample', keep_ratio=0.25)
        before = _error(student, teacher, image)
        solve(student, teacher, images)
        found[tokens] = student.state_dict(), _error(student, teacher, image)
    (first, error), (second, _), (third, with_few) = found.values()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(third['blocks.0.attn.proj.weight'], first['blocks.0.attn.proj.weight'])
    assert error < before and with_few < before


@pytest.mark.parametrize('step', range(1, 9))
def test_all_tokens_count_in_some_image_that_is_fitted_and_in_some_that_is_held_out(step):
    tokens = step * least_squares.TOKENS
    counted = [range(tokens)[least_squares._counted(number, tokens)] for number in range(512 // HELD_OUT)]
    assert {len(each) for each in counted} == {least_squares.TOKENS}
    assert set().union(*counted) == {*range(tokens)}


def test_photographs_are_held_out_and_not_images_of_them():
    held = least_squares._held_out
    assert held(range(16)) == [number % HELD_OUT == HELD_OUT - 1 for number in range(16)]
    assert held([5, 3, 9, 5, 9, 3]) == [False, False, True, False, True, False]
    twice = [*range(0, 40, 2), *range(0, 40, 2)]
    assert held(twice)[:20] == held(twice)[20:] and sum(held(twice)) == 4
    images, numbers = pictures(4), [number % 4 for number in range(12)]
    teacher = on_grid(tiny())
    told, untold = (
        solve(convert(copy.deepcopy(teacher), 'dct', keep_ratio=0.25), teacher, images * 3, photographs=each)
        for each in (numbers, None)
    )
    # Images of photographs that are fitted too make a layer look better than it is.
    assert told[0].after > untold[0].after


def test_of_an_image_its_tokens_are_kept_alone():
    """Images of several sizes, each gone before the next one is read."""
    teacher, sizes = on_grid(tiny(dynamic_img_size=True)), [(28, 52), (20, 24)]
    kept = [pictures(size=size)[number] for number in range(8) for size in sizes]
    seen, alive = [], []

    def read():
        for image in kept:
            alive.append(sum(each() is not None for each in seen))
            image = image.clone()
            seen.append(weakref.ref(image))
            yield image
            del image

    one, other = (convert(copy.deepcopy(teacher), 'dct', keep_ratio=0.25) for _ in range(2))
    assert solve(one, teacher, read()) == solve(other, teacher, kept)
    assert max(alive) <= 1 and not any(each() is not None for each in seen)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_that_lacks_nothing_stays_as_it_is():
    teacher = on_grid(tiny())
    student = copy.deepcopy(teacher)
    found = solve(student, teacher, pictures(8))
    assert all(each.after <= each.before < 1e-25 for each in found)
    for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    'name', ['eva02_tiny_patch14_224', 'vit_small_patch16_dinov3', 'vit_pe_spatial_tiny_patch16_512']
)
def test_families_with_rotary_positions_are_served(name):
    torch.manual_seed(0)
    teacher = timm.create_model(name, depth=2, img_size=64, num_classes=0).double().eval()
    student = convert(copy.deepcopy(teacher), 'subsample', keep_ratio=0.25)
    images = pictures(9, (64, 64))
    try:
        solve(student, on_grid(teacher), images[:8])
    except UserError as error:
        assert 'heal.solve serves blocks that add what attn.proj and mlp.fc2 give' in str(error)
        return
    assert torch.isfinite(student.forward_features(images[8][None])).all()


def test_what_cannot_be_solved_is_refused():
    model = timm.create_model('vit_relpos_small_patch16_rpn_224', depth=1, num_classes=0)
    with pytest.raises(UserError, match='which a GridResPostRelPosBlock does not; set heal.solve=0'):
        solve(on_grid(model), on_grid(copy.deepcopy(model)), [torch.zeros(3, 224, 224)] * 8)
    with pytest.raises(UserError, match='heal.solve needs 8 images at least, got 3'):
        solve(on_grid(tiny()), on_grid(tiny()), pictures(3))
    with pytest.raises(UserError, match='heal.solve needs two photographs at least'):
        solve(on_grid(tiny()), on_grid(tiny()), pictures(8), photographs=[3] * 8)


def test_a_channel_that_is_scaled_by_nothing_asks_for_nothing():
    teacher = on_grid(tiny(init_values=0.5))
    teacher.blocks[0].ls1.gamma.data[3:5] = 0
    student = convert(copy.deepcopy(teacher), 'dct', keep_ratio=0.25)
    found = solve(student, teacher, pictures(8))
    assert all(each.after <= each.before < 1 for each in found)
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    teacher.blocks[0].attn.proj.bias.data[0] = float('nan')
    with pytest.raises(UserError, match='heal.solve: tokens are not finite, of these images, at blocks.0.attn.proj'):
        solve(student, teacher, pictures(8))
