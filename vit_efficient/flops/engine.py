"""The engines behind `count_flops`.

Two engines see the same operators and agree wherever both run:

- `'meta'` (the default) runs the forward pass on PyTorch's meta device, where tensors have a shape and no data, under a
  `TorchDispatchMode`. Nothing is computed and no weight is copied, so that any image size takes a moment.
- `'fvcore'` is fvcore's `FlopCountAnalysis` (https://github.com/facebookresearch/fvcore), which traces a forward pass
  that really runs. Its handlers are corrected where they are wrong for transformers: its matmul undercounts `basis @ x`
  (a matrix times a batch), its einsum allocates the operands, and scaled dot product attention has no handler at all.

fvcore cannot be the default: tracing without executing takes private hooks (meta kernels reject the sizes that a trace
turns into tensors).
"""

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_efficient.flops.formulas import (
    FORMULAS,
    FVCORE_IS_RIGHT,
    PRODUCTS,
    is_listed,
    parts_of,
    register_flops,
    short_name,
)
from vit_efficient.flops.roles import ROLES, role_of
from vit_efficient.utils.checks import as_integer, check_choice, is_integer
from vit_efficient.utils.compat import OperatorMode, as_written
from vit_efficient.utils.device import as_hosts
from vit_efficient.utils.errors import UserError

# Handlers of fvcore's for products, by their names in `fvcore.nn.jit_handles`; it does not know of complex ones.
_OF_FVCORE = {
    'aten::linear': 'linear_flop_jit',
    'aten::addmm': 'addmm_flop_jit',
    'aten::bmm': 'bmm_flop_jit',
}


@dataclass(frozen=True)
class FlopCount:
    """What a forward pass computes, in multiply-accumulates (MACs; one multiplication with its addition counts 1).

    A product of complex numbers counts 4 in matrix products, and 3 in convolutions, as PyTorch takes them. What modules
    do that another one keeps where PyTorch does not look for them, such as a list, is counted as that one's.

    Attributes:
        total: Everything that is counted, with normalisation, pooling, interpolation and FFTs.
        products: Matrix products, convolutions and attention only: half of what `FlopCounterMode` reports.
        by_module: MACs of every module that computes something, its submodules included; the model is `''`.
        by_operator: MACs of every operator.
        by_role: MACs of the seven roles in `ROLES`, which sum to `total`. Within an attention, a multiplication by a
            weight is a projection and one of two activations a product; `transform` is what a compressor does to
            shorten the sequence and to restore it, and `patch transform` the DCT before a patch embedding. Only these
            two hold anything but products: norms, pooling and the like are `rest` wherever they occur, and so is the
            head.
        uncounted: Calls of operators that count nothing: element-wise arithmetic, softmax, reductions. Operators that
            only move, make or view data are left out. (The fvcore engine also leaves out what fvcore ignores.)
    """

    total: int
    products: int
    by_module: dict[str, int]
    by_operator: dict[str, int]
    by_role: dict[str, int]
    uncounted: dict[str, int]

    @property
    def attention(self) -> int:
        """What attention costs: its products and projections, and the transforms that make them fewer."""
        return sum(self.by_role[role] for role in ('attention products', 'attention projections', 'transform'))


def count_flops(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    batch_size: int = 1,
    engine: str = 'meta',
    images: Tensor | None = None,
) -> FlopCount:
    """Counts the multiply-accumulates of one forward pass in evaluation mode.

    The model itself is never run or changed: a copy of its modules is, whose tensors are on the meta device (engine
    `'meta'`) or the model's own (`'fvcore'`). Attention is counted in full whether or not it is masked or causal. What
    depends on the data ('treeformer_tf') is counted in expectation, or, given `images`, as these have it.

    Args:
        model: A module that takes one batch of images, on any device and in any dtype.
        input_size: Channels, height and width of an image.
        batch_size: Images in the batch.
        engine: `'meta'` executes nothing; `'fvcore'` runs the model on its device.
        images: A batch (B, C, H, W), on which the model is run, on its own device; instead of `input_size`,
            `batch_size` and `engine`.

    Raises:
        UserError: If an argument is out of range, the model refuses the input, or an operator that multiplies
            matrices has no formula (`register_flops` gives it one).
    """
    model = as_written(model)
    if images is not None:
        if not isinstance(images, Tensor) or images.ndim != 4:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise UserError(f'count_flops: images must be a tensor (B, C, H, W), got {shape}')
        replica = _replicate(model, meta=False).eval()
        for module in replica.modules():
            if prepare := getattr(module, 'prepare_counting', None):
                prepare()
        with _quiet(images.device):
            return _summarise(replica, *_count_operators(replica, images))
    input_size = tuple(input_size) if isinstance(input_size, Sequence) else (input_size,)
    if len(input_size) != 3 or not all(is_integer(n, 1) for n in input_size):
        raise UserError(f'count_flops: input_size must be three positive integers (C, H, W), got {input_size=}')
    batch_size = as_integer('batch_size', batch_size)
    check_choice('engine', engine, ('meta', 'fvcore'))
    example = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    device = torch.device('meta') if engine == 'meta' else example.device
    if engine == 'fvcore' and device.type == 'meta':
        raise UserError("count_flops: engine='fvcore' runs the model, which is on the meta device; use engine='meta'")
    replica = _replicate(model, meta=engine == 'meta').eval()
    x = torch.zeros(batch_size, *input_size, dtype=example.dtype, device=device)
    with _quiet(device):
        try:
            counts, uncounted = (_count_operators if engine == 'meta' else _count_with_fvcore)(replica, x)
        except (AssertionError, RuntimeError) as error:
            # Such as `.item()`, or a tensor in the model's code that stayed on another device.
            needs_values = engine == 'meta' and 'meta' in str(error)
            hint = "; engine='fvcore' runs models that need values and not only shapes" if needs_values else ''
            raise UserError(f'count_flops: the model fails on {input_size=}: {error}{hint}') from error
    return _summarise(replica, counts, uncounted)


