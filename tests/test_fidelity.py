"""Fidelity: what a cosine of features says and hides, and that models are left as they were."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from vit_efficient.fidelity import Fidelity, fidelity, final_tokens, mean_fidelity, same_neighbours
from vit_efficient.utils.errors import UserError


def test_equal_tokens_keep_all_and_a_constant_none():
    tokens = torch.randn(12, 8, dtype=torch.float64) + 5
    same = fidelity(tokens, tokens, prefix=2)
    assert same[:3] == pytest.approx((1, 1, 1)) and same.error == 0
    constant = torch.cat([tokens[:2], tokens[2:].mean(dim=0).expand(10, -1)])
    kept = fidelity(tokens, constant, prefix=2)
    assert kept.patch > 0.9 and kept.centred == pytest.approx(0, abs=1e-9)
    assert kept.prefix == pytest.approx(1) and kept.error == pytest.approx(1)


def test_cosines_by_hand():
    reference, tokens = torch.tensor([[1.0, 0], [0, 1], [2, 1]]), torch.tensor([[0.0, 1], [1, 1], [2, 1]])
    kept = fidelity(reference, tokens, prefix=1)
    assert kept.prefix == 0 and kept.patch == pytest.approx((1 / math.sqrt(2) + 1) / 2)
    # The mean patch is (1, 1): (-1, 0) and (1, 0) against (0, 0) and (1, 0).
    assert kept.centred == pytest.approx(0.5) and kept.error == pytest.approx(0.5)


def test_without_prefix_tokens_there_is_no_cosine_of_them():
    assert math.isnan(fidelity(torch.randn(4, 3), torch.randn(4, 3), prefix=0).prefix)


def test_mean_is_over_images():
    assert mean_fidelity([Fidelity(1, 0, 0.5, 2), Fidelity(0, 1, 0.5, 0)]) == (0.5, 0.5, 0.5, 1)


def test_tokens_of_images_of_several_sizes_and_modes_stay():
    model = timm.create_model('test_vit', dynamic_img_size=True, drop_path_rate=0.5)
    model.blocks[0].eval()
    tokens = list(final_tokens(model, [torch.randn(3, 32, 64), torch.randn(3, 16, 16)]))
    assert [t.shape for t in tokens] == [(9, 64), (2, 64)] and not tokens[0].requires_grad
    assert model.training and not model.blocks[0].training
    assert all(
        map(torch.equal, final_tokens(model, [torch.ones(3, 32, 32)]), final_tokens(model, [torch.ones(3, 32, 32)]))
    )


def test_the_map_of_a_sam_is_tokens():
    model = timm.create_model('samvit_base_patch16', embed_dim=32, depth=1, num_heads=2, img_size=64)
    image = torch.randn(3, 64, 64)
    [tokens] = final_tokens(model, [image])
    torch.testing.assert_close(tokens.T.unflatten(1, (4, 4)), model.eval().forward_features(image[None])[0])


@pytest.mark.parametrize(('shape', 'prefix'), [((3, 8), 1), ((4, 8), 4)])
def test_other_shapes_are_refused(shape, prefix):
    with pytest.raises(UserError, match='of one image'):
        fidelity(torch.randn(4, 8), torch.randn(*shape), prefix)


def test_neighbours_are_those_of_slow_loops():
    torch.manual_seed(4)
    reference = torch.randn(30, 8)
    tokens = reference + 0.5 * torch.randn(30, 8)

    def nearest(each, patch):
        patches = each[2:] - each[2:].mean(0)
        cosines = {i: float(F.cosine_similarity(patches[i], patches[patch], dim=0)) for i in range(28) if i != patch}
        return set(sorted(cosines, key=cosines.get)[-5:])

    same = [len(nearest(reference, i) & nearest(tokens, i)) / 5 for i in range(28)]
    assert same_neighbours(reference, tokens, prefix=2, count=5) == pytest.approx(sum(same) / 28)
    assert same_neighbours(reference, reference, prefix=2) == 1
    assert same_neighbours(reference[:3], tokens[:3], prefix=2) == 1  # of a single patch
