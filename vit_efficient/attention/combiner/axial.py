"""Combiner's axial pattern: the row and the column of a patch, and summaries of what is left of the other columns.

Letters: B batch, P prefix, R rows and C columns of patches, H heads, of D channels of queries and keys and E of values.
"""

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from vit_efficient.attention.combiner.summaries import Summaries
from vit_efficient.attention.functional import attend, bias_as_channel
from vit_efficient.attention.partial import Part, attend_with_lse, combine
from vit_efficient.utils.compat import are_numbers


def attend_axially(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: int,
    height,
    width,
    transpose: bool,
    summary: str,
    count: bool,
    how: tuple,
) -> Tensor:
    """Attention of patches to their rows, their columns and summaries of what is left of the others, and of prefix
    tokens to all.

    Args:
        q, k, v: (B, H, N, D or E)
        prefix, height, width: The grid.
        transpose, summary, count: The options of the mechanism, `count` for `count_bias`.
        how: Scale, and whether to use PyTorch's fused attention.

    Returns:
        (B, H, N, E)
    """
    return _attend_axially(q, k, v, prefix, height, width, transpose, summary, count, how)


# A leaf for FX, because what it does depends on the sizes; called in this module, where FX finds it.
@torch.fx.wrap
@register_notrace_function
def _attend_axially(q, k, v, prefix: int, height, width, transpose: bool, summary: str, count: bool, how) -> Tensor:
    # Split, not sliced: the gradient of a slice is as large as the whole.
    first, patches = zip(*(t.split_with_sizes([prefix, t.shape[2] - prefix], dim=2) for t in (q, k, v)), strict=True)
    y = [attend(first[0], k, v, *how)] if prefix else []
    on_grid = [t.unflatten(2, (height, width)) for t in patches]
    if transpose:
        on_grid = [t.transpose(2, 3) for t in on_grid]
    of_patches = _attend_patches(*on_grid, first[1:], summary, count, *how)
    if transpose:
        of_patches = of_patches.transpose(2, 3)
    return torch.cat([*y, of_patches.flatten(2, 3)], dim=2)


def _attend_patches(
    q: Tensor, k: Tensor, v: Tensor, kv_prefix: tuple, summary: str, count: bool, scale: float, fused: bool
) -> Tensor:
    """(B, H, R, C, D or E) each → (B, H, R, C, E); `kv_prefix` are keys and values that all see, (B, H, P, D or E)."""
    batch, _, rows, columns, _ = q.shape
    in_rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # (B · R, H, C, D or E)
    near = [t.repeat_interleave(rows, dim=0) for t in kv_prefix]
    if are_numbers(rows) and rows == 1:
        keys, values = (torch.cat(parts, dim=2) for parts in zip(near, in_rows[1:], strict=True))
        y = attend_with_lse(in_rows[0], keys, values, scale, fused).output
        return y.unflatten(0, (batch, rows)).transpose(1, 2)

    in_columns = [t.permute(0, 3, 1, 2, 4).flatten(0, 1) for t in (q, k, v)]  # (B · C, H, R, D or E)
    far = Summaries(
        *(_by_rows(t, batch, columns) for t in _summarise_others(*in_columns, summary, count, scale, fused))
    )
    keys, values = (torch.cat(parts, dim=2) for parts in zip(near, in_rows[1:], far[:2], strict=True))
    bias = torch.cat([far.bias.new_zeros(*far.bias.shape[:2], keys.shape[2] - columns, 1), far.bias], dim=2)
    own = torch.arange(columns, device=q.device)
    sees = torch.cat([own.new_ones(columns, keys.shape[2] - columns) > 0, own != own[:, None]], dim=1)
    of_rows = attend_with_lse(*bias_as_channel(in_rows[0], keys, bias, scale), values, scale, fused, sees)
    of_columns = attend_with_lse(*in_columns, scale, fused, _others(rows, q.device))
    lse = _by_rows(of_columns.lse[..., None], batch, columns).squeeze(-1)
    y = combine([of_rows, Part(_by_rows(of_columns.output, batch, columns), lse)]).output
    return y.unflatten(0, (batch, rows)).transpose(1, 2)


def _by_rows(t: Tensor, batch: int, columns: int) -> Tensor:
    """(B · C, H, R, …) → (B · R, H, C, …)"""
    return t.unflatten(0, (batch, columns)).transpose(1, 3).flatten(0, 1)


def _others(length, device: torch.device) -> Tensor:
    """(length, length): whether a place is another than one."""
    place = torch.arange(length, device=device)
    return place != place[:, None]


def _summarise_others(
    q: Tensor, k: Tensor, v: Tensor, summary: str, count: bool, scale: float, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The summaries of a column without one of its patches, for each: key, value and bias, (B · C, H, R, D, E or 1).

    The bias is −∞ where there is no other patch.
    """
    others = _others(k.shape[2], k.device)
    number = others.sum(dim=1, keepdim=True).to(k.dtype)

    def mean(t: Tensor) -> Tensor:
        return (t.sum(dim=2, keepdim=True) - t) / number.clamp(min=1)

    def largest(t: Tensor) -> Tensor:
        first = t.argmax(dim=2, keepdim=True)
        row = torch.arange(t.shape[2], device=t.device)[:, None]
        of_others = t.masked_fill(row == first, torch.finfo(t.dtype).min).amax(dim=2, keepdim=True)
        return torch.where(row == first, of_others, t.gather(2, first)).masked_fill(number == 0, 0)

    bias = (number.log() if count else torch.where(number > 0, 0.0, -torch.inf).to(k.dtype)).expand(*k.shape[:3], 1)
    if summary == 'mean':
        return mean(k), mean(v), bias
    pool = largest if summary == 'max' else mean
    query = pool(q)
    if summary != 'tangent':
        return pool(k), attend_with_lse(query, k, v, scale, fused, others).output, bias
    weighed, lse = attend_with_lse(query, k, torch.cat([k, v], dim=-1), scale, fused, others)
    key, value = weighed.split([k.shape[-1], v.shape[-1]], dim=-1)
    if count:
        bias = lse[..., None].to(k.dtype) - scale * (query * key).sum(dim=-1, keepdim=True)
    return key, value, bias
