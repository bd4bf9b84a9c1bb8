"""Rotary positions: queries and keys turned by where their patches lie, also where these were compressed.

Sources: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, arXiv 2104.09864; on images,
Heo et al., "Rotary Position Embedding for Vision Transformer", ECCV 2024, arXiv 2403.13298. Pairs of channels are
turned by the angle ω · p, with p = (row, column) and a frequency ω for each pair, so that the score of a query and a
key depends on p_q − p_k alone.

A model hands down `rope`, the sines and cosines of all patches, as timm does: (N, 2 D), those of all heads and images;
(H, N, 2 D), of each head; (B, 1, N, 2 D) and (B, H, N, 2 D), of each image. The prefix tokens are not turned.

A token that stands for several patches lies at their mean coordinate. Its rotation is read off `rope`, whatever module
has made it and drawn augmentations for it: that of the nearest patch before it, turned on by the fraction of a step
that it lies farther. Angles grow by the same step from each patch to the next, which `rope` tells up to whole turns:
this is exact where the step is below half a turn. On small grids it may be larger; models that know it hand down a
`Rope`, which has the steps too.

Letters: B batch, H heads, N patches, h × w kept, D channels of a head.
"""

from typing import NamedTuple

import torch
from timm.layers import apply_rot_embed_cat, register_notrace_function
from torch import Tensor

from vit_efficient.compress.cells import COORDINATES
from vit_efficient.dct.bases import basis, is_eager
from vit_efficient.grid import plain_sizes, smaller
from vit_efficient.utils.compat import are_numbers
from vit_efficient.utils.device import on_gpu
from vit_efficient.utils.precision import real_dtype

# Patches that a CPU turns at once: what it computes on the way stays in its cache, which takes a third of the time.
ROWS = 256


class Rope(NamedTuple):
    """Rotations of patches that lie far apart.

    Args:
        table: As in this module.
        steps: The angles from a patch to the one below it, and to the one on its right: (2, …, D).
    """

    table: Tensor
    steps: Tensor


def table_of(rope: Tensor | Rope) -> Tensor:
    """The rotations of the patches alone."""
    return rope.table if isinstance(rope, Rope) else rope


def rotate(x: Tensor, rope: Tensor | Rope, prefix: int, half: bool) -> Tensor:
    """Queries or keys turned by their positions: (B, H, P + N, D) → the same; the P prefix tokens as they are.

    Args:
        rope: As in this module, of the N patches or of the tokens kept of them.
        half: Whether the channels i and i + D / 2 are a pair; or else 2 i and 2 i + 1.
    """
    return _rotate(x, table_of(rope), prefix, half)


# Leaves for FX, since what they do depends on sizes; called in this module, where FX finds them.


