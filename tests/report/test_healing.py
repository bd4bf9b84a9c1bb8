"""Tables of healing, and what its pictures of features show."""

import json

import pytest
import torch

from vit_efficient.report.healing import Components, blocks_table, healed_table, healing_table, similarity
from vit_efficient.utils.errors import UserError
from vit_efficient_cli import main


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
    for swapped in (1.0, 1 - 1e-7):  # less than this is rounding
        rows = healing_table({'healing': [line('swapped', swapped), line('solved', 0.9)]}).rows
        assert rows[2]['given_back'] is None


def test_what_was_swapped_since_has_no_share_of_what_is_given_back():
    lines = [line('swapped', 0.9, converted=1), line('aligned', 0.95, converted=1), line('aligned', 0.4, converted=2)]
    rows = healing_table({'healing': lines}).rows
    assert [row['given_back'] for row in rows[2:]] == [pytest.approx(50), None]


def test_runs_that_differ_in_their_seed_have_one_row(tmp_path, capsys):
    def run(name, *lines):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'result.json').write_text(json.dumps({'healing': lines, 'environment': {}}))
        return str(tmp_path / name)

    first = run('dct-s0', line('swapped', 0.6, images=0), line('solved', 0.7), line('refined', 0.8, images=16, hours=1))
    second = run(
        'dct-s1', line('swapped', 0.6, images=0), line('solved', 0.8), line('refined', 0.9, images=16, hours=2)
    )
    other = run('pool', line('swapped', 0.5, images=0), line('recovered', 0.4, images=8, hours=1))
    rows = healed_table([first, other, second]).rows
    assert [(row['run'], row['seeds'], row.get('solved')) for row in rows] == [
        ('dct', 2, pytest.approx(0.75)),
        ('pool', 1, None),
    ]
    assert [row['given_back'] for row in rows] == [pytest.approx(62.5), pytest.approx(-20)]
    assert rows[0]['given_back_std'] == pytest.approx(12.5 * 2**0.5) and rows[0]['hours'] == 1.5
    assert main(['table', 'healing', first, other, '--out', str(tmp_path / 'healing.md')]) == 0
    assert (tmp_path / 'healing.md').read_text() == capsys.readouterr().out
    with pytest.raises(UserError, match='dct-s0 is given twice'):
        healed_table([first, first])
    (tmp_path / 'begun').mkdir()
    with pytest.raises(UserError, match='begun: no finished run of vit-efficient heal'):
        healed_table([first, tmp_path / 'begun'])


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
