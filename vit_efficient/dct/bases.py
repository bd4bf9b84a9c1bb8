"""Constant matrices that transform one axis of a tensor, and the memo that keeps them.

They depend on sizes alone, so they live here and not in the models: as buffers they would be NaN after `meta` →
`to_empty`, and rounded for good by a trip through bfloat16.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from vit_efficient.utils.compat import is_transformed

MEMO_BYTES = 2**29


class Memo:
    """Bases that were built, the least recently used dropped beyond `MEMO_BYTES`."""

    def __init__(self):
        self.tensors: OrderedDict[tuple, Tensor] = OrderedDict()
        self.bytes = 0
        self.lock = threading.Lock()

    def get(self, key: tuple, build: Callable[[], Tensor]) -> Tensor:
        with self.lock:
            if key in self.tensors:
                self.tensors.move_to_end(key)
                return self.tensors[key]
        # A tensor made in inference mode could never be saved for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            tensor = build()
        # Not what is of no use outside of here: fake, without data, or wrapped by a transform.
        if type(tensor) is Tensor and not tensor.is_meta and not is_transformed(tensor):
            with self.lock:
                if key not in self.tensors:
                    self.tensors[key] = tensor
                    self.bytes += tensor.nbytes
                while self.bytes > MEMO_BYTES and len(self.tensors) > 1:
                    self.bytes -= self.tensors.popitem(last=False)[1].nbytes
        return tensor


memo = Memo()


def basis(build: Callable[..., Tensor], rows, columns, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix `build(rows, columns, device)` in `dtype` on the device of `like`, from the memo where that is sound.

    While compiling or tracing, a tensor from outside would cost a second compilation or leave the graph; sizes may be
    symbols and tensors fake.
    """

    def cast() -> Tensor:
        return build(rows, columns, like.device).to(dtype)

    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(rows) is not int
        or type(columns) is not int
        or type(like) not in (Tensor, torch.nn.Parameter)
    ):
        return cast()
    return memo.get((build, rows, columns, dtype, like.device), cast)


def along(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """matrix @ x along the axis `dim` of x: (…, n, …) → (…, m, …), matrix (m, n)."""
    dim = dim % x.ndim
    outer, inner = x.shape[:dim], x.shape[dim + 1 :]
    x_PNC = x.reshape(math.prod(outer), x.shape[dim], math.prod(inner))
    if not inner:
        y = x_PNC.squeeze(-1) @ matrix.mT
    else:
        # Not matmul: with a gradient to compute, it would fold and copy x.
        y = torch.bmm(matrix.expand(math.prod(outer), -1, -1), x_PNC)
    return y.reshape(*outer, matrix.shape[0], *inner)
