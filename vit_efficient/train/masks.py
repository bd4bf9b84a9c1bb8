"""What the classes of pixels ask for: their loss, and their accuracy without logits of a whole image at once.

Dimensions: B images, K classes, h × w cells of the logits, H × W pixels of the image.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_efficient.data.files.masks import IGNORED
from vit_efficient.train.boundaries import boundary_f

STRIP = 2**24  # logits of a strip: 64 MiB of float32


def padded_size(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """The least multiples of the sides of a patch that hold an image."""
    height, width = (math.ceil(side / step) * step for side, step in zip(size, patch, strict=True))
    return height, width


def pad_to_patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) whose lower and right edges are repeated until patches divide them."""
    size = images.shape[-2:]
    below, right = (whole - side for whole, side in zip(padded_size(size, patch), size, strict=True))
    return F.pad(images, (0, right, 0, below), mode='replicate') if below or right else images


def upsampled(logits: Tensor, size: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Logits (B, K, h, w) of padded images, as those of their pixels: (B, K, H, W), bilinear."""
    return F.interpolate(logits, padded_size(size, patch), mode='bilinear', align_corners=False)[
        ..., : size[0], : size[1]
    ]


def strips(
    logits: Tensor, size: tuple[int, int], patch: tuple[int, int], most: int = STRIP
) -> Iterator[tuple[slice, Tensor]]:
    """`upsampled` in strips, one below the other: the rows of each, and its logits (B, K, rows, W).

    Args:
        most: Numbers that a strip has at most, if not a single row has more.
    """
    height, width = padded_size(size, patch)
    h = logits.shape[2]
    rows = max(1, most // (logits.shape[0] * logits.shape[1] * width))
    for top in range(0, size[0], rows):
        pixels = torch.arange(top, min(top + rows, size[0]), device=logits.device)
        # The centres of pixels among those of cells, and the share of the lower one of the two next to each.
        places = ((pixels.to(logits.dtype) + 0.5) * (h / height) - 0.5).clamp(min=0)
        upper = places.floor().long()
        share = (places - upper)[:, None]
        lower = (upper + 1).clamp(max=h - 1)
        between = logits[:, :, upper] * (1 - share) + logits[:, :, lower] * share
        strip = F.interpolate(between, (len(pixels), width), mode='bilinear', align_corners=False)
        yield slice(top, top + len(pixels)), strip[..., : size[1]]


class MaskLoss(nn.Module):
    """Of logits (B, K, H, W) and classes (B, H, W): the mean over the images of what each has lost.

    So it is the same however a batch is split among processes. Pixels that do not count (`IGNORED`) lose nothing.
    Cross-entropy is the sum over the pixels of an image divided by their number, those that do not count included, as
    in MMSegmentation. Dice is 1 - 2 |A ∩ B| / (|A| + |B|) with probabilities for A, averaged over the classes that an
    image has (Milletari, Navab, Ahmadi, "V-Net", 2016, arXiv 1606.04797, without the squares).

    Args:
        kind: `cross_entropy`, `dice` or `both`, their sum.
        weights: Of the classes, K of them; by default 1.
        smoothing: Of labels, in cross-entropy.
    """

    def __init__(self, kind: str = 'cross_entropy', weights: list[float] | None = None, smoothing: float = 0.0):
        super().__init__()
        self.kind, self.smoothing = kind, smoothing
        self.register_buffer('weights', None if weights is None else torch.tensor(weights), persistent=False)

    def forward(self, logits: Tensor, classes: Tensor) -> Tensor:
        classes = classes.long()
        weights = None if self.weights is None else self.weights.to(logits)
        loss = logits.new_zeros(())
        if self.kind != 'dice':
            options = dict(ignore_index=IGNORED, reduction='sum', label_smoothing=self.smoothing)
            loss = loss + F.cross_entropy(logits, classes, weights, **options) / classes.numel()
        if self.kind != 'cross_entropy':
            loss = loss + self._dice(logits.softmax(1), classes, weights)
        return loss

    @staticmethod
    def _dice(shares: Tensor, classes: Tensor, weights: Tensor | None) -> Tensor:
        counts = (classes != IGNORED)[:, None]
        shares, labels = shares * counts, classes.clamp(min=0)[:, None]
        empty = shares.new_zeros(*shares.shape[:2])
        of_labels = shares.gather(1, labels).flatten(1)  # 0 where the label does not count
        both = empty.scatter_add(1, labels.flatten(1), of_labels)
        area = empty.scatter_add(1, labels.flatten(1), counts.flatten(1).to(shares))
        total = shares.sum((2, 3)) + area
        there = (area > 0).to(shares) if weights is None else (area > 0) * weights
        lost = there * (1 - 2 * both / total.clamp(min=torch.finfo(shares.dtype).tiny))
        return (lost.sum(1) / there.sum(1).clamp(min=torch.finfo(shares.dtype).tiny)).mean()


@dataclass
class PixelScore:
    """How the pixels of one image are told.

    Attributes:
        loss: Cross-entropy: its sum over the pixels, divided by their number, as of `MaskLoss`.
        confusion: (K, K), int64: how many pixels of a class, by row, were taken for another, by column.
        probability, label_probability: Of the class that is told, and of the one that is there: means over the pixels
            that count.
        boundary_f: `boundaries.boundary_f`.
        predicted: The classes that are told, (H, W), int16.
    """

    loss: Tensor
    confusion: Tensor
    probability: Tensor
    label_probability: Tensor
    boundary_f: float
    predicted: np.ndarray

    @classmethod
    def of(cls, logits: Tensor, classes: Tensor, patch: tuple[int, int]) -> 'PixelScore':
        """Of the logits (K, h, w) of an image, padded to patches, and the classes (H, W) of its pixels."""
        kinds, size = logits.shape[0], tuple(classes.shape)
        lost, shares, of_labels = (logits.new_zeros(()) for _ in range(3))
        confusion = torch.zeros(kinds, kinds, dtype=torch.int64, device=logits.device)
        found = torch.empty(size, dtype=torch.int16, device=logits.device)
        for rows, strip in strips(logits[None], size, patch):
            truth = classes[rows].long()
            counts = truth != IGNORED
            log_shares = strip[0].log_softmax(0)
            of_label = log_shares.gather(0, truth.clamp(min=0)[None])[0] * counts
            best, predicted = log_shares.max(0)
            found[rows] = predicted.to(found.dtype)
            lost = lost - of_label.sum()
            of_labels = of_labels + (of_label.exp() * counts).sum()
            shares = shares + (best.exp() * counts).sum()
            pairs = (truth * kinds + predicted)[counts]
            confusion += torch.bincount(pairs, minlength=kinds**2).view(kinds, kinds)
        count = confusion.sum()
        predicted = found.cpu().numpy()
        outlines = boundary_f(predicted, classes.cpu().numpy())
        return cls(lost / classes.numel(), confusion, shares / count, of_labels / count, outlines, predicted)

    def areas(self) -> Tensor:
        """(3, K), int64: pixels of a class, those that were taken for it, and those that are both."""
        return torch.stack([self.confusion.sum(1), self.confusion.sum(0), self.confusion.diagonal()])

    def numbers(self) -> tuple[Tensor, ...]:
        """The accuracy of the pixels that count and the boundary F-score, in percent, and the two probabilities."""
        right, count = (part.to(self.probability) for part in (self.confusion.trace(), self.confusion.sum()))
        outlines = right.new_tensor(100 * self.boundary_f)
        return 100 * right / count, outlines, self.probability, self.label_probability
