"""Pooling and subsampling: a mean, or one patch, of each cell of the grid.

Sources: PVTv2 (Wang et al., 2022, arXiv 2106.13797), whose linear attention average-pools keys and values; without the
convolution, norm and activation that follow there. The log-count bias is that of token merging (Bolya et al., "Token
Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461, eq. 1): softmax(q kᵀ + log s) with s the number of patches
that a key stands for. Of subsampling there is no paper. Values that a mean query reads are the local expectation of
Combiner (Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", NeurIPS 2021, arXiv
2107.05768), there of maximal queries and keys, without a count. Medoids are ours.

Letters: H × W patches, h × w kept, D channels.
"""

from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vit_efficient.compress import budget as budgets
from vit_efficient.compress import cells
from vit_efficient.compress.base import Compressor, State, register_compressor
from vit_efficient.grid import PatchGrid, plain_sizes
from vit_efficient.utils.checks import check_choice, check_flag
from vit_efficient.utils.errors import UserError

SUMMARIES = ('mean', 'local', 'medoid')
WAYS = {'mean': cells.means, 'middle': cells.pick_middles, 'largest': cells.largest}

# Leaves for FX: which way is taken depends on sizes.


@torch.fx.wrap
@register_notrace_function
def shrink(x: Tensor, height, width, budget: budgets.Budget, way: str) -> Tensor:
    """(…, H · W, D) → (…, h · w, D): of each cell the mean, the patch in its middle, or the largest value."""
    kept = budgets.kept_grid(height, width, budget)
    return WAYS[way](x.unflatten(-2, (height, width)), kept).flatten(-3, -2)


@torch.fx.wrap
@register_notrace_function
def interpolate(y: Tensor, height, width, budget: budgets.Budget, picked: bool) -> Tensor:
    """(…, h · w, D) → (…, H · W, D), bilinear."""
    kept = budgets.kept_grid(height, width, budget)
    if type(height) is int and type(width) is int and kept == (height, width):
        return y
    return cells.interpolate(y.unflatten(-2, (kept[0], kept[1])), (height, width), picked).flatten(-3, -2)


@torch.fx.wrap
@register_notrace_function
def log_counts(height, width, prefix, budget: budgets.Budget, like: Tensor) -> Tensor | None:
    """(1, prefix + h · w): of the patches in each cell, after the prefix tokens; None if they are all equal."""
    kept = budgets.kept_grid(height, width, budget)
    sides = (height, width, *kept)
    even = all(type(side) is int for side in sides) and height % kept[0] == width % kept[1] == 0
    if even and (prefix == 0 or kept == (height, width)):
        return None
    return cells.log_counts(height, width, kept, prefix, like)[None]


@torch.fx.wrap
@register_notrace_function
def summarise(
    q: Tensor, k: Tensor, v: Tensor, height, width, budget: budgets.Budget, summary: str
) -> tuple[Tensor, Tensor]:
    """Keys and values of cells, by 'local' or 'medoid' of `SUMMARIES`; arguments as of `Compressor.keys_and_values`.

    Raises:
        UserError: If a size is a symbol of `torch.export`, for which such a graph would take minutes.
    """
    height, width = plain_sizes((height, width))
    if type(height) is not int or type(width) is not int:
        raise UserError(f"summary={summary!r} needs a fixed image size: export for one, or set summary='mean'")
    kept = budgets.kept_grid(height, width, budget)
    if kept == (height, width):
        return k, v
    if summary == 'local':
        return cells.local_expectations(q, k, v, height, width, kept)
    return cells.medoids(k, v, height, width, kept)


class Summarise(nn.Module):
    """`summarise` as a module, under whose name it is counted."""

    flop_role = 'transform'

    def __init__(self, budget: budgets.Budget, summary: str):
        super().__init__()
        self.budget = budget
        self.summary = summary

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
        return summarise(q, k, v, grid.height, grid.width, self.budget, self.summary)


