"""The matrix products of a call, to be timed alone: what is left of its time is what could be saved."""

from collections.abc import Callable

import torch

from vit_efficient.utils.compat import OperatorMode

_FUSED = ('flash_attention_for_cpu', 'flash_attention', 'efficient_attention', 'cudnn_attention')
#: Matrix products, softmax, fused attention, convolutions and FFTs, and their backward passes.
PRODUCTS = frozenset(
    [
        *('mm', 'addmm', 'bmm', 'baddbmm', '_fft_r2c', '_fft_c2r', '_fft_c2c'),
        *('_softmax', '_softmax_backward_data', 'convolution', 'convolution_backward'),
        *(f'_scaled_dot_product_{name}{backward}' for name in _FUSED for backward in ('', '_backward')),
    ]
)


class _Recorder(OperatorMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator.overloadpacket.__name__ in PRODUCTS:
            self.calls.append((operator, args, kwargs))
        return operator(*args, **kwargs)


def products_of(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A call that does the products of another one, on the operands that they had there, and nothing else.

    Args:
        make: Makes the other call, which must not use inference mode: there composite operators are not taken apart.
    """
    call = make()
    with _Recorder() as recorder:
        call()

    def replay() -> None:
        with torch.no_grad():
            for operator, args, kwargs in recorder.calls:
                operator(*args, **kwargs)

    return replay
