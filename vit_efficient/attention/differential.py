"""Differential attention: a head reads its values by the difference of two maps, which share what they attend to.

Source: Ye et al., "Differential Transformer", ICLR 2025, arXiv 2410.05258. With (q₁, q₂) and (k₁, k₂) of a head,

    out = (1 − λ₀) · norm((softmax(q₁ k₁ᵀ / √D) − λ softmax(q₂ k₂ᵀ / √D)) v)

To a mechanism these are twice as many heads of half the channels, of queries, keys and values alike, so that keys and
values are compressed once. What attends is given the values of a head twice, with all their channels.

Letters: B batch, H heads, N tokens, D channels of a map's queries and keys, 2 D of a head's values.
"""

from torch import Tensor, nn


def values_of_maps(v: Tensor) -> Tensor:
    """Values as each of the two maps of a head reads them: (B, 2 H, N, D) → (B, 2 H, N, 2 D)"""
    of_heads = v.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
    return of_heads.repeat_interleave(2, dim=1)


def difference(y: Tensor, weight: Tensor, norm: nn.Module, start: float) -> Tensor:
    """What a head makes of what its maps read: (B, 2 H, N, 2 D) → (B, H, N, 2 D)

    Args:
        weight: λ
        norm: Of a head's channels.
        start: λ₀, what λ begins near.
    """
    maps = y.unflatten(1, (-1, 2)).unbind(2)
    return norm(maps[0] - weight.type_as(y) * maps[1]) * (1 - start)