class Down(nn.Module):
    """One of `WAYS` from the patches of a cell to a token, cells as in `vit_efficient.compress.cells`."""

    flop_role = 'transform'

    def __init__(self, budget: budgets.Budget, way: str, axes: str = '2d'):
        super().__init__()
        self.budget = budget
        self.way = way
        self.axes = axes

    def forward(self, x: Tensor, grid: PatchGrid, state: State = None) -> tuple[Tensor, State]:
        return shrink(x, *budgets.sides(grid.height, grid.width, self.axes), self.budget, self.way), None


class Up(nn.Module):
    def __init__(self, budget: budgets.Budget, picked: bool):
        super().__init__()
        self.budget = budget
        self.picked = picked

    def forward(self, y: Tensor, grid: PatchGrid, state: State) -> Tensor:
        return interpolate(y, grid.height, grid.width, self.budget, self.picked)


@register_compressor('pool')
class PoolCompressor(Compressor):
    """Averages each of h × w cells of the patch grid; bilinear interpolation brings them up again.

    Args:
        keep_ratio: The fraction of patches kept. 1/4 if neither this nor `num_tokens` is given.
        num_tokens: (h, w), or a number: the largest h × w that is no larger and has the shape of the grid.
        count_bias: Whether a kept key weighs as many as the patches that it stands for. It matters beside prefix
            tokens, and where cells differ in size.
        summary: What stands for a cell. 'mean': its mean key and mean value. At place `kv` also 'local': its mean key,
            and what its mean query reads of its values; or 'medoid': key and value of the patch whose key has the
            largest cosine with the mean key. Both are of queries and keys with qk-norm. With rotary positions 'local'
            is of those before rotation, its keys then being rotated at the mean coordinate of the cell; 'medoid' is of
            rotated ones, since it keeps patches where they lie. 'mean' by default, and 'local' where a model that is
            trained is converted.
    """

    commutes = True
    keeps_constants = True
    picks = False
    coordinates = 'means'

    def __init__(
        self,
        keep_ratio: float | None = None,
        num_tokens: int | tuple[int, int] | None = None,
        count_bias: bool = True,
        summary: str = 'mean',
    ):
        super().__init__()
        if keep_ratio is None and num_tokens is None:
            keep_ratio = 0.25
        check_flag('count_bias', count_bias)
        check_choice('summary', summary, SUMMARIES)
        self.budget = budgets.Budget(keep_ratio, num_tokens)
        self.count_bias = count_bias
        self.down = Down(self.budget, 'middle' if self.picks else 'mean')
        self.up = Up(self.budget, self.picks)
        self.summary = summary
        self.has_summaries = summary != 'mean'
        if self.has_summaries:
            self.summarise = Summarise(self.budget, summary)
        if summary == 'medoid':
            self.coordinates = None

    @classmethod
    def in_trained(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {'summary': 'local', **options} if options.get('place') == 'kv' else options

    @property
    def options(self) -> dict[str, Any]:
        return dict(**self.budget.options, count_bias=self.count_bias, summary=self.summary)

    def keys_and_values(self, q: Tensor, k: Tensor, v: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
        return self.summarise(q, k, v, grid)

    def kept_sides(self, grid: PatchGrid) -> tuple:
        return budgets.kept_grid(grid.height, grid.width, self.budget)

    def num_kept(self, grid: PatchGrid) -> int:
        h, w = self.kept_sides(grid)
        return h * w

    def log_counts(self, grid: PatchGrid, like: Tensor, state: State = None) -> Tensor | None:
        return log_counts(grid.height, grid.width, grid.prefix, self.budget, like) if self.count_bias else None


@register_compressor('subsample')
class SubsampleCompressor(PoolCompressor):
    """Keeps the patch in the middle of each of h × w cells (every n-th row and column, where n divides the grid's
    sides) and drops the others; bilinear interpolation fills them in again.

    Args and raises as `PoolCompressor`, without `summary`.
    """

    picks = True
    coordinates = 'middles'

    def __init__(
        self,
        keep_ratio: float | None = None,
        num_tokens: int | tuple[int, int] | None = None,
        count_bias: bool = True,
    ):
        super().__init__(keep_ratio, num_tokens, count_bias)

    @classmethod
    def in_trained(cls, options: dict[str, Any]) -> dict[str, Any]:
        return options

    @property
    def options(self) -> dict[str, Any]:
        return dict(**self.budget.options, count_bias=self.count_bias)
