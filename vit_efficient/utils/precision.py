"""The dtypes of products, and the contexts that set them."""

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
    """A context in which autocast is off on the device of x."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """The context of a forward pass: bf16 autocast for `amp` bf16, none otherwise."""
    return torch.autocast(device.type, torch.bfloat16) if amp == 'bf16' else nullcontext()
