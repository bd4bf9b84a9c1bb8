"""The dtypes of products, and the contexts that set them."""

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def real_dtype(device: torch.device) -> torch.dtype:
    """The most exact real dtype of a device."""
    return torch.float32 if device.type == 'mps' else torch.float64  # Apple's GPUs have no float64


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matrix product with x computes in: that of x, or autocast's."""
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x.dtype
    # An exported graph casts by itself, and may run without the autocast that it was made under. One compiled may not.
    exporting = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    return x.dtype if exporting else torch.get_autocast_dtype(kind)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on the device of x, and products of float32 on CUDA are not of TF32.

    TF32 is a setting of the process (`torch.set_float32_matmul_precision`): for as long as the context lasts other
    threads have float32 too. Backward passes, which come later, have what is set then; so has a compiled graph.
    """
    if x.is_meta:
        return nullcontext()
    plain = torch.autocast(x.device.type, enabled=False)
    if torch.compiler.is_compiling() or not (uses_tf32(x) or _Float32.entered):
        return plain
    return _Float32(plain)


def uses_tf32(x: Tensor) -> bool:
    """Whether a product with x is one of TF32, if x is float32."""
    return x.is_cuda and torch.backends.cuda.matmul.fp32_precision == 'tf32'


class _Float32(AbstractContextManager):
    """A context, and within it products of float32 on CUDA as they are called; of several threads, until all have left.

    Two families of settings say which products they are. PyTorch raises an error where these disagree, so the one that
    was used is set.
    """

    lock = threading.Lock()
    entered = 0  # contexts, of all threads
    before: tuple[str | None, str] = (None, '')

    def __init__(self, context: AbstractContextManager):
        self.context = context

    def __enter__(self) -> None:
        self.context.__enter__()
        with self.lock:
            if not _Float32.entered:
                _Float32.before = _set_float32()
            _Float32.entered += 1

    def __exit__(self, *error) -> None:
        with self.lock:
            _Float32.entered -= 1
            if not _Float32.entered:
                _restore(*_Float32.before)
        self.context.__exit__(*error)


def _set_float32() -> tuple[str | None, str]:
    """What was set before: None where the newer family is in use."""
    on_cpu = torch.backends.mkldnn.matmul.fp32_precision
    try:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision('highest')
    except RuntimeError:
        before = None
        torch.backends.cuda.matmul.fp32_precision = 'ieee'
    return before, on_cpu


def _restore(before: str | None, on_cpu: str) -> None:
    if before is None:
        torch.backends.cuda.matmul.fp32_precision = 'tf32'
    else:
        torch.set_float32_matmul_precision(before)
        torch.backends.mkldnn.matmul.fp32_precision = on_cpu


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The context of a forward pass: bf16 autocast for `amp` bf16, none otherwise."""
    return torch.autocast(device.type, torch.bfloat16) if amp == 'bf16' else nullcontext()
