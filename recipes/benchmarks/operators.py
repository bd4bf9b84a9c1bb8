"""Counts the operators of each attention layer, which on a GPU are its kernels, and how often it waits for them; prints
a table. Needs no GPU.

    python recipes/benchmarks/operators.py > recipes/benchmarks/operators.md

Batch 1, bfloat16, ViT-B's 768 channels and 12 heads, as on a GPU: what asks `on_gpu` is told yes. An operator takes
about 6 µs to start, so that 300 of them last as long as exact attention of 16,384 patches on an H100. What the data
decide (`treeformer_tf`) runs on the CPU, on random numbers, with 8 channels per head; its kernel counts as one.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.attention import list_attentions
from vit_efficient.attention.treeformer import tf
from vit_efficient.benchmark.layers import EXACT, Candidate, LayerSetting
from vit_efficient.dct.bases import Memo
from vit_efficient.report.table import Column, Table
from vit_efficient.utils import device
from vit_efficient.utils.compat import OperatorMode
from vit_efficient.utils.environment import describe_environment, one_line

#: Operators that start no kernel and yet return no view of an argument, as far as their schema says.
FREE = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', '_unsafe_view', 'resize_', 'set_'}
#: Operators whose result, or its size, the host has to wait for.
READS = {'_local_scalar_dense', 'nonzero', 'unique', '_unique', '_unique2', 'unique_dim', 'unique_consecutive'}
READS |= {'bincount', 'masked_select', 'equal'}
HOST_COPIES = ('tolist', 'cpu', 'numpy')  # methods that on CPU tensors pass no operator

CANDIDATES = [
    EXACT,
    *(Candidate(name) for name in list_attentions() if name not in ('full', 'treeformer_tf')),
    Candidate('window', {'shift': True}),
    Candidate('window', {'window_size': 8}),
    Candidate('window', {'window_size': 8, 'shift': True}),
    Candidate('dct', {'keep_ratio': 1 / 16}),
    Candidate('treeformer_tc', {'tree_height': 7}),
    Candidate('treeformer_tf'),
    Candidate('treeformer_tf', {'tree_height': 7}),
]


class Operators(NamedTuple):
    """What a call runs on a GPU.

    Attributes:
        operators: Operators that do work, which is more than to make a view. Fused attention is one.
        synchronisations: Those for which the host waits.
    """

    operators: int
    synchronisations: int


class _Counter(OperatorMode):
    def __init__(self):
        super().__init__()
        self.operators = self.synchronisations = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator.overloadpacket.__name__
        infos = [result.alias_info for result in operator._schema.returns]
        is_view = bool(infos) and all(info is not None and not info.is_write for info in infos)
        reads = name in READS or (name == 'repeat_interleave' and kwargs.get('output_size') is None)
        # A mask as an index is `nonzero` inside of the kernel, and numbers of Python are copied to the GPU.
        reads |= name in ('index', 'index_put', 'index_put_') and any(_is_mask(index) for index in args[1])
        reads |= name == 'lift_fresh' and args[0].ndim > 0
        self.operators += not (is_view or name in FREE)
        self.synchronisations += reads
        return operator(*args, **kwargs)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def count_operators(call: Callable[[], object]) -> Operators:
    """The operators of a call, which is made twice: bases that are kept between calls are not counted.

    Args:
        call: On meta tensors (there `F.scaled_dot_product_attention` is counted as what GPUs run), or on CPU tensors if
            the data decide. Not in inference mode, where operators that consist of others arrive whole.
    """
    counter, kept = _Counter(), {}

    def get(memo: Memo, key: tuple, build: Callable[[], Tensor], device: torch.device) -> Tensor:
        if key not in kept:
            with torch.no_grad():
                kept[key] = build()
        return kept[key]

    def counted(method):
        @wraps(method)
        def count(*args, **kwargs):
            counter.synchronisations += 1
            return method(*args, **kwargs)

        return count

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Memo, 'get', get))
        stack.enter_context(mock.patch.object(F, 'scaled_dot_product_attention', _fused))
        stack.enter_context(mock.patch.object(tf, 'packed', lambda q, k, v, *_: _Packed.apply(q, k, v)))
        stack.enter_context(on_a_gpu())
        call()
        for name in HOST_COPIES:
            stack.enter_context(mock.patch.object(Tensor, name, counted(getattr(Tensor, name))))
        stack.enter_context(counter)
        call()
    return Operators(counter.operators, counter.synchronisations)


@contextlib.contextmanager
def on_a_gpu() -> Iterator[None]:
    """A context in which CPU tensors take the ways of a GPU."""
    with mock.patch.object(device, 'HOSTS', ()):
        yield


def _fused(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, real=F.scaled_dot_product_attention):
    """Attention as one operator, on meta tensors too, where PyTorch would write it out."""
    if not q.is_meta:
        return real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(q.dtype)
    grad = torch.is_grad_enabled()
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, grad, dropout_p, is_causal, scale=scale
    )[0]


class _Packed(torch.autograd.Function):
    """One operator, and one backward, for the kernel that attends inside groups."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.num_keys = len(k)
        return q.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_keys = gradient.new_zeros(ctx.num_keys, gradient.shape[1])
        return gradient, of_keys, of_keys


def measure(candidate: Candidate, tokens: int) -> dict:
    of_data = candidate.name == 'treeformer_tf'
    torch.manual_seed(0)
    place = dict(device=torch.device('cpu'), dim=96) if of_data else dict(device=torch.device('meta'))
    setting = LayerSetting(dtype=torch.bfloat16, **place)
    layer = setting.layer(candidate, tokens)
    x, gradient = setting.inputs(tokens)

    def inference() -> None:
        with torch.no_grad():
            layer.eval()(x)

    def training() -> None:
        layer.train()(x).backward(gradient)
        layer.zero_grad()
        x.grad = None

    forward, both = count_operators(inference), count_operators(training)
    return {
        'layer': str(candidate),
        'tokens': tokens,
        'forward': forward.operators,
        'forward_waits': forward.synchronisations,
        'both': both.operators,
        'both_waits': both.synchronisations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tokens', type=int, nargs='+', default=[16384])
    parser.add_argument('--attentions', nargs='+', help='names of layers that are counted (default: all)')
    args = parser.parse_args()
    chosen = [one for one in CANDIDATES if not args.attentions or one.name in args.attentions]
    rows = [measure(candidate, tokens) for tokens in args.tokens for candidate in chosen]
    columns = [
        Column('layer'),
        Column('tokens', 'N'),
        Column('forward', 'inference'),
        Column('forward_waits', 'its synchronisations'),
        Column('both', 'forward + backward'),
        Column('both_waits', 'their synchronisations'),
    ]
    print(Table(columns, rows).render())
    print(f'Operators per call, batch 1, bfloat16. {one_line(describe_environment(torch.device("cpu")))}.')


if __name__ == '__main__':
    main()
