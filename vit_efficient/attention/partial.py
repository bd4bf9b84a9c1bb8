"""Softmax attention to parts of the keys, merged as if one softmax had gone over all of them.

Of each part there are the output y and the logarithm of its denominator, lse = log Σ_j exp(s q·k_j). Two make one:

    lse = log(exp lse₁ + exp lse₂)        y = exp(lse₁ − lse) y₁ + exp(lse₂ − lse) y₂

This is exact, in any order, and a part without keys has y = 0 and lse = −∞. Source: Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018, arXiv 1805.02867.
"""

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends import cuda  # what it enables holds for CPUs too
from torch.nn import functional as F

from vit_efficient.attention.functional import masked
from vit_efficient.dct.bases import is_eager
from vit_efficient.utils.compat import flash_attention_on_cpu, flash_attention_on_cpu_backward, is_transformed
from vit_efficient.utils.device import on_gpu


class Part(NamedTuple):
    """Attention to a part of the keys.

    Args:
        output: (…, queries, E)
        lse: (…, queries), −∞ for a query that sees no key.
    """

    output: Tensor
    lse: Tensor


# A leaf for FX, since which way it takes depends on the tensors.
@torch.fx.wrap
@register_notrace_function
def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, fused: bool, mask: Tensor | None = None) -> Part:
    """Attention of queries to a part of the keys; both of its results have gradients.

    Args:
        q, k, v: (B, H, queries, D), (B, H, keys, D), (B, H, keys, E); there may be no keys.
        scale: The factor of the scores.
        fused: Whether to use PyTorch's fused attention, on a CPU. Elsewhere, in a graph, and under transforms of
            `torch.func`, it is written out.
        mask: As of `vit_efficient.attention.functional`, of no more than four axes, without a gradient.
    """
    if is_fused_on_cpu(fused, q, k, v) and k.shape[-2]:
        return Part(*_Fused.apply(*in_autocast(q, k, v), scale, mask))
    scores = masked((q * scale) @ k.mT, mask)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return Part(weights @ v, lse)


def is_fused_on_cpu(fused: bool, *tensors: Tensor) -> bool:
    """Whether attention of these may be a direct call of PyTorch's fused one for CPUs, `flash_attention_on_cpu`."""
    q = tensors[0]
    plain = is_eager(q) and not (q.is_meta or on_gpu(q) or any(map(is_transformed, tensors)))
    return fused and plain and cuda.flash_sdp_enabled()


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the type of autocast, where it is on: kernels that are called directly do not see it."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)  # which float64 never becomes
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def combine(parts: Iterable[Part]) -> Part:
    """One part of several: attention to the keys of all of them."""
    return reduce(_combined, parts)


def _combined(a: Part, b: Part) -> Part:
    nothing = (a.lse == -torch.inf) & (b.lse == -torch.inf)
    lse = torch.logaddexp(*(part.lse.masked_fill(nothing, 0) for part in (a, b)))
    shares = ((part.lse - lse).exp()[..., None].to(part.output.dtype) for part in (a, b))
    output = sum(share * part.output for share, part in zip(shares, (a, b), strict=True))
    return Part(output, lse.masked_fill(nothing, -torch.inf))


class _Fused(torch.autograd.Function):
    """PyTorch's fused attention on a CPU, with the gradient of its log-sum-exp too.

    Its backward pass takes the gradient of the scores to be P (dP − Δ), with Δ = Σ dy · y. With a gradient g of the
    log-sum-exp it is P (dP − (Δ − g)). One more channel makes Δ that much less: its output is −g, with the gradient 1,
    and its values are 0, so that dP stays.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
            mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
        width = max(q.shape[-1], v.shape[-1])
        y, lse = flash_attention_on_cpu(*(F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v)), mask, scale)
        y = y[..., : v.shape[-1]]
        ctx.save_for_backward(q, k, v, y, lse, mask)
        ctx.scale = scale
        if mask is not None:  # of no key, the kernel says 0
            lse = lse.masked_fill((mask == -torch.inf).all(dim=-1), -torch.inf)
        return y, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse, mask = ctx.saved_tensors
        width = max(q.shape[-1], v.shape[-1])
        q_wide, k_wide, v_wide = (F.pad(t, (0, width + 1 - t.shape[-1])) for t in (q, k, v))
        y_wide, dy_wide = (F.pad(t, (0, width - t.shape[-1])) for t in (y, dy))
        y_wide = torch.cat([y_wide, -dlse[..., None].to(y.dtype)], dim=-1)
        dy_wide = F.pad(dy_wide, (0, 1), value=1.0)
        gradients = flash_attention_on_cpu_backward(dy_wide, q_wide, k_wide, v_wide, y_wide, lse, mask, ctx.scale)
        return *(g[..., : t.shape[-1]] for g, t in zip(gradients, (q, k, v), strict=True)), None, None
