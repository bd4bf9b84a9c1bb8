"""The processes of a run: one, or those that torchrun started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vit_efficient.train.config import first_line


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


@contextmanager
def processes(device: str = 'auto') -> Iterator[Processes]:
    """Joins the processes that torchrun started (gloo on the CPU, NCCL on GPUs), or stands alone.

    Args:
        device: auto (a GPU where there is one), or a name that torch.device knows.

    Raises:
        ValueError: If there is no such device.
    """
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device={device}: {first_line(error)}') from error
    if chosen.type == 'meta':
        raise ValueError(f'device={device} holds no numbers; use device=cpu')
    if chosen.type == 'cuda':
        if not torch.cuda.is_available():
            raise ValueError(f'device={device}: PyTorch finds no GPU here; use device=cpu')
        chosen = torch.device('cuda', local_rank if chosen.index is None else chosen.index)
    try:
        torch.empty(0, device=chosen)
    except Exception as error:  # each backend has its own way to say that it is not there
        raise ValueError(f'device={device}: PyTorch finds no {chosen} here; use another, or device=cpu') from error
    if chosen.type == 'cuda':
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Processes(chosen)
        return
    dist.init_process_group('nccl' if chosen.type == 'cuda' else 'gloo')
    try:
        yield Processes(chosen, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
