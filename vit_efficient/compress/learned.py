"""Linformer's compressor: keys and values of N patches projected to k, by learned matrices or by pooling.

Source: Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020, arXiv 2006.04768, section 4: k̄ = E k,
v̄ = F v with E, F ∈ R^{k×N}; which of them are one and the same, a k for each layer, and mean, max and convolution as
projections.

Ours: a row of E is a map over the patch grid. At another image size it is resampled as one, band-limited and divided by
the growth of its area. That keeps its sum, and its product with every image that holds no other frequencies; so a model
classifies an image and its enlargement alike.

Letters: B batch, H heads, N = Y × X patches, k kept, D channels of a head.
"""

import logging
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient import dct
from vit_efficient.compress import budget as budgets
from vit_efficient.compress import cells
from vit_efficient.compress.base import Compressor, register_compressor
from vit_efficient.compress.pool import Down
from vit_efficient.dct.bases import along
from vit_efficient.grid import PatchGrid, plain_sizes
from vit_efficient.utils.checks import as_sides, check_choice, is_integer, is_pair
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import without_autocast

logger = logging.getLogger(__name__)

PROJECTIONS = ('linear', 'mean', 'max', 'conv')
SHARING = ('none', 'headwise', 'key-value', 'layerwise')


def follow(maps: Tensor, size: tuple) -> Tensor:
    """Maps (…, Y, X) resampled to another size of their two last axes, band-limited; their sums stay the same."""
    old = plain_sizes(maps.shape[-2:])
    if all(type(side) is int for side in size) and old == tuple(size):
        return maps
    # Rounded once, at the end, and not to a type that autocast has for products.
    exact = maps.to(torch.promote_types(maps.dtype, torch.float32))
    with without_autocast(maps):
        resampled = dct.resample(exact, (size[0], size[1]), dims=(-2, -1))
    return (resampled * (old[0] * old[1] / (size[0] * size[1]))).to(maps.dtype)


class Maps(nn.Module):
    """A way down with weights that are maps, the two last axes of `weight`."""

    flop_role = 'transform'  # said here for those that the model owns, of which no compressor says it
    weight: nn.Parameter

    def follow(self, size: tuple[int, int]) -> None:
        """Resamples the weight to maps of another size."""
        if tuple(self.weight.shape[-2:]) != tuple(size):
            with torch.no_grad():
                self.weight = nn.Parameter(follow(self.weight, size), self.weight.requires_grad)

    def adapt(self, weight: Tensor) -> Tensor:
        """The weight of a checkpoint, made for another image size, as it fits here.

        Raises:
            UserError: If it has another number of rows.
        """
        if weight.shape[:-2] != self.weight.shape[:-2]:
            raise UserError(
                f'the checkpoint has Linformer projections {tuple(weight.shape)}, the model '
                f'{tuple(self.weight.shape)}: only the two last axes, the patch grid, follow the image size; set '
                'num_tokens and sharing as they were'
            )
        return follow(weight, tuple(self.weight.shape[-2:]))


def _check_heads(x: Tensor, weight: Tensor) -> None:
    """Raises UserError if every head has weights of its own (the first axis), and x has other heads or none."""
    heads = weight.shape[0]
    if heads > 1 and (x.ndim < 3 or x.shape[-3] != heads):
        raise UserError(
            f"with sharing='none' each of {heads} heads has a projection: it takes (…, {heads}, N, D), got "
            f'{tuple(x.shape)}'
        )


@torch.fx.wrap
@register_notrace_function
def project(x: Tensor, weight: Tensor, height, width) -> Tensor:
    """E x; a leaf for FX, because the matrix is resampled where the image has another size.

    Args:
        x: (…, N, D); (…, H, N, D) where every head has a matrix.
        weight: (1 or H, k, Y, X).

    Returns:
        (…, k, D)
    """
    _check_heads(x, weight)
    matrices = follow(weight, (height, width)).flatten(-2)
    return matrices @ x if weight.shape[0] > 1 else along(x, -2, matrices[0])


