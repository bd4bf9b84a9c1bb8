"""Features finer than the patches that a model saw, guided by the image: what half the resolution loses, learned back.

Dimensions: B images, L layers, C channels, h × w patches of the reduced image, f the factor, h · f × w · f fine ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GuidedUpsampler(nn.Module):
    """Features at the patches of an image, from those of the same image reduced.

    A fine patch takes a convex combination of the features of the nine reduced patches around it, weighed by how alike
    the image is in it and there, and by where it lies in its own; features stay those that the model gives. It is the
    idea of AnyUp (Wimmer et al., 2025, arXiv 2510.12764) in a simple form, for one model: attention of image features
    in a window, and values that are not changed. Untrained it weighs by the distance alone.

    Args:
        in_chans: Channels of images.
        dim: C; the last layer helps to tell patches apart.
        patch_size: Sides of a patch in pixels, of the whole image as of the reduced one.
        factor: f, by which images are reduced.
        width: Channels that images and features are compared in.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: tuple[int, int], factor: int = 2, width: int = 96):
        super().__init__()
        self.factor = factor
        self.embed = nn.Conv2d(in_chans, width, patch_size, patch_size)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.keys = nn.Conv2d(width + dim, width, 1)
        self.queries = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.queries.weight)
        nn.init.zeros_(self.queries.bias)
        self.bias = nn.Parameter(-_distances(factor))

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        """Images (B, channels, H, W) and features (B, L, C, h, w) -> (B, L, C, h · f, w · f)"""
        f = self.factor
        guide = self.embed(images)
        guide = guide + self.mix(F.gelu(guide))
        queries = self.queries(F.gelu(guide))
        last = self.norm(features[:, -1].movedim(1, -1)).movedim(-1, 1)
        keys = self.keys(torch.cat([F.avg_pool2d(F.gelu(guide), f), last], 1))
        # One neighbour after the other: all nine at once would be nine times the features.
        scores = [
            (queries * _repeated(near, f)).sum(1) / queries.shape[1] ** 0.5 + _tiled(self.bias[i], near.shape[-2:])
            for i, near in enumerate(_neighbours(keys))
        ]
        inside = _neighbours(torch.ones_like(keys[:1, :1]))
        scores = [
            score.masked_fill(_repeated(there, f)[:, 0] == 0, -torch.inf)
            for score, there in zip(scores, inside, strict=True)
        ]
        shares = torch.stack(scores).softmax(0)
        fine = 0
        for share, near in zip(shares, _neighbours(features.flatten(1, 2)), strict=True):
            fine = fine + share[:, None] * _repeated(near, f)
        return fine.unflatten(1, features.shape[1:3])


def _distances(factor: int) -> Tensor:
    """(9, f, f): the squared distance of a fine patch, by its place in a reduced one, from the centre of each of the
    nine reduced ones, whose sides are 1, times two."""
    centres = (torch.arange(factor) + 0.5) / factor - 0.5
    axis = (centres[None] - torch.arange(-1, 2)[:, None]).square()
    return 2 * (axis[:, None, :, None] + axis[None, :, None, :]).flatten(0, 1)


def _neighbours(x: Tensor) -> list[Tensor]:
    """(B, C, h, w) -> nine of the same shape, with what lies one above or below, left or right; 0 beyond the edges."""
    h, w = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1))
    return [padded[..., i : i + h, j : j + w] for i in range(3) for j in range(3)]


def _repeated(x: Tensor, factor: int) -> Tensor:
    """(B, C, h, w) -> (B, C, h · f, w · f), each of them f × f times."""
    return x.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def _tiled(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(f, f) -> (h · f, w · f)"""
    return x.repeat(*grid)
