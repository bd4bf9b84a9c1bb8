"""Accuracy of a model on a labelled data set: of images, of patches, or of both.

Dimensions: B images, K classes, H × W patches of the target.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vit_efficient.data import iterate
from vit_efficient.train.distributed import Processes
from vit_efficient.train.tasks import Task
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.modes import evaluates
from vit_efficient.utils.precision import autocast, real_dtype

# The accuracies, in percent, in the order in which they are shown.
ACCURACIES = {
    'top1': 'top-1',
    'top5': 'top-5',
    'foreground_miou': 'foreground mIoU',
    'miou': 'mIoU',
    'patch_accuracy': 'patch accuracy',
    'pixel_accuracy': 'pixel accuracy',
    'boundary_f': 'boundary F',
}
# How near features are to those of a teacher, 1 where they are the same.
COSINES = {
    'centred_cosine': 'centred cosine',
    'patch_cosine': 'patch cosine',
    'patch_low': 'its 5th percentile',
    'prefix_cosine': 'class cosine',
    'neighbours': 'same neighbours',
}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. Accuracies are in percent; None where the task has no such."""

    loss: float  # mean cross-entropy, without label smoothing
    images: int  # of those that could be read, if others are skipped
    images_per_second: float  # of the whole loop, loading included, over all processes
    # Of predictions: index; label, predicted class, the probabilities of the latter and of the former; of patches, or
    # of pixels that count, the accuracy, of pixels the boundary F-score too, and the means of these probabilities.
    columns: tuple[str, ...] = field(repr=False)
    predictions: list[tuple[int | float, ...]] = field(repr=False)  # for every image, by index
    top1: float | None = None  # images whose label is the first of the classes
    top5: float | None = None  # or among the first five; None with no more than five classes, of which it says nothing
    # Intersection over union of the patches or pixels of each class, all images together, averaged over the classes
    # that occur in targets or predictions; without the class none (or background), and with it.
    foreground_miou: float | None = None
    miou: float | None = None
    patch_accuracy: float | None = None  # patches that are right
    pixel_accuracy: float | None = None  # pixels that are right, of those that count
    boundary_f: float | None = None  # mean over images of `boundaries.boundary_f`
    centred_cosine: float | None = None  # of features: as `vit_efficient.fidelity.Fidelity`, mean over images
    patch_cosine: float | None = None
    patch_low: float | None = None  # 5th percentile over the patches of all images
    prefix_cosine: float | None = None  # None without prefix tokens
    neighbours: float | None = None  # as `vit_efficient.fidelity.same_neighbours`, mean over images
    after_blocks: list[float] | None = field(default=None, repr=False)  # patch cosine after each block
    confusion: Tensor | None = field(default=None, repr=False)  # of patches or pixels, as `confusion_matrix`
    # (images, 3, K), as predictions: pixels of a class, those that were taken for it, those that are both
    areas: Tensor | None = field(default=None, repr=False)
    skipped: dict[int, str] = field(default_factory=dict, repr=False)  # why an image could not be read, by index

    @property
    def accuracies(self) -> dict[str, float]:
        """Those that the task has, by name."""
        values = {name: getattr(self, name) for name in (*ACCURACIES, *COSINES)}
        return {name: value for name, value in values.items() if value is not None}


def describe(accuracies: Mapping[str, float]) -> str:
    """Accuracies as text: 'top-1 97.10 %, top-5 99.90 %'. What else the mapping holds is left out."""
    found = [f'{title} {accuracies[name]:.2f} %' for name, title in ACCURACIES.items() if name in accuracies]
    found += [f'{title} {accuracies[name]:.4f}' for name, title in COSINES.items() if name in accuracies]
    return ', '.join(found)


