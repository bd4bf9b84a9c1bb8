"""A relative position bias: what is added to the score of a query and a key for where the one lies from the other.

Sources: Liu et al., "Swin Transformer", ICCV 2021, arXiv 2103.14030, whose biases are a table; "Swin Transformer V2",
CVPR 2022, arXiv 2111.09883, where an MLP makes them of coordinates; BEiT, Bao et al., ICLR 2022, arXiv 2106.08254,
which gives entries of their own to the class token. timm's classes of each are read here, and nowhere else.

A key that stands for the patches j of a cell weighs as they would, if each had this key: its bias is

    b(p, cell) = log Σ_j exp b(p − r_j)

which contains the logarithm of their number. A query that stands for a cell has the mean over its patches p. This holds
too where a compressor keeps one patch of each cell: it stands for the others. Neither takes a matrix of all pairs of
patches: windows slide over the table, one for each size of cells, and each pair of tokens picks what it needs.

Letters: A heads, H × W patches, h × w cells, P prefix tokens, N = P + H · W.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.layers import RelPosBias, RelPosMlp, register_notrace_function
from timm.layers.pos_embed_rel import gen_relative_log_coords
from timm.models import beit
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.attention.decomposed import DecomposedBias
from vit_efficient.compress.cells import first_patches
from vit_efficient.dct.bases import basis
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import real_dtype

#: The argument by which timm's attentions are given the bias that all blocks share.
SHARED_ARGUMENT = {beit.Attention: 'shared_rel_pos_bias', RelPosAttention: 'shared_rel_pos'}


class RelativeBias(NamedTuple):
    """The biases of a grid, before they are spread over its pairs of tokens.

    Args:
        table: (A, 2 H − 1, 2 W − 1), that of a query and a key dy rows and dx columns before it at [H − 1 + dy,
            W − 1 + dx].
        prefix: (A, 3), of prefix queries and patches, of patches and prefix keys, and among prefix tokens.
    """

    table: Tensor
    prefix: Tensor
    #: (1, A, N, N), those of all pairs of tokens, where several attentions need them.
    whole: Tensor | None = None


Bias = RelativeBias | DecomposedBias


# Not a property of the bias: `torch.compile` of torch 2.10 knows of none of a named tuple.
def grid_of_bias(bias: Bias) -> tuple[int, int] | None:
    """The grid that biases are for; None of any."""
    if isinstance(bias, DecomposedBias):
        return None
    return (bias.table.shape[1] + 1) // 2, (bias.table.shape[2] + 1) // 2


def relative_bias(module: nn.Module | None) -> Bias | None:
    """The biases that a module of timm's holds, if it holds any.

    Args:
        module: A `RelPosBias`, `RelPosMlp` or `RelativePositionBias`, or the attention of a `Beit` or of SAM.
    """
    if getattr(module, 'rel_pos_h', None) is not None:
        return DecomposedBias(module.rel_pos_h, module.rel_pos_w)
    if isinstance(module, RelPosMlp):
        table = module.bias_act(module.mlp(module.rel_coords_log)).permute(2, 0, 1)
        table = table if module.bias_gain is None else module.bias_gain * table
        return RelativeBias(table, table.new_zeros(table.shape[0], 3))
    rows = getattr(module, 'relative_position_bias_table', None)
    return None if rows is None else _of_rows(rows, module.window_size)


def own_bias_module(attention: nn.Module) -> nn.Module | None:
    """What holds the relative bias that an attention has for itself; None if it has none."""
    if any(getattr(attention, name, None) is not None for name in ('relative_position_bias_table', 'rel_pos_h')):
        return attention
    return getattr(attention, 'rel_pos', None)


class _WithoutIndex:
    """A module of timm's without its index, N × N numbers in each layer: which entry is that of a pair of tokens."""

    def _init_buffers(self) -> None:
        drop_index(self)

    def get_bias(self) -> Tensor:
        return whole_bias(relative_bias(self), self.prefix_tokens)


class _RelPosBias(_WithoutIndex, RelPosBias):
    pass


class _RelPosMlp(_WithoutIndex, RelPosMlp):
    def _init_buffers(self) -> None:
        super()._init_buffers()
        coords = self.rel_coords_log
        made = gen_relative_log_coords(self.window_size, self.pretrained_window_size, self.mode, coords.device)
        coords.copy_(made)


class _RelativePositionBias(_WithoutIndex, beit.RelativePositionBias):
    prefix_tokens = 1

    def forward(self) -> Tensor:
        return self.get_bias()[0]


_WITHOUT_INDEX = {
    RelPosBias: _RelPosBias,
    RelPosMlp: _RelPosMlp,
    beit.RelativePositionBias: _RelativePositionBias,
}


