"""How a candidate is called: by which backend of SDPA, compiled, or replayed. `flash/NAME` says it of one of them.

Of a layer also `rope/NAME`: with rotary positions.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit_efficient.utils.checks import check_choice
from vit_efficient.utils.errors import UserError, first_line

BACKENDS = {
    'cudnn': SDPBackend.CUDNN_ATTENTION,
    'flash': SDPBackend.FLASH_ATTENTION,
    'efficient': SDPBackend.EFFICIENT_ATTENTION,
    'math': SDPBackend.MATH,
}
#: Bytes of inputs that are drawn ahead; after them they come again.
POOL = 2**30


def way_of(name: str, setting: Any) -> tuple[str, Any]:
    """A candidate's name without the ways before it, and the setting that they make of one: 'compiled/cudnn/timm'."""
    way, slash, rest = name.partition('/')
    if slash and (way in BACKENDS or (way in ('compiled', 'graph', 'rope') and hasattr(setting, way))):
        return way_of(rest, replace(setting, **({'sdpa': way} if way in BACKENDS else {way: True})))
    return name, setting


def check_way(setting: Any, head_dim: int = 64) -> None:
    """Raises a UserError if a setting asks for what its device cannot do."""
    if setting.graph and setting.device.type != 'cuda':
        raise UserError(
            f'--cuda-graph, or graph/NAME, needs a GPU, and the device is {setting.device}; give --device cuda, or '
            'leave it out'
        )
    if setting.sdpa is None:
        return
    check_choice('sdpa', setting.sdpa, BACKENDS)
    where = setting.device, setting.dtype, head_dim
    if problem := _problem(setting.sdpa, *where):
        there = ', '.join(name for name in BACKENDS if not _problem(name, *where)) or 'none'
        dtype = str(setting.dtype).removeprefix('torch.')
        raise UserError(
            f'--sdpa {setting.sdpa}, or {setting.sdpa}/NAME: SDPA has no such backend on {setting.device} in {dtype} '
            f'with {head_dim} channels per head ({problem}); it has {there}'
        )


@functools.lru_cache
def _problem(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why a backend does not run; empty if it does."""
    q = torch.zeros(1, 1, 128, head_dim, dtype=dtype, device=device)
    try:
        with warnings.catch_warnings(), torch.no_grad(), sdpa_kernel(BACKENDS[backend]):
            warnings.simplefilter('ignore')  # PyTorch says of each one why not
            F.scaled_dot_product_attention(q, q, q)
    except RuntimeError as error:
        return first_line(error)
    return ''


def sdpa_context(setting: Any) -> Callable[[], AbstractContextManager]:
    """Makes the context in which a setting's calls are made."""
    return nullcontext if setting.sdpa is None else functools.partial(sdpa_kernel, BACKENDS[setting.sdpa])


def replayed(module: nn.Module, example: Tensor) -> tuple[nn.Module, str]:
    """The module as one that replays a CUDA graph, and what a table says of it: 'replayed', or why it is not."""
    from vit_efficient.graphs import graphed

    with torch.inference_mode():
        module = graphed(module, example)
        module(example)  # it may capture now only
    reasons = module.reasons
    if isinstance(reasons, dict):
        reasons = [f'{part}: {reason}' for part, reason in reasons.items()]
    reasons = [reasons] if isinstance(reasons, str) else reasons
    return module, '; '.join(map(str, filter(None, reasons or ()))) or 'replayed'


def depends_on_data(module: nn.Module) -> bool:
    """Whether what a module costs depends on its input."""
    return any(getattr(part, 'cost_depends_on_data', False) for part in module.modules())


class Inputs:
    """The input of calls: one tensor or, `fresh`, one that no call has had, drawn by `prepare` outside of the clock."""

    def __init__(self, x: Tensor, fresh: bool):
        self._pool, self._next, self._fresh = [x], 0, fresh

    def prepare(self, count: int) -> None:
        """Draws the inputs of so many calls, as many as `POOL` bytes hold."""
        if self._fresh:
            x = self._pool[0]
            self._pool = [x]
            count = min(count, max(1, POOL // x.nbytes))
            self._pool = [torch.randn_like(x).requires_grad_(x.requires_grad) for _ in range(count)]
            self._next = 0

    def __call__(self) -> Tensor:
        x = self._pool[self._next % len(self._pool)]
        self._next += 1
        return x
