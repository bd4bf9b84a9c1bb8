"""Efficient attentions, by name. A module here registers what it defines; importing it is all that is needed."""

# These register themselves.
from vit_efficient.attention import combiner, compressed, monarch, nystrom, performer, window
from vit_efficient.attention.base import (
    FullAttention,
    GridAttention,
    create_attention,
    layer_options,
    swap_attention,
    trained_options,
)
from vit_efficient.attention.compressed import CompressedAttention
from vit_efficient.attention.registry import get_attention, list_attentions, on_register, register_attention
from vit_efficient.attention.treeformer import tc, tf

__all__ = [
    'CompressedAttention',
    'FullAttention',
    'GridAttention',
    'combiner',
    'compressed',
    'create_attention',
    'get_attention',
    'layer_options',
    'list_attentions',
    'monarch',
    'nystrom',
    'on_register',
    'performer',
    'register_attention',
    'swap_attention',
    'tc',
    'tf',
    'trained_options',
    'window',
]
