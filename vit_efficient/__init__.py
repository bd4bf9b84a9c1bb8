"""Efficient attention for timm vision transformers on long image-patch sequences.

Importing the package registers its models with timm.
"""

from vit_efficient import dct
from vit_efficient.attention import create_attention, list_attentions, register_attention
from vit_efficient.conversion import convert, convert_patch_embed, convert_pool
from vit_efficient.dense import DenseModel
from vit_efficient.flops import FlopCount, count_flops
from vit_efficient.graphs import graphed
from vit_efficient.grid import PatchGrid
from vit_efficient.models import DctPatchEmbed, freeze_truncation, kept_tokens, save_model
from vit_efficient.planning import Plan, plan
from vit_efficient.sparse import sparse_linear
from vit_efficient.version import __version__

__all__ = [
    'DctPatchEmbed',
    'DenseModel',
    'FlopCount',
    'PatchGrid',
    'Plan',
    '__version__',
    'convert',
    'convert_patch_embed',
    'convert_pool',
    'count_flops',
    'create_attention',
    'dct',
    'freeze_truncation',
    'graphed',
    'kept_tokens',
    'list_attentions',
    'plan',
    'register_attention',
    'save_model',
    'sparse_linear',
]
