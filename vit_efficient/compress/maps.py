"""Weights that are maps over the patch grid: matrices and convolutions that bring N patches down to k.

At another image size a map is resampled, band-limited and divided by the growth of its area. That keeps its sum, and
its product with every image that holds no other frequencies; so a model classifies an image and its enlargement alike.

Letters: B batch, H heads, N = Y × X patches, k kept, D channels of a head.
"""

import math

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient import dct
from vit_efficient.compress import budget as budgets
from vit_efficient.compress import cells
from vit_efficient.compress.base import State
from vit_efficient.dct.bases import along
from vit_efficient.grid import PatchGrid, plain_sizes
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import without_autocast


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
    (heads,) = plain_sizes(weight.shape[:1])
    if heads > 1 and plain_sizes(x.shape[-3:-2]) != (heads,):
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

    def forward(self, x: Tensor, grid: PatchGrid, state: State = None) -> tuple[Tensor, State]:
        return project(x, self.weight, grid.height, grid.width), None

    def add_constant(self, y: Tensor, constant: Tensor, grid: PatchGrid) -> Tensor:
        sums = self.weight[0].sum((-2, -1))  # the same at every image size
        return y + sums[:, None] * constant

    def extra_repr(self) -> str:
        matrices, rows, height, width = self.weight.shape
        return f'matrices={matrices}, num_tokens={rows}, grid_size=({height}, {width})'


@torch.fx.wrap
@register_notrace_function
def kernel_size(height, width, budget: budgets.Budget) -> tuple:
    """The least kernel and stride that leaves no more than the budget of the grid: rounded up."""
    h, w = budgets.kept_grid(height, width, budget)
    return (height + h - 1) // h, (width + w - 1) // w  # of negative symbols torch.export finds bounds for a minute


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

    def forward(self, x: Tensor, grid: PatchGrid, state: State = None) -> tuple[Tensor, State]:
        return convolve(x, self.weight, *budgets.sides(grid.height, grid.width, self.axes), self.budget), None

    def extra_repr(self) -> str:
        kernels, channels, *size = self.weight.shape
        return f'kernels={kernels}, channels={channels}, kernel_size={tuple(size)}'
