"""The DCT compressor: the lowest frequencies of the patch grid.

Source of the 1-D form: Scribano et al., "DCT-Former: Efficient Self-Attention with Discrete Cosine Transform",
J. Sci. Comput. 94, 2023, arXiv 2203.01178: tokens are one sequence of N, and attention works on its m lowest DCT-II
coefficients. Ours are the second axis, at d · (H·W·h + h·W·w) products instead of d · N · m, and the domain `space`.

Letters: B batch, H × W patches, h × w kept, D channels.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.compress import budget as budgets
from vit_efficient.compress.base import Compressor, State, register_compressor
from vit_efficient.dct import transforms
from vit_efficient.dct.window import FrequencyWindow
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.checks import check_choice, check_flag
from vit_efficient.utils.errors import UserError


class _Way(nn.Module):
    """One way of the compressor; it owns no weights, and exists so that profiles and FLOPs carry its name."""

    def __init__(self, axes: str, domain: str, budget: budgets.Budget, window: FrequencyWindow | None):
        super().__init__()
        self.axes = axes
        self.budget = budget
        self.frequency = domain == 'frequency'
        self.kinds = ('dct', 'idct') if self.frequency else ('resample', 'resample')  # down, up
        self.windows = (window,)  # in a tuple, since it is the compressor's: it appears once in a state dict

    def windowed(self, y: Tensor, sizes: tuple) -> Tensor:
        """(…, h · w, D): kept coefficients, or the grid that they make, with each coefficient times its gain."""
        (window,) = self.windows
        if window is None:
            return y
        gains = window(*sizes).flatten()[:, None].to(y.dtype)
        if self.frequency:
            return y * gains
        y = transforms.transform(y, 'dct', (-3, -2), sizes, sizes) * gains
        return transforms.transform(y, 'idct', (-2, -3), (sizes[1], sizes[0]), sizes)


class Down(_Way):
    def forward(self, x: Tensor, grid: PatchGrid, state: State = None) -> tuple[Tensor, State]:
        if self.axes == '1d':
            m = budgets.kept_count(grid.height, grid.width, self.budget)
            return transforms.transform(x, self.kinds[0], (-2,), (m,)), None
        size = budgets.kept_grid(grid.height, grid.width, self.budget)
        sizes = (size[0], size[1])
        y = transforms.transform(x, self.kinds[0], (-3, -2), sizes, (grid.height, grid.width))
        return self.windowed(y, sizes), None

    def add_constant(self, y: Tensor, constant: Tensor, grid: PatchGrid) -> Tensor:
        """y (…, m, D) + the coefficients of the image that is `constant` (D,) at every patch; of `frequency`."""
        first = (grid.height * grid.width) ** 0.5 * constant[None]
        return y + F.pad(first, (0, 0, 0, y.shape[-2] - 1))


class Up(_Way):
    def forward(self, y: Tensor, grid: PatchGrid, state: State) -> Tensor:
        if self.axes == '1d':
            return transforms.transform(y, self.kinds[1], (-2,), (grid.height * grid.width,))
        size = budgets.kept_grid(grid.height, grid.width, self.budget)
        sizes = (size[0], size[1])
        return transforms.transform(self.windowed(y, sizes), self.kinds[1], (-2, -3), (grid.width, grid.height), sizes)


@register_compressor('dct')
class DctCompressor(Compressor):
    """Keeps the lowest DCT frequencies of the patches.

    Args:
        axes: '2d', the separable transform of the H × W grid, or '1d', the paper's, of the row-major sequence.
        domain: 'frequency', the paper's: the tokens kept are the orthonormal coefficients, the first of them √(H·W)
            times the mean token. 'space': the coefficients go back to an h × w grid of tokens, the best band-limited
            downsampling; constants keep their value, and with nothing truncated it is the identity.
        keep_ratio: The fraction of patches kept. 1/4 if neither this nor `num_tokens` is given.
        num_tokens: Number of tokens kept, or (h, w) with axes '2d'.
        learned: Learn how many of these are needed: their frequencies are weighed by a `FrequencyWindow`, down and up,
            and so are the keys of the domain 'frequency'. Where it starts, the highest ones are damped: with nothing
            else truncated the outputs are close to those of exact attention, and not equal.
            `vit_efficient.freeze_truncation` turns it into a hard one. With axes '2d'.
    """

    commutes = True

    def __init__(
        self,
        axes: str = '2d',
        domain: str = 'space',
        keep_ratio: float | None = None,
        num_tokens: int | tuple[int, int] | None = None,
        learned: bool = False,
    ):
        super().__init__()
        check_choice('axes', axes, ('1d', '2d'))
        check_choice('domain', domain, ('frequency', 'space'))
        check_flag('learned', learned)
        if keep_ratio is None and num_tokens is None:
            keep_ratio = 0.25
        self.axes = axes
        self.domain = domain
        self.keeps_constants = domain == 'space'
        self.coordinates = 'samples' if domain == 'space' and axes == '2d' else None
        self.budget = budgets.Budget(keep_ratio, num_tokens)
        if axes == '1d' and isinstance(self.budget.num_tokens, tuple):
            raise UserError(f"num_tokens must be an integer with axes='1d', got {num_tokens=}")
        if learned and axes == '1d':
            raise UserError("learned=True needs axes='2d', got axes='1d'")
        self.window = FrequencyWindow() if learned else None
        self.down = Down(axes, domain, self.budget, self.window)
        self.up = Up(axes, domain, self.budget, self.window)

    @property
    def options(self) -> dict[str, Any]:
        learned = {'learned': True} if self.window is not None else {}
        return dict(axes=self.axes, domain=self.domain, **self.budget.options, **learned)

    def log_counts(self, grid: PatchGrid, like: Tensor, state: State = None) -> Tensor | None:
        """The logarithms of the gains, by which a coefficient that is faded out is faded out as a key."""
        if self.window is None or self.domain == 'space':
            return None
        size = budgets.kept_grid(grid.height, grid.width, self.budget)
        gains = self.window(size[0], size[1]).flatten()
        return F.pad(gains.clamp(min=1e-6).log(), (grid.prefix, 0))[None].to(like.dtype)

    def kept_sides(self, grid: PatchGrid) -> tuple:
        return budgets.kept_grid(grid.height, grid.width, self.budget)

    def num_kept(self, grid: PatchGrid) -> int:
        if self.axes == '1d':
            return budgets.kept_count(grid.height, grid.width, self.budget)
        h, w = self.kept_sides(grid)
        return h * w
