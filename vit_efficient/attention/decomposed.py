"""The relative position bias of SAM, whose entries are products with the query: q · R_y[y − y'] + q · R_x[x − x'].

Sources: Li et al., "MViTv2", CVPR 2022, arXiv 2112.01526, section 4.1; Kirillov et al., "Segment Anything", ICCV 2023,
arXiv 2304.02643. As in `vit_efficient.attention.relative`, a key that stands for the patches of a cell weighs as they
would, if each had this key. The sum over a cell is a product of one over its rows and one over its columns:

    b(q, cell) = log Σ_y' exp q · R_y[y − y'] + log Σ_x' exp q · R_x[x − x']

which takes queries × (H + W) numbers before its two parts are added. A query that stands for a cell has the mean of
R_y over the rows y of its cell, and of R_x over the columns: the mean of what its patches would have, with this query.

Letters: B batch, A heads, H × W patches, h × w cells, D channels of a head.
"""

from typing import NamedTuple

import torch
from timm.layers import register_notrace_function
from timm.models.vision_transformer_sam import get_rel_pos
from torch import Tensor

from vit_efficient.compress.cells import first_patches


class DecomposedBias(NamedTuple):
    """What queries are multiplied by for each distance along an axis; timm interpolates it for a grid of other sides.

    Args:
        rows, columns: R_y, (2 H − 1, D), and R_x, (2 W − 1, D): that of a query dy rows after a key at [H − 1 + dy].
    """

    rows: Tensor
    columns: Tensor


# Leaves for FX, where sizes are not known.


@torch.fx.wrap
@register_notrace_function
def decomposed_of_kept(
    bias: DecomposedBias, q: Tensor, height: int, width: int, kept: tuple, kept_queries: bool, counted: bool
) -> Tensor:
    """What is added to the scores of the keys that are kept: (B, A, queries, h · w).

    Args:
        q: Queries, (B, A, queries, D), of the kept tokens or of all; not scaled.
        height, width: The grid.
        kept: h and w; the cells are those of `vit_efficient.compress.cells`.
        kept_queries: Whether the queries are the kept tokens too.
        counted: Whether a key weighs as many as the patches that it stands for.
    """
    of_axes = []
    for table, n, m in zip(bias, (height, width), kept, strict=True):
        R_qkD = get_rel_pos(n, n, table)
        if kept_queries and m != n:
            R_qkD = (_in_cells(R_qkD.movedim(0, -1), m, 0.0).sum(-1) / _lengths(m, n, q)).movedim(-1, 0)
        of_axes.append(R_qkD)
    by_row, by_column = _products(q, *of_axes)
    return _added(_over_cells(by_row, kept[0], counted), _over_cells(by_column, kept[1], counted), q)


def decomposed_of_windows(
    bias: DecomposedBias, q: Tensor, height: int, width: int, number: int, side: tuple[int, int]
) -> Tensor:
    """Of the patches of windows, `side` rows and columns each, to each other: (B · number, A, L, L).

    Args:
        q: The queries of one window after the other, (B, number · L, A, D).
        height, width: The grid that the windows are of.
    """
    near = [get_rel_pos(n, n, table)[:m, :m] for table, n, m in zip(bias, (height, width), side, strict=True)]
    q = q.unflatten(1, (number, -1)).flatten(0, 1).transpose(1, 2)
    return _added(*_products(q, *near), q)


def _products(q: Tensor, R_y: Tensor, R_x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, A, y · x, D) times R_y (y, H, D) and R_x (x, W, D): (B, A, y, x, H), (B, A, y, x, W)"""
    q = q.unflatten(2, (R_y.shape[0], R_x.shape[0]))
    return torch.einsum('bayxd,ykd->bayxk', q, R_y), torch.einsum('bayxd,xkd->bayxk', q, R_x)


def _added(by_row: Tensor, by_column: Tensor, like: Tensor) -> Tensor:
    """(B, A, y, x, h), (B, A, y, x, w) → (B, A, y · x, h · w)"""
    return (by_row[..., None] + by_column[..., None, :]).flatten(-2).flatten(2, 3).to(like.dtype)


def _over_cells(x: Tensor, m: int, counted: bool) -> Tensor:
    """The logarithm of the sums of exp x over m cells, or of its means: (…, n) → (…, m)"""
    n = x.shape[-1]
    if m == n:
        return x
    total = _in_cells(x.to(torch.promote_types(x.dtype, torch.float32)), m, -torch.inf).logsumexp(-1)
    return total if counted else total - _lengths(m, n, total).log()


def _in_cells(x: Tensor, m: int, fill: float) -> Tensor:
    """The entries of m cells, shorter ones filled up: (…, n) → (…, m, longest)"""
    n = x.shape[-1]
    if n % m == 0:
        return x.unflatten(-1, (m, n // m))
    first = first_patches(m, n, x.device)
    patch = first[:-1, None] + torch.arange(n // m + 1, device=x.device)
    cells = x.index_select(-1, patch.clamp(max=n - 1).flatten()).unflatten(-1, (m, -1))
    return cells.masked_fill(patch >= first[1:, None], fill)


def _lengths(m: int, n: int, like: Tensor) -> Tensor:
    """The number of patches of each cell: (m,)"""
    return first_patches(m, n, like.device).diff().to(like.dtype)
