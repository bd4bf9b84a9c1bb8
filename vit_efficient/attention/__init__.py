"""Efficient attentions, by name. A module here registers what it defines; importing it is all that is needed."""

from vit_efficient.attention import (  # these register themselves
    compressed,
    nystrom,
    performer,
    treeformer_tc,
    treeformer_tf,
    window,
)
from vit_efficient.attention.base import FullAttention, GridAttention, create_attention, layer_options, swap_attention
from vit_efficient.attention.compressed import CompressedAttention
from vit_efficient.attention.registry import get_attention, list_attentions, register_attention

__all__ = [
    'CompressedAttention',
    'FullAttention',
    'GridAttention',
    'compressed',
    'create_attention',
    'get_attention',
    'layer_options',
    'list_attentions',
    'nystrom',
    'performer',
    'register_attention',
    'swap_attention',
    'treeformer_tc',
    'treeformer_tf',
    'window',
]
