"""Pruning against its definitions, in float64 and slowly; and what is left of models."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from tests.train.recipes import TINY
from vit_efficient import convert_patch_embed, save_model
from vit_efficient.prune import METHODS, Masks, by_role, densities, lamp_scores, prune, share_out, smallest, sparsity
from vit_efficient.utils.errors import UserError


def vit(name='vit_full_tiny', **options):
    return timm.create_model(name, **{**TINY, 'num_classes': 5, **options}).eval()


def three_layers(sides=(6, 4, 5), scales=(1, 0.01, 0.1)):
    layers = [nn.Linear(sides[i], sides[(i + 1) % 3]) for i in range(3)]
    with torch.no_grad():
        for layer, scale in zip(layers, scales, strict=True):
            layer.weight.normal_(0, scale)
    return nn.Sequential(*layers).double()


def left(model):
    return {each.name: each.left for each in densities(model)}


def defined(weight):
    """The score of each weight by its definition: those that are larger, or equal and not before it, one by one."""
    flat = weight.double().flatten()
    scores = torch.zeros_like(flat)
    for i, w in enumerate(flat):
        at_least = sum(v**2 for j, v in enumerate(flat) if abs(v) > abs(w) or (abs(v) == abs(w) and j >= i))
        scores[i] = w**2 / at_least if at_least else 0
    return scores.view_as(weight)


@pytest.mark.parametrize('shape', [(6, 5), (3, 2, 2, 2), (12,)])
def test_scores_are_those_of_the_definition(shape):
    for weight in (torch.randn(shape), torch.randint(-2, 3, shape).float()):
        torch.testing.assert_close(lamp_scores(weight), defined(weight), rtol=0, atol=1e-15)
        parts = torch.cat([defined(part) for part in weight.chunk(3)])
        torch.testing.assert_close(lamp_scores(weight, parts=3), parts, rtol=0, atol=1e-15)


def test_the_scale_of_a_layer_changes_nothing():
    weight = torch.randn(40, 30)
    assert torch.equal(lamp_scores(weight), lamp_scores(weight * 2**-20))
    torch.testing.assert_close(lamp_scores(weight.double() * 0.3), lamp_scores(weight), rtol=1e-14, atol=0)


def test_the_largest_weight_has_the_score_one_exactly_where_single_precision_misses_it():
    weight = 1 + 1e-3 * torch.rand(2**21)
    scores = lamp_scores(weight)
    assert scores.dtype == torch.float64
    assert scores.max() == 1 and (scores == 1).sum() == 1 and weight[scores.argmax()] == weight.max()
    squares = weight.square().sort().values
    assert (squares / (squares.sum() - squares.cumsum(0) + squares)).max() > 1.001


def test_a_layer_of_zeros_has_scores_of_zero():
    assert torch.equal(lamp_scores(torch.zeros(3, 4)), torch.zeros(3, 4, dtype=torch.float64))
    model = three_layers()
    model[1].weight.data.zero_()
    for method in METHODS:
        assert left(prune_copy(model, 0.3, method))['1'] == 0


def test_a_layer_that_begins_at_zero_has_no_mask_until_it_has_learned():
    model = three_layers((30, 30, 30))
    model[1].weight.data.zero_()
    masks = prune(model, 0.5, skip=())
    assert list(masks.kept) == ['0', '2'] and sum(left(model).values()) == 900
    model[1].weight.data.normal_()
    masks = prune(model, 0.5, skip=(), masks=masks)
    assert list(masks.kept) == ['0', '2', '1'] and sum(left(model).values()) == 900
    model[1].weight.data.zero_()  # one that was emptied stays so
    assert '1' in prune(model, 0.1, skip=(), masks=masks).kept


def test_what_is_not_left_has_no_energy():
    model = three_layers((30, 30, 30))
    masks = prune(model, 0.5, skip=())
    expected = left(prune_copy(model, 0.5, masks=masks))
    model[0].weight.data[~masks.kept['0']] = 100
    assert left(prune_copy(model, 0.5, masks=masks)) == expected


def test_numbers_whose_squares_are_beyond_float64_have_scores():
    weight = torch.randn(30, 20, dtype=torch.float64)
    for scale in (2.0**600, 2.0**-600):
        assert torch.equal(lamp_scores(weight * scale), lamp_scores(weight))
    with pytest.raises(UserError, match='weight: an entry is not finite'):
        lamp_scores(weight / 0)


def test_the_head_that_distilled_models_have_beside_it_stays_too():
    model = vit('deit_tiny_distilled_patch16_224', embed_dim=12, num_heads=2, depth=1)
    assert not {'head', 'head_dist'} & prune(copy.deepcopy(model), 0.5).kept.keys()
    plus = {each.name: each.density for each in densities(prune_copy(model, 0.4, 'uniform+'))}
    assert plus['patch_embed.proj'] == 1 and min(plus['head'], plus['head_dist']) >= 0.2


def prune_copy(model, amount, method='lamp', **options):
    model = copy.deepcopy(model)
    prune(model, amount, method, skip=(), **options)
    return model


@pytest.mark.parametrize('amount', [0.1, 0.5, 0.8, 0.93])
def test_it_prunes_what_greedy_removal_at_least_relative_cost_prunes(amount):
    model = three_layers()
    weights = [layer.weight.detach().clone() for layer in model]
    for _ in range(round(amount * sum(w.numel() for w in weights))):
        costs = []
        for number, weight in enumerate(weights):
            energy = weight.square()
            alive = energy[energy > 0]
            costs.append((alive.min() / alive.sum(), number, energy.masked_fill(energy == 0, torch.inf).argmin()))
        _, number, place = min(costs)
        weights[number].view(-1)[place] = 0
    for layer, weight in zip(prune_copy(model, amount), weights, strict=True):
        assert torch.equal(layer.weight, weight)


def test_layers_of_any_scale_are_left_alike_and_none_is_emptied():
    sides = (30, 30, 30)
    model = three_layers(sides)
    assert min(left(prune_copy(model, 0.99)).values()) > 0
    assert left(prune_copy(model, 0.99, 'global')) == {'0': 27, '1': 0, '2': 0}
    assert left(prune_copy(model, 1 - 3.4 / 2700)) == {'0': 1, '1': 1, '2': 1}
    scaled = copy.deepcopy(model)
    scaled[1].weight.data *= 1024
    ours, theirs = prune_copy(model, 0.9), prune_copy(scaled, 0.9)
    assert torch.equal(ours[1].weight != 0, theirs[1].weight != 0)


@pytest.mark.parametrize('method', METHODS)
def test_inside_a_layer_the_smallest_weights_go_first(method):
    model = vit()
    pruned = prune_copy(model, 0.6, method)
    for (name, before), after in zip(model.named_modules(), pruned.modules(), strict=True):
        if isinstance(before, nn.Linear | nn.Conv2d):
            parts = (module.weight.detach().chunk(3 if 'qkv' in name else 1) for module in (before, after))
            for w, kept in zip(*parts, strict=True):
                gone = w[kept == 0].abs()
                assert not len(gone) or not (kept != 0).any() or gone.max() <= w[kept != 0].abs().min()
                assert torch.equal(kept[kept != 0], w[kept != 0])


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('amount', [0, 0.001, 0.37, 0.5, 0.9])
def test_the_number_that_is_left_is_exact_with_ties(method, amount):
    model = three_layers((9, 7, 8))
    for layer in model:
        layer.weight.data = layer.weight.data.sign()
    total = sum(layer.weight.numel() for layer in model)
    amount = min(amount, 0.5) if method == 'uniform+' else amount  # beyond, the first layer is too large
    pruned = prune_copy(model, amount, method)
    assert sum(left(pruned).values()) == total - round(amount * total)
    scores = torch.tensor([2.0, 1, 1, 1, 0])
    assert [smallest(scores, count).tolist() for count in (0, 2, 5)] == [
        [False] * 5,
        [False, True, False, False, True],
        [True] * 5,
    ]


def test_amounts_are_of_what_is_left():
    model = three_layers((30, 30, 10))
    counts = [sum(left(model).values())]
    masks = None
    for _ in range(3):
        masks = prune(model, 0.5, skip=(), masks=masks)
        counts.append(sum(left(model).values()))
    assert counts == [1500, 750, 375, 187]
    reloaded = copy.deepcopy(model)
    prune(model, 0.2, skip=(), masks=masks)
    prune(reloaded, 0.2, skip=())
    assert left(model) == left(reloaded) and sum(left(model).values()) == 187 - 37


def test_a_weight_that_has_become_zero_by_itself_is_left_to_learn():
    model = three_layers()
    masks = prune(model, 0.5, skip=())
    place = masks.kept['0'].nonzero()[0]
    model[0].weight.data[tuple(place)] = 0
    assert prune(copy.deepcopy(model), 0, skip=(), masks=masks).kept['0'][tuple(place)]
    assert not prune(copy.deepcopy(model), 0, skip=()).kept['0'][tuple(place)]


@pytest.mark.parametrize('amount', [0.25, 0.5, 0.8, 0.95])
def test_uniform_budgets_are_met(amount):
    model = vit()
    for each in densities(prune_copy(model, amount, 'uniform')):
        assert abs(each.left - (1 - amount) * each.weights) < 1
    if amount < 0.9:  # the first layer alone is larger than what would be left
        plus = {each.name: each for each in densities(prune_copy(model, amount, 'uniform+'))}
        assert plus['patch_embed.proj'].density == 1
        assert plus['head'].density >= 0.2
        others = [each for name, each in plus.items() if name not in ('patch_embed.proj', 'head')]
        assert max(each.density for each in others) - min(each.density for each in others) < 0.02
        assert sum(each.left for each in plus.values()) == round((1 - amount) * sum(e.weights for e in plus.values()))


@pytest.mark.parametrize('amount', [0.25, 0.5, 0.8, 0.95])
def test_budgets_by_shape_are_met_and_what_would_pass_one_is_dense(amount):
    model = vit()
    shapes = {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    found = densities(prune_copy(model, amount, 'erk'))
    factors = []
    for each in found:
        layer, _, part = each.name.partition(', ')
        rows, *others = shapes[layer]
        size = sum((rows // 3 if part else rows, *others))
        if each.density < 1:
            factors.append((each.left - 1) / size)
            factors.append((each.left + 1) / size)
    assert max(factors[::2]) <= min(factors[1::2])
    for each in found:
        if each.density == 1:
            layer, _, part = each.name.partition(', ')
            rows, *others = shapes[layer]
            assert max(factors[::2]) * sum((rows // 3 if part else rows, *others)) >= each.weights - 1
    assert sum(each.left for each in found) == round((1 - amount) * sum(each.weights for each in found))


def test_shares_meet_their_sum_within_their_limits():
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        most = torch.randint(0, 40, (8,), generator=draw).tolist()
        least = [int(torch.randint(0, m + 1, (1,), generator=draw)) for m in most]
        sizes = torch.randint(1, 20, (8,), generator=draw).tolist()
        for total in range(sum(least), sum(most) + 1, 7):
            shares = share_out(total, sizes, least, most)
            assert sum(shares) == total
            assert all(low <= share <= high for low, share, high in zip(least, shares, most, strict=True))


def test_queries_keys_and_values_are_scored_apart():
    model = vit()
    for block in model.blocks:
        block.attn.qkv.weight.data[24:] *= 100
    apart, together = prune_copy(model, 0.7), prune_copy(model, 0.7, parts=False)
    roles = [{each.role: each.density for each in by_role(densities(m))} for m in (apart, together)]
    assert list(roles[0]) == ['patch embedding', 'q', 'k', 'v', 'proj', 'mlp', 'head', 'all']
    assert abs(roles[0]['q'] - roles[0]['v']) < 0.15
    assert roles[1]['q'] < 0.05 < 0.5 < roles[1]['v']
    assert {each.role for each in densities(model, parts=False)} == {'patch embedding', 'qkv', 'proj', 'mlp', 'head'}


@pytest.mark.parametrize(
    ('name', 'roles'),
    [
        ('vit_dct_tiny', ['patch embedding', 'q', 'k', 'v', 'proj', 'mlp', 'head', 'all']),
        ('eva02_tiny_patch14_224', ['patch embedding', 'q', 'k', 'v', 'proj', 'mlp', 'head', 'all']),
    ],
)
def test_roles_of_other_models(name, roles):
    options = {} if name.startswith('vit') else {'embed_dim': 16}
    assert [each.name for each in by_role(densities(vit(name, **options)))] == roles


def test_layers_that_are_fused_in_a_parallel_block_are_apart():
    model = timm.create_model('vit_base_patch32_plus_256', depth=1, embed_dim=12, num_heads=2, img_size=32)
    block = timm.models.vision_transformer.ParallelScalingBlock(12, 2)
    model.blocks[0] = block
    found = {each.name: each for each in densities(model)}
    assert [found[f'blocks.0.in_proj, {part}'].weights for part in ('mlp', 'q', 'k', 'v')] == [576, 144, 144, 144]


def test_biases_norms_and_the_head_stay(tmp_path):
    model = vit()
    before = copy.deepcopy(model.state_dict())
    masks = prune(model, 0.9)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f'{name}.weight' for name in masks.kept}
    assert 'head' not in masks.kept and 'patch_embed.proj' in masks.kept and len(masks.kept) == 9
    assert set(prune(model, 0.1, skip=('blocks.0', 'head')).kept) == {n for n in masks.kept if 'blocks.0' not in n}
    zeros = sum((m.weight == 0).sum().item() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    total = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    assert sparsity(model) == pytest.approx(zeros / total)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'vit_dct_tiny'])
def test_a_pruned_model_is_saved_as_plain_weights(tmp_path, name):
    model = vit(name)
    prune(model, 0.8)
    save_model(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model(images))
    assert left(loaded) == left(model)


@pytest.mark.parametrize('name', ['AdamW', 'SGD', 'RMSprop'])
def test_masks_hold_through_optimisers(name):
    model = vit()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, weight_decay=0.1)
    images = torch.randn(4, 3, 16, 16)
    model(images).square().sum().backward()
    optimizer.step()  # momentum of what is pruned now
    masks = prune(model, 0.7)
    for _ in range(2):
        optimizer.zero_grad()
        model(images).square().sum().backward()
        masks.apply_(model, gradients=True)
        assert all((model.get_submodule(n).weight.grad[~kept] == 0).all() for n, kept in masks.kept.items())
        optimizer.step()
        masks.apply_(model)
    for name, kept in masks.kept.items():
        weight = model.get_submodule(name).weight
        assert (weight[~kept] == 0).all() and not weight[~kept].signbit().any() and (weight[kept] != 0).any()
    again = Masks(masks.state_dict())
    again.apply_(model)
    assert left(model) == {each.name: each.left for each in densities(model, masks=masks)} | {'head': 60}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'amount': 1}, 'amount must be a number with 0 ≤ amount < 1, got amount=1'),
        ({'amount': -0.1}, 'got amount=-0.1'),
        ({'amount': float('nan')}, 'got amount=nan'),
        ({'amount': '0.5'}, "got amount='0.5'"),
        ({'method': 'lmap'}, "method must be one of lamp, global, .*, got method='lmap'; did you mean lamp"),
        ({'skip': ('block',)}, "skip: the model has no module 'block'; did you mean blocks"),
        ({'skip': ('patch_embed', 'blocks', 'head')}, 'no linear layer or convolution outside of skip='),
        ({'amount': 0.9999}, 'of 4032 weights of linear layers and convolutions none would be left'),
        ({'amount': 0.95, 'method': 'uniform+'}, "method='uniform.' keeps 576 weights of the first and last layer"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    model = vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        prune(model, **{'amount': 0.5, **arguments})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_cannot_be_pruned_are_named():
    with pytest.raises(UserError, match=r'parts must divide the rows of a weight of shape \(4, 5\), got parts=3'):
        lamp_scores(torch.ones(4, 5), parts=3)
    with pytest.raises(UserError, match='model must be an nn.Module'):
        prune([1, 2], 0.5)
    model = vit()
    model.blocks[1].mlp.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match='blocks.1.mlp.fc1: a weight is not finite'):
        prune(model, 0.5)
    model = vit()
    torch_prune.l1_unstructured(model.blocks[0].mlp.fc1, 'weight', 0.5)
    with pytest.raises(UserError, match='blocks.0.mlp.fc1: its weight is no plain parameter; merge what'):
        prune(model, 0.5)
    masks = prune(model := vit(), 0.5)
    with pytest.raises(UserError, match='the model has no layer blocks.1.attn.qkv, which was pruned'):
        masks.apply_(vit(depth=1))
    smaller = vit(depth=1)
    before = copy.deepcopy(smaller.state_dict())
    for call in (masks.apply_, lambda model: prune(model, 0.5, masks=masks)):
        with pytest.raises(UserError, match='the model has no layer blocks.1'):
            call(smaller)
    assert all(torch.equal(value, before[name]) for name, value in smaller.state_dict().items())
    with pytest.raises(UserError, match='masks must be what prune has returned, got dict'):
        prune(model, 0.5, masks=masks.kept)
    with pytest.raises(UserError, match=r'patch_embed.proj: its weight is \(24, 3, 4, 4\), its mask \(12, 3, 4, 4\)'):
        masks.apply_(vit(embed_dim=24))


def test_a_pruned_patch_embedding_is_not_converted():
    model = vit('vit_tiny_patch16_224')
    prune(model, 0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UserError, match='of the weights of the patch embedding are 0, which no other basis keeps; convert'
    ):
        convert_patch_embed(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
