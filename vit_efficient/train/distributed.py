"""The processes of a run: one, or those that torchrun started."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vit_efficient.utils.device import choose_device
from vit_efficient.utils.modes import evaluating
from vit_efficient.utils.precision import autocast, real_dtype

# A process that waits longer for another gives up. Without torchrun, which ends the others when one dies, nothing else
# would end a run on GPUs; what the first process does alone (checkpoints, the final files) must take less.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Processes:
    """This process among those of the run, and the device it computes on."""

    device: torch.device = field(default=torch.device('cpu'))
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def exchange(self, values: Sequence[Tensor], numbers: Sequence[float] = ()) -> list[list[float]]:
        """The numbers of every process, by rank: one collective, and one wait for the device.

        `values` are scalars on the device, `numbers` are known on the host. All processes give as many of both.
        """
        measured = torch.stack(list(values)).to(real_dtype(self.device)).tolist() if values else []
        if self.world_size == 1:
            return [[*measured, *numbers]]
        device = talking_device(self.device)
        row = torch.tensor([*measured, *numbers], dtype=real_dtype(device), device=device)
        rows = row.new_empty(self.world_size, len(row))
        dist.all_gather(list(rows), row)
        return rows.tolist()

    def max(self, value: float) -> float:
        """Of the values of all processes."""
        return max(number for (number,) in self.exchange((), (value,)))

    def in_step(self, batches: Iterable[Sequence[Tensor]]) -> Iterator[tuple[Sequence[Tensor], bool]]:
        """Batches as long as any process has some, with whether they are this process's own.

        So all do as often what none can do alone: the forward pass of a sharded model. Batches begin with images
        (B, C, H, W); a process that has no more gets a single blank image like those of the others, and nothing beside.
        """
        batches = iter(batches)
        while True:
            batch = next(batches, None)
            shapes = self.gather(None if batch is None else (batch[0].shape[1:], batch[0].dtype))
            shape = next(filter(None, shapes), None)
            if shape is None:
                return
            yield (batch, True) if batch is not None else ((torch.zeros(1, *shape[0], dtype=shape[1]),), False)


def talking_device(device: torch.device) -> torch.device:
    """Where what processes tell each other lies: on the host, which waits for no GPU; else with the weights.

    The latter if a process group that the caller has made knows no other way.
    """
    return torch.device('cpu') if 'cpu:' in dist.get_backend_config() else device


def has_unused_parameters(model: nn.Module, images: Tensor, amp: str = 'none') -> bool:
    """Whether some parameters get no gradient from what a model makes of images (B, C, H, W): DDP would wait for it.

    The model is run in eval mode, with the products of `amp`, and left in the modes that it was in.
    """
    with evaluating(model):
        with autocast(images.device, amp):
            outputs = model(images)
        sum(output.sum() for output in ([outputs] if isinstance(outputs, Tensor) else outputs)).backward()
    unused = any(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.zero_grad()
    return unused


@contextmanager
def processes(device: str = 'auto') -> Iterator[Processes]:
    """Joins the processes that torchrun started, or stands alone.

    Tensors on GPUs go over NCCL, all else, which is what runs are steered by, over gloo.

    A process group that is there already is used, however it was made, as by scripts that train more than once.
    `device` is auto (a GPU where there is one), or a name that torch.device knows; the number of the GPU, where it has
    none, is torchrun's LOCAL_RANK or, in processes that were started in another way, that of the current device.
    """
    made = dist.is_available() and dist.is_initialized()  # by the caller, who also ends it
    current = torch.cuda.current_device() if made and torch.cuda.is_available() else 0
    chosen = choose_device(device, local_rank=int(os.environ.get('LOCAL_RANK', current)))
    if chosen.type == 'cuda':
        torch.cuda.set_device(chosen)
    if made:
        yield Processes(chosen, dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        yield Processes(chosen)
        return
    dist.init_process_group('cpu:gloo,cuda:nccl' if chosen.type == 'cuda' else 'gloo', timeout=TIMEOUT)
    try:
        yield Processes(chosen, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
