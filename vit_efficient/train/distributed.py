"""The processes of a run: one, or those that torchrun started."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vit_efficient.utils.errors import UserError, first_line

# A process that waits longer for another gives up. Without torchrun, which ends the others when one dies, nothing else
# would end a run on GPUs; what the first process does alone (checkpoints, the final files) must take less.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Processes:
    """This process among those of the run, and the device it computes on."""

    device: torch.device
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

    def mean(self, value: float) -> float:
        """Of the values of all processes."""
        return self._reduce(value, dist.ReduceOp.SUM) / self.world_size

    def max(self, value: float) -> float:
        """Of the values of all processes."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def _reduce(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.item()

    def in_step(self, batches: Iterable[Sequence[Tensor]]) -> Iterator[tuple[Sequence[Tensor], bool]]:
        """Batches as long as any process has some, with whether they are this process's own.

        So all do as often what none can do alone: the forward pass of a sharded model.

        Args:
            batches: Of this process, each beginning with images (B, C, H, W). To one that has no more is given a single
                blank image like those of the others, with nothing beside it.
        """
        batches = iter(batches)
        while True:
            batch = next(batches, None)
            shapes = self.gather(None if batch is None else (batch[0].shape[1:], batch[0].dtype))
            shape = next(filter(None, shapes), None)
            if shape is None:
                return
            yield (batch, True) if batch is not None else ((torch.zeros(1, *shape[0], dtype=shape[1]),), False)


def has_unused_parameters(model: nn.Module, images: Tensor) -> bool:
    """Whether some parameters get no gradient from the logits, for which DDP would wait.

    Args:
        model: Images (B, C, H, W) -> logits. It is run in eval mode, and left in the mode that it was in.
        images: On the model's device.
    """
    was_training = model.training
    model.eval()(images).sum().backward()
    model.train(was_training)
    unused = any(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.zero_grad()
    return unused


@contextmanager
def processes(device: str = 'auto') -> Iterator[Processes]:
    """Joins the processes that torchrun started (gloo on the CPU, NCCL on GPUs), or stands alone.

    A process group that is there already is used, as by scripts that train more than once.

    Args:
        device: auto (a GPU where there is one), or a name that torch.device knows.

    Raises:
        UserError: If there is no such device.
    """
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f'device={device}: {first_line(error)}') from error
    if chosen.type == 'meta':
        raise UserError(f'device={device} holds no numbers; use device=cpu')
    if chosen.type == 'cuda':
        if not torch.cuda.is_available():
            raise UserError(f'device={device}: PyTorch finds no GPU here; use device=cpu')
        chosen = torch.device('cuda', local_rank if chosen.index is None else chosen.index)
    try:
        torch.empty(0, device=chosen)
    except Exception as error:  # each backend has its own way to say that it is not there
        raise UserError(f'device={device}: PyTorch finds no {chosen} here; use another, or device=cpu') from error
    if chosen.type == 'cuda':
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Processes(chosen)
        return
    if dist.is_initialized():  # by the caller, who also ends it
        yield Processes(chosen, dist.get_rank(), dist.get_world_size())
        return
    dist.init_process_group('nccl' if chosen.type == 'cuda' else 'gloo', timeout=TIMEOUT)
    try:
        yield Processes(chosen, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
