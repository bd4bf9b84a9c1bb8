"""Which kernels softmax attention may choose from."""

import pytest
import torch
from torch.backends import cuda
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit_efficient.attention.functional import FEW_QUERIES, attend, bias_as_channel
from vit_efficient.utils import device


@pytest.fixture
def cudnn(monkeypatch):
    """Whether cuDNN was enabled, at each call of `scaled_dot_product_attention`."""
    found, real = [], F.scaled_dot_product_attention

    def attention(*tensors, **options):
        found.append(cuda.cudnn_sdp_enabled())
        return real(*tensors, **options)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', attention)
    return found


def tensors(queries, keys=11):
    return (torch.randn(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (queries, keys, keys))


@pytest.mark.parametrize(
    'queries, keys, masks, allowed',
    [
        (FEW_QUERIES, 1025, False, True),
        (FEW_QUERIES - 1, 1025, False, False),
        (1, 11, False, False),
        (1, 1, False, True),
        (49, 50, False, True),  # windows
        (FEW_QUERIES, 11, True, False),
    ],
)
def test_masks_and_few_queries_are_kept_from_cudnn(monkeypatch, cudnn, queries, keys, masks, allowed):
    q, k, v = tensors(queries, keys)
    mask = torch.rand(1, keys) < 0.7 if masks else None
    expected = attend(q, k, v, 0.3, True, 0.0, mask)
    assert cudnn == [True]  # of a CPU there is nothing to choose
    monkeypatch.setattr(device, 'HOSTS', ())
    assert torch.equal(attend(q, k, v, 0.3, True, 0.0, mask), expected)
    assert cudnn[1:] == [allowed] and cuda.cudnn_sdp_enabled()


def test_a_choice_from_outside_is_kept(monkeypatch, cudnn):
    monkeypatch.setattr(device, 'HOSTS', ())
    q, k, v = tensors(1)
    with sdpa_kernel([SDPBackend.MATH]):
        attend(q, k, v, 0.3, True)
        assert cuda.math_sdp_enabled() and not cuda.flash_sdp_enabled()
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]), pytest.raises(RuntimeError, match='backend'):  # it has no choice
        attend(q, k, v, 0.3, True)
    assert cudnn == [False, True]


def test_after_an_error_all_are_enabled(monkeypatch):
    monkeypatch.setattr(device, 'HOSTS', ())
    q, k, v = tensors(1)
    with pytest.raises(RuntimeError):
        attend(q, k[..., :3], v, 0.3, True)
    assert cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize('masks', (False, True))
@pytest.mark.compiled
def test_compiled_as_one_graph(monkeypatch, masks):
    monkeypatch.setattr(device, 'HOSTS', ())
    q, k, v = tensors(5)
    mask = torch.rand(1, 11) < 0.7 if masks else None
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend='aot_eager')
    assert torch.allclose(compiled(q, k, v, 0.3, True, 0.0, mask), attend(q, k, v, 0.3, True, 0.0, mask))


@pytest.mark.parametrize('dtype, multiple', [(torch.bfloat16, 8), (torch.float32, 4), (torch.float64, 4)])
@pytest.mark.parametrize('dim', (1, 7, 8, 64))
def test_channels_are_whole_16_bytes(dtype, multiple, dim):
    q, k, bias = torch.randn(3, dim, dtype=dtype), torch.randn(5, dim, dtype=dtype), torch.randn(5, 1, dtype=dtype)
    wide_q, wide_k = bias_as_channel(q, k, bias, 0.5)
    assert wide_q.shape[-1] == wide_k.shape[-1] == dim + multiple - dim % multiple
    expected = q.double() @ k.double().mT + 2 * bias.mT.double()
    assert torch.allclose(wide_q.double() @ wide_k.double().mT, expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_a_bias_of_minus_infinity_hides_keys(dtype):
    q, k, v = (t.to(dtype) for t in (torch.randn(5, 8), torch.randn(7, 8), torch.randn(7, 8)))
    bias = torch.zeros(1, 7, dtype=dtype).index_fill(1, torch.tensor([2, 5]), -torch.inf).requires_grad_()
    kept = torch.tensor([0, 1, 3, 4, 6])
    y = attend(q, k, v, 0.3, True, 0.0, bias)
    assert torch.allclose(y, attend(q, k[kept], v[kept], 0.3, True), atol=2e-3 if dtype == torch.float16 else 1e-14)
    y.sum().backward()
    assert bias.grad.isfinite().all() and not bias.grad[0, [2, 5]].any()
