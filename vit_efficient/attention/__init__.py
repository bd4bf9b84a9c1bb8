"""Efficient attentions, by name. A module here registers what it defines; importing it is all that is needed."""

from . import compressed  # registers itself
from .base import FullAttention, GridAttention, create_attention, swap_attention
from .compressed import CompressedAttention
from .registry import get_attention, list_attentions, register_attention

__all__ = [
    'CompressedAttention',
    'FullAttention',
    'GridAttention',
    'compressed',
    'create_attention',
    'get_attention',
    'list_attentions',
    'register_attention',
    'swap_attention',
]