@torch.fx.wrap
@register_notrace_function
def _rotate(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    parts = [x]
    if prefix:
        # Split, not sliced: the gradient of a slice is as large as the whole.
        parts = x.split_with_sizes([prefix, x.shape[-2] - prefix], dim=-2)
    *first, patches = parts
    if is_eager(x) and not on_gpu(x) and patches.shape[-2] > ROWS:
        blocks = zip(patches.split(ROWS, dim=-2), rope.split(ROWS, dim=-2), strict=True)
        return torch.cat([*first, *(apply_rot_embed_cat(*block, half=half) for block in blocks)], dim=-2)
    turned = apply_rot_embed_cat(patches, rope, half=half)
    return torch.cat([*first, turned], dim=-2) if prefix else turned


def rope_of_kept(rope: Tensor | Rope, height, width, kept: tuple, coordinates: str) -> Tensor:
    """The rotations of the tokens kept of a grid: (…, height · width, 2 D) → (…, h · w, 2 D)

    Args:
        rope: Of all patches.
        height, width: The grid.
        kept: h and w.
        coordinates: Where the tokens lie along a side, of `COORDINATES`.
    """
    return _rope_of_kept(*(rope if isinstance(rope, Rope) else (rope, None)), height, width, kept, coordinates)


@torch.fx.wrap
@register_notrace_function
def _rope_of_kept(rope: Tensor, steps: Tensor | None, height, width, kept: tuple, coordinates: str) -> Tensor:
    h, w = kept
    if type(h) is type(w) is type(height) is type(width) is int and (h, w) == (height, width):
        return rope
    coordinates_of = [
        basis(COORDINATES[coordinates], sizes, rope, real_dtype(rope.device)) for sizes in ((h, height), (w, width))
    ]
    (row, y), (column, x) = (_split(each, rope) for each in coordinates_of)
    near = rope.index_select(-2, (row[:, None] * width + column).flatten()).unflatten(-2, (h, w))
    down, across = (step[..., None, None, :] for step in _steps(rope, steps, height, width))
    return _turned_on(near, y[:, None, None] * down + x[:, None] * across).flatten(-3, -2)


def rope_at(rope: Tensor | Rope, height, width, rows: Tensor, columns: Tensor) -> Tensor:
    """The rotations at coordinates of each image: (B, 1 or H, m, 2 D)

    Args:
        rope: Of all patches.
        height, width: The grid.
        rows, columns: In patches from the first, (B, m) each. If there are as many as patches, they are taken to be
            those of the patches, in order.
    """
    return _rope_at(*(rope if isinstance(rope, Rope) else (rope, None)), height, width, rows, columns)


@torch.fx.wrap
@register_notrace_function
def _rope_at(rope: Tensor, steps: Tensor | None, height, width, rows: Tensor, columns: Tensor) -> Tensor:
    patches, kept = plain_sizes((rope.shape[-2], rows.shape[1]))
    if are_numbers(patches, kept) and patches == kept:
        return rope
    (row, y), (column, x) = _split(rows, rope), _split(columns, rope)
    down, across = (step[..., None, :] for step in _steps(rope, steps, height, width))
    # From (N, 2 D) and (H, N, 2 D) too: one more axis of images.
    table = rope[(None,) * (4 - rope.ndim)].expand(rows.shape[0], -1, -1, -1)
    patch = (row * width + column)[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])
    return _turned_on(table.gather(2, patch), y[:, None, :, None] * down + x[:, None, :, None] * across)


def _split(coordinates: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    """The patch before each coordinate, and the fraction of a step that it lies farther, exact enough for `rope`."""
    before = coordinates.floor()
    return before.long(), (coordinates - before).to(torch.promote_types(rope.dtype, torch.float32))


def _turned_on(rope: Tensor, angle: Tensor) -> Tensor:
    """Rotations (…, 2 D), turned on by angles (…, D)."""
    sine, cosine = rope.to(angle.dtype).chunk(2, dim=-1)
    sine_more, cosine_more = angle.sin(), angle.cos()
    sine, cosine = sine * cosine_more + cosine * sine_more, cosine * cosine_more - sine * sine_more
    return torch.cat([sine, cosine], dim=-1).to(rope.dtype)


def _steps(rope: Tensor, steps: Tensor | None, height, width) -> tuple[Tensor, Tensor]:
    """The angles from a patch to the one below it and to the one on its right, as they are known; (…, D) each."""
    down, across = steps_between(rope, height, width) if steps is None else steps
    dtype = torch.promote_types(rope.dtype, torch.float32)
    return down.to(dtype), across.to(dtype)


def steps_between(rope: Tensor, height, width) -> tuple[Tensor, Tensor]:
    """The angles from a patch to the one below it, and to the one on its right, in (−π, π]: (…, D) each

    They are the same everywhere; of a side of one patch there is none.
    """
    below, right = smaller(1, height - 1) * width, smaller(1, width - 1)
    dtype = torch.promote_types(rope.dtype, torch.float32)
    first, *others = (rope[..., i, :].to(dtype).chunk(2, dim=-1) for i in (0, below, right))
    return tuple(_angle_between(first, other) for other in others)


def _angle_between(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """From a to b, sines and cosines each, in (−π, π]."""
    return torch.atan2(b[0] * a[1] - a[0] * b[1], b[1] * a[1] + a[0] * b[0])
