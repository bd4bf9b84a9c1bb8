"""What an operator costs, in multiply-accumulates: the table behind `vit_efficient.flops`.

The conventions are fvcore's: a bias is free, a layer norm costs 5 per element, bilinear interpolation 4 per output
element. Pooling costs 1 per input element, and so does a mean, which is what global pooling often is, and a sum of rows
that are picked or scattered by an index.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch

from vit_efficient.utils.errors import UserError

Shape = tuple[int, ...]
Formula = Callable[[list, Any], int]

FORMULAS: dict[str, Formula] = {}
# By short names: what multiplies matrices, and in what two activations meet (a weight comes in by `linear`).
PRODUCTS: set[str] = set()
BATCHED: set[str] = set()
CONVOLUTIONS = ('aten::convolution', 'aten::_convolution', 'aten::_convolution_mode')
FVCORE_IS_RIGHT: set[str] = set()  # filled below


def short_name(operator: str) -> str:
    """The name of an operator in `FlopCount.by_operator`: fvcore's, which calls every convolution 'conv'."""
    return 'conv' if operator in CONVOLUTIONS else operator.removeprefix('aten::')


def register_flops(*operators: str, product: bool = True, batched: bool = False) -> Callable[[Formula], Formula]:
    """Registers the formula of one or more operators, for both engines.

        @register_flops('mylib::fused_mlp')
        def fused_mlp(inputs, output):
            x, w1, w2 = inputs[:3]
            return math.prod(x) * (w1[-1] + w2[-1])

    Args:
        operators: Qualified names, such as `'aten::mm'`.
        product: Whether the operator multiplies matrices, so that `FlopCount.products` includes it.
        batched: Whether two activations meet in it, so that in an attention it is one of the attention products.

    Returns:
        A decorator for `formula(inputs, output) -> MACs`. The formula sees the operator's positional arguments as a
        list, and its result, with a tuple (the shape) in place of every tensor.

    Raises:
        UserError: If a name has no namespace.
    """
    for operator in operators:
        if not re.fullmatch(r'\w+::\w+', operator):
            raise UserError(f"register_flops: an operator is named 'namespace::name', got {operator=}")

    def register(formula: Formula) -> Formula:
        for operator in operators:
            FORMULAS[operator] = formula
            FVCORE_IS_RIGHT.discard(operator)
            for names, belongs in ((PRODUCTS, product), (BATCHED, batched)):
                (names.add if belongs else names.discard)(short_name(operator))
        return formula

    return register


def parts_of(operator: str, dtype: torch.dtype | None) -> int:
    """The real products in one product of an operator with a result of this type."""
    return 4 if dtype is not None and dtype.is_complex and short_name(operator) in PRODUCTS else 1


@register_flops('aten::mm', 'aten::mv', 'aten::dot')
@register_flops('aten::bmm', 'aten::matmul', batched=True)
def _matmul(inputs: list, output: Shape) -> int:
    # fvcore's, prod(a) · n, forgets the batch where only the second operand has one.
    return math.prod(output) * inputs[0][-1]


@register_flops('aten::addmm', 'aten::addmv', 'aten::linear')
@register_flops('aten::baddbmm', batched=True)
def _second_matmul(inputs: list, output: Shape) -> int:
    return math.prod(output) * inputs[1][-1]


@register_flops(*CONVOLUTIONS)
def _convolution(inputs: list, output: Shape) -> int:
    x, weight = inputs[:2]
    transposed = len(inputs) > 6 and inputs[6] is True
    return math.prod(weight) * x[0] * math.prod((x if transposed else output)[2:])


@register_flops('aten::scaled_dot_product_attention', batched=True)
def _attention(inputs: list, output: Shape) -> int:
    q, k, v = inputs[:3]  # (…, Nq, Dk), (…, Nk, Dk), (…, Nk, Dv); the result has the batch and all heads
    return math.prod(output[:-1]) * k[-2] * (q[-1] + v[-1])


@register_flops('aten::_scaled_dot_product_flash_attention_for_cpu', batched=True)
def _attention_with_lse(inputs: list, outputs: list) -> int:
    # Channels that are padded for it are counted, since they are computed.
    return _attention(inputs, outputs[0])


@register_flops('aten::linalg_pinv', batched=True)
def _pinv(inputs: list, output: Shape) -> int:
    # Nominal, for square matrices: 21 n³ FLOPs, half as many MACs, for a singular value decomposition (Golub & Van
    # Loan, "Matrix Computations"), and n³ for the product of its parts.
    return math.prod(output) * output[-1] * 23 // 2


def _norm(inputs: list, weight: Shape | None = None) -> int:
    return math.prod(inputs[0]) * (5 if weight else 4)


@register_flops('aten::batch_norm', product=False)
def _batch_norm(inputs: list, output: Shape) -> int:
    affine = bool(inputs[1])
    training = len(inputs) > 5 and inputs[5]  # statistics of the batch, as in weight standardisation
    return math.prod(inputs[0]) * (4 + affine if training else 1 + affine)


