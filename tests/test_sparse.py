"""Sparse layers against the dense ones that they replace."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.processes import ROOT
from tests.test_prune import vit
from vit_efficient import save_model
from vit_efficient.models import load_model
from vit_efficient.prune import prune, sparsity
from vit_efficient.sparse import SparseLinear, load_sparse, sparse_linear
from vit_efficient.utils.errors import UserError


def sparse_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', [(7,), (5, 7), (2, 5, 7), (2, 3, 5, 7)])
def test_a_sparse_layer_equals_the_dense_one(bias, dtype, shape):
    dense = nn.Linear(7, 9, bias).to(dtype).eval()
    dense.weight.data[torch.rand(9, 7) < 0.7] = 0
    dense.weight.data[3] = 0
    sparse = SparseLinear.from_linear(dense)
    assert len(sparse.values) == dense.weight.count_nonzero()
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y, z = dense(x), sparse(x)
    torch.testing.assert_close(z, y)
    assert z.is_contiguous()
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x) for out in (z, y)))


@pytest.mark.parametrize('name', ['vit_full_tiny', 'vit_dct_tiny', 'vit_linformer_tiny', 'vit_tiny_patch16_224'])
def test_a_sparse_model_equals_the_dense_one_and_is_saved_in_a_smaller_file(name, tmp_path):
    dense = vit(name, embed_dim=96)
    prune(dense, 0.95)
    sparse = sparse_linear(copy.deepcopy(dense), below=0.5)
    assert len(sparse_of(sparse)) == 8  # qkv, proj, fc1 and fc2 of two blocks; the head is dense
    images = torch.randn(2, 3, 16, 16)
    expected = dense(images)
    torch.testing.assert_close(sparse(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    save_model(dense, tmp_path / 'dense')
    save_model(sparse, tmp_path / 'sparse')
    sizes = [(tmp_path / kind / 'model.safetensors').stat().st_size for kind in ('dense', 'sparse')]
    assert sizes[1] < 0.3 * sizes[0]
    loaded = load_sparse(tmp_path / 'sparse')
    assert sparse_of(loaded) == sparse_of(sparse)
    assert torch.equal(loaded(images), sparse(images))


def test_attentions_that_read_a_weight_by_themselves_keep_it():
    dense = vit('eva02_tiny_patch14_224', embed_dim=16)
    prune(dense, 0.9)
    sparse = sparse_linear(copy.deepcopy(dense), below=0.5)
    assert 'blocks.0.attn.qkv' not in sparse_of(sparse) and 'blocks.0.attn.proj' in sparse_of(sparse)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(sparse(images), dense(images), rtol=0, atol=1e-5)


def test_only_layers_that_are_sparse_enough_are_replaced():
    model = vit()
    prune(model, 0.9, skip=('head', 'blocks.1'))
    sparse_linear(model, below=0.6)
    assert set(sparse_of(model)) <= {f'blocks.0.{name}' for name in ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')}
    assert 'density=0.' in str(model.blocks[0].mlp.fc1)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r'below=0.2: the sparsest linear layer has a density of 1.000; prune the model'
    ):
        sparse_linear(vit())
    with pytest.raises(UserError, match='below must be a number with 0 < below ≤ 1, got below=0'):
        sparse_linear(vit(), below=0)
    model = vit().half()
    prune(model, 0.95)
    with pytest.raises(UserError, match='its weight is torch.float16; sparse layers are float32 or float64'):
        sparse_linear(model, below=0.5)
    model = model.float()
    sparse_linear(model, below=0.5)
    images = torch.randn(1, 3, 16, 16)
    with pytest.raises(UserError, match='does not learn: call model.eval'):
        model.train()(images)
    model.eval()
    with pytest.raises(UserError, match='float32 or float64, inputs and weights alike, got torch.bfloat16'):
        layer = model.get_submodule(sparse_of(model)[0])
        layer(torch.ones(2, layer.in_features, dtype=torch.bfloat16))
    with pytest.raises(UserError, match='computes on the CPU, got meta; keep the model dense on other devices'):
        layer(torch.ones(2, layer.in_features, device='meta'))
    save_model(vit('vit_linformer_tiny'), tmp_path / 'dense')
    (tmp_path / 'dense/model.safetensors').write_bytes(b'')
    with pytest.raises(UserError, match='dense: not a sparse model that save_model has saved'):
        load_sparse(tmp_path / 'dense')
    with pytest.raises(UserError, match='no such model folder'):
        load_sparse(tmp_path / 'nothing')
    with pytest.raises(UserError, match=r'x must be \(…, 7\), as in_features says, got \(2, 8\)'):
        SparseLinear(7, 3, 0).eval()(torch.ones(2, 8))
    with pytest.raises(UserError, match='replaces layers inside of a model, got a layer'):
        sparse_linear(nn.Linear(3, 4))
    with pytest.raises(UserError, match='blocks.0.attn.qkv: its weight is on meta'):
        sparse_linear(vit().to('meta'))


def test_autocast_is_refused():
    model = vit()
    prune(model, 0.95)
    sparse_linear(model, below=0.5)
    with (
        torch.autocast('cpu', torch.bfloat16),
        pytest.raises(UserError, match='torch.bfloat16 and .*leave autocast'),
    ):
        model(torch.randn(1, 3, 16, 16))


def test_what_is_sparse_already_is_said_where_dense_models_are_taken(tmp_path):
    model = vit()
    prune(model, 0.95)
    save_model(model, tmp_path / 'dense')
    sparse_linear(model, below=0.5)
    for call in (lambda: prune(model, 0.5), lambda: sparsity(model)):
        with pytest.raises(UserError, match='blocks.0.attn.qkv is sparse already; prune, and count'):
            call()
    save_model(model, tmp_path / 'sparse')
    with pytest.raises(UserError, match='a sparse model; vit_efficient.sparse.load_sparse reads it'):
        load_model(tmp_path / 'sparse')
    with pytest.raises(UserError, match='not a sparse model .*none of its layers is sparse'):
        load_sparse(tmp_path / 'dense')


def test_double_precision_is_saved_and_loaded(tmp_path):
    model = vit().double()
    prune(model, 0.95)
    sparse_linear(model, below=0.5)
    save_model(model, tmp_path)
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(load_sparse(tmp_path)(images), model(images))


def test_a_layer_under_two_names_becomes_one():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
    model.append(model[0])
    model[0].weight.data[1:] = 0
    sparse_linear(model.eval())
    assert isinstance(model[0], SparseLinear) and model[0] is model[2]


@pytest.mark.parametrize('tokens', [0, 1, 32, 33, 100])
def test_any_number_of_tokens(tokens):
    dense = nn.Linear(7, 9).double().eval()
    dense.weight.data[torch.rand(9, 7) < 0.7] = 0
    sparse = SparseLinear.from_linear(dense)
    x = torch.randn(2, tokens, 7, dtype=torch.float64, requires_grad=True)
    y, z = dense(x), sparse(x)
    torch.testing.assert_close(z, y, rtol=0, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (z, y)))
    torch.library.opcheck(
        torch.ops.vit_efficient.sparse_linear, (x[0], sparse.starts, sparse.columns, sparse.values, sparse.bias)
    )


@pytest.mark.subprocess
def test_nothing_is_said_of_a_beta():
    code = 'import torch; from vit_efficient.sparse import SparseLinear as S; S(4, 3, 0).eval()(torch.ones(2, 4))'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, '')
