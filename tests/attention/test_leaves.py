import pytest
import timm
import torch

import vit_efficient
from vit_efficient.attention.treeformer.leaves import Occupancy, find_leaves, leaf_occupancy, occupancy

SMALL = dict(embed_dim=24, depth=3, num_heads=2, img_size=(28, 52), patch_size=4)  # 7 × 13 patches


def small_model():
    torch.manual_seed(0)
    model = timm.create_model('vit_full_tiny', **SMALL, reg_tokens=4, qk_norm=True)
    vit_efficient.convert(model, 'treeformer_tc', layers=[0], tree_height=3)
    return vit_efficient.convert(model, 'treeformer_tf', layers=[2], tree_height=2)


@pytest.mark.parametrize(
    ('leaf', 'expected'),
    [
        ([0, 1, 2, 3] * 3, Occupancy(2.0, 0.0, 0.25)),
        ([2] * 5, Occupancy(0.0, 0.75, 1.0)),
        ([0, 0, 1, 3], Occupancy(1.5, 0.25, 0.5)),
    ],
)
def test_occupancy(leaf, expected):
    found = occupancy(torch.tensor([[leaf]]), 4)
    assert vars(found) == pytest.approx(vars(expected))


def test_occupancy_is_a_mean_over_images_and_heads():
    found = occupancy(torch.tensor([[[0, 1], [1, 1]], [[0, 0], [0, 0]]]), 2)
    assert vars(found) == pytest.approx(dict(entropy=0.25, empty=3 / 8, largest=7 / 8))


def test_leaves_are_those_of_a_walk_down_the_tree():
    model, images = small_model().train(), torch.randn(2, 3, 28, 52)
    inputs = {}
    for layer in (0, 2):
        model.blocks[layer].attn.register_forward_pre_hook(lambda _, args, layer=layer: inputs.update({layer: args[0]}))
    found = find_leaves(model, images)
    assert model.training
    assert list(found) == [0, 2]
    for layer, leaves in found.items():
        attention = model.blocks[layer].attn
        assert (leaves.grid.height, leaves.grid.width, leaves.num_leaves) == (7, 13, 2**attention.tree.height)
        qkv = attention.qkv(inputs[layer]).unflatten(-1, (3, 2, 12))
        for z, given in (
            (attention.q_norm(qkv[:, :, 0]), leaves.queries),
            (attention.k_norm(qkv[:, :, 1]), leaves.keys),
        ):
            assert given.shape == (2, 2, 91)
            for image, head, patch in ((0, 0, 0), (1, 1, 90), (0, 1, 17), (1, 0, 40)):
                node = 0
                while node < leaves.num_leaves - 1:
                    weight, bias = attention.tree.weight[head, node], attention.tree.bias[head, node]
                    node = 2 * node + (2 if z[image, 5 + patch, head] @ weight + bias >= 0 else 1)
                assert given[image, head, patch] == node - (leaves.num_leaves - 1)
    assert all(block.attn._forward_pre_hooks for block in (model.blocks[0], model.blocks[2]))  # the test's own, alone
    assert sum(len(block.attn._forward_pre_hooks) for block in model.blocks) == 2
    assert leaf_occupancy(model, images)[2] == occupancy(found[2].keys, 4)


def test_a_model_without_trees():
    model = timm.create_model('vit_dct_tiny', **SMALL)
    with pytest.raises(ValueError, match='no layer of the model has trees.*treeformer_tc'):
        find_leaves(model, torch.zeros(1, 3, 28, 52))