class Linear(Maps):
    """E: (…, N, D) → (…, k, D), (1 or H, k, Y, X)."""

    def __init__(self, matrices: int, rows: int, grid_size: tuple[int, int], **kwargs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(matrices, rows, *grid_size, **kwargs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Keys and values keep their scale, as those of independent patches.
        nn.init.normal_(self.weight, std=math.prod(self.weight.shape[-2:]) ** -0.5)

    def means(self) -> Tensor:
        """What the weight is beside weights that were trained with exact attention: the means of k cells."""
        rows, *size = self.weight.shape[1:]
        return cells.whole_cells(rows, *size).to(self.weight).expand_as(self.weight)

    def start_in_trained(self) -> str:
        """Pooling is a linear projection too, and the one that is known to change little."""
        with torch.no_grad():
            self.weight.copy_(self.means())
        return 'projections, which start as the means of cells of the patch grid'

    def forward(self, x: Tensor, grid: PatchGrid) -> Tensor:
        return project(x, self.weight, grid.height, grid.width)

    def add_constant(self, y: Tensor, constant: Tensor, grid: PatchGrid) -> Tensor:
        sums = self.weight[0].sum((-2, -1))  # the same at every image size
        return y + sums[:, None] * constant

    def extra_repr(self) -> str:
        matrices, rows, height, width = self.weight.shape
        return f'matrices={matrices}, num_tokens={rows}, grid_size=({height}, {width})'


@lru_cache
def _say_if_many(rows: int, num_patches: int) -> None:
    """Logs it once for each case."""
    logger.warning(
        f'num_tokens={rows} is more than the {num_patches} patches that there are: exact attention is cheaper'
    )


@torch.fx.wrap
@register_notrace_function
def kernel_size(height, width, budget: budgets.Budget) -> tuple:
    """The least kernel and stride that leaves no more than the budget of the grid: rounded up."""
    h, w = budgets.kept_grid(height, width, budget)
    return -(-height // h), -(-width // w)


@torch.fx.wrap
@register_notrace_function
def convolve(x: Tensor, weight: Tensor, height, width, budget: budgets.Budget) -> Tensor:
    """Depthwise, kernel and stride alike, zeros beyond the grid: (…, H, N, D) → (…, H, k, D).

    A leaf for FX, because the kernel (1 or H, D, y, x) is resampled where the image has another size.
    """
    _check_heads(x, weight)
    outer = x.shape[:-2]
    x_BHND = x if x.ndim == 4 else x.reshape(math.prod(outer[:-1]), *outer[-1:] or (1,), *x.shape[-2:])
    size = kernel_size(height, width, budget)
    weight = follow(weight, size)
    heads = x_BHND.shape[1]
    x_BCYX = x_BHND.transpose(1, 2).flatten(2).mT.unflatten(2, (height, width))
    x_BCYX = F.pad(x_BCYX, (0, -width % size[1], 0, -height % size[0]))
    kernel = weight.expand(heads, -1, -1, -1).flatten(0, 1)[:, None]
    y_BCyx = F.conv2d(x_BCYX, kernel, stride=size, groups=kernel.shape[0])
    y_BHkD = y_BCyx.flatten(2).unflatten(1, (heads, -1)).mT
    return y_BHkD if x.ndim == 4 else y_BHkD.reshape(*outer, *y_BHkD.shape[-2:])


class Conv(Maps):
    """A depthwise convolution whose kernel is also its stride; it begins as the mean."""

    def __init__(self, kernels: int, channels: int, grid_size: tuple, budget: budgets.Budget, axes: str, **kwargs):
        super().__init__()
        self.budget = budget
        self.axes = axes
        self.weight = nn.Parameter(torch.empty(kernels, channels, *self.kernel_size(*grid_size), **kwargs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1 / math.prod(self.weight.shape[-2:]))

    def kernel_size(self, height: int, width: int) -> tuple[int, int]:
        return kernel_size(*budgets.sides(height, width, self.axes), self.budget)

    def forward(self, x: Tensor, grid: PatchGrid) -> Tensor:
        return convolve(x, self.weight, *budgets.sides(grid.height, grid.width, self.axes), self.budget)

    def extra_repr(self) -> str:
        kernels, channels, *size = self.weight.shape
        return f'kernels={kernels}, channels={channels}, kernel_size={tuple(size)}'


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
