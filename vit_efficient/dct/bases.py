"""Constant matrices that transform one axis of a tensor, and the memo that keeps them.

They depend on sizes alone, so they live here and not in the models: as buffers they would be NaN after `meta` →
`to_empty`, and rounded for good by a trip through bfloat16.
"""

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from vit_efficient.utils.compat import are_numbers, is_transformed

MEMO_BYTES = 2**29
MEMO_PLANS = 1024


def is_capturing(device: torch.device) -> bool:
    """Whether what is called for on a device is recorded in a CUDA graph, and computed when that is replayed."""
    return device.type == 'cuda' and torch.cuda.is_current_stream_capturing()


def is_eager(x: Tensor) -> bool:
    """Whether x holds numbers, and is neither compiled with nor traced: what is made for it now may be kept."""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing() and type(x) in (Tensor, torch.nn.Parameter)


def is_lasting(tensor: Tensor) -> bool:
    """Whether a tensor is of use outside of here: not fake, without data, or wrapped by a transform."""
    return type(tensor) is Tensor and not tensor.is_meta and not is_transformed(tensor)


class Memo:
    """Bases that were built, the least recently used dropped beyond `MEMO_BYTES`; and plans of what to do with them.

    What a CUDA graph reads is never dropped, since the graph may be replayed at any time. What is built while one is
    captured is not kept: its memory is the graph's, and holds nothing before the first replay.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.captured: dict[tuple, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Drops everything, but what CUDA graphs read."""
        self.tensors: OrderedDict[tuple, Tensor] = OrderedDict()
        self.bytes = 0
        self.plans: dict[tuple, object] = {}

    def get(self, key: tuple, build: Callable[[], Tensor], device: torch.device) -> Tensor:
        capturing = is_capturing(device)
        with self.lock:
            if key in self.tensors:
                self.tensors.move_to_end(key)
                if capturing:
                    self.captured[key] = self.tensors[key]
                return self.tensors[key]
        # A tensor made in inference mode could never be saved for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            tensor = build()
        if capturing or not is_lasting(tensor):
            return tensor
        if device.type == 'cuda':
            torch.cuda.current_stream(device).synchronize()  # other streams may read it as soon as it is here
        with self.lock:
            if key not in self.tensors:
                self.tensors[key] = tensor
                self.bytes += tensor.nbytes
            while self.bytes > MEMO_BYTES and len(self.tensors) > 1:
                dropped = self.tensors.popitem(last=False)[1]
                self.bytes -= dropped.nbytes
                self.plans.clear()  # they hold bases too
                if dropped.is_cuda:
                    torch.cuda.synchronize(dropped.device)  # other streams may still read it
        return tensor

    def keep_plan(self, key: tuple, plan: object) -> None:
        """Keeps a plan, to be found in `plans`; of too many all others are dropped."""
        if len(self.plans) >= MEMO_PLANS:
            self.plans.clear()
        self.plans[key] = plan


memo = Memo()


def _kept(build: Callable[..., Tensor], sizes: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    return memo.get((build, sizes, dtype, device), lambda: build(*sizes, device).to(dtype), device)


#: The bases that compiled graphs read; to those they are inputs.
compiled = SimpleNamespace()


# `torch.compile` calls it while it compiles. The basis itself could not be what it returns: of tensors one is allowed.
@torch.compiler.assume_constant_result
def _compiled_name(build: Callable, sizes: tuple, dtype: torch.dtype, device: torch.device) -> str:
    """The attribute of `compiled` that is the basis."""
    name = re.sub(r'\W', '_', f'{build.__module__}_{build.__name__}_{sizes}_{dtype}_{device}')
    setattr(compiled, name, _kept(build, sizes, dtype, device))
    return name


def basis(build: Callable[..., Tensor], sizes: tuple, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor `build(*sizes, device)` in `dtype` on the device of `like`, from the memo where that is sound.

    A compiled graph is given it, unless a size is left open; so is one of `torch.export` with strict=True, whose file
    holds it. Other exported or traced graphs build it.
    """
    if is_eager(like) and all(type(size) is int for size in sizes):
        return _kept(build, sizes, dtype, like.device)
    if torch.compiler.is_dynamo_compiling() and are_numbers(*sizes):
        # Symbols whose value is fixed become numbers as bounds of a range.
        sizes = tuple(range(size).stop for size in sizes)
        return getattr(compiled, _compiled_name(build, sizes, dtype, like.device))
    return build(*sizes, like.device).to(dtype)


def product_step(outer, n, inner, matrix: Tensor) -> tuple[tuple, Callable[[Tensor, Tensor], Tensor], Tensor]:
    """matrix (m, n) along one axis, for an x of `outer` · n · `inner` entries; `inner` is None where none follows.

    Returns:
        The shape that x is to have, what takes a matrix and that x, and the matrix that it takes.
    """
    if inner is None:
        return (outer, n), _from_the_right, matrix.mT
    # Not matmul: with a gradient to compute, it would fold and copy x.
    return (outer, n, inner), torch.bmm, matrix.expand(outer, -1, -1)


def _from_the_right(matrix: Tensor, x: Tensor) -> Tensor:
    return x @ matrix


def along(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """matrix @ x along the axis `dim` of x: (…, n, …) → (…, m, …), matrix (m, n)."""
    dim = dim % x.ndim
    outer, inner = x.shape[:dim], x.shape[dim + 1 :]
    shape, operator, matrix = product_step(math.prod(outer), x.shape[dim], math.prod(inner) if inner else None, matrix)
    y = operator(matrix, x.reshape(shape))
    return y.reshape(*outer, y.shape[1], *inner)
