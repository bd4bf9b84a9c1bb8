"""Softmax attention, once: fused, or written out.

softmax(scale · q kᵀ + mask) v, with q (…, queries, D), k (…, keys, D), v (…, keys, E). A mask is boolean, true for the
keys that a query sees, or a bias that is added to the scores.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.backends import cuda
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit_efficient.dct.bases import is_eager
from vit_efficient.utils.compat import are_numbers, is_transformed
from vit_efficient.utils.device import on_gpu

FEW_QUERIES = 256  # of fewer, a GPU's kernel that does not split the keys leaves most of the GPU idle


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    fused: bool,
    dropout: float | nn.Dropout = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of queries to keys.

    Args:
        q, k, v: (…, queries, D), (…, keys, D), (…, keys, E)
        scale: The factor of the scores.
        fused: Whether to use PyTorch's fused attention.
        dropout: The fraction of the weights that is dropped, or the module that drops them, whose hooks see the weights
            where they are written out.
        mask: What `masked` takes.

    Returns:
        (…, queries, E)
    """
    is_module = isinstance(dropout, nn.Module)
    if fused:
        rate = dropout.p * dropout.training if is_module else dropout
        return attend_fused(q, k, v, scale, rate, mask)
    weights = attention_weights(q, k, scale, mask)
    return (dropout(weights) if is_module else F.dropout(weights, dropout)) @ v


def attention_weights(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale · q kᵀ + mask): (…, queries, keys)"""
    return masked((q * scale) @ k.mT, mask).softmax(dim=-1)


def bias_as_channel(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys with a bias of the keys, (…, keys, 1), in their product: as a channel more, 1 for queries.

    Further channels are zeros of the keys: GPUs' kernels want rows of whole 16 bytes. (Twice as many make CPUs slower.)
    """
    whole = max(4, 16 // q.element_size())
    more = whole - q.shape[-1] % whole
    k = torch.cat([k, (bias / scale).to(k.dtype).expand(*k.shape[:-1], 1)], dim=-1)
    return F.pad(q, (0, more), value=1.0), F.pad(k, (0, more - 1))


def is_bias_of_keys(mask: Tensor) -> bool:
    """Whether a mask is (…, 1, keys), added to the scores of all queries."""
    return mask.shape[-2] == 1 and mask.dtype != torch.bool


# Leaves for FX, to which nothing is None.


@torch.fx.wrap
@register_notrace_function
def attend_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, mask: Tensor | None) -> Tensor:
    """`attend` by `F.scaled_dot_product_attention`."""
    if mask is not None and is_bias_of_keys(mask) and (_may_have_gradient(mask) or (on_gpu(q) and not q.is_meta)):
        # Few fused kernels take a mask that has a gradient, and the fastest of GPUs takes none; this one costs no
        # queries × keys matrix. A product cannot have −∞.
        q, k = bias_as_channel(q, k, mask.mT.clamp(min=torch.finfo(k.dtype).min / 2 * scale), scale)
        mask = None
    more = max(0, q.shape[-1] - v.shape[-1])  # fused kernels want values of as many channels
    v = F.pad(v, (0, more)) if more else v
    with _backends(q, k, mask):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return y[..., :-more] if more else y


def _may_have_gradient(mask: Tensor) -> bool:
    """Whether a mask has a gradient, as it says itself; one that `torch.func` wraps does not say so. A graph of
    `torch.jit.trace` is to be the same with gradients and without, and its kernel is chosen where it is run."""
    if torch.jit.is_tracing():
        return False
    return mask.requires_grad or (is_eager(mask) and is_transformed(mask))


def _backends(q: Tensor, k: Tensor, mask: Tensor | None) -> AbstractContextManager:
    """The kernels that attention may choose from: of a mask, or of few queries to many keys, not cuDNN's.

    PyTorch prefers it on recent GPUs. There its backward pass fails or is NaN with one query (pytorch#138529,
    cudnn-frontend#1072) and with a mask (pytorch#196678). Of small windows it is the fastest.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    is_few = are_numbers(queries, keys) and queries < FEW_QUERIES and keys > 4 * queries
    if not on_gpu(q) or (mask is None and not is_few):
        return nullcontext()
    if torch.compiler.is_compiling():  # which could not ask what is enabled
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return _without_cudnn()


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """A context in which attention is not cuDNN's, unless it is the only one enabled."""
    before = cuda.cudnn_sdp_enabled()
    others = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.math_sdp_enabled()
    cuda.enable_cudnn_sdp(before and not others)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(before)


@torch.fx.wrap
@register_notrace_function
def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a mask; as they are without one."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