def drop_index(module: nn.Module) -> None:
    """Leaves an empty one, as timm's code expects one."""
    module.relative_position_index = module.relative_position_index.new_empty(0)


def without_index(module: nn.Module | None) -> nn.Module | None:
    """The same parameters in a module that has no index of all pairs of tokens; the one given is left as it was."""
    if type(module) not in _WITHOUT_INDEX:
        return module
    new = module.__new__(_WITHOUT_INDEX[type(module)])
    vars(new).update({name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(module).items()})
    drop_index(new)
    return new


def bias_of_attention(attention: nn.Module, shared: RelativeBias | None) -> Bias | None:
    """The biases of an attention: its own, and the ones given that all blocks share; None if there are none."""
    own = relative_bias(own_bias_module(attention))
    if own is None or shared is None:
        return shared if own is None else own
    return RelativeBias(own.table + shared.table, own.prefix + shared.prefix)


# Leaves for FX, where shapes are not known, are called in this module: where they are, FX finds them.


@torch.fx.wrap
@register_notrace_function
def _of_rows(rows: Tensor, window_size: tuple[int, int]) -> RelativeBias:
    """From timm's table, (entries, A): those of patches, row-major, and those of prefix tokens where there are any."""
    size = tuple(2 * side - 1 for side in window_size)
    patches, prefix = rows.mT.split_with_sizes([size[0] * size[1], rows.shape[0] - size[0] * size[1]], dim=1)
    return RelativeBias(patches.unflatten(1, size), prefix if prefix.shape[1] else prefix.new_zeros(rows.shape[1], 3))


def check_grid(title: str, grid_size: tuple | None, height, width) -> None:
    """Raises UserError if the biases are of another grid; with None they are of any."""
    if grid_size is not None and type(height) is type(width) is int and tuple(grid_size) != (height, width):
        raise UserError(
            f'{title}: its relative position bias is that of {grid_size[0]} × {grid_size[1]} patches, the input has '
            f'{height} × {width}; call set_input_size of the model, or create it with this img_size'
        )


def whole_bias(bias: RelativeBias, prefix: int) -> Tensor:
    """Of all pairs of tokens: (1, A, N, N)."""
    return _whole_bias(bias, prefix)


@torch.fx.wrap
@register_notrace_function
def _whole_bias(bias: RelativeBias, prefix: int) -> Tensor:
    if bias.whole is not None:
        return bias.whole
    return _bias_of_kept(bias, prefix, grid_of_bias(bias), False, True, bias.table)


def window_bias(bias: RelativeBias, prefix: int, rows: int, columns: int) -> Tensor:
    """Of the patches of a window, to the prefix tokens and each other: (1, A, rows · columns, P + rows · columns)."""
    height, width = grid_of_bias(bias)
    near = bias.table[:, height - rows : height + rows - 1, width - columns : width + columns - 1]
    return whole_bias(RelativeBias(near, bias.prefix), prefix)[:, :, prefix:]


def prefix_bias(bias: RelativeBias, prefix: int) -> Tensor:
    """Of the prefix tokens to each other and all patches: (1, A, P, N)."""
    height, width = grid_of_bias(bias)
    to_patches, _, among = bias.prefix[:, :, None].unbind(1)
    of_one = torch.cat([among.expand(-1, prefix), to_patches.expand(-1, height * width)], dim=1)
    return of_one[None, :, None].expand(-1, -1, prefix, -1)


def bias_of_kept(
    bias: RelativeBias, prefix: int, kept: tuple, kept_queries: bool, counted: bool, like: Tensor
) -> Tensor:
    """Of the tokens that are kept: (1, A, queries, P + h · w).

    Args:
        prefix: P
        kept: h and w; the cells are those of `vit_efficient.compress.cells`.
        kept_queries: Whether the queries are the kept tokens too, or all.
        counted: Whether a key weighs as many as the patches that it stands for.
        like: Has the dtype of the result.
    """
    return _bias_of_kept(bias, prefix, kept, kept_queries, counted, like)


