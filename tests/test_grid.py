import dataclasses

import pytest

from vit_efficient import PatchGrid


def test_counts():
    grid = PatchGrid(7, 13, prefix=5)
    assert (grid.num_patches, grid.num_tokens) == (91, 96)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PatchGrid(7, 13).height = 8


@pytest.mark.parametrize('arguments', [(0, 3), (3, -1), (3, 3, -1), (2.0, 3), ('3', 3), (True, 3)])
def test_bad_sizes(arguments):
    with pytest.raises(ValueError, match='PatchGrid'):
        PatchGrid(*arguments)