for _operators, _formula in {
    ('mean', *(f'{kind}_pool{n}d' for kind in ('avg', 'adaptive_avg') for n in (1, 2, 3))): (
        lambda inputs, output: math.prod(inputs[0])
    ),
    ('scatter_add', 'scatter_add_'): lambda inputs, output: math.prod(inputs[2]),  # indices; a sum by leaf
    ('embedding_bag',): lambda inputs, output: math.prod(inputs[1]) * inputs[0][-1],  # sums of rows
    ('upsample_nearest2d',): lambda inputs, output: math.prod(output),
    ('upsample_bilinear2d', 'grid_sampler'): lambda inputs, output: 4 * math.prod(output),
    ('layer_norm', 'rms_norm', 'group_norm'): lambda inputs, output: _norm(inputs, *inputs[2:3]),
    ('instance_norm',): lambda inputs, output: _norm(inputs, *inputs[1:2]),
}.items():
    register_flops(*(f'aten::{name}' for name in _operators), product=False)(_formula)


def _fft(name: str) -> Formula:
    """n/2 · log2(n) butterflies of one complex multiplication (4 MACs) each; half of it where one side is real."""
    real = name.startswith(('rfft', 'irfft', 'hfft', 'ihfft'))

    def formula(inputs: list, output: Shape) -> int:
        x, length, dims = (*inputs, None, None)[:3]
        if dims is None:
            dims = {'2': (-2, -1), 'n': range(-len(output), 0)}.get(name[-1], -1)
        dims = (dims,) if isinstance(dims, int) else tuple(dims)
        size = list(output)
        if name.startswith(('rfft', 'ihfft')):  # the result has half of the frequencies
            length = length[-1] if isinstance(length, (list, tuple)) else length
            size[dims[-1]] = length or x[dims[-1]]
        return round((1 if real else 2) * math.prod(size) * math.log2(math.prod(size[d] for d in dims)))

    return formula


for _kind in ('fft', 'ifft', 'rfft', 'irfft', 'hfft', 'ihfft'):
    for _rank in ('', '2', 'n'):
        register_flops(f'aten::fft_{_kind}{_rank}', product=False)(_fft(_kind + _rank))

# The other formulas of this table replace fvcore's in its own engine, or fill a gap there.
FVCORE_IS_RIGHT |= {
    *('aten::linear', 'aten::addmm', 'aten::bmm', 'aten::_convolution'),
    *('aten::layer_norm', 'aten::group_norm', 'aten::instance_norm', 'aten::batch_norm'),
    *('aten::upsample_nearest2d', 'aten::upsample_bilinear2d', 'aten::grid_sampler', 'aten::adaptive_avg_pool2d'),
}

# What multiplies matrices, by its name.
_MULTIPLIES = re.compile(
    r'(mm|matmul|mv|dot|inner)_?$|conv(?!ert)|attention|attn|einsum|^lstm|^gru|^rnn|^_?(bi|tri)?linear|_linear'
    r'|dist$|linalg_(?!vector_norm|norm|cross)|cholesky|svd|inverse|^qr$|fft|matrix_|chain_mat|^cov$|corrcoef'
)
# What moves, views, makes or converts data, or asks about it, by its name.
_MOVES = re.compile(
    r'(new_)?(empty|full|ones|zeros)(_like|_strided)?|_?(re)?(view|shape)(_as)?(_real|_complex|_alias)?|_unsafe_view'
    r'|_?(to|to_copy|copy|conj|clone|contiguous|detach|alias|lift_fresh|type_as|real|imag|resolve_conj|resolve_neg)'
    r'|(broadcast_|expand|repeat|tile).*|(un)?squeeze|(un)?flatten|(un)?fold|(un)?bind|as_strided|t|transpose|permute'
    r'|movedim|swapaxes|(unsafe_|tensor_)?split.*|chunk|slice|select|narrow|index(_select|_put)?|gather|diagonal'
    r'|cat|concat|stack|pad|constant_pad_nd|roll|flip|scatter|meshgrid|pixel_(un)?shuffle|channel_shuffle|tri[lu]|masked_fill'
    r'|fill|zero|arange|linspace|scalar_tensor|(feature_)?dropout|size|is_nonzero|item|_assert.*|Int|ScalarImplicit'
)


def is_listed(operator: str) -> bool:
    """Whether an operator without a formula belongs into `FlopCount.uncounted`.

    One that multiplies matrices raises a UserError, and so does what is not PyTorch's own: it may do anything.
    """
    namespace, name = operator.split('::', 1)
    if namespace in ('prim', 'prims', 'profiler') and not name.startswith(('PythonOp', 'CallFunction')):
        return False
    if namespace != 'aten' or _MULTIPLIES.search(name):
        raise UserError(
            f'count_flops: no formula for the operator {operator}, which may multiply matrices; give it one with '
            f"@vit_efficient.flops.register_flops('{operator}', product=…)"
        )
    return not _MOVES.fullmatch(name.rstrip('_'))