@torch.fx.wrap
@register_notrace_function
def _bias_of_kept(
    bias: RelativeBias, prefix: int, kept: tuple, kept_queries: bool, counted: bool, like: Tensor
) -> Tensor:
    height, width = grid_of_bias(bias)
    h, w = (range(side).stop for side in kept)
    keys = _lengths(h, height), _lengths(w, width)
    queries = (_lengths(h, height), _lengths(w, width)) if kept_queries else ([1], [1])
    # Windows over keys come first: the mean over queries is one of logarithms.
    table = bias.table.to(torch.promote_types(bias.table.dtype, torch.float32))
    for dim, lengths in zip((-2, -1), keys, strict=True):
        table = _over_windows(table, dim, lengths, torch.logaddexp)
    log_counts = basis(_log_counts, (height, width, h, w), table, table.dtype)
    if not counted:
        table = table - log_counts[..., None, None]
    for dim, lengths in zip((-2, -1), queries, strict=True):
        table = _over_windows(table, dim, lengths, torch.add, mean=True)
    entries = table.flatten(1)
    sizes = (height, width, h, w, prefix, int(kept_queries))
    if prefix:
        first, *others = bias.prefix.to(table.dtype).split(1, dim=1)
        first = first + log_counts.flatten() if counted else first.expand(-1, log_counts.numel())
        entries = torch.cat([entries, first, *others], dim=1)
    index = basis(_which, sizes, like, torch.int64)
    # Cast afterwards: an entry's gradient is a sum over many pairs.
    return entries.index_select(1, index.flatten()).unflatten(1, tuple(index.shape))[None].to(like.dtype)


def _lengths(m: int, n: int) -> list[int]:
    """The sizes that m cells of n patches have along a side, one or two."""
    return [n // m] if n % m == 0 else [n // m, n // m + 1]


def _over_windows(x: Tensor, dim: int, lengths: list[int], add: Callable, mean: bool = False) -> Tensor:
    """The sums, by `add`, or means of windows that slide along `dim`, of each length: (A, …) → (A, lengths, …)

    At each place that of the window that begins there; where it would go beyond the end there are zeros.
    """
    windows = []
    for length in lengths:
        y = _sliding(x, dim, length, add)
        windows.append(F.pad(y / length if mean else y, (*(0, 0) * (-1 - dim), 0, length - 1)))
    return torch.stack(windows, dim=1)


def _sliding(x: Tensor, dim: int, length: int, add: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The sums, by `add`, of each `length` neighbours along an axis, from those of 1, 2, 4 … neighbours."""
    size, start, span = x.shape[dim] - length + 1, 0, 1
    total = None
    while span <= length:
        if length & span:
            part = x.narrow(dim, start, size)
            total = part if total is None else add(total, part)
            start += span
        if 2 * span <= length:
            rest = x.shape[dim] - span
            x = add(x.narrow(dim, 0, rest), x.narrow(dim, span, rest))
        span *= 2
    return total


def _log_counts(height: int, width: int, h: int, w: int, device: torch.device) -> Tensor:
    """The logarithms of the numbers of patches in cells of each size: (widths, heights)."""
    heights, widths = (torch.tensor(_lengths(*side), device=device) for side in ((h, height), (w, width)))
    return (widths[:, None] * heights).to(real_dtype(device)).log()


def _which(height: int, width: int, h: int, w: int, prefix: int, kept_queries: bool, device: torch.device) -> Tensor:
    """For each query and key, which of the entries of `bias_of_kept` is theirs: (queries, P + h · w)."""
    # The entries: A × (lengths of queries: columns, rows) × (of keys: columns, rows) × the table's rows × columns.
    area = (2 * height - 1) * (2 * width - 1)
    keys_y, keys_x = len(_lengths(h, height)), len(_lengths(w, width))
    queries_y, queries_x = (keys_y, keys_x) if kept_queries else (1, 1)
    strides_y = 2 * width - 1, area, keys_x * keys_y * area
    strides_x = 1, keys_y * area, queries_y * keys_x * keys_y * area
    rows = _along_side(h, height, kept_queries, strides_y, device)
    columns = _along_side(w, width, kept_queries, strides_x, device)
    index = (rows[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)
    if not prefix:
        return index
    # Then those of prefix queries for each size of cells, of prefix keys, and among prefix tokens.
    behind = queries_x * queries_y * keys_x * keys_y * area
    of_prefix = keys_x * keys_y
    y, x = (_length_of(m, n, device) for m, n in ((h, height), (w, width)))
    first = behind + (x[None, :] * keys_y + y[:, None]).flatten()
    first = F.pad(first, (prefix, 0), value=behind + of_prefix + 1)
    index = F.pad(index, (prefix, 0), value=behind + of_prefix)
    return torch.cat([first.expand(prefix, -1), index])


def _along_side(m: int, n: int, kept_queries: bool, strides: tuple[int, int, int], device: torch.device) -> Tensor:
    """The part of a side, of n patches in m cells, in the index: (queries, m)."""
    of_place, of_key, of_query = strides
    cells, length = first_patches(m, n, device), _length_of(m, n, device)
    query = cells[:-1] if kept_queries else torch.arange(n, device=device)
    # The window begins with the first query and the last key.
    place = query[:, None] - cells[1:] + n
    index = place * of_place + length * of_key
    return index + length[:, None] * of_query if kept_queries else index


def _length_of(m: int, n: int, device: torch.device) -> Tensor:
    """Which of `_lengths` each cell has: (m,)."""
    return first_patches(m, n, device).diff() - n // m
