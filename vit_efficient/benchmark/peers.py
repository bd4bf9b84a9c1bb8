"""Attention layers of others, to be timed beside ours: timm's, PyTorch's, one of a paper, and those of packages."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.grid import PatchGrid
from vit_efficient.utils.checks import as_integer, as_share, check_flag
from vit_efficient.utils.errors import UserError

BLOCK = 128  # tokens of a block of FlexAttention


class FlexWindows(nn.Module):
    """Attention within windows of w × w patches by FlexAttention, which skips the blocks that no window has.

    Tokens come in the order of their windows, so that a window lies in one block, or fills several. On a CPU it takes a
    C++ compiler, and PyTorch has no backward pass of it.

    Raises:
        UserError: If the windows do not divide the grid, or blocks of 128 tokens, or there are prefix tokens.
    """

    compiles = True  # when it is first called

    def __init__(self, dim: int, heads: int, grid: PatchGrid, window_size: int = 8):
        super().__init__()
        w = as_integer('window_size', window_size)
        size = (grid.height, grid.width)
        if any(side % w for side in size) or (BLOCK % w**2 and w**2 % BLOCK) or size[0] * size[1] % BLOCK:
            raise UserError(
                f'window_size={w} on a grid of {size[0]} × {size[1]}: FlexAttention takes whole windows in whole '
                f'blocks of {BLOCK} patches; use window_size=8 and --tokens of which the sides are multiples of 16'
            )
        if grid.prefix:
            raise UserError('takes patches alone; use --prefix 0')
        self.heads, self.window = heads, w
        self.grid = (size[0] // w, w, size[1] // w, w)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self._mask: Any = None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        x = x.view(batch, *self.grid, dim).transpose(2, 3).reshape(batch, tokens, dim)
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # On the meta device all products are counted, as many as there are in the windows.
        y = (self.by_windows if x.is_meta else self.by_blocks)(q, k, v)
        y = self.proj(y.transpose(1, 2).reshape(batch, tokens, dim))
        a, w, b, _ = self.grid
        return y.view(batch, a, b, w, w, dim).transpose(2, 3).reshape(batch, tokens, dim)

    def by_windows(self, *qkv: Tensor) -> Tensor:
        """The same by SDPA, with the windows as a batch; q, k, v are (B, H, N, D)."""
        windows = (t.unflatten(2, (-1, self.window**2)).transpose(1, 2).flatten(0, 1) for t in qkv)
        y = F.scaled_dot_product_attention(*windows)
        return y.unflatten(0, (qkv[0].shape[0], -1)).transpose(1, 2).flatten(2, 3)

    def by_blocks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._mask is None:
            with torch.inference_mode(False):  # to be used with gradients too
                self._mask = window_blocks(q.shape[2], self.window**2, q.device)
        return _flex()(q, k, v, block_mask=self._mask)


@functools.cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def window_blocks(tokens: int, window: int, device: torch.device):
    """The `BlockMask` of windows of so many tokens, one after the other; the N × N mask of them is never made."""
    from torch.nn.attention.flex_attention import BlockMask

    block = torch.arange(tokens // BLOCK, dtype=torch.int32, device=device)
    read = max(1, window // BLOCK)  # blocks that a block reads: those of its window, first in its row
    rows = ((block // read * read)[:, None] + block) % len(block)
    return BlockMask.from_kv_blocks(
        torch.full((1, 1, len(block)), read, dtype=torch.int32, device=device),
        rows[None, None].contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, i, j: i // window == j // window,
    )


class TokenMerging(nn.Module):
    """timm's attention among merged patches, whose outputs go to all that were merged.

    Bipartite soft matching of Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023), sec. 3: the match of
    every second patch is that of the others whose key, the mean over heads, is most similar by cosine; the r most
    similar ones are averaged with their matches.

    Args:
        dim, heads, grid: Of the attention; prefix tokens are not merged.
        keep_ratio: The share of the patches that is left, from 1/2.
        proportional: Add the logarithm of how many patches a token stands for to its scores (eq. 1). To SDPA it is a
            mask, which few of its backends take.
    """

    def __init__(self, dim: int, heads: int, grid: PatchGrid, keep_ratio: float = 0.5, proportional: bool = False):
        super().__init__()
        share = as_share('keep_ratio', keep_ratio)
        if share < 0.5:
            raise UserError(f'keep_ratio must be 1/2 at least, since every second patch stays, got {keep_ratio=}')
        check_flag('proportional', proportional)
        patches = grid.height * grid.width
        self.prefix, self.proportional = grid.prefix, proportional
        self.merged = min(patches - round(share * patches), patches // 2)
        self.attn = Attention(dim, heads, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        first, x = x[:, : self.prefix], x[:, self.prefix :]
        a, b = x[:, ::2], x[:, 1::2]
        with torch.no_grad():
            keys = F.normalize(self._mean_keys(x), dim=-1)
            similar, match = (keys[:, ::2] @ keys[:, 1::2].mT).max(dim=-1)
            order = similar.argsort(dim=-1, descending=True)
            match = match.gather(1, order[:, : self.merged])
            counts = torch.ones(b.shape[:2], dtype=torch.float32, device=x.device)
            counts = counts.scatter_add(1, match, counts.new_ones(match.shape))
        a = _take(a, order)
        b = b.scatter_add(1, _wide(match, b), a[:, : self.merged]) / counts[..., None].to(x.dtype)
        a = a[:, self.merged :]
        bias = None
        if self.proportional:
            bias = F.pad(counts.log(), (self.prefix + a.shape[1], 0))[:, None, None].to(x.dtype)
        y = self.attn(torch.cat([first, a, b], dim=1), attn_mask=bias)
        first, a, b = y.split([self.prefix, a.shape[1], b.shape[1]], dim=1)
        a = _take(torch.cat([_take(b, match), a], dim=1), order.argsort(dim=-1))
        x = torch.empty_like(x)
        x[:, ::2], x[:, 1::2] = a, b
        return torch.cat([first, x], dim=1)

    def _mean_keys(self, x: Tensor) -> Tensor:
        """Keys, averaged over heads: (B, N, D)."""
        heads = self.attn.num_heads
        of_keys = (t.chunk(3)[1].unflatten(0, (heads, -1)).mean(0) for t in (self.attn.qkv.weight, self.attn.qkv.bias))
        return F.linear(x, *of_keys)


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[-1])


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, n, C) of x (B, N, C), by their numbers (B, n)."""
    return x.gather(1, _wide(index, x))


