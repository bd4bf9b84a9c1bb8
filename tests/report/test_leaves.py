import pytest
import torch
from PIL import Image

from tests.attention.test_leaves import small_model
from vit_efficient.attention.treeformer.leaves import find_leaves
from vit_efficient.report.leaves import plot_leaves

pytestmark = pytest.mark.once


@pytest.mark.parametrize('channels', [1, 3, 5])
def test_drawing(tmp_path, channels):
    found = find_leaves(small_model(), torch.randn(1, 3, 28, 52))
    plot_leaves(torch.rand(channels, 28, 52), found, tmp_path / 'leaves.png')
    drawn = Image.open(tmp_path / 'leaves.png')
    plot_leaves(torch.rand(channels, 28, 52), found, tmp_path / 'queries.png', queries=True)
    assert drawn.width > drawn.height > 200
