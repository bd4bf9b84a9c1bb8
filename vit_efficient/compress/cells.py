"""The patch grid cut into h × w cells, each side evenly: what pooling averages and subsampling picks from.

Along a side of n patches in m cells, cell i holds the patches from floor(i · n / m) to before floor((i + 1) · n / m):
every patch is in one cell. Index and matrix builders take sizes that may be symbols, and a device.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.dct.bases import along, basis
from vit_efficient.grid import plain_sizes
from vit_efficient.utils.precision import product_dtype, real_dtype, without_autocast


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


def _patches_of_side(m, n, device: torch.device) -> Tensor:
    """The patches of each cell of a side, as many as the longest has: (m, longest). Shorter ones repeat their last."""
    first = first_patches(m, n, device)
    return torch.minimum(first[:-1, None] + torch.arange((n + m - 1) // m, device=device), first[1:, None] - 1)


def patches_of_cells(height, width, h, w, device: torch.device) -> Tensor:
    """The patches of each cell, in row-major order, as many as the largest has: (h · w, S), some repeated in others."""
    rows, columns = _patches_of_side(h, height, device), _patches_of_side(w, width, device)
    return (rows[:, None, :, None] * width + columns[:, None]).flatten(2).flatten(0, 1)


def is_repeated(height, width, h, w, device: torch.device) -> Tensor:
    """Which entries of `patches_of_cells` are there already: (h · w, S)."""
    again = [
        torch.arange((n + m - 1) // m, device=device) >= first_patches(m, n, device).diff()[:, None]
        for m, n in ((h, height), (w, width))
    ]
    return (again[0][:, None, :, None] | again[1][:, None]).flatten(2).flatten(0, 1)


def largest(x_HWD: Tensor, kept: tuple) -> Tensor:
    """The largest value of each cell: (…, H, W, D) → (…, h, w, D)."""
    for dim, n, m in zip((-3, -2), plain_sizes(x_HWD.shape[-3:-1]), kept, strict=True):
        patches = _patches_of_side(m, n, x_HWD.device)
        x_HWD = x_HWD.index_select(dim, patches.flatten()).unflatten(dim, patches.shape).amax(dim)
    return x_HWD


def local_expectations(q: Tensor, k: Tensor, v: Tensor, height, width, kept: tuple) -> tuple[Tensor, Tensor]:
    """The mean key of each cell, and what its mean query reads of its values, by a softmax over its patches.

    Args:
        q, k, v: (…, H · W, D), v (…, H · W, E), the scale of scores being in q.

    Returns:
        (…, h · w, D), (…, h · w, E)
    """
    sizes = (height, width, *kept)
    patches = basis(patches_of_cells, sizes, k, torch.int64)
    mean_q, mean_k = (means(t.unflatten(-2, (height, width)), kept).flatten(-3, -2) for t in (q, k))
    k_of_cells, v_of_cells = (t.index_select(-2, patches.flatten()).unflatten(-2, patches.shape) for t in (k, v))
    scores = k_of_cells @ mean_q[..., None].to(k.dtype)  # (…, h · w, S, 1)
    repeated = basis(is_repeated, sizes, k, torch.bool)
    weights = scores.masked_fill(repeated[..., None], -torch.inf).softmax(dim=-2)
    return mean_k, (weights.mT.to(v.dtype) @ v_of_cells).squeeze(-2)


def medoids(k: Tensor, v: Tensor, height, width, kept: tuple) -> tuple[Tensor, Tensor]:
    """Key and value of the patch of each cell whose key has the largest cosine with the cell's mean key.

    Args:
        k, v: (…, H · W, D or E)

    Returns:
        (…, h · w, D or E), twice.
    """
    patches = basis(patches_of_cells, (height, width, *kept), k, torch.int64)
    with torch.no_grad(), without_autocast(k):  # of what is rounded, another patch would be chosen
        exact_k = k.to(torch.promote_types(k.dtype, torch.float32))
        mean_k = means(exact_k.unflatten(-2, (height, width)), kept).flatten(-3, -2)
        k_of_cells = exact_k.index_select(-2, patches.flatten()).unflatten(-2, patches.shape)
        along_mean = (k_of_cells @ mean_k[..., None]).squeeze(-1)
        nearest = (along_mean / k_of_cells.norm(dim=-1)).argmax(dim=-1, keepdim=True)
        at = patches.expand(*nearest.shape[:-1], -1).gather(-1, nearest)  # (…, h · w, 1)
    return tuple(t.gather(-2, at.expand(*at.shape[:-1], t.shape[-1])) for t in (k, v))


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
