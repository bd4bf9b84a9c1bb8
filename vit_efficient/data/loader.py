"""Batches of samples: how they are collated, the processes that load them, and their errors."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, default_collate

from vit_efficient.data.sampler import EpochSampler
from vit_efficient.data.samples import Samples, Unreadable
from vit_efficient.utils.errors import UserError


class _Batch(NamedTuple):
    """What loader processes send where samples may be skipped; no tensors if nothing can be read."""

    tensors: list[torch.Tensor] | None
    unreadable: dict[int, str]


def _collate(items: Sequence[tuple[Any, ...] | Unreadable], full: bool) -> _Batch:
    """Leaves out what cannot be read; in a full batch the others take its places, in turn."""
    unreadable = {item.index: item.reason for item in items if isinstance(item, Unreadable)}
    readable = [item for item in items if not isinstance(item, Unreadable)]
    if full and not readable:
        raise UserError(f'nothing in a batch of {len(items)} can be read; the first one: {items[0].reason}')
    if full:
        others = cycle(readable)
        readable = [next(others) if isinstance(item, Unreadable) else item for item in items]
    return _Batch(default_collate(readable) if readable else None, unreadable)


def create_loader(
    samples: Samples,
    sampler: EpochSampler,
    batch_size: int,
    workers: int = 0,
    drop_last: bool = False,
    pin: bool = False,
) -> DataLoader:
    """A loader of batches (images (B, C, H, W), labels (B,), indices (B,)), with targets before the indices if any.

    `iterate` gives these batches. If samples are skipped, what the loader itself gives holds them.

    Args:
        samples, sampler: The data and their order. Training sets the epoch of the sampler before each pass.
        batch_size: Images per batch.
        workers: Loader processes. Those of training, and those that cache images, live as long as the loader.
        drop_last: Full batches only (training): a last batch that is not full is left out, and a copy of another sample
            of the batch takes the place of one that is skipped. Evaluation keeps the former and leaves out the latter.
        pin: Page-locked memory, for a GPU.
    """
    return DataLoader(
        samples,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=drop_last,
        collate_fn=partial(_collate, full=drop_last) if samples.on_error == 'skip' else None,
        pin_memory=pin,
        # Those of an evaluation would idle, beside the others, for an epoch.
        persistent_workers=workers > 0 and (drop_last or samples.cached is not None),
        worker_init_fn=_start_worker,
    )


def _start_worker(_worker: int) -> None:
    # Loader processes are the parallelism; OpenCV's own threads would compete with them.
    with suppress(ImportError):
        import cv2

        cv2.setNumThreads(0)
    # Schedulers send SIGTERM to every process of a job. The one that trains saves a checkpoint first, and would fail
    # where its loader is gone.
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def iterate(loader: Iterable[Any], unreadable: dict[int, str] | None = None) -> Iterator[Any]:
    """Iterates a loader, and gives errors of loader processes the message they have without processes.

    The samples that are skipped go to `unreadable`, by index, each with a line that names it and tells why.

    Raises:
        UserError: What the data set raised, as one line; for training, also if nothing in a batch can be read.
    """
    try:
        for batch in loader:
            if isinstance(batch, _Batch):
                if unreadable is not None:
                    unreadable.update(batch.unreadable)
                batch = batch.tensors
            if batch is not None:
                yield batch
    except UserError as error:
        if 'DataLoader worker process' not in str(error):
            raise
        # Its traceback is a reference cycle, and the garbage collector would shut the loader down in 5 s per process.
        error.__traceback__ = None
        raise UserError(str(error).splitlines()[-1].partition(': ')[2]) from None
