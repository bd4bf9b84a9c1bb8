"""Tables of healing, and what its pictures of features show."""

import pytest
import torch

from vit_efficient.report.healing import Components, blocks_table, healing_table, similarity


def line(features, centred, **more):
    return {'features': features, 'centred_cosine': centred, 'patch_cosine': 0.5, 'after_blocks': [0.25, 0.75], **more}


def test_a_row_says_which_part_of_the_loss_is_given_back():
    lines = [line('swapped', 0.6, images=0), line('solved', 0.8, images=8, hours=0.5), line('refined', 0.5, images=16)]
    rows = healing_table({'healing': lines}).rows
    assert [row['features'] for row in rows] == ['teacher', 'swapped', 'solved', 'refined']
    assert [row['given_back'] for row in rows] == [None, None, pytest.approx(50), pytest.approx(-25)]
    assert rows[0]['centred_cosine'] == 1 and rows[2]['hours'] == 0.5
    assert blocks_table({'healing': lines}).rows[1] == {'features': 'solved', 'block0': 0.25, 'block1': 0.75}


def test_what_has_lost_nothing_gives_nothing_back():
    rows = healing_table({'healing': [line('swapped', 1.0), line('solved', 1.0)]}).rows
    assert rows[2]['given_back'] is None


def test_colours_are_the_components_of_the_first_model():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6)).Q
    strength = torch.tensor([9.0, 5.0, 2.0, 0.1, 0.1, 0.1])
    tokens = (torch.randn(8, 9, 6) * strength) @ axes + 3
    components = Components(tokens)
    assert (components.vectors @ axes[:3].T).abs().diagonal().min() > 0.9
    colours = components.colours(tokens)
    assert colours.shape == (8, 9, 3) and colours.min() == 0 and colours.max() == 1
    assert Components(tokens[..., :2]).colours(tokens[..., :2])[..., 2].eq(0).all()
    # The same tokens, turned the other way, have the same colours.
    assert torch.allclose(Components(tokens.flip(0)).colours(tokens), colours, atol=1e-3)


def test_similarity_is_a_cosine_less_the_mean():
    torch.manual_seed(1)
    tokens = torch.randn(3, 4, 5) + 10
    found = similarity(tokens, 0.99, 0.0)
    mean = tokens.mean((0, 1))
    for row in range(3):
        for column in range(4):
            a, b = tokens[row, column] - mean, tokens[2, 0] - mean
            assert found[row, column] == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-5)
    assert found[2, 0] == pytest.approx(1)
    assert similarity(tokens, 1.0, 1.0)[2, 3] == pytest.approx(1)
