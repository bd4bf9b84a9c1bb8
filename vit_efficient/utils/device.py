"""The device that a command or a run computes on, and what is asked of a tensor's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vit_efficient.utils.errors import UserError, first_line

HOSTS = ('cpu',)


def on_gpu(x: Tensor) -> bool:
    """Whether x is worked on by an accelerator, where few and large operators are fast, and not by the host.

    A tensor without data, on the meta device, says yes: counting its operators shows what a GPU runs.
    """
    return x.device.type not in HOSTS


@contextmanager
def as_hosts(*types: str) -> Iterator[None]:
    """A context in which tensors on devices of these types are worked on as the host's are."""
    global HOSTS
    before, HOSTS = HOSTS, (*HOSTS, *types)
    try:
        yield
    finally:
        HOSTS = before


def choose_device(name: str = 'auto', key: str = 'device', local_rank: int = 0) -> torch.device:
    """A device by name, tried; auto is a GPU where there is one, and `local_rank` its number where the name has none.

    A UserError names it as the `key` of a recipe or command.
    """
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'{key}={name}: {first_line(error)}') from error
    if device.type == 'meta':
        raise UserError(f'{key}={name} holds no numbers; use {key}=cpu')
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise UserError(f'{key}={name}: PyTorch finds no GPU here; use {key}=cpu')
        device = torch.device('cuda', local_rank if device.index is None else device.index)
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each backend has its own way to say that it is not there
        raise UserError(f'{key}={name}: PyTorch finds no {device} here; use another, or {key}=cpu') from error
    return device


def available_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def limit_threads(most: int | None) -> None:
    """Has PyTorch take at most so many threads on the CPU: no more than there are cores, or OMP_NUM_THREADS says.

    None leaves it as it is. Threads beyond the cores wait for each other by turning, each in the other's time.
    """
    if most is None:
        return
    said = os.environ.get('OMP_NUM_THREADS', '').partition(',')[0].strip()  # a number for each level of nesting
    torch.set_num_threads(min(most, available_cores(), int(said) if said.isdecimal() and int(said) else most))
