"""The patch grid cut into h × w cells, each side evenly: what pooling averages and subsampling picks from.

Along a side of n patches in m cells, cell i holds the patches from floor(i · n / m) to before floor((i + 1) · n / m):
every patch is in one cell. Index and matrix builders take sizes that may be symbols, and a device.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.dct.bases import along, basis
from vit_efficient.grid import plain_sizes
from vit_efficient.utils.precision import product_dtype, real_dtype


def first_patches(m, n, device: torch.device) -> Tensor:
    """The first patch of each cell, and n behind the last: (m + 1,)."""
    return torch.arange(m + 1, device=device) * n // m


def middle_patches(m, n, device: torch.device) -> Tensor:
    """The patch in the middle of each cell; of two, the second: (m,)."""
    first = first_patches(m, n, device)
    return (first[:-1] + first[1:]) // 2


def mean_coordinates(m, n, device: torch.device) -> Tensor:
    """The mean coordinate of the patches of each cell: (m,)."""
    first = first_patches(m, n, device).to(real_dtype(device))
    return (first[:-1] + first[1:] - 1) / 2


def sample_coordinates(m, n, device: torch.device) -> Tensor:
    """Where a band-limited resize from n to m samples takes them, at the middles of m equal parts of the side: (m,)."""
    return (torch.arange(m, device=device, dtype=real_dtype(device)) + 0.5) * n / m - 0.5


#: Where along a side of n patches each of m kept tokens lies, in patches from the first: (m, n, device) → (m,).
COORDINATES = {'means': mean_coordinates, 'middles': middle_patches, 'samples': sample_coordinates}


def log_counts(height, width, kept: tuple, prefix, like: Tensor) -> Tensor:
    """The logarithm of the number of patches in each of the h × w cells, after those of tokens: (prefix + h · w,)."""
    return basis(_log_counts, (height, width, kept[0], kept[1], prefix), like, like.dtype)


def _log_counts(height, width, h, w, prefix, device: torch.device) -> Tensor:
    of_side = [first_patches(m, n, device).diff().to(real_dtype(device)).log() for m, n in ((h, height), (w, width))]
    return F.pad((of_side[0][:, None] + of_side[1]).flatten(), (prefix, 0))


def _means(m, n, device: torch.device) -> Tensor:
    """(m, n): the mean of each cell."""
    first = first_patches(m, n, device)
    patch = torch.arange(n, device=device)
    inside = (patch >= first[:-1, None]) & (patch < first[1:, None])
    return inside.to(real_dtype(device)) / first.diff()[:, None]


def _between(nodes: Tensor, n, device: torch.device) -> Tensor:
    """(n, m): linear interpolation at n patches between values at m nodes; constant beyond the first and last."""
    patch = torch.arange(n, device=device)[:, None]
    i = torch.arange(nodes.shape[0], device=device)
    last = nodes.shape[0] - 1
    before, after = nodes[(i - 1).clamp(min=0)], nodes[torch.where(i < last, i + 1, last)]
    rise = torch.where(i == 0, 1, (patch - before) / (nodes - before))
    fall = torch.where(i == last, 1, (after - patch) / (after - nodes))
    return torch.minimum(rise, fall).clamp(0, 1)


def _between_centres(n, m, device: torch.device) -> Tensor:
    return _between(mean_coordinates(m, n, device), n, device)


def _between_middles(n, m, device: torch.device) -> Tensor:
    return _between(middle_patches(m, n, device).to(real_dtype(device)), n, device)


def means(x_HWD: Tensor, kept: tuple) -> Tensor:
    """The mean of each cell: (…, H, W, D) → (…, h, w, D)."""
    height, width = plain_sizes(x_HWD.shape[-3:-1])
    if all(type(n) is int and type(m) is int and n % m == 0 for n, m in zip((height, width), kept, strict=True)):
        outer = x_HWD.shape[:-3]
        x_BDHW = x_HWD.reshape(-1, *x_HWD.shape[-3:]).permute(0, 3, 1, 2)
        y_BDhw = F.avg_pool2d(x_BDHW, (height // kept[0], width // kept[1]))
        return y_BDhw.permute(0, 2, 3, 1).reshape(*outer, *kept, x_HWD.shape[-1])
    return _transform(x_HWD, _means, (-3, -2), kept)


def whole_cells(count: int, height: int, width: int) -> Tensor:
    """The means of exactly `count` cells that cover the grid, as maps: (count, height, width), float64.

    The cells lie in rows of about equal height, some of one cell more than others. Beyond one cell for each patch,
    they begin anew.
    """
    if count > height * width:
        more = whole_cells(count - height * width, height, width)
        return torch.cat([torch.eye(height * width, dtype=more.dtype).unflatten(1, (height, width)), more])
    rows = min(max(1, round((count * height / width) ** 0.5), -(-count // width)), height, count)
    maps = torch.zeros(count, height, width, dtype=torch.float64)
    cells = iter(maps)
    for row in range(rows):
        columns = (row + 1) * count // rows - row * count // rows
        across = slice(row * height // rows, (row + 1) * height // rows)
        for column in range(columns):
            next(cells)[across, column * width // columns : (column + 1) * width // columns] = 1
    return maps / maps.sum((1, 2), keepdim=True)


def largest(x_HWD: Tensor, kept: tuple) -> Tensor:
    """The largest value of each cell: (…, H, W, D) → (…, h, w, D)."""
    for dim, n, m in zip((-3, -2), plain_sizes(x_HWD.shape[-3:-1]), kept, strict=True):
        first = first_patches(m, n, x_HWD.device)
        longest = -(-n // m)
        # Shorter cells repeat their last patch.
        patches = torch.minimum(first[:-1, None] + torch.arange(longest, device=first.device), first[1:, None] - 1)
        x_HWD = x_HWD.index_select(dim, patches.flatten()).unflatten(dim, (m, longest)).amax(dim)
    return x_HWD


def interpolate(y_hwD: Tensor, size: tuple, picked: bool) -> Tensor:
    """Bilinear, between the centres of cells or the patches `picked` in their middle: (…, h, w, D) → (…, H, W, D)."""
    return _transform(y_hwD, _between_middles if picked else _between_centres, (-2, -3), size[::-1])


def pick_middles(x_HWD: Tensor, kept: tuple) -> Tensor:
    """The patch in the middle of each cell: (…, H, W, D) → (…, h, w, D)."""
    for dim, n, m in zip((-3, -2), plain_sizes(x_HWD.shape[-3:-1]), kept, strict=True):
        if type(n) is int and type(m) is int and n % m == 0:
            x_HWD = x_HWD[(..., slice(n // m // 2, None, n // m), *[slice(None)] * (-1 - dim))]
        else:
            x_HWD = x_HWD.index_select(dim, middle_patches(m, n, x_HWD.device))
    return x_HWD


def _transform(x: Tensor, build, dims: tuple, sizes: tuple) -> Tensor:
    """The matrices of `build` along `dims` of x, in this order: it is cheaper to begin with one that shrinks."""
    dtype = product_dtype(x)
    for dim, size in zip(dims, sizes, strict=True):
        (n,) = plain_sizes((x.shape[dim],))
        x = along(x, dim, basis(build, (size, n), x, dtype))
    return x
