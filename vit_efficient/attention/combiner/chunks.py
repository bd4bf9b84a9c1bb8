"""Attention of the patches of windows to the prefix, to their window and to the summaries that it sees.

Keys of a window and its copy of the summaries go into one softmax, a few windows at a time, so that copies stay in the
cache. For the backward pass they are made again: none is kept.

Letters: B batch, P prefix, w windows, L patches of a window, n summaries, H heads, of D channels of queries and keys
and E of values.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vit_efficient.attention.combiner.summaries import Summaries
from vit_efficient.attention.functional import attend
from vit_efficient.attention.partial import in_autocast, is_fused_on_cpu
from vit_efficient.dct.bases import is_eager
from vit_efficient.utils.compat import flash_attention_on_cpu, flash_attention_on_cpu_backward, is_transformed
from vit_efficient.utils.device import on_gpu

# Bytes of keys and values of the windows that are worked on at once: a CPU keeps them in its cache, a GPU wants large
# operators.
CHUNK_OF_HOST, CHUNK_OF_GPU = 2**23, 2**28


class Seen(NamedTuple):
    """What windows see besides themselves.

    Args:
        k_prefix, v_prefix: (B, H, P, D) and (B, H, P, E)
        key, value, bias: Of all summaries, (B, H, n, D), (B, H, n, E), and (B, H, n) or (1, 1, n).
        index: (w, seen), which of them each window sees, and −1 where one sees fewer than another.
    """

    k_prefix: Tensor
    v_prefix: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    index: Tensor


def attend_windows(
    q: Tensor, k: Tensor, v: Tensor, kv_prefix: tuple, summaries: Summaries | None, index: Tensor | None, how: tuple
) -> list[Tensor]:
    """The patches of windows of one shape, some windows at a time: (B, w, H, L, D or E) each → (B, … · L, H, E)

    Args:
        kv_prefix: Keys and values that all see, (B, H, P, D or E).
        summaries: Of all sets, if there are any.
        index: As of `Seen`, if there are summaries.
        how: Scale, fused, dropout.
    """
    scale, fused, dropout = how
    batch, number, heads, area, dim = k.shape
    if summaries is None:
        summaries = Summaries(k.new_empty(batch, heads, 0, dim), v.new_empty(batch, heads, 0, v.shape[-1]), None)
        index = torch.empty(number, 0, dtype=torch.int32, device=k.device)
    bias = k.new_zeros(1, 1, summaries.key.shape[2]) if summaries.bias is None else summaries.bias
    seen = Seen(*kv_prefix, summaries.key, summaries.value, bias, index)
    most = number
    if is_eager(q):
        keys = seen.k_prefix.shape[2] + area + index.shape[1]
        bytes_of_one = batch * heads * keys * (dim + v.shape[-1]) * k.element_size()
        most = max(1, (CHUNK_OF_GPU if on_gpu(q) else CHUNK_OF_HOST) // max(1, bytes_of_one))
    if dropout == 0 and is_fused_on_cpu(fused, q, k, v, *seen[:-1]):
        return [_Fused.apply(most, scale, seen.index, *in_autocast(q, k, v, *seen[:-1]))]
    checkpoints = most < number and torch.is_grad_enabled()
    checkpoints = checkpoints and not any(map(is_transformed, (q, k, v, *seen)))  # torch.func has none
    y = []
    for *of_some, seen_by_some in _chunks(most, (q, k, v), seen):
        if checkpoints:
            given = dict(use_reentrant=False, preserve_rng_state=dropout > 0)
            y.append(checkpoint(_attend_some, *of_some, seen_by_some, *how, **given))
        else:
            y.append(_attend_some(*of_some, seen_by_some, *how))
    return y


def _chunks(most: int, tensors: tuple, seen: Seen) -> Iterator[tuple]:
    """Each up to `most` windows of (B, w, …) and what they see."""
    for *of_some, index in zip(*(t.split(most, dim=1) for t in tensors), seen.index.split(most), strict=True):
        yield *of_some, seen._replace(index=index)


def _attend_some(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float, fused: bool, dropout: float) -> Tensor:
    """As `attend_windows`, of all windows at once."""
    k, v, mask = _gathered(k, v, seen)
    y = attend(q.flatten(0, 1), k, v, scale, fused, dropout, mask)
    return _tokens(y, *q.shape[:2])


def _gathered(k: Tensor, v: Tensor, seen: Seen) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys and values that windows see, (B · w, H, keys, D or E), and what is added to scores, (B · w, H or 1, 1,
    keys)."""
    batch, number = k.shape[:2]
    index = seen.index.clamp(min=0).flatten()

    def by_windows(t: Tensor) -> Tensor:  # (B, H, n, …) → (B, w, H, seen, …)
        return t.index_select(2, index).unflatten(2, seen.index.shape).transpose(1, 2)

    def joined(prefix: Tensor, own: Tensor, summaries: Tensor) -> Tensor:
        prefix = prefix.unsqueeze(1).expand(-1, number, -1, -1, -1)
        return torch.cat([prefix, own, by_windows(summaries)], dim=3).flatten(0, 1)

    keys, values = joined(seen.k_prefix, k, seen.key), joined(seen.v_prefix, v, seen.value)
    if not seen.index.shape[1]:
        return keys, values, None
    mask = by_windows(seen.bias).masked_fill((seen.index < 0).unsqueeze(1), -torch.inf)
    mask = F.pad(mask, (keys.shape[2] - seen.index.shape[1], 0)).unsqueeze(3)
    return keys, values, mask.expand(batch, -1, -1, -1, -1).flatten(0, 1)


