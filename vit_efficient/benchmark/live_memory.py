"""The memory that tensors take while something is computed, counted as they come and go."""

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors made in its context while they live. What a kernel takes within itself is not seen.

        with LiveMemory() as memory:
            model(images)
        memory.peak  # bytes

    Unlike the resident set of a process, it tells two calls apart whatever ran before, on any device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._living: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Those of arguments were there before, or are in the list.
        given = {StorageWeakRef(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if _has_storage(each)}
        found = func(*args, **(kwargs or {}))
        for tensor in filter(_has_storage, tree_leaves(found)):
            storage = tensor.untyped_storage()
            key = StorageWeakRef(storage)
            if key not in given:
                self._living.setdefault(key, storage.nbytes())
        self._living = {key: size for key, size in self._living.items() if not key.expired()}
        self.peak = max(self.peak, sum(self._living.values()))
        return found


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is not None and not value.is_sparse
