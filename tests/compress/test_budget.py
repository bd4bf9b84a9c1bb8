import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vit_efficient import PatchGrid, create_attention
from vit_efficient.compress.budget import Budget, kept_count, kept_grid

pytestmark = pytest.mark.once

SIDES = st.integers(1, 60)


def largest_scaled_grid(height, width, budget):
    """Grids ⌊s·H⌋ × ⌊s·W⌋ for growing s: the last within the budget."""
    best = (1, 1)
    for numerator, denominator in sorted(
        [(i, height) for i in range(1, height + 1)] + [(j, width) for j in range(1, width + 1)],
        key=lambda s: s[0] / s[1],
    ):
        grid = max(1, height * numerator // denominator), max(1, width * numerator // denominator)
        if grid[0] * grid[1] <= budget:
            best = grid
    return best


@given(SIDES, SIDES, st.data())
def test_int(height, width, data):
    budget = data.draw(st.integers(1, height * width))
    assert kept_grid(height, width, Budget(num_tokens=budget)) == largest_scaled_grid(height, width, budget)
    assert kept_count(height, width, Budget(num_tokens=budget)) == budget


@given(SIDES, SIDES, st.sampled_from([1, 1 / 2, 1 / 3, 1 / 4, 1 / 9, 1 / 16, 0.1, 0.7, 0.99, 1e-3]))
def test_ratio(height, width, ratio):
    tokens = max(1, int(height * width * ratio + 1e-9))
    assert kept_grid(height, width, Budget(ratio)) == largest_scaled_grid(height, width, tokens)
    assert kept_count(height, width, Budget(ratio)) == tokens


def test_a_larger_budget_keeps_everything():
    assert kept_grid(3, 4, Budget(num_tokens=100)) == (3, 4)
    assert kept_count(3, 4, Budget(num_tokens=100)) == 12


def test_pair():
    assert kept_grid(14, 14, Budget(num_tokens=(7, 3))) == (7, 3)
    with pytest.raises(ValueError, match=r'num_tokens=\(7, 3\).*6 × 6'):
        kept_grid(6, 6, Budget(num_tokens=(7, 3)))


def test_neither():
    with pytest.raises(ValueError, match='one of keep_ratio and num_tokens'):
        Budget()


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('dct', dict(num_tokens=9999), 'num_tokens=9999 is more than the 15 patches that there are: all are kept'),
        ('dct1d', dict(num_tokens=9998), 'num_tokens=9998 is more than the 15 patches that there are: all are kept'),
        ('pool', dict(keep_ratio=1e-9), 'keep_ratio=1e-09 of 15 patches is less than one: one is kept'),
        ('nystrom', dict(num_landmarks=9997), 'num_landmarks=9997 is more than the 15 patches'),
        ('linformer', dict(num_tokens=9996, grid_size=(3, 5)), 'num_tokens=9996 is more than the 15 patches'),
        ('pool', dict(num_tokens=15), ''),
        ('pool', dict(keep_ratio=1 / 15), ''),
    ],
)
def test_what_cannot_be_kept_to_is_said_once(name, options, message, caplog):
    for _ in range(2):
        attention = create_attention(name, 12, 2, **options)
        for _ in range(2):
            attention(torch.randn(1, 15, 12), PatchGrid(3, 5))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == bool(message) and all(message in text for text in said)
