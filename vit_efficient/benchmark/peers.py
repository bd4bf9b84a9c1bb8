"""Attention layers of other packages, to be timed beside ours: `pip install 'vit-efficient[peers]'`."""

from collections.abc import Callable
from typing import Any

from torch import nn

from vit_efficient.utils.errors import UserError


def _linformer(dim: int, heads: int, tokens: int, **options) -> nn.Module:
    from linformer import LinformerSelfAttention

    return LinformerSelfAttention(dim, tokens, heads=heads, **{'k': 64, **options})


def _nystrom(dim: int, heads: int, tokens: int, **options) -> nn.Module:
    from nystrom_attention import NystromAttention

    return NystromAttention(dim, dim_head=dim // heads, heads=heads, **{'num_landmarks': 64, **options})


def _performer(dim: int, heads: int, tokens: int, **options) -> nn.Module:
    from performer_pytorch import SelfAttention

    return SelfAttention(dim, heads=heads, dim_head=dim // heads, **options)


#: By the name `package/NAME`: makes a layer that is called with (B, tokens, dim), from dim, heads, tokens and options.
#: As many keys and landmarks as ours have by default.
PEERS: dict[str, Callable[..., nn.Module]] = {
    'package/linformer': _linformer,
    'package/nystrom-attention': _nystrom,
    'package/performer-pytorch': _performer,
}


def create_peer(name: str, dim: int, heads: int, tokens: int, options: dict[str, Any]) -> nn.Module:
    """A layer of `PEERS`, in float32 on the CPU; a UserError if its package is missing, or takes no such option."""
    try:
        return PEERS[name](dim, heads, tokens, **options)
    except ImportError as error:
        raise UserError(f"{name}: {error}; pip install 'vit-efficient[peers]'") from None
    except (AssertionError, TypeError) as error:
        raise UserError(f'{name}: {error}') from None
