"""Models compiled block by block: one graph for equal blocks, the same outputs and names."""

import copy

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from vit_efficient.models import compile_blocks
from vit_efficient.utils.compat import without_recompile_limit

pytestmark = pytest.mark.compiled
TINY = {'img_size': 32, 'patch_size': 8, 'embed_dim': 24, 'num_heads': 2, 'num_classes': 5}


@pytest.fixture
def compiler():
    torch.compiler.reset()
    return CompileCounterWithBackend('aot_eager')


@pytest.mark.parametrize(
    'name', ['vit_tiny_patch16_224', 'vit_dct_tiny', 'vit_linformer_tiny', 'vit_treeformer_tc_tiny']
)
def test_equal_blocks_share_a_graph(name, compiler):
    model = timm.create_model(name, depth=4, **TINY)
    written, x = copy.deepcopy(model), torch.rand(2, 3, 32, 32)
    assert compile_blocks(model, backend=compiler) is model
    for _ in range(2):
        for one in (model, written):
            one.zero_grad()
            one(x).square().sum().backward()
    assert compiler.frame_count == 1
    assert model.state_dict().keys() == written.state_dict().keys()
    for ours, theirs in zip(model.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), written.eval()(x))
    assert compiler.frame_count == 2  # one for training, one for evaluation
    copy.deepcopy(model)(torch.rand(3, 3, 32, 32))
    assert compiler.frame_count == 2


def test_blocks_that_drop_paths_are_compiled_however_many_they_are():
    torch.compiler.reset()
    compiler = CompileCounter()
    model = compile_blocks(timm.create_model('vit_dct_tiny', depth=10, drop_path_rate=0.5, **TINY), backend=compiler)
    with without_recompile_limit():
        model(torch.rand(2, 3, 32, 32))
    assert compiler.frame_count == 10


def test_a_model_without_blocks_is_compiled_as_a_whole(compiler):
    model = timm.create_model('test_resnet.r160_in1k').eval()
    written, x = copy.deepcopy(model), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compile_blocks(model, backend=compiler)(x), written(x))
    assert compiler.frame_count == 1
    assert model.state_dict().keys() == written.state_dict().keys()
