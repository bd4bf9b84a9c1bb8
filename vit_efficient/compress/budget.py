"""How many tokens a compressor keeps, whichever it is: its budget, and what that allows, by `vit_efficient.grid`."""

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
from timm.layers import register_notrace_function

from vit_efficient.grid import fraction_of, larger, scaled_grid, smaller
from vit_efficient.utils.checks import as_share, as_sides
from vit_efficient.utils.compat import assume
from vit_efficient.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """What a compressor may keep of the H × W patches; exactly one of the two.

    Args:
        keep_ratio: A fraction of the patches, 0 < keep_ratio ≤ 1.
        num_tokens: A number of tokens, or the pair (h, w).
        argument: What messages call `num_tokens`.

    Raises:
        UserError: If both or neither are given, or one is out of range.
    """

    keep_ratio: float | None = None
    num_tokens: int | tuple[int, int] | None = None
    argument: str = 'num_tokens'

    def __post_init__(self):
        ratio, tokens = self.keep_ratio, self.num_tokens
        if (ratio is None) == (tokens is None):
            raise UserError(f'give one of keep_ratio and num_tokens, got keep_ratio={ratio!r}, num_tokens={tokens!r}')
        if tokens is not None:
            object.__setattr__(self, 'num_tokens', as_sides(self.argument, tokens))
        else:
            object.__setattr__(self, 'keep_ratio', as_share('keep_ratio', ratio))

    @property
    def options(self) -> dict[str, float | int | list[int]]:
        """The argument it was made from, in types that JSON has."""
        if self.keep_ratio is not None:
            return {'keep_ratio': self.keep_ratio}
        return {'num_tokens': list(self.num_tokens) if isinstance(self.num_tokens, tuple) else self.num_tokens}


def sides(height, width, axes: str) -> tuple:
    """The sides of the grid; with axes '1d' the row-major sequence, which is a grid of one row."""
    return (1, height * width) if axes == '1d' else (height, width)


# Two functions below are leaves for FX.


@torch.fx.wrap
@register_notrace_function
def kept_grid(height, width, budget: Budget) -> tuple[int, int]:
    """The largest (h, w) of the grid's aspect, h = ⌊s · height⌋ and w = ⌊s · width⌋ (at least 1), within the budget.

    Raises:
        UserError: If the budget is a pair that exceeds the grid.
    """
    if type(height) is int and type(width) is int and not torch.compiler.is_compiling():
        return _kept_grid_once(height, width, budget)
    return _kept_grid(height, width, budget)


def _kept_grid(height, width, budget: Budget) -> tuple[int, int]:
    if isinstance(budget.num_tokens, tuple):
        h, w = budget.num_tokens
        if type(height) is not int or type(width) is not int:
            assume(height >= h and width >= w)
        elif h > height or w > width:
            raise UserError(
                f'{budget.argument}={budget.num_tokens} exceeds the grid of {height} × {width} patches; give a smaller '
                'pair, or one number, which follows the image size'
            )
        return h, w
    if budget.num_tokens is not None and (type(height) is not int or type(width) is not int):
        raise UserError(
            f'{budget.argument}={budget.num_tokens} needs a fixed image size; give a pair (h, w), or keep_ratio where '
            'there is one'
        )
    return scaled_grid(height, width, count=budget.num_tokens, ratio=budget.keep_ratio)


@torch.fx.wrap
@register_notrace_function
def kept_count(height, width, budget: Budget) -> int:
    """The number of tokens, of height · width, that the budget allows (at least 1).

    Raises:
        UserError: If the budget is a pair.
    """
    if type(height) is int and type(width) is int and not torch.compiler.is_compiling():
        return _kept_count_once(height, width, budget)
    return _kept_count(height, width, budget)


def _kept_count(height, width, budget: Budget) -> int:
    if isinstance(budget.num_tokens, tuple):
        raise UserError(f'num_tokens={budget.num_tokens}: a sequence has one axis; give an integer, or keep_ratio')
    if budget.num_tokens is not None:
        return smaller(budget.num_tokens, height * width)
    return larger(1, fraction_of(height * width, budget.keep_ratio))


# Each layer asks for both, on each call.


@lru_cache(maxsize=4096)
def _kept_grid_once(height: int, width: int, budget: Budget) -> tuple[int, int]:
    say_if_odd(height * width, budget)
    return _kept_grid(height, width, budget)


@lru_cache(maxsize=4096)
def _kept_count_once(height: int, width: int, budget: Budget) -> int:
    say_if_odd(height * width, budget)
    return _kept_count(height, width, budget)


@lru_cache(maxsize=4096)
def say_if_odd(num_patches: int, budget: Budget) -> None:
    """Logs, once for each case, a budget that cannot be kept to: of more tokens than there are, or of less than one."""
    tokens, ratio = budget.num_tokens, budget.keep_ratio
    if isinstance(tokens, int) and tokens > num_patches:
        logger.warning(
            f'{budget.argument}={tokens} is more than the {num_patches} patches that there are: all are kept'
        )
    elif ratio is not None and fraction_of(num_patches, ratio) < 1:
        logger.warning(f'keep_ratio={ratio:g} of {num_patches} patches is less than one: one is kept')
