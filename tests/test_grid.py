import dataclasses

import numpy as np
import pytest
import torch

from vit_efficient import PatchGrid

pytestmark = pytest.mark.once


def test_counts():
    grid = PatchGrid(7, 13, prefix=5)
    assert (grid.num_patches, grid.num_tokens) == (91, 96)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PatchGrid(7, 13).height = 8


@pytest.mark.parametrize(
    'arguments',
    [
        (0, 3),
        (3, -1),
        (3, 3, -1),
        (2.0, 3),
        ('3', 3),
        (True, 3),
        (None, 3),
        (3, np.float64(3)),
        (np.int64(-3), 3),
        (3, 3, np.int32(-1)),
        (torch.tensor(-3), 3),
        (3, torch.tensor(3)),
    ],
)
def test_bad_sizes(arguments):
    with pytest.raises(ValueError, match='an integer of at least . in a PatchGrid, got'):
        PatchGrid(*arguments)
