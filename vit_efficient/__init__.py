"""Efficient attention for timm vision transformers on long image-patch sequences.

Importing the package registers its models with timm.
"""

from . import dct
from .attention import create_attention, list_attentions, register_attention
from .conversion import convert
from .flops import FlopCount, count_flops
from .grid import PatchGrid
from .models import kept_tokens, save_model
from .version import __version__

__all__ = [
    'FlopCount',
    'PatchGrid',
    '__version__',
    'convert',
    'count_flops',
    'create_attention',
    'dct',
    'kept_tokens',
    'list_attentions',
    'register_attention',
    'save_model',
]
