"""Linformer's compressor: keys and values of N patches projected to k, by learned matrices or by pooling.

Source: Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020, arXiv 2006.04768, section 4: k̄ = E k,
v̄ = F v with E, F ∈ R^{k×N}; which of them are one and the same, a k for each layer, and mean, max and convolution as
projections.

Ours: a row of E is a map over the patch grid, which follows the image size (`vit_efficient.compress.maps`).

Letters: L layers, H heads, N patches, k kept, D channels of a head.
"""

import logging
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from vit_efficient.compress import budget as budgets
from vit_efficient.compress.base import Compressor, register_compressor
from vit_efficient.compress.maps import Conv, Linear, kernel_size
from vit_efficient.compress.pool import Down
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.checks import as_sides, check_choice, is_integer, is_pair
from vit_efficient.utils.errors import UserError

logger = logging.getLogger(__name__)

PROJECTIONS = ('linear', 'mean', 'max', 'conv')
SHARING = ('none', 'headwise', 'key-value', 'layerwise')


@register_compressor('learned')
class LearnedCompressor(Compressor):
    """Projects the keys and values of N patches to k, by weights that follow the image size.

    There is no way up: it stands at place `kv`.

    Args:
        projection: 'linear', a learned matrix k × N; 'mean' or 'max' of the cells of the grid; 'conv', a depthwise
            convolution whose kernel and stride are those of a cell, rounded up (so it may leave fewer than k).
        sharing: Which 'linear' or 'conv' projections are one, 'headwise' by default; parameters with layers L, heads H
            and weights w in one projection (k · N; of 'conv', D · N / k):
            'none', 2 · L · H · w; 'headwise', one E and one F in a layer, 2 · L · w; 'key-value', also E = F, L · w;
            'layerwise', one for all layers, owned by the model, w.
        axes: '2d', cells of the grid, or '1d', the paper's, of the row-major sequence; 'linear' has none.
        keep_ratio: k as a fraction of the patches. For 'linear', of those that it is made for: k stays at other sizes.
        num_tokens: k, or (h, w) with axes '2d', of which an integer gives 'mean', 'max' and 'conv' the largest that has
            no more tokens and the shape of the grid. 64 if neither this nor `keep_ratio` is given. In the options of a
            model also one for each block, as a list, or a mapping from `first` and `last` to those of the first and
            last block, between which it changes linearly (the paper's "non-uniform projected dimension").
        grid_size: Rows and columns of patches that the weights are made for; a model gives its own.
        num_heads, head_dim, device, dtype: Those of the attention.
    """

    def __init__(
        self,
        projection: str = 'linear',
        sharing: str | None = None,
        axes: str = '2d',
        keep_ratio: float | None = None,
        num_tokens: int | tuple[int, int] | None = None,
        grid_size: tuple[int, int] | None = None,
        num_heads: int = 1,
        head_dim: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        has_weights = projection in ('linear', 'conv')
        check_choice('projection', projection, PROJECTIONS)
        if sharing is not None and not has_weights:
            raise UserError(f'{projection=} has no weights to share, got {sharing=}; leave it out')
        if sharing is not None:
            check_choice('sharing', sharing, SHARING)
        if axes not in ('1d', '2d') or (axes == '1d' and projection == 'linear'):
            raise UserError(f"axes must be '2d', or '1d' with projection mean, max or conv, got {axes=}, {projection=}")
        if has_weights and grid_size is None:
            raise UserError(
                f'{projection=} has weights that are made for a grid: set grid_size=(rows, columns) of patches (a '
                'model does)'
            )
        if grid_size is not None:
            if not is_pair(grid_size) or not all(is_integer(side, 1) for side in grid_size):
                raise UserError(f'grid_size must be rows and columns of patches, got {grid_size=}')
            grid_size = as_sides('grid_size', grid_size)
        if keep_ratio is None and num_tokens is None:
            num_tokens = 64
        self.budget = budgets.Budget(keep_ratio, num_tokens)
        pair = isinstance(self.budget.num_tokens, tuple)
        if pair and (axes == '1d' or projection == 'linear'):
            raise UserError(f'num_tokens must be an integer with {projection=}, {axes=}, got {num_tokens=}')
        self.projection = projection
        self.sharing = (sharing or 'headwise') if has_weights else None
        self.axes = axes
        self.commutes = projection == 'mean' or (projection == 'linear' and self.sharing != 'none')
        self.keeps_constants = projection == 'mean'
        self.up = None

        ways = 2 if self.sharing in ('none', 'headwise') else 1
        each = num_heads if self.sharing == 'none' else 1
        if projection == 'linear':
            k = budgets.kept_count(*grid_size, self.budget) if num_tokens is None else self.budget.num_tokens
            self.budget = budgets.Budget(num_tokens=k)
            if k > math.prod(grid_size):
                _say_if_many(k, math.prod(grid_size))
            made = [Linear(each, k, grid_size, device=device, dtype=dtype) for _ in range(ways)]
        elif projection == 'conv':
            made = [Conv(each, head_dim, grid_size, self.budget, axes, device=device, dtype=dtype) for _ in range(ways)]
        else:
            made = [Down(self.budget, 'largest' if projection == 'max' else 'mean', axes)]
        self.down = made[0]
        if ways == 2:
            self.down_values = made[1]

    @classmethod
    def at_layer(cls, options: dict[str, Any], layer: int, depth: int, grid_size: tuple[int, int]) -> dict[str, Any]:
        one_axis = options.get('projection', 'linear') == 'linear' or options.get('axes') == '1d'
        tokens = _tokens_at(options.get('num_tokens'), layer, depth, one_axis)
        return {'grid_size': grid_size, **options, 'num_tokens': tokens}

    @property
    def options(self) -> dict[str, Any]:
        sharing = {} if self.sharing is None else {'sharing': self.sharing}
        return dict(projection=self.projection, **sharing, axes=self.axes, **self.budget.options)

    @property
    def ways_down(self) -> tuple[nn.Module, nn.Module]:
        return self.down, getattr(self, 'down_values', self.down)

    def num_kept(self, grid: PatchGrid) -> int:
        if self.projection == 'linear':
            return self.down.weight.shape[1]
        sides = budgets.sides(grid.height, grid.width, self.axes)
        h, w = budgets.kept_grid(*sides, self.budget)
        if self.projection == 'conv':
            kernel = kernel_size(*sides, self.budget)
            h, w = -(-sides[0] // kernel[0]), -(-sides[1] // kernel[1])
        return h * w

    def set_grid_size(self, height: int, width: int) -> None:
        for way in self.ways_down:
            if isinstance(way, Linear):
                way.follow((height, width))
            elif isinstance(way, Conv):
                way.follow(way.kernel_size(height, width))

    def common_part(self) -> nn.Module | None:
        return self.down if self.sharing == 'layerwise' else None

    def use_common_part(self, owned: nn.Module) -> None:
        # By reference to the module, not to its weight, which can be replaced; unregistered, since the model owns it.
        del self.down
        vars(self)['down'] = owned


def _tokens_at(num_tokens: Any, layer: int, depth: int, one_axis: bool) -> Any:
    """`num_tokens` of one block, where it is given for each. A pair is (h, w), unless there is but one axis."""
    if isinstance(num_tokens, Mapping):
        if set(num_tokens) != {'first', 'last'} or not all(is_integer(n, 1) for n in num_tokens.values()):
            raise UserError(f'num_tokens as a mapping needs positive integers first and last, got {num_tokens=}')
        first, last = int(num_tokens['first']), int(num_tokens['last'])
        return round(first + (last - first) * layer / max(depth - 1, 1))
    if isinstance(num_tokens, (list, tuple)) and (one_axis or len(num_tokens) != 2):
        if len(num_tokens) != depth:
            raise UserError(f'num_tokens lists {len(num_tokens)} blocks, there are {depth}: {num_tokens}')
        return num_tokens[layer]
    return num_tokens


@lru_cache
def _say_if_many(rows: int, num_patches: int) -> None:
    """Logs it once for each case."""
    logger.warning(
        f'num_tokens={rows} is more than the {num_patches} patches that there are: exact attention is cheaper'
    )
