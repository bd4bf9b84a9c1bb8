"""Large images seen tile by tile: tiles overlap, and their logits are blended.

Dimensions: B images, K classes, h × w cells of the logits, H × W pixels.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from vit_efficient.train.tasks import Task
from vit_efficient.utils.checks import as_integer, is_real, multiples_around
from vit_efficient.utils.errors import UserError


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover a length, evenly spaced, each two sharing `overlap` at least.

    All are in the same unit, with overlap < tile. A length of no more than a tile is one tile.
    """
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def seams(size: tuple[int, int], patch: tuple[int, int], tile: int, overlap: float) -> tuple[list[float], list[float]]:
    """Where tiles of an image of that size meet, in pixels from the top and from the left: in the middle of what two of
    them share. Arguments are those of `Tiled`."""
    lines = []
    for length, side in zip(size, patch, strict=True):
        of_tile, _, starts = _along(math.ceil(length / side), tile // side, overlap)
        lines.append([(before + of_tile + after) / 2 * side for before, after in pairwise(starts)])
    return lines[0], lines[1]


def _along(length: int, tile: int, overlap: float) -> tuple[int, int, list[int]]:
    """Of tiles along a length, all in patches: their side, what two share at least, and where they begin."""
    shared = min(math.ceil(overlap * tile), tile - 1)
    return min(tile, length), shared, tile_starts(length, tile, shared)


def as_overlap(overlap: float) -> float:
    """The share of a tile that the next one has too; a UserError if it is none."""
    if not is_real(overlap) or not 0 <= overlap < 1:
        raise UserError(f'overlap must be at least 0 and below 1, got {overlap=}')
    return float(overlap)


class Tiled(nn.Module):
    """A model of patches that sees images tile by tile, and gives the logits of the whole, as a `DenseModel` does.

    Tiles begin at whole patches, so that their logits lie on one grid; where they overlap, these are averaged, each
    weighed by how far it is from the edge of its tile. One tile that holds the image changes nothing.

    Args:
        model: Images (B, C, H, W) -> logits, as `task` reads them.
        task: Of pixels.
        tile: Side of a tile in pixels, a multiple of the patches.
        overlap: The share of a tile that the next one has too, at least: from 0 to below 1.

    Raises:
        UserError: If an argument is out of its range.
    """

    def __init__(self, model: nn.Module, task: Task, tile: int, overlap: float = 0.25):
        super().__init__()
        as_integer('tile', tile)
        for side in task.patch_size:
            if tile % side:
                raise UserError(f'{tile=} must be a multiple of the patches; use {multiples_around(tile, side)}')
        self.model, self.task, self.tile, self.overlap = model, task, int(tile), as_overlap(overlap)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of whole patches -> (B, K, h, w)"""
        return self.blend(lambda y, x, h, w: images[..., y : y + h, x : x + w], tuple(images.shape[-2:]))

    def blend(self, read: Callable[[int, int, int, int], Tensor], size: tuple[int, int]) -> Tensor:
        """The same of images that are read part by part.

        Args:
            read: Of a part, where it begins and its size (top, left, height, width) -> (B, C, height, width).
            size: H and W, of whole patches.
        """
        patch = self.task.patch_size
        lengths = [whole // side for whole, side in zip(size, patch, strict=True)]  # in patches, as all below
        axes = [_along(length, self.tile // side, self.overlap) for length, side in zip(lengths, patch, strict=True)]
        sides, shared, starts = zip(*axes, strict=True)
        total = weights = None
        for top in starts[0]:
            for left in starts[1]:
                y, x, h, w = top * patch[0], left * patch[1], sides[0] * patch[0], sides[1] * patch[1]
                logits = self.task.maps(self.model(read(y, x, h, w)), (h, w))
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                fine = logits.shape[2] // sides[0]  # cells along a patch
                if total is None:
                    total = logits.new_zeros(*logits.shape[:2], *(fine * length for length in lengths))
                    weights = logits.new_zeros(total.shape[2:])
                    ramps = [
                        _ramp(fine * side, fine * over).to(logits) for side, over in zip(sides, shared, strict=True)
                    ]
                    of_tile = torch.outer(*ramps)
                rows, columns = (slice(fine * at, fine * (at + n)) for at, n in zip((top, left), sides, strict=True))
                total[..., rows, columns] += of_tile * logits
                weights[rows, columns] += of_tile
        return total / weights


def _ramp(length: int, overlap: int) -> Tensor:
    """Weights along a tile: they rise from its ends to 1 over what is shared."""
    near = torch.arange(1, length + 1, dtype=torch.float64)
    return (torch.minimum(near, near.flip(0)) / (overlap + 1)).clamp(max=1)