def _linformer(dim: int, heads: int, grid: PatchGrid, **options) -> nn.Module:
    from linformer import LinformerSelfAttention

    return LinformerSelfAttention(dim, grid.num_tokens, heads=heads, **{'k': 64, **options})


def _nystrom(dim: int, heads: int, grid: PatchGrid, **options) -> nn.Module:
    from nystrom_attention import NystromAttention

    return NystromAttention(dim, dim_head=dim // heads, heads=heads, **{'num_landmarks': 64, **options})


def _performer(dim: int, heads: int, grid: PatchGrid, **options) -> nn.Module:
    from performer_pytorch import SelfAttention

    return SelfAttention(dim, heads=heads, dim_head=dim // heads, **options)


def _timm(dim: int, heads: int, grid: PatchGrid, **options) -> nn.Module:
    return Attention(dim, heads, **{'qkv_bias': True, **options})


#: By name: makes a layer that is called with (B, tokens, dim), from dim, heads, grid and options.
#: As many keys and landmarks as ours have by default. Packages: `pip install 'vit-efficient[peers]'`.
PEERS: dict[str, Callable[..., nn.Module]] = {
    'timm': _timm,
    'flex_window': FlexWindows,
    'tome': TokenMerging,
    'package/linformer': _linformer,
    'package/nystrom-attention': _nystrom,
    'package/performer-pytorch': _performer,
}


def create_peer(name: str, dim: int, heads: int, grid: PatchGrid, options: dict[str, Any]) -> nn.Module:
    """A layer of `PEERS`, in float32 on the CPU; a UserError if its package is missing, or it takes no such option."""
    try:
        return PEERS[name](dim, heads, grid, **options)
    except ImportError as error:
        raise UserError(f"{name}: {error}; pip install 'vit-efficient[peers]'") from None
    except (AssertionError, TypeError, UserError) as error:
        raise UserError(f'{name}: {error}') from None
