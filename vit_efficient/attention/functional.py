"""Softmax attention, once: fused, or written out.

softmax(scale · q kᵀ + mask) v, with q (…, queries, D), k (…, keys, D), v (…, keys, E). A mask is boolean, true for the
keys that a query sees, or a bias that is added to the scores.
"""

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.utils.device import on_gpu


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
        mask: What `masked` takes; a bias that has a gradient is of keys, (1, keys).

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

    Further channels are zeros of the keys: fused kernels of GPUs want multiples of 4.
    """
    more = 4 - q.shape[-1] % 4
    k = torch.cat([k, (bias / scale).to(k.dtype).expand(*k.shape[:-1], 1)], dim=-1)
    return F.pad(q, (0, more), value=1.0), F.pad(k, (0, more - 1))


def is_bias_of_keys(mask: Tensor) -> bool:
    """Whether a mask is (1, keys), added to the scores of all queries."""
    return mask.ndim == 2 and mask.shape[0] == 1 and mask.dtype != torch.bool


# Leaves for FX, to which nothing is None.


@torch.fx.wrap
@register_notrace_function
def attend_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, mask: Tensor | None) -> Tensor:
    """`attend` by `F.scaled_dot_product_attention`; v may have fewer channels than q and k."""
    if mask is not None and (mask.requires_grad or (is_bias_of_keys(mask) and on_gpu(q) and not q.is_meta)):
        # No fused kernel takes a mask that has a gradient, and the fastest of GPUs takes none; this one costs no
        # queries × keys matrix.
        q, k = bias_as_channel(q, k, mask[0, :, None], scale)
        mask = None
    more = q.shape[-1] - v.shape[-1]
    if not more:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    y = F.scaled_dot_product_attention(q, k, F.pad(v, (0, more)), attn_mask=mask, dropout_p=dropout, scale=scale)
    return y[..., :-more]


@torch.fx.wrap
@register_notrace_function
def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a mask; as they are without one."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
