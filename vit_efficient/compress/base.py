"""The contract of a compressor, and the register of them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vit_efficient.grid import PatchGrid
from vit_efficient.utils.checks import argument_names, nearest
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.options import write_options

#: What a way down hands on.
State = tuple[Tensor, ...] | None

COMPRESSORS: dict[str, type['Compressor']] = {}

# Arguments that a compressor with weights may have, and that the attention it is of fills in.
FROM_ATTENTION = ('num_heads', 'head_dim', 'device', 'dtype')


class Compressor(nn.Module):
    """H × W patch tokens down to fewer, and up again. Prefix tokens are not its affair.

    Both ways are modules, so that what they cost is found under their names:

        down(x, grid, state=None): (…, H · W, D) → (…, m, D), and a state
        up(y, grid, state):        (…, m, D) → (…, H · W, D)

    The state is what a way down that depends on the tokens found out and hands on, a tuple of tensors: to the way up,
    to `centres` and `log_counts`, and to the way down of other tokens that are to go the same way, as values go with
    their keys. All others hand on None. Nothing is kept in the modules.

    Raises:
        UserError: By a constructor, if an argument is missing or out of range.
    """

    #: What FLOPs inside it are, of `vit_efficient.flops.ROLES`.
    flop_role: str = 'transform'
    down: nn.Module
    #: None where there is no way up: then it can only stand at place `kv`.
    up: nn.Module | None

    #: Whether both ways are one linear map along the token axis, the same for every channel. Then channels may be
    #: projected before or after, and attention does it where there are fewer tokens.
    commutes: bool = False
    #: Whether an image that is constant stays that constant, down and up. Where it does not, the ways down of one that
    #: `commutes` have a method add_constant(y, constant, grid): y (…, m, D) + down(the image that is `constant` (D,)
    #: at every patch).
    keeps_constants: bool = False
    #: Whether the way down depends on the tokens. Then queries and values go down as their keys do.
    matches: bool = False
    #: Where kept tokens lie on the grid, of `vit_efficient.compress.cells.COORDINATES`: then there is `kept_sides` too;
    #: 'groups' if the state says it: then there is `centres`. None where a kept token is a mixture of patches that lies
    #: nowhere.
    coordinates: str | None = None
    #: Whether its kept keys and values are what `keys_and_values` returns: then it can only stand at place `kv`.
    has_summaries: bool = False

    @classmethod
    def of_attention(cls, attention: nn.Module, **options) -> 'Compressor':
        """The compressor for an attention, on its device and of its dtype; it fills in what `FROM_ATTENTION` lists."""
        kind = attention.kind_of_weights()
        values = (attention.num_maps, attention.head_dim, *kind.values())
        has = dict(zip(FROM_ATTENTION, values, strict=True))
        own = {name: has[name] for name in argument_names(cls)[0] if name in has}
        return cls(**own, **options).to(**kind)

    @classmethod
    def option_names(cls) -> tuple[list[str], bool]:
        """The names of the options, which are the other arguments, and whether it takes any others by name."""
        names, takes_others = argument_names(cls)
        return [name for name in names if name not in FROM_ATTENTION], takes_others

    @classmethod
    def at_layer(cls, options: dict[str, Any], layer: int, depth: int, grid_size: tuple[int, int]) -> dict[str, Any]:
        """As `GridAttention.at_layer`, of the compressor's own options."""
        return options

    @classmethod
    def in_trained(cls, options: dict[str, Any]) -> dict[str, Any]:
        """As `GridAttention.in_trained`."""
        return options

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that build it, in types that JSON has."""
        raise NotImplementedError

    @property
    def ways_down(self) -> tuple[nn.Module, nn.Module]:
        """The way down of keys, and that of values."""
        return self.down, self.down

    def keys_and_values(self, q: Tensor, k: Tensor, v: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
        """Keys and values that stand for those of all patches, of a compressor that `has_summaries`.

        Args:
            q, k, v: Of the patches, with qk-norm: (B, H, height · width, D), v (B, H, height · width, E). The scale of
                scores is in q. They are rotated already if it has no `coordinates`.

        Returns:
            (B, H, m, D), (B, H, m, E)
        """
        raise NotImplementedError

    def num_kept(self, grid: PatchGrid) -> int:
        """m, the number of tokens that `down` leaves of the patches of `grid`."""
        raise NotImplementedError

    def kept_sides(self, grid: PatchGrid) -> tuple:
        """h and w, of kept tokens whose coordinates are those of cells."""
        raise NotImplementedError

    def centres(self, grid: PatchGrid, state: State) -> tuple[Tensor, Tensor]:
        """Row and column of each kept token of each image, in patches from the first: (B, m) each."""
        raise NotImplementedError

    def log_counts(self, grid: PatchGrid, like: Tensor, state: State = None) -> Tensor | None:
        """What is added to the score of each key, so that it weighs as many patches as it stands for.

        Args:
            grid: The layout of the tokens.
            like: Has the dtype and device of the result.
            state: What the way down of the keys gave.

        Returns:
            (1, prefix + m), or (B, 1, 1, prefix + m) if it is each image's own; None where it would be the same for all
            keys.
        """
        return None

    def set_grid_size(self, height: int, width: int) -> None:
        """Follows the model to another patch grid, where there are weights that have one."""

    def extra_repr(self) -> str:
        return write_options(self.options)

    def common_part(self) -> nn.Module | None:
        """The part that all layers of a model have in common, if there is one."""
        return None

    def use_common_part(self, owned: nn.Module) -> None:
        """Uses the common part that the model owns instead of its own."""
        raise NotImplementedError


def register_compressor(name: str) -> Callable[[type[Compressor]], type[Compressor]]:
    """Class decorator: makes a compressor known by `name`."""

    def register(cls: type[Compressor]) -> type[Compressor]:
        if name in COMPRESSORS:
            raise UserError(f'a compressor {name!r} is registered already: {COMPRESSORS[name].__qualname__}')
        COMPRESSORS[name] = cls
        return cls

    return register


def get_compressor(name: str) -> type[Compressor]:
    """The compressor behind a name.

    Raises:
        UserError: If no compressor has the name.
    """
    if name not in COMPRESSORS:
        known = ', '.join(sorted(COMPRESSORS))
        raise UserError(f'compressor must be one of {known}, got compressor={name!r}{nearest(name, COMPRESSORS)}')
    return COMPRESSORS[name]
