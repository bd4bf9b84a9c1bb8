"""A differentiable truncation of frequencies, whose size is learned.

Source: Riad, Teboul, Grangier, Zeghidour, "Learning strides in convolutional neural networks", ICLR 2022, arXiv
2202.01653 (DiffStride): frequencies are multiplied by a window that falls off linearly, and the gradient reaches the
length of the window through those on its slope. Theirs is a window of Fourier coefficients, ours of DCT coefficients.
A frequency is inside as long as its gain is above 0, in what it costs and in the hard truncation that the window is
turned into after training: one that is faint is still read, by larger weights.
"""

import math

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vit_efficient.grid import plain_sizes
from vit_efficient.utils.checks import is_pair, is_real
from vit_efficient.utils.errors import UserError

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

    With n frequencies and half height at L = share · n, frequency k has the gain

        g(k) = clamp(1/2 + (L - 1/2 - k) / smoothness, 0, 1),      g(0) = 1

    `share` (2,) is learned: one for each axis, whatever the number of frequencies or of channels. At 1, where it
    starts, the last frequencies are damped a little (the very last one to 3/4 with a smoothness of 2), so that
    there is a gradient; from 1 + (smoothness - 1) / (2 n) on the gains have none, nor have they where only the
    first frequency is left. Inside are the frequencies with a gain above 0: L + smoothness / 2 of them, rounded
    (halves down), n at most, 1 at least.

    It is made in float32 whatever the dtype of the model: its steps are too small for half precision, and a model that
    is cast to that does not learn it any more.

    Args:
        smoothness: The number of frequencies on the slope, above 1. Only those have a gradient; the paper has 4.
        share: L / n along the two axes at the start, above 0.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self,
        smoothness: float = 2.0,
        share: tuple[float, float] = (1.0, 1.0),
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if not is_pair(share):
            raise UserError(f'share of a frequency window must be a pair, got {share=}')
        for name, value, least in (('smoothness', smoothness, 1), ('share', share[0], 0), ('share', share[1], 0)):
            if not is_real(value) or not least < value < math.inf:
                raise UserError(f'{name} of a frequency window must be above {least}, got {name}={value!r}')
        self.smoothness = float(smoothness)
        self.initial = tuple(float(value) for value in share)
        self.share = nn.Parameter(torch.empty(2, device=device, dtype=torch.float32))
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
        """How many frequencies are inside along both axes, as differentiable numbers: not rounded, 1 or more.

        A window that is wider than all of them has their number, and a gradient as if it counted further ones.
        """
        lengths = [side * n + self.smoothness / 2 for side, n in zip(self.share.float(), (height, width), strict=True)]
        wider = [(length - n).clamp(min=0).detach() for length, n in zip(lengths, (height, width), strict=True)]
        return tuple((length - more).clamp(min=1) for length, more in zip(lengths, wider, strict=True))

    def hard_size(self, height: int, width: int) -> tuple[int, int]:
        """How many frequencies are inside along both axes; all, if the share has no data (device 'meta').

        Raises:
            UserError: If the share that was learned is not a number.
        """
        if self.share.is_meta:
            return height, width
        if not self.share.isfinite().all():
            raise UserError(f'the size of a frequency window is not finite: share={self.share.tolist()}')
        return tuple(int((self.gains(axis, n) > 0).sum()) for axis, n in enumerate((height, width)))

    def extra_repr(self) -> str:
        return f'smoothness={self.smoothness:g}'