def confusion_matrix(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """(classes, classes), int64: how often a class, by row, was taken for another, by column."""
    return torch.bincount((target * classes + predicted).flatten(), minlength=classes**2).view(classes, classes)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Of each class, (classes,), float64; NaN for those that occur neither in targets nor in predictions."""
    both = confusion.diagonal().double()
    return both / (confusion.sum(0) + confusion.sum(1) - both)


# Not inference_mode: the memory into which it gathers a sharded model could not be written to outside of it.
@torch.no_grad()
@evaluates
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    processes: Processes | None = None,
    amp: str = 'none',
    task: Task | None = None,
    progress: bool = True,
    after_batch: Callable[[], None] | None = None,
    keep: Callable[[int, np.ndarray], None] | None = None,
) -> Evaluation:
    """Measures a model.

    Args:
        model: Images (B, C, H, W) -> logits, as the task reads them. It is put in eval mode, and each
            module of it back as it was. If it is sharded, all processes of the run must call.
        loader: From `create_loader`; or any that gives batches (images, labels, indices), of patch tasks (images,
            labels, targets, indices). Every process reads its own part.
        processes: Where the work is shared; by default, the model's device alone.
        amp: none or bf16.
        task: By default, the classification of images.
        progress: Show a progress bar where there is a terminal.
        after_batch: Called after every batch, as often in all processes.
        keep: Of pixels: called with the index of each image and the class of each of its pixels, (H, W), int16.

    Returns:
        The same Evaluation in every process.

    Raises:
        UserError: If there are no images that can be read, or one of them is corrupt and not to be skipped.
    """
    processes = processes or Processes(next(model.parameters()).device)
    task = task or Task()
    device, found, losses, top5, areas = processes.device, [], [], [], []
    confusion: Tensor | int = 0
    skipped: dict[int, str] = {}
    start = time.perf_counter()
    disable = None if progress and processes.is_first else True  # None: unless there is a terminal
    batches = tqdm(iterate(loader, skipped, device), 'evaluate', len(loader), leave=False, disable=disable)
    # What is found stays on the device to the end: to fetch it sooner would be to wait for each batch.
    for (images, *rest), own in processes.in_step(batches):
        with autocast(device, amp):
            logits = model(task.padded(images.to(device, non_blocking=True)))
        if after_batch:
            after_batch()
        if not own:
            continue
        *truth, indices = rest
        if task.of_pixels:
            scores = task.score_pixels(logits, truth[1])
            losses.append(torch.stack([score.loss for score in scores]).sum().to(real_dtype(device)))
            confusion = confusion + sum(score.confusion for score in scores)
            areas += [score.areas() for score in scores]
            for index, score in zip(indices.tolist(), scores, strict=True) if keep else ():
                keep(index, score.predicted)
            found.append([indices.clone(), *map(torch.stack, zip(*(score.numbers() for score in scores), strict=True))])
            continue
        logits = images_BK, patches_BKHW = task.split(logits, truth)
        losses.append(len(images) * task.loss(logits, truth, F.cross_entropy).to(real_dtype(device)))
        columns = [indices.clone()]  # not what a loader process shares: each would hold a file open
        if task.of_images:
            labels_B1, shares_BK = truth[0][:, None], images_BK.softmax(1)
            best = images_BK.topk(min(5, images_BK.shape[1])).indices
            if images_BK.shape[1] > 5:
                top5.append((best == labels_B1).sum())
            columns += [truth[0].clone(), best[:, 0]]
            columns += [shares_BK.gather(1, classes)[:, 0] for classes in (best[:, :1], labels_B1)]
        if task.of_patches:
            predicted_BHW = patches_BKHW.argmax(1)
            confusion = confusion + confusion_matrix(predicted_BHW, truth[1], patches_BKHW.shape[1])
            columns.append(100 * (predicted_BHW == truth[1]).to(real_dtype(device)).mean((1, 2)))
            shares_BKHW = patches_BKHW.softmax(1)
            for classes in (predicted_BHW, truth[1]):
                columns.append(shares_BKHW.gather(1, classes[:, None]).mean((1, 2, 3)))
        found.append(columns)
    lists = [torch.cat(column).tolist() for column in zip(*found, strict=True)]
    rows: list[tuple[int | float, ...]] = list(zip(*lists, strict=True))
    total_loss, right5 = (sum(torch.stack(values).tolist()) if values else None for values in (losses, top5))
    confusion = confusion.cpu() if isinstance(confusion, Tensor) else confusion
    seconds = time.perf_counter() - start
    areas = torch.stack(areas).cpu() if areas else torch.zeros(0)
    parts = processes.gather((rows, areas, right5, total_loss, confusion, seconds, list(skipped.items())))
    rows_of, areas_of, top5_of, loss_of, confusion_of, seconds_of, skipped_of = zip(*parts, strict=True)
    indices = [row[0] for row in chain(*rows_of)]
    rows, skipped = sorted(chain(*rows_of)), dict(sorted(chain(*skipped_of)))
    if not rows:
        reason = f': none of {len(skipped)} can be read; {next(iter(skipped.values()))}' if skipped else ''
        raise UserError(f'there are no images to evaluate{reason}')
    count = len(rows)
    columns, accuracies = ['index'], {}
    if task.of_images:
        columns += ['label', 'predicted', 'probability', 'label_probability']
        accuracies['top1'] = 100 * sum(label == predicted for _, label, predicted, *_ in rows) / count
        if any(right is not None for right in top5_of):
            accuracies['top5'] = 100 * sum(filter(None, top5_of)) / count
    if task.of_pixels and not sum(confusion_of).any():
        raise UserError(
            f'none of the pixels of {count} images counts, so that there is nothing to evaluate; see ignore_index and '
            'values (data.args), which say what does not'
        )
    if task.of_patches:
        what = 'pixel' if task.of_pixels else 'patch'
        outlines = ['boundary_f'] * task.of_pixels
        columns += [f'{what}_accuracy', *outlines, f'{what}_probability', f'{what}_label_probability']
        if task.of_pixels:
            of_images = [row[2] for row in rows if not math.isnan(row[2])]
            accuracies['boundary_f'] = sum(of_images) / len(of_images) if of_images else None
            filled = [each for each in areas_of if len(each)]
            accuracies['areas'] = torch.cat(filled)[sorted(range(count), key=indices.__getitem__)]
        accuracies.update(_accuracies_of(what, sum(confusion_of), task.none), confusion=sum(confusion_of))
    loss, rate = sum(filter(None, loss_of)) / count, count / max(seconds_of)
    return Evaluation(loss, count, rate, tuple(columns), rows, skipped=skipped, **accuracies)


def _accuracies_of(what: str, confusion: Tensor, none: int | None) -> dict[str, float | None]:
    found = intersection_over_union(confusion)
    right = confusion.trace() / confusion.sum()
    accuracies = {'miou': 100 * found.nanmean().item(), f'{what}_accuracy': 100 * right.item()}
    if none is not None:
        foreground = torch.cat([found[:none], found[none + 1 :]]).nanmean()
        accuracies['foreground_miou'] = None if foreground.isnan() else 100 * foreground.item()
    return accuracies