class _Counter(OperatorMode):
    """Counts every operator that runs under it, under the path of the module on top of `scopes`.

    In inference mode operators arrive whole, as fvcore sees them in a trace; without it, autograd takes a linear layer
    or an attention apart first, in ways that depend on the device. What arrives without a formula is taken apart.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.scopes = ['']

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operator = func.name().partition('.')[0]
        if operator not in FORMULAS:
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if operator in FORMULAS:
            macs = FORMULAS[operator](_shapes(args), _shapes(output))
            macs *= parts_of(operator, output.dtype if isinstance(output, Tensor) else None)
            self.counts[self.scopes[-1], short_name(operator)] += macs
        elif is_listed(operator):
            self.uncounted[short_name(operator)] += 1
        return output


@register_flops('aten::einsum', batched=True)
def _einsum(inputs: list, output: tuple[int, ...]) -> int:
    # Which products an equation becomes is PyTorch's to say. (fvcore would allocate the operands.)
    operands = [torch.empty(shape, device='meta') for shape in inputs[1]]
    with torch.inference_mode(), _Counter() as counter:
        torch.ops.aten.einsum.default.decompose(inputs[0], operands)
    return sum(counter.counts.values())


def _shapes(value: Any) -> Any:
    """The value with a tuple in place of every tensor."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return [_shapes(v) for v in value] if isinstance(value, (list, tuple)) else value


def _count_operators(model: nn.Module, x: Tensor) -> tuple[dict, dict]:
    """MACs by (module path, operator), and the calls of operators that count nothing."""
    counter = _Counter()

    def leave(*_) -> None:
        counter.scopes.pop()

    for path, module in model.named_modules():
        # The first of the hooks before and the last of those after: what other hooks compute is the module's.
        module.register_forward_pre_hook(lambda *_, path=path: counter.scopes.append(path), prepend=True)
        module.register_forward_hook(leave)
    with torch.inference_mode(), counter:
        model(x)
    return counter.counts, counter.uncounted


def _count_with_fvcore(model: nn.Module, x: Tensor) -> tuple[dict, dict]:
    from fvcore.nn import FlopCountAnalysis, jit_handles

    def unwrap(value):
        if value.isCompleteTensor():
            return tuple(value.type().sizes())
        if value.node().kind() in ('prim::ListConstruct', 'prim::TupleConstruct'):
            return [unwrap(v) for v in value.node().inputs()]
        return value.toIValue()

    def handle(operator, formula):
        name, theirs = short_name(operator), _OF_FVCORE.get(operator)

        def count(inputs, outputs):
            if theirs:
                macs = getattr(jit_handles, theirs)(inputs, outputs)
            else:
                macs = formula([unwrap(v) for v in inputs], unwrap(outputs[0]))
            dtype = outputs[0].type().dtype() if outputs[0].isCompleteTensor() else None
            return Counter({name: macs * parts_of(operator, dtype)})

        return count

    analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle(
        **{name: handle(name, f) for name, f in FORMULAS.items() if name not in FVCORE_IS_RIGHT - _OF_FVCORE.keys()}
    )
    with torch.no_grad():
        inclusive = analysis.by_module_and_operator()
    counts = Counter({(path, operator): n for path, each in inclusive.items() for operator, n in each.items()})
    for path, each in inclusive.items():
        if path:  # what a module's children compute is not its own
            for operator, n in each.items():
                counts[path.rpartition('.')[0], operator] -= n
    return counts, {short_name(name): n for name, n in analysis.unsupported_ops().items() if is_listed(name)}


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Parameters, buffers and plain attributes of a module, and of modules that it keeps in a list or the like."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        if id(value) not in seen:
            seen.add(id(value))
            yield from _tensors(vars(value), seen)
    elif isinstance(value, (dict, list, tuple)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _tensors(v, seen)


def _replicate(model: nn.Module, meta: bool) -> nn.Module:
    """A copy of the modules, with the model's own tensors or such as have only their shape: nothing large is copied."""
    memo = {}
    for tensor in _tensors(model, set()):
        memo[id(tensor)] = tensor
        if meta and not tensor.is_meta:
            replica = torch.empty_like(tensor, device='meta', requires_grad=tensor.requires_grad)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(replica, tensor.requires_grad) if is_parameter else replica
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """No warnings, no change of the random state, and no fused path that would hide what nn.MultiheadAttention does.

    What a count says does not depend on the device: sums that a GPU takes as products are counted as sums.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    random = torch.random.fork_rng([device] if device.type == 'cuda' else [])
    with warnings.catch_warnings(), random, as_hosts(device.type):
        warnings.simplefilter('ignore')
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def _summarise(model: nn.Module, counts: dict[tuple[str, str], int], uncounted: dict[str, int]) -> FlopCount:
    modules = dict(model.named_modules())
    by_module, by_operator, by_role = Counter({'': 0}), Counter(), dict.fromkeys(ROLES, 0)
    # Some of fvcore's handlers count in floats.
    for (path, operator), macs in ((key, int(macs)) for key, macs in counts.items() if macs):
        by_operator[operator] += macs
        by_role[role_of(path, operator, modules)] += macs
        names = path.split('.') if path else []
        for i in range(len(names) + 1):
            by_module['.'.join(names[:i])] += macs
    products = sum(macs for operator, macs in by_operator.items() if operator in PRODUCTS)
    ordered = {path: by_module[path] for path in modules if path in by_module}
    return FlopCount(by_module[''], products, ordered, dict(by_operator.most_common()), by_role, dict(uncounted))
