"""Accuracy of a model on a labelled data set."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vit_efficient.data import iterate
from vit_efficient.train.distributed import Processes


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: accuracies in percent, mean loss, and (index, label, predicted) for every image."""

    top1: float
    top5: float
    loss: float
    images: int
    images_per_second: float
    predictions: list[tuple[int, int, int]]


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The context of a forward pass: bf16 autocast for `amp` bf16, none otherwise."""
    return torch.autocast(device.type, torch.bfloat16) if amp == 'bf16' else nullcontext()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    processes: Processes | None = None,
    amp: str = 'none',
    progress: bool = True,
) -> Evaluation:
    """Counts how often the label is the first, or among the first five, of the model's classes.

    Args:
        model: Images (B, C, H, W) -> logits (B, classes). It is put in eval mode, and back as it was.
        loader: Batches (images, labels, indices); every process reads its own share.
        processes: Where the work is shared; by default, the model's device alone.
        amp: none or bf16.
        progress: Show a progress bar where there is a terminal.

    Returns:
        The same Evaluation in every process. With fewer than six classes top-5 is 100 %. Images per second is the rate
        of the whole loop, loading included, over all processes.

    Raises:
        ValueError: If there are no images, or one of them is corrupt.
    """
    processes = processes or Processes(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    rows: list[tuple[int, int, int]] = []
    top5 = total_loss = 0.0
    start = time.perf_counter()
    disable = None if progress and processes.is_first else True  # None: unless there is a terminal
    for images, labels, indices in tqdm(iterate(loader), 'evaluate', len(loader), leave=False, disable=disable):
        labels = labels.to(processes.device)
        with autocast(processes.device, amp):
            logits = model(images.to(processes.device, non_blocking=True))
        logits = logits.float()
        total_loss += F.cross_entropy(logits, labels, reduction='sum').item()
        best = logits.topk(min(5, logits.shape[1])).indices
        top5 += (best == labels[:, None]).sum().item()
        rows += zip(indices.tolist(), labels.tolist(), best[:, 0].tolist(), strict=True)
    seconds = time.perf_counter() - start
    model.train(was_training)
    shares = processes.gather((rows, top5, total_loss, seconds))
    rows = sorted(row for share in shares for row in share[0])
    if not rows:
        raise ValueError('there are no images to evaluate')
    count = len(rows)
    return Evaluation(
        top1=100 * sum(label == predicted for _, label, predicted in rows) / count,
        top5=100 * sum(share[1] for share in shares) / count,
        loss=sum(share[2] for share in shares) / count,
        images=count,
        images_per_second=count / max(share[3] for share in shares),
        predictions=rows,
    )
