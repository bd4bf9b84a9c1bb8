"""Where the tokens of a vision transformer come from: the grid of image patches, and the prefix tokens before it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PatchGrid:
    """The layout of N = prefix + height · width tokens.

    The first `prefix` tokens are not patches (class token, registers); the patches follow in row-major order. The grid
    is a value: it is made once per forward pass, where the patches are embedded, and handed down with the tokens.

    Args:
        height: Rows of patches.
        width: Columns of patches.
        prefix: Tokens before the patches.

    Raises:
        ValueError: If `height` or `width` is below 1, or `prefix` below 0.
    """

    height: int
    width: int
    prefix: int = 0

    def __post_init__(self):
        for name, least in (('height', 1), ('width', 1), ('prefix', 0)):
            value = getattr(self, name)
            # Sizes that are symbols (torch.export, FX) are taken as they are: comparing them would fix their value.
            if type(value) in (int, float, bool, str) and (type(value) is not int or value < least):
                raise ValueError(f'PatchGrid: {name} must be an integer of at least {least}, got {name}={value!r}')

    @property
    def num_patches(self) -> int:
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.prefix + self.height * self.width
