"""Queries, keys and values, as timm's attentions project them: by one layer or by three, with the biases of each class.

class            layers                        biases
Attention        qkv                           of the layer
DiffAttention    qkv                           of the layer
EvaAttention     qkv, or q_proj, k_proj …      q_bias and v_bias beside qkv, and a buffer of zeros for keys
Beit's           qkv                           as EvaAttention
RelPosAttention  qkv                           of the layer, as SAM's and those of parallel blocks
AttentionRope    qkv, or q_proj, k_proj …      of the layers; there may be fewer heads of keys and values

Of a parallel block, `qkv` is a part of a larger layer (`vit_efficient.utils.projections.Part`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vit_efficient.utils.projections import Rows, is_plain

PARTS = ('q', 'k', 'v')

Projection = Callable[[Tensor], Tensor]


def first_layer(attention: nn.Module) -> nn.Module:
    """The layer that projects queries, alone or with keys and values."""
    return attention.q_proj if attention.qkv is None else attention.qkv


def is_fused(attention: nn.Module) -> bool:
    """Whether one plain layer projects all three, whose rows can be used apart."""
    return attention.qkv is not None and is_plain(attention.qkv)


def projections(attention: nn.Module, first: int = 0, last: int = 3) -> list[tuple[Projection, int]] | None:
    """What projects number `first` to `last` - 1 of queries, keys and values: in their order, how many each gives.

    Those of a fused layer that is no plain one (an adapter, a quantised one) cannot be had apart: None.
    """
    if attention.qkv is None:
        return [(getattr(attention, f'{part}_proj'), 1) for part in PARTS[first:last]]
    biases = _own_biases(attention)
    count, size = last - first, attention.attn_dim
    if count == 3:
        if biases is None:
            return [(attention.qkv, 3)]
        if not is_plain(attention.qkv):
            return [(lambda x: attention.qkv(x) + torch.cat(biases), 3)]
        return [(Rows(attention.qkv.weight, torch.cat(biases), attention.qkv_bias_separate), 3)]
    if not is_plain(attention.qkv):
        return None
    rows = slice(first * size, last * size)
    if biases is not None:
        of_parts = biases[first:last]
        bias = of_parts[0] if count == 1 else torch.cat(of_parts)
        return [(Rows(attention.qkv.weight[rows], bias, attention.qkv_bias_separate), count)]
    bias = attention.qkv.bias
    return [(Rows(attention.qkv.weight[rows], None if bias is None else bias[rows]), count)]


def _own_biases(attention: nn.Module) -> tuple[Tensor, Tensor, Tensor] | None:
    """The biases that stand beside the fused layer, in the attention itself."""
    biases = tuple(getattr(attention, f'{part}_bias', None) for part in PARTS)
    return None if biases[0] is None else biases