def _tokens(y: Tensor, batch: int, number: int) -> Tensor:
    """(B · w, H, L, E) → (B, w · L, H, E)"""
    return y.transpose(1, 2).unflatten(0, (batch, number)).flatten(1, 2)


class _Fused(torch.autograd.Function):
    """As `attend_windows`, by PyTorch's fused attention on a CPU and its backward pass.

    The gradient of the bias of a key is the sum over queries of that of its scores: that of a channel more of the keys,
    which is 1 in queries and 0 in keys.
    """

    @staticmethod
    def forward(ctx, most: int, scale: float, index: Tensor, q: Tensor, k: Tensor, v: Tensor, *seen: Tensor) -> Tensor:
        width, lse, start = max(q.shape[-1], v.shape[-1]), [], 0
        y = _by_tokens(q, v.shape[-1])
        for q_some, *of_some in _chunks(most, (q, k, v), Seen(*seen, index)):
            keys, values, mask = _gathered(*of_some)
            wide = (_widened(t, width) for t in (q_some.flatten(0, 1), keys, values))
            y_some, lse_some = flash_attention_on_cpu(*wide, mask, scale)
            some = slice(start, start := start + q_some.shape[1])
            y[:, some] = y_some[..., : v.shape[-1]].unflatten(0, q_some.shape[:2])
            lse.append(lse_some)
        y = y.transpose(2, 3).flatten(1, 2)
        ctx.save_for_backward(q, k, v, *seen, index, y, *lse)
        ctx.most, ctx.scale = most, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors  # once: checkpoints make them again each time
        seen, y, *lse = Seen(*saved[:6]), *saved[6:]
        if is_transformed(dy):  # several gradients at once, as `torch.autograd.grad(is_grads_batched=True)` hands down
            return None, None, None, *_written_out(ctx, q, k, v, seen, dy)
        number, area = k.shape[1], k.shape[3]
        prefix, with_bias = seen.k_prefix.shape[2], ctx.needs_input_grad[-1]
        width = max(q.shape[-1], v.shape[-1]) + with_bias
        wide = Seen(*(_widened(t, width) for t in seen[:4]), *seen[4:])
        dq, dk, dv = grads = [_by_tokens(t, t.shape[-1]) for t in (q, k, v)]
        # Summed over all windows, so in float32 at least.
        of_seen = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in seen[:4]]
        of_bias = of_seen[0].new_zeros(seen.key.shape[:3])
        y, dy = (t.unflatten(1, (number, area)).transpose(2, 3) for t in (y, dy))
        start = 0
        for (*of_some, seen_by_some), lse_some in zip(_chunks(ctx.most, (q, k, v, y, dy), wide), lse, strict=True):
            q_some, *of_some = (_widened(t, width, with_bias * (i == 0)) for i, t in enumerate(of_some))
            keys, values, mask = _gathered(*of_some[:2], seen_by_some)
            y_some, dy_some = (t.flatten(0, 1) for t in of_some[2:])
            found = flash_attention_on_cpu_backward(
                dy_some, q_some.flatten(0, 1), keys, values, y_some, lse_some, mask, ctx.scale
            )
            of_queries, of_keys, of_values = (t.unflatten(0, q_some.shape[:2]) for t in found)
            some = slice(start, start := start + q_some.shape[1])
            dq[:, some] = of_queries[..., : q.shape[-1]]
            index = seen_by_some.index.clamp(min=0).flatten()
            for i, own, g in ((0, dk, of_keys[..., : k.shape[-1]]), (1, dv, of_values[..., : v.shape[-1]])):
                of_prefix, own[:, some], of_sets = g.split([prefix, area, g.shape[3] - prefix - area], dim=3)
                of_seen[i] += of_prefix.sum(dim=1, dtype=of_seen[i].dtype)
                of_sets = of_sets.transpose(1, 2).flatten(2, 3).to(of_seen[i + 2].dtype)
                of_seen[i + 2].index_add_(2, index, of_sets)
            if with_bias:
                of_some_bias = of_keys[:, :, :, prefix + area :, -1].transpose(1, 2).flatten(2, 3)
                of_bias.index_add_(2, index, of_some_bias.to(of_bias.dtype) / ctx.scale)
        of_seen = (
            g.to(t.dtype) for g, t in zip([*of_seen, of_bias.sum_to_size(seen.bias.shape)], seen[:5], strict=True)
        )
        return None, None, None, *grads, *of_seen


def _written_out(ctx, q: Tensor, k: Tensor, v: Tensor, seen: Seen, dy: Tensor) -> list[Tensor | None]:
    """The gradients of queries, keys, values and all that is seen, by PyTorch's own of what is computed once more."""
    needed = ctx.needs_input_grad[3:]
    with torch.enable_grad():
        given = [t.detach().requires_grad_(some) for t, some in zip((q, k, v, *seen[:-1]), needed, strict=True)]
        y = _attend_some(*given[:3], Seen(*given[3:], seen.index), ctx.scale, True, 0.0)
    found = iter(torch.autograd.grad(y, [t for t in given if t.requires_grad], dy))
    return [next(found) if some else None for some in needed]


def _by_tokens(t: Tensor, channels: int) -> Tensor:
    """An empty tensor (B, w, H, L, channels), in the memory of which the heads of a token are beside each other."""
    return t.new_empty(*(t.shape[i] for i in (0, 1, 3, 2)), channels).transpose(2, 3)


def _widened(t: Tensor, width: int, value: float = 0.0) -> Tensor:
    """A tensor with channels of a value at the end, `width` in all."""
    return F.pad(t, (0, width - t.shape[-1]), value=value) if width > t.shape[-1] else t
