import pytest
import torch

from vit_efficient.compress.cells import means, whole_cells


@pytest.mark.parametrize(('height', 'width'), [(1, 1), (4, 4), (3, 7), (7, 3), (1, 9), (14, 14), (5, 2)])
def test_any_number_of_cells_covers_the_grid(height, width):
    for count in range(1, height * width + 1):
        maps = whole_cells(count, height, width)
        inside = (maps > 0).double()
        assert maps.shape == (count, height, width)
        assert torch.equal(inside.sum(0), torch.ones(height, width, dtype=torch.float64))
        torch.testing.assert_close(maps.sum((1, 2)), torch.ones(count, dtype=torch.float64))
        assert inside.sum((1, 2)).max() <= 4 * height * width / count


def test_even_cells_are_those_of_pooling():
    x = torch.randn(8, 12, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.tensordot(whole_cells(24, 8, 12), x, 2), means(x, (4, 6)).flatten(0, 1))


def test_more_cells_than_patches():
    maps = whole_cells(2 * 6 + 2, 2, 3)
    each = torch.eye(6, dtype=torch.float64).unflatten(1, (2, 3))
    assert torch.equal(maps, torch.cat([each, each, whole_cells(2, 2, 3)]))
