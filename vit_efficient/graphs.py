"""Inference at fixed sizes by CUDA graphs: the host starts one graph instead of the hundreds of kernels of a model.

At small sizes and batches it is the host that takes the time (`recipes/benchmarks/host_time.py`); a graph is what makes
an efficient attention faster there, without a compiler.
"""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.compat import map_instances, own_buffers, own_parameters, unwrap
from vit_efficient.utils.errors import UserError, one_line

logger = logging.getLogger(__name__)

WARM_UPS = 3  # calls before the capture, which build bases and the handles of libraries
_turn = threading.Lock()  # one thread at a time fills inputs, replays, and takes outputs


class _Capture(NamedTuple):
    graph: Any
    inputs: list[Tensor]  # what the graph reads
    outputs: Any  # what it writes
    addresses: list[int]  # of the weights that it reads


class GraphedModel(nn.Module):
    """A model that replays its forward pass, made by `graphed`. In training mode it is the model itself."""

    def __init__(self, model: nn.Module, max_sizes: int = 8):
        super().__init__()
        self.model = model
        self.max_sizes = as_integer('max_sizes', max_sizes)
        #: Why inputs were not replayed but computed by the model, by their sizes.
        self.reasons: dict[str, str] = {}
        self.training = model.training
        self._forget()

    def _forget(self) -> None:
        """Drops what was captured."""
        self._captures: dict[tuple, _Capture] = {}
        self._failed: dict[tuple, str] = {}
        owned = [own(module) for module in self.model.modules() for own in (own_parameters, own_buffers)]
        self._weights = [(tensors, name) for tensors in owned for name in tensors]

    def __getstate__(self) -> dict[str, Any]:  # graphs are neither copied nor pickled
        return {**self.__dict__, '_captures': {}, '_failed': {}, '_weights': []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def forward(self, *inputs: Tensor) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.model(*inputs)
        capture = self.capture(*inputs)
        if capture is None:
            return self.model(*inputs)
        with _turn, torch.no_grad():
            for own, given in zip(capture.inputs, inputs, strict=True):
                own.copy_(given)
            capture.graph.replay()
            return map_instances(Tensor, Tensor.clone, capture.outputs)

    def capture(self, *inputs: Tensor) -> _Capture | None:
        """The graph for inputs like these, captured if there is none yet; None, and a reason, if there can be none."""
        reason = self._why_not(inputs)
        if reason is None:
            kind = inputs[0].device.type
            amp = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            key = (amp, *((x.shape, x.dtype, x.device) for x in inputs))
            addresses = self._addresses()
            capture = self._captures.get(key)
            if capture is not None and capture.addresses == addresses:
                return capture
            if capture is not None:
                self._forget()
                addresses = self._addresses()
            reason = self._failed.get(key)
            if reason is None and len(self._captures) >= self.max_sizes:
                reason = f'max_sizes={self.max_sizes} other sizes are captured already'
            if reason is None:
                try:
                    with _turn, torch.inference_mode(False), torch.no_grad():
                        copies = [x.detach().clone() for x in inputs]
                        pool = next((other.graph.pool() for other in self._captures.values()), None)
                        graph, outputs = _record(self.model, copies, amp, pool)
                    self.reasons.pop(_text(inputs), None)
                    self._captures[key] = _Capture(graph, copies, outputs, addresses)
                    return self._captures[key]
                except UserError:
                    raise
                except Exception as error:  # whatever cannot be captured can be computed
                    reason = self._failed[key] = f'its capture failed: {one_line(error)}'
        self._say(inputs, reason)
        return None

    def _addresses(self) -> list[int]:
        """Where the weights lie; a weight that is replaced or moved lies elsewhere."""
        return [0 if tensors.get(name) is None else tensors[name].data_ptr() for tensors, name in self._weights]

    def _why_not(self, inputs: tuple) -> str | None:
        """Why inputs cannot be replayed, whatever their sizes."""
        if not inputs or not all(isinstance(x, Tensor) for x in inputs):
            return 'inputs are not tensors alone'
        if not all(on_cuda(x) for x in inputs):
            return f'it is on {inputs[0].device}, and graphs are of CUDA'
        if torch.is_grad_enabled():
            return 'gradients are enabled: call it under torch.inference_mode() or torch.no_grad()'
        if self.model.training:
            return 'the model is in training mode: call eval()'
        if is_capturing():
            return 'it is captured in a graph already'
        for name, module in self.model.named_modules() if not self._captures else ():
            if getattr(module, 'cost_depends_on_data', False):
                return f'the work of {name} depends on the values of its input'
            if module.training:
                return f'{name} is in training mode: call eval()'
        return None

    def _say(self, inputs: tuple, reason: str) -> None:
        """Keeps a reason, and logs it if it is new for these sizes."""
        sizes = _text(inputs)
        if self.reasons.get(sizes) != reason:
            self.reasons[sizes] = reason
            logger.warning(f'input {sizes} is computed without a CUDA graph: {reason}')


def _text(inputs: tuple) -> str:
    """Inputs as `reasons` names them."""
    sizes = (f'{" × ".join(map(str, x.shape))} {x.dtype}' if isinstance(x, Tensor) else repr(x) for x in inputs)
    return ', '.join(sizes).replace('torch.', '')


def on_cuda(x: Tensor) -> bool:
    """Whether x is where there are graphs."""
    return x.is_cuda


def is_capturing() -> bool:
    """Whether what is called for now is recorded already."""
    return torch.cuda.is_current_stream_capturing()


def _record(model: nn.Module, inputs: list[Tensor], amp: torch.dtype | None, pool: Any) -> tuple[Any, Any]:
    """A graph of the model, which reads the inputs, and the outputs, which it writes.

    It may have the memory of others in `pool`, since they are not replayed at once, and their outputs are taken.
    """
    device = inputs[0].device
    before = torch.cuda.current_stream(device)
    # Weights that autocast has cast are its own to free: the graph casts them itself.
    autocast = torch.autocast(device.type, dtype=amp, enabled=amp is not None, cache_enabled=False)
    with torch.cuda.device(device), autocast:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                model(*inputs)
            with _no_waiting():
                model(*inputs)
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as one that pins the memory of batches, may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode='thread_local'):
                outputs = model(*inputs)
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own
    return graph, outputs


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Makes an operator that waits for the GPU an error, which it would be in a capture.

    A capture that fails leaves PyTorch's random state and its allocator as if it went on.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # it is a prototype, PyTorch says
        warnings.simplefilter('ignore')
        torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def graphed(model: nn.Module, example: Tensor | tuple[Tensor, ...] | None = None, max_sizes: int = 8) -> GraphedModel:
    """A model for inference on CUDA that is captured once for each size of its inputs, and replayed from then on.

        model = vit_efficient.graphed(model.cuda().eval(), torch.empty(1, 3, 1024, 1024, device='cuda'))
        with torch.inference_mode():
            logits = model(images)

    Results are the model's, in memory of their own. Where there can be no graph the model computes them itself: on
    other devices, with gradients enabled, in training mode, with an attention whose work depends on its data
    (`treeformer_tf`), and where a capture fails. `reasons` of the result says why, by size, and a warning is logged
    once for each.

    Weights that are changed in place (`load_state_dict`, an optimiser) are seen. If one is replaced or moved, sizes are
    captured anew. Modules that are replaced, hooks, and options that are changed after a capture are not seen: call
    `graphed` again. Each size holds the memory of one forward pass. Calls of several threads take turns; those on
    several streams have to be ordered by their caller.

    Args:
        model: It takes tensors and returns a tensor, or tuples, lists and dicts of them.
        example: The inputs, one tensor or a tuple, of the size to capture now; by default the first call captures.
        max_sizes: How many sizes are captured; all others the model computes itself.

    Raises:
        UserError: If model, example or max_sizes is of another kind.
    """
    next(unwrap(model))  # raises unless it is a model
    inputs = (example,) if isinstance(example, Tensor) else example
    if inputs is not None and not (isinstance(inputs, tuple) and all(isinstance(x, Tensor) for x in inputs)):
        raise UserError(f'example must be a tensor or a tuple of tensors, got {type(example).__name__}')
    new = GraphedModel(model, max_sizes)
    if inputs is not None:
        with torch.no_grad():
            new.capture(*inputs)
    return new
