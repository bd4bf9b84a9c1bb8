"""The options of all mechanisms and compressors, and the grid: the types they take, and names that are wrong."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from vit_efficient import PatchGrid, create_attention, list_attentions
from vit_efficient.attention import layer_options
from vit_efficient.compress import COMPRESSORS, Compressor, register_compressor

GRID = (7, 13)
N = np.int64

# Every integer option of every mechanism: the mechanism, its options with NumPy's integers, and how they come out.
INTEGERS = [
    ('dct', dict(num_tokens=N(9)), dict(num_tokens=9)),
    ('dct', dict(num_tokens=(N(3), N(4)), local=N(3)), dict(num_tokens=[3, 4], local=3)),
    ('dct1d', dict(num_tokens=N(9)), dict(num_tokens=9)),
    ('pool', dict(num_tokens=(N(3), np.int32(4))), dict(num_tokens=[3, 4])),
    ('subsample', dict(num_tokens=np.uint8(9)), dict(num_tokens=9)),
    ('merge', dict(num_tokens=N(9)), dict(num_tokens=9)),
    ('linformer', dict(num_tokens=N(5), grid_size=(N(7), N(13))), dict(num_tokens=5)),
    ('linformer', dict(num_tokens=dict(first=N(8), last=N(4))), dict(num_tokens=8)),
    ('linformer', dict(num_tokens=[N(8), N(4)]), dict(num_tokens=8)),
    ('linformer', dict(projection='conv', num_tokens=(N(3), N(4))), dict(num_tokens=[3, 4])),
    ('nystrom', dict(num_landmarks=N(9), pinv_iterations=N(4)), dict(num_landmarks=9, pinv_iterations=4)),
    ('nystrom', dict(num_landmarks=[N(3), N(4)]), dict(num_landmarks=[3, 4])),
    ('nystrom', dict(residual_kernel=N(3)), dict(residual_kernel=[3, 3])),
    ('nystrom', dict(residual_kernel=(N(3), N(5))), dict(residual_kernel=[3, 5])),
    ('nystrom', dict(residual_kernel=N(0)), dict(residual_kernel=0)),
    ('combiner', dict(window_size=N(3), cell_size=N(2), reach=N(1)), dict(window_size=3, cell_size=2, reach=1)),
    ('combiner', dict(window_size=[N(3), N(4)], cell_size=(N(1), N(2))), dict(window_size=[3, 4], cell_size=[1, 2])),
    ('monarch', dict(block_size=N(6), steps=N(2)), dict(block_size=6, steps=2)),
    ('performer', dict(num_features=N(20)), dict(num_features=20)),
    ('window', dict(window_size=N(3)), dict(window_size=3)),
    ('window', dict(window_size=[N(3), N(4)]), dict(window_size=[3, 4])),
    ('treeformer_tc', dict(tree_height=N(3)), dict(tree_height=3)),
    ('treeformer_tf', dict(tree_height=N(3), num_leaves=N(2)), dict(tree_height=3, num_leaves=2)),
]


@pytest.mark.parametrize(('name', 'options', 'expected'), INTEGERS)
def test_integers_of_numpy_are_integers(name, options, expected):
    attention = create_attention(name, N(12), N(3), **layer_options(name, options, 0, 2, GRID)).eval()
    written = json.loads(json.dumps(attention.options))
    assert written == attention.options and written | expected == written
    torch.manual_seed(0)
    plain = create_attention(name, 12, 3, **written, **({'grid_size': GRID} if name == 'linformer' else {})).eval()
    plain.load_state_dict(attention.state_dict())
    x, grid = torch.randn(2, 92, 12), PatchGrid(N(7), N(13), N(1))
    assert [type(side) for side in (grid.height, grid.width, grid.prefix)] == [int] * 3
    assert grid == PatchGrid(7, 13, 1)
    assert torch.equal(attention(x, grid), plain(x, PatchGrid(7, 13, 1)))


@pytest.mark.parametrize(
    ('name', 'option'), sorted({(name, option) for name, options, _ in INTEGERS for option in options})
)
def test_bools_are_no_integers(name, option):
    with pytest.raises(ValueError, match=f'{option}.*True'):
        create_attention(name, 12, 3, **layer_options(name, {option: True}, 0, 2, GRID))


@pytest.mark.parametrize('name', list_attentions())
def test_an_unknown_option_is_named_with_the_nearest(name):
    known = [*create_attention(name, 12, 3, **layer_options(name, {}, 0, 1, GRID)).options][-1:]
    hint = rf'; did you mean {known[0]}\? \(it has .*{known[0]}' if known else r' \(it has none\)'
    wrong = f'{known[0]}_' if known else 'wrong'
    with pytest.raises(ValueError, match=f"^attention '{name}' has no option '{wrong}'{hint}"):
        create_attention(name, 12, 3, **layer_options(name, {wrong: 1}, 0, 1, GRID))


@pytest.fixture
def faulty(monkeypatch):
    """A compressor of a plug-in, whose constructor has a bug."""
    monkeypatch.setitem(COMPRESSORS, 'faulty', None)  # to be forgotten after the test
    del COMPRESSORS['faulty']

    @register_compressor('faulty')
    class Faulty(Compressor):
        def __init__(self, head_dim: int, factor: int = 2):
            super().__init__()
            self.down = self.up = nn.Linear(head_dim, 'a bug')

    return Faulty


class TestCompressorsOfPlugins:
    def test_a_bug_is_no_wrong_option(self, faulty):
        with pytest.raises(TypeError, match=r'str|empty'):
            create_attention('pool', 12, 3, compressor='faulty')

    def test_options_are_the_arguments_that_no_attention_fills_in(self, faulty):
        assert faulty.option_names() == (['factor'], False)
        for wrong in ('factr', 'head_dim'):
            with pytest.raises(ValueError, match=f"attention 'pool' has no option '{wrong}'.*it has .*factor"):
                create_attention('pool', 12, 3, compressor='faulty', **{wrong: 3})

    def test_a_name_is_taken_once(self, faulty):
        with pytest.raises(ValueError, match="a compressor 'faulty' is registered already: .*Faulty"):
            register_compressor('faulty')(faulty)
