"""A differentiable truncation of frequencies, whose size is learned.

Source: Riad, Teboul, Grangier, Zeghidour, "Learning strides in convolutional neural networks", ICLR 2022, arXiv
2202.01653 (DiffStride): frequencies are multiplied by a window that falls off linearly, and the gradient reaches the
length of the window through those on its slope. Theirs is a window of Fourier coefficients and ends where its slope
ends; ours is one of DCT coefficients, has its length at half height (so that the gains sum to it), and is turned into a
hard truncation after training.
"""

import math

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vit_efficient.grid import plain_sizes

__all__ = ['FrequencyWindow']


# A leaf for FX, where sizes are not yet numbers.
@torch.fx.wrap
@register_notrace_function
def _gains(share: Tensor, axis: int, n, smoothness: float) -> Tensor:
    (n,) = plain_sizes((n,))
    k = torch.arange(n, device=share.device)
    length = share[axis].to(torch.promote_types(share.dtype, torch.float32)) * n
    gains = (0.5 + (length - 0.5 - k) / smoothness).clamp(0, 1)
    return torch.where(k == 0, torch.ones_like(gains), gains)


class FrequencyWindow(nn.Module):
    """Gains of the lowest frequencies along two axes: 1 inside the window, 0 outside, a slope of `smoothness` between.

    With n frequencies and the window's length L = share · n, frequency k has the gain

        g(k) = clamp(1/2 + (L - 1/2 - k) / smoothness, 0, 1),      g(0) = 1

    `share` (2,) is learned. At 1, where it starts, only the last frequencies are damped a little, so that there is a
    gradient; from 1 + smoothness / (2 n) on there is none, nor is there where only the first frequency is left. Frozen,
    the frequencies whose gain is at least one half are kept: round(L) of them.

    Args:
        smoothness: Frequencies on the slope, above 0. Only those have a gradient; the paper has 4.
        share: Of the two axes at the start, above 0.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        smoothness: float = 2.0,
        share: tuple[float, float] = (1.0, 1.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (('smoothness', smoothness), ('share', share[0]), ('share', share[1])):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f'{name} of a frequency window must be above 0, got {name}={value!r}')
        self.smoothness = float(smoothness)
        self.initial = tuple(float(value) for value in share)
        self.share = nn.Parameter(torch.empty(2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.share.copy_(torch.tensor(self.initial))

    def gains(self, axis: int, n: int) -> Tensor:
        """(n,), of the n lowest frequencies along an axis, 0 or 1; float32 or more."""
        return _gains(self.share, axis, n, self.smoothness)

    def forward(self, height: int, width: int) -> Tensor:
        """(height, width), the gains of the lowest frequencies of both axes."""
        return self.gains(0, height)[:, None] * self.gains(1, width)

    def soft_size(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The sums of the gains along both axes: differentiable numbers of frequencies."""
        return self.gains(0, height).sum(), self.gains(1, width).sum()

    def hard_size(self, height: int, width: int) -> tuple[int, int]:
        """The numbers of frequencies along both axes with a gain of at least one half, 1 or more.

        Raises:
            ValueError: If the share that was learned is not a number.
        """
        if not self.share.isfinite().all():
            raise ValueError(f'the size of a frequency window is not finite: share={self.share.tolist()}')
        return tuple(int((self.gains(axis, n) >= 0.5).sum()) for axis, n in enumerate((height, width)))

    def extra_repr(self) -> str:
        return f'smoothness={self.smoothness:g}'
