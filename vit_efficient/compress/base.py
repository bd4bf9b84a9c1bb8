"""The contract of a compressor, and the register of them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vit_efficient.grid import PatchGrid

COMPRESSORS: dict[str, type['Compressor']] = {}


class Compressor(nn.Module):
    """H × W patch tokens down to fewer, and up again. Prefix tokens are not its affair.

    Both ways are modules, so that what they cost is found under their names:

        down(x, grid): (…, H · W, D) → (…, m, D)
        up(y, grid):   (…, m, D) → (…, H · W, D)
    """

    down: nn.Module
    up: nn.Module

    #: Whether both ways are one linear map along the token axis, the same for every channel. Then channels may be
    #: projected before or after, and attention does it where there are fewer tokens.
    commutes: bool = False
    #: Whether an image that is constant stays that constant, down and up. Where it does not, `add_constant` is needed.
    keeps_constants: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that build it, in types that JSON has."""
        raise NotImplementedError

    def num_kept(self, grid: PatchGrid) -> int:
        """m, the number of tokens that `down` leaves of the patches of `grid`."""
        raise NotImplementedError

    def add_constant(self, y: Tensor, constant: Tensor, grid: PatchGrid) -> Tensor:
        """y + down(the image that is `constant` at every patch); needed where `commutes` and not
        `keeps_constants`.

        Args:
            y: (…, m, D)
            constant: (D,)
            grid: Of the patches.

        Returns:
            (…, m, D)
        """
        raise NotImplementedError


def register_compressor(name: str) -> Callable[[type[Compressor]], type[Compressor]]:
    """Class decorator: makes a compressor known by `name`."""

    def register(cls: type[Compressor]) -> type[Compressor]:
        if name in COMPRESSORS:
            raise ValueError(f'a compressor {name!r} is registered already: {COMPRESSORS[name].__qualname__}')
        COMPRESSORS[name] = cls
        return cls

    return register
