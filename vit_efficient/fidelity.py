"""How near the features of a converted model are to those of the model that it was.

What is compared are the tokens after the last block and the final norm. Cosines of patch tokens hide much: all patches
of an image have a large part in common, so that even a constant output may have .7. Beside them stands the centred
cosine, after the mean patch token of the image, of the model that it was, is taken from both: a constant output has 0.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.utils.errors import UserError

NOTHING = 1e-6  # of a cosine, which rounding alone may take


def given_back(swapped: float, healed: float) -> float | None:
    """The share, in percent, of what a swap has taken from a cosine; None where that is nothing."""
    lost = 1 - swapped
    return 100 * (healed - swapped) / lost if lost >= NOTHING else None


class Fidelity(NamedTuple):
    """What is kept of features, 1 where nothing changed.

    Args:
        patch: The mean cosine of a patch token to what it was.
        centred: The same, after the mean patch token of the image, as it was, is taken from both.
        prefix: The mean cosine of a prefix token (class, registers), NaN where there is none.
        error: The mean squared error of the patch tokens over the mean square of what they were, centred.
    """

    patch: float
    centred: float
    prefix: float
    error: float


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which a model is evaluated, without gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def final_tokens(model: nn.Module, images: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tokens of each image after the last block and the final norm, of SAM after its neck.

    Args:
        model: A timm ViT, converted or not; it is evaluated, and left in the modes that it was in.
        images: (C, height, width) each, preprocessed for the model, of sizes that it takes.

    Yields:
        (N, C) each, float32, on the CPU.
    """
    weight = next(model.parameters())
    for image in images:
        with _evaluating(model):
            tokens = model.forward_features(image[None].to(weight.device, weight.dtype))[0]
        if tokens.ndim == 3:  # the map of a VisionTransformerSAM, (C, H, W)
            tokens = tokens.flatten(1).T
        yield tokens.float().cpu()


def fidelity(reference: Tensor, tokens: Tensor, prefix: int) -> Fidelity:
    """What the tokens of an image keep of those that they were.

    Args:
        reference, tokens: (N, C), the prefix tokens first.
        prefix: The number of prefix tokens.

    Raises:
        UserError: If they are not of one shape, or there is no patch.
    """
    if reference.shape != tokens.shape or reference.ndim != 2 or not 0 <= prefix < reference.shape[0]:
        raise UserError(
            f'fidelity compares tokens (N, C) of one image, N > {prefix=}, got {tuple(reference.shape)} and '
            f'{tuple(tokens.shape)}'
        )
    reference, tokens = reference.double(), tokens.double()
    first, patches = reference.tensor_split([prefix])
    of_first, of_patches = tokens.tensor_split([prefix])
    mean = patches.mean(dim=0)
    return Fidelity(
        patch=_cosine(patches, of_patches),
        centred=_cosine(patches - mean, of_patches - mean),
        prefix=_cosine(first, of_first) if prefix else float('nan'),
        error=float((of_patches - patches).square().mean() / (patches - mean).square().mean()),
    )


def same_neighbours(reference: Tensor, tokens: Tensor, prefix: int, count: int = 10) -> float:
    """The share of the nearest patches of a patch that are among its nearest still, mean over the patches of an image.

    Args:
        reference, tokens: As of `fidelity`.
        count: Of nearest patches, by the cosine of tokens less the mean patch token of the image; at most all others.
    """
    count = min(count, len(reference) - prefix - 1)
    if count < 1:
        return 1.0
    if not tokens.isfinite().all():  # they have no order
        return float('nan')
    nearest = []
    for each in (reference, tokens):
        patches = each[prefix:].float()
        patches = F.normalize(patches - patches.mean(0), dim=-1)
        near = patches @ patches.T
        nearest.append(near.fill_diagonal_(-2).topk(count).indices)
    both = torch.zeros(len(near), len(near), dtype=torch.bool, device=near.device).scatter_(1, nearest[0], True)
    return float(both.gather(1, nearest[1]).float().mean())


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=-1).mean())


def mean_fidelity(of_images: Sequence[Fidelity]) -> Fidelity:
    """The mean over images."""
    return Fidelity(*(sum(values) / len(values) for values in zip(*of_images, strict=True)))
