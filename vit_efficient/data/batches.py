"""Batches: samples put together in loader processes, and brought to the device, a batch ahead of the computation."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from vit_efficient.data.samples import Samples, Unreadable
from vit_efficient.utils.device import available_cores
from vit_efficient.utils.errors import UserError

logger = logging.getLogger(__name__)


class _Batch(NamedTuple):
    """What loader processes send where samples may be skipped; no tensors if nothing can be read."""

    tensors: list[Tensor] | None
    unreadable: dict[int, str]


def _collate(
    items: Sequence[tuple[Any, ...] | Unreadable], normalize: Callable[[Tensor], Tensor], skip: bool, full: bool
) -> _Batch | list[Tensor]:
    """Puts samples together; images of 8 bits stay so, if all are.

    With `skip` what cannot be read is left out; in a full batch the others take its places, in turn.
    """
    readable = [item for item in items if not isinstance(item, Unreadable)]
    if full and not readable:
        raise UserError(f'nothing in a batch of {len(items)} can be read; the first one: {items[0].reason}')
    if full and len(readable) < len(items):
        others = cycle(readable)
        readable = [next(others) if isinstance(item, Unreadable) else item for item in items]
    if len({image.dtype for image, *_ in readable}) > 1:
        readable = [(normalize(image), *rest) for image, *rest in readable]
    sizes = sorted({tuple(image.shape) for image, *_ in readable})
    if len(sizes) > 1:
        shapes = ' and '.join('×'.join(map(str, size)) for size in (sizes[0], sizes[-1]))
        way_out = '' if full else '; set data.eval_batch_size=1 (--batch-size 1)'
        raise UserError(f'images of several sizes, such as {shapes}, are no batch{way_out}')
    tensors = default_collate(readable) if readable else None
    if not skip:
        return tensors
    return _Batch(tensors, {item.index: item.reason for item in items if isinstance(item, Unreadable)})


def limit_workers(workers: int, key: str) -> int:
    """So many loader processes, or as many as there are cores, which is said; `key` is where the number is from."""
    cores = available_cores()
    if workers > cores:
        logger.info('%s=%d: %d load images, as many as there are cores', key, workers, cores)
    return min(workers, cores)


def create_loader(
    samples: Samples, sampler: Sampler, batch_size: int, workers: int = 0, drop_last: bool = False, pin: bool = False
) -> DataLoader:
    """A loader of batches (images (B, C, H, W), labels (B,), indices (B,)), with targets before the indices if any.

    `iterate` gives these batches. What the loader itself gives has images of 8 bits as uint8, not normalised yet, and
    is another type if samples are skipped.

    Args:
        samples, sampler: The data and their order. Training sets the sampler's epoch before each pass.
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
        collate_fn=partial(_collate, normalize=samples.normalize, skip=samples.on_error == 'skip', full=drop_last),
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


def iterate(
    loader: Iterable[Any],
    unreadable: dict[int, str] | None = None,
    device: torch.device | None = None,
    normalize: bool = True,
) -> Iterator[list[Tensor]]:
    """Iterates a loader, and gives errors of loader processes the message they have without processes.

    The samples that are skipped go to `unreadable`, by index, each with a line that names it and tells why, once their
    batch is given.

    Args:
        loader: From `create_loader`, or any that gives lists or tuples of tensors.
        unreadable: See above.
        device: Where batches go, but for the indices, which are last; by default they stay where they are. On a GPU
            each is copied while the one before is computed with.
        normalize: Whether images of 8 bits are normalised; else `Samples.normalize` is left to the caller, and they
            take a quarter of the memory until then.

    Raises:
        UserError: What the data set raised, as one line; for training, also if nothing in a batch can be read.
    """
    dataset = getattr(loader, 'dataset', None)
    normal = dataset.normalize if normalize and isinstance(dataset, Samples) else None
    received = (batch if isinstance(batch, _Batch) else _Batch(batch, {}) for batch in loader)
    if device is not None:
        received = _copied_ahead(received, device) if copies_ahead(device) else (_to(b, device) for b in received)
    try:
        for tensors, reasons in received:
            if unreadable is not None:
                unreadable.update(reasons)
            if tensors is not None:
                yield [normal(tensors[0]), *tensors[1:]] if normal else tensors
    except UserError as error:
        if 'DataLoader worker process' not in str(error):
            raise
        # Its traceback is a reference cycle, and the garbage collector would shut the loader down in 5 s per process.
        error.__traceback__ = None
        raise UserError(str(error).splitlines()[-1].partition(': ')[2]) from None


def copies_ahead(device: torch.device) -> bool:
    """Whether copies to a device run beside what it computes."""
    return device.type == 'cuda'


def _to(batch: _Batch, device: torch.device) -> _Batch:
    if batch.tensors is None:
        return batch
    *tensors, indices = batch.tensors
    return batch._replace(tensors=[*(tensor.to(device, non_blocking=True) for tensor in tensors), indices])


def _copied_ahead(batches: Iterator[_Batch], device: torch.device) -> Iterator[_Batch]:
    """Batches on a GPU: before one is given, the copy of the next has begun, on a stream of its own.

    What goes wrong with a batch is raised when it is its turn, as if nothing were read ahead.
    """
    stream = torch.cuda.Stream(device)

    def begin() -> _Batch | Exception | None:
        try:
            batch = next(batches, None)
        except Exception as error:  # Ctrl-C, which is none, is not put off
            return error
        with torch.cuda.stream(stream):
            return batch and _to(batch, device)

    following = begin()
    while following is not None:
        if isinstance(following, Exception):
            try:
                raise following
            finally:
                del following  # with its traceback it would hold the loader
        batch, computing = following, torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for tensor in (batch.tensors or [])[:-1]:
            tensor.record_stream(computing)  # the other stream, whose memory it is, would use that again too early
        following = begin()
        yield batch
