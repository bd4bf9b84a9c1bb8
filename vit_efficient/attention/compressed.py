"""Attention among compressed tokens: any compressor, at any place.

    place   what is compressed                                              attention
    x       the block's normed input; the output goes up again              m × m, projections on m tokens
    qkv     queries, keys and values; the output goes up again              m × m
    kv      keys and values                                                 N × m
    block   the block's input; what attention and MLP add to it goes up     m × m, projections and MLP on m tokens

At `block` the residual carries what the compressor cannot: x + up(attention and MLP of down(x)).

Sources: DCT-Former (Scribano et al., 2023, arXiv 2203.01178; `x` and, as its second form, `qkv`), Linformer (Wang et
al., 2020, arXiv 2006.04768; `kv`). `block` is ours.

Letters: B batch, N tokens, m kept, P prefix, C channels, H heads, D = C / H. Kept tokens include the prefix.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import register_notrace_function, to_2tuple
from torch import Tensor, nn

from vit_efficient.attention.base import GridAttention, check_tokens
from vit_efficient.attention.decomposed import DecomposedBias, decomposed_of_kept
from vit_efficient.attention.functional import attend
from vit_efficient.attention.projections import Projection, first_layer, is_fused
from vit_efficient.attention.registry import register_attention
from vit_efficient.attention.relative import (
    Bias,
    RelativeBias,
    bias_of_attention,
    bias_of_kept,
    check_grid,
    grid_of_bias,
)
from vit_efficient.attention.rotary import rope_at, rope_of_kept, rotate
from vit_efficient.compress import COMPRESSORS, get_compressor
from vit_efficient.compress.base import State
from vit_efficient.compress.cells import COORDINATES
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.checks import argument_names, as_integer, check_choice, check_options
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.options import write_options
from vit_efficient.utils.projections import bias_of, channels_of

PLACES = ('x', 'qkv', 'kv', 'block')


class LocalMixing(nn.Conv2d):
    """Depthwise convolution over the patch grid, of odd kernel sizes.

    It starts at zero, so that the weights of a plain ViT mean what they did; its gradient is not zero there.
    """

    flop_role = 'transform'

    def __init__(self, channels: int, kernel_size: int | tuple[int, int], **kwargs):
        padding = tuple(side // 2 for side in to_2tuple(kernel_size))
        super().__init__(channels, channels, kernel_size, padding=padding, groups=channels, bias=False, **kwargs)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, grid: PatchGrid) -> Tensor:
        """(B, H · W, C) → (B, H · W, C)"""
        x_BCHW = x.transpose(1, 2).unflatten(2, (grid.height, grid.width))
        return super().forward(x_BCHW).flatten(2).transpose(1, 2)


@register_attention('dct', compressor='dct', axes='2d')
@register_attention('dct1d', compressor='dct', axes='1d', domain='frequency')
@register_attention('linformer', compressor='learned', place='kv')
@register_attention('pool', compressor='pool', place='kv')
@register_attention('subsample', compressor='subsample', place='kv')
@register_attention('merge', compressor='merge', place='kv')
class CompressedAttention(GridAttention):
    """timm's attention among the tokens that a compressor keeps.

    qk-norm acts after compression. At place `x` the whole of timm's attention runs on the kept tokens, with its gate
    and its norm; at `block` too, but there it is the block that goes down and up (`GridBlock` of the models), and
    `forward` takes the kept tokens and the `state` that `down` gave with them. At `qkv` and `kv` gate and norm act at
    full resolution, and the output projection stands after them.

    Where the compressor commutes with projections (the DCT does), the result is the same if channels are projected on
    the kept tokens, before going up or after coming down; so that is done. At `kv` this uses the rows of `qkv` apart,
    and hooks on that layer are not called.

    Args:
        dim, num_heads, **kwargs: As timm's `Attention`.
        place: 'x', 'qkv', 'kv' or 'block'.
        compressor: One of the registered compressors.
        local: Kernel size of a depthwise convolution over the patch grid, added to the output; it restores what the
            compressor cannot carry. Odd; 0 for none, as at place 'block', whose residual does that.
        **compressor_options: For the compressor, such as `keep_ratio`.
    """

    can_be_differential = True

    def configure(self, *, compressor: str, place: str = 'x', local: int = 0, **compressor_options) -> None:
        check_choice('place', place, PLACES)
        local = as_integer('local', local, 0, '0 or an odd kernel size')
        if local and local % 2 == 0:
            raise UserError(f'local must be 0 or an odd kernel size, got {local=}')
        if local and place == 'block':
            raise UserError(f"local={local} cannot be had at place='block': there the residual carries the rest")
        chosen = get_compressor(compressor)
        known, takes_others = chosen.option_names()
        if not takes_others:
            check_options(self.title, compressor_options, [*argument_names(self.configure)[0], *known])
        self.compress = chosen.of_attention(self, **compressor_options)
        if self.compress.up is None and place != 'kv':
            raise UserError(f"compressor {compressor!r} has no way up, it can only stand at place='kv', got {place=}")
        if self.compress.has_summaries and place != 'kv':
            raise UserError(
                f'compressor {compressor!r} with {write_options(self.compress.options)} reads queries and keys: it can '
                f"only stand at place='kv', got {place=}"
            )
        self.compressor = compressor
        self.place = place
        self.of_block = place == 'block'
        self.local = LocalMixing(channels_of(first_layer(self)), local, **self.kind_of_weights()) if local else None

    @classmethod
    def at_layer(cls, options: dict[str, Any], layer: int, depth: int, grid_size: tuple[int, int]) -> dict[str, Any]:
        compressor = COMPRESSORS.get(options.get('compressor'))
        return compressor.at_layer(options, layer, depth, grid_size) if compressor else options

    @classmethod
    def in_trained(cls, options: dict[str, Any]) -> dict[str, Any]:
        compressor = COMPRESSORS.get(options.get('compressor'))
        return compressor.in_trained(options) if compressor else options

    def set_grid_size(self, height: int, width: int) -> None:
        self.compress.set_grid_size(height, width)

    def common_part(self) -> nn.Module | None:
        return self.compress.common_part()

    def use_common_part(self, owned: nn.Module) -> None:
        self.compress.use_common_part(owned)

    @property
    def options(self) -> dict[str, Any]:
        kernel_size = self.local.kernel_size[0] if self.local is not None else 0
        return dict(compressor=self.compressor, place=self.place, local=kernel_size, **self.compress.options)

    def forward(
        self,
        x: Tensor,
        grid: PatchGrid,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_bias: RelativeBias | None = None,
        state: State = None,
    ) -> Tensor:
        if rope is not None:
            self.check_rotary()
        bias = bias_of_attention(self, shared_bias)
        if bias is not None:
            self.check_relative_bias()
            check_grid(self.title, grid_of_bias(bias), grid.height, grid.width)
        if self.of_block:
            check_kept(self.title, x.shape, self.num_attended(grid), attn_mask, is_causal)
            return self.proj_drop(self.proj(self._among_kept(x, grid, state, rope, bias)))
        self.check_call(x, grid, attn_mask, is_causal)
        if self.place == 'x':
            kept, state = self._down(x, grid)
            y = self._project_up(self._among_kept(kept, grid, state, rope, bias), grid, state)
        else:
            y = self._on_projections(x, grid, rope, bias)
        if self.local is not None:
            prefix, patches = self._split(y, grid)
            patches = patches + self.local(self._split(x, grid)[1], grid)
            y = torch.cat([prefix, patches], dim=1) if grid.prefix else patches
        return self.proj_drop(y)

    def down(self, x: Tensor, grid: PatchGrid) -> tuple[Tensor, State]:
        """The tokens that a block keeps at place 'block', (B, N, C) → (B, m, C); a state for `forward` and `up`."""
        self.check_call(x, grid)
        return self._down(x, grid)

    def check_rotary(self) -> None:
        if self.compress.coordinates is None and self.place in ('x', 'block'):
            raise UserError(
                f'{self.title}: at place={self.place!r} the tokens kept are mixtures of patches that have no place '
                f"({write_options(self.compress.options)}), and cannot have rotary positions; use place='kv' or "
                "'qkv', where queries and keys are rotated before, or, of 'dct', domain='space'"
            )

    def check_relative_bias(self) -> None:
        if self.compress.coordinates not in COORDINATES:
            raise UserError(
                f'{self.title}: the keys kept are mixtures of patches and no cells of the grid, or chosen patches '
                f"({write_options(self.compress.options)}), and cannot have the model's relative position bias; use "
                "'pool' (without summary='medoid'), 'subsample' or 'window', or 'dct' with domain='space' and axes='2d'"
            )

    def _among_kept(
        self, x_BmC: Tensor, grid: PatchGrid, state: State, rope: Tensor | None, bias: Bias | None
    ) -> Tensor:
        """timm's attention on the kept tokens, but for the output projection."""
        q, k, v = self.project_heads(x_BmC)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self.rotate(q, k, self._rope_of_kept(rope, grid, state), grid.prefix)
        return self.norm_and_gate(self._attend(q, k, self.values_of_maps(v), grid, state, bias), x_BmC)

    def _on_projections(self, x: Tensor, grid: PatchGrid, rope: Tensor | None, bias: Bias | None) -> Tensor:
        q, k, v, state = self._compressed_projections(x, grid, rope)
        y = self._attend(q, k, v, grid, state, bias)
        if self.place == 'qkv':
            if self.gate is None and isinstance(self.norm, nn.Identity):
                return self._project_up(y, grid, state)
            y = self.up(y, grid, state)
        return self.proj(self.norm_and_gate(y, x))

    def _compressed_projections(
        self, x: Tensor, grid: PatchGrid, rope: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """q, k, v as (B, H, tokens, D or E), with qk-norm and rotated: k and v, and at `qkv` q, of the kept tokens; and
        the state of the keys, which the others follow."""
        if self.compress.has_summaries:
            return *self._summaries(x, grid, rope), None
        of_queries, state = self.place == 'qkv', None
        commutes = self.compress.commutes and not self.compress.matches
        if rope is not None and self.compress.coordinates is None:
            return self._rotated_first(x, grid, rope)
        if commutes and of_queries:
            q, k, v = self.project_heads(self._down(x, grid)[0], through=partial(self._projected, grid=grid))
        elif commutes and (self.qkv is None or is_fused(self)):
            q, k, v = self._projected_apart(x, grid)
        else:
            q, k, v = self.project_heads(x)
            q, k, v, state = self._kept_of_heads(q, k, v, grid)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            of_kept = self._rope_of_kept(rope, grid, state)
            q = rotate(q, of_kept if of_queries else rope, grid.prefix, self.rotate_half)
            k = rotate(k, of_kept, grid.prefix, self.rotate_half)
        return q, k, self.values_of_maps(v), state

    def _kept_of_heads(self, q: Tensor, k: Tensor, v: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor, Tensor, State]:
        """As `_compressed_projections`, of projections: keys and values, and at `qkv` queries, go down."""
        down_k, down_v = self.compress.ways_down
        k, state = self._down(k, grid, down_k)
        v, _ = self._down(v, grid, down_v, state)
        if self.place == 'qkv':
            q, _ = self._down(q, grid, state=state)
        return q, k, v, state

    def _projected_apart(self, x: Tensor, grid: PatchGrid) -> list[Tensor]:
        """Queries of all tokens, keys and values of the kept ones, which are compressed before they are projected."""
        down_k, down_v = self.compress.ways_down
        ways = [(1, 3, down_k)] if down_k is down_v else [(1, 2, down_k), (2, 3, down_v)]
        heads = self.project_heads(x, 0, 1)
        for first, last, way in ways:
            through = partial(self._projected, grid=grid, way=way)
            heads += self.project_heads(self._down(x, grid, way)[0], first, last, through)
        return heads

    def _rotated_first(self, x: Tensor, grid: PatchGrid, rope: Tensor) -> tuple[Tensor, Tensor, Tensor, State]:
        """As `_compressed_projections`, where kept tokens have no place: queries and keys are rotated, then mixed."""
        q, k, v = self.project(x)
        q, k = self.rotate(q, k, rope, grid.prefix)
        q, k, v, state = self._kept_of_heads(q, k, v, grid)
        return q, k, self.values_of_maps(v), state

    def _summaries(self, x: Tensor, grid: PatchGrid, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """As `_compressed_projections`, of a compressor that `has_summaries`."""
        q, k, v = self.project(x)
        v = self.values_of_maps(v)
        rotates_first = rope is not None and self.compress.coordinates is None
        if rotates_first:
            q, k = self.rotate(q, k, rope, grid.prefix)
        (_, of_q), (k_prefix, of_k), (v_prefix, of_v) = (self._split(t, grid) for t in (q, k, v))
        of_k, of_v = self.compress.keys_and_values(of_q * self.scale, of_k, of_v, grid)
        if grid.prefix:
            of_k, of_v = torch.cat([k_prefix, of_k], dim=-2), torch.cat([v_prefix, of_v], dim=-2)
        if rope is not None and not rotates_first:
            q = rotate(q, rope, grid.prefix, self.rotate_half)
            of_k = rotate(of_k, self._rope_of_kept(rope, grid, None), grid.prefix, self.rotate_half)
        return q, of_k, of_v

    def _rope_of_kept(self, rope: Tensor, grid: PatchGrid, state: State) -> Tensor:
        if self.compress.coordinates == 'groups':
            rows, columns = self.compress.centres(grid, state)
            return rope_at(rope, grid.height, grid.width, rows, columns)
        kept = self.compress.kept_sides(grid)
        return rope_of_kept(rope, grid.height, grid.width, kept, self.compress.coordinates)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, grid: PatchGrid, state: State, bias: Bias | None) -> Tensor:
        """(B, H, tokens, D or E) each → (B, tokens, C)"""
        if bias is None:
            mask = self.compress.log_counts(grid, q, state)
        else:
            kept, counted = self.compress.kept_sides(grid), getattr(self.compress, 'count_bias', False)
            how = kept, self.place != 'kv', counted
            if isinstance(bias, DecomposedBias):
                mask = decomposed_of_kept(bias, q, grid.height, grid.width, *how)
            else:
                mask = bias_of_kept(bias, grid.prefix, *how, q)
        y = attend(q, k, v, self.scale, self.fused_attn, self.attn_drop, mask)
        return self.merge_heads(y)

    def _project_up(self, y_BmC: Tensor, grid: PatchGrid, state: State) -> Tensor:
        """up, then the output projection: the other way round where that is the same, on fewer tokens."""
        if not self.compress.commutes:
            return self.proj(self.up(y_BmC, grid, state))
        return self.up(self._projected(self.proj, y_BmC, grid), grid, state)

    def _projected(
        self, projection: Projection, x_BmC: Tensor, grid: PatchGrid, way: nn.Module | None = None
    ) -> Tensor:
        """Kept tokens as a projection of all tokens would have them, if it had come before this way down."""
        y = projection(x_BmC)
        bias = None if self.compress.keeps_constants else bias_of(projection, x_BmC)
        if bias is None:
            return y
        # The projection gave it to each kept token, and it belongs to each patch.
        bias = bias.to(y.dtype)
        prefix, kept = self._split(y, grid)
        kept = (way or self.compress.down).add_constant(kept - bias, bias, grid)
        return torch.cat([prefix, kept], dim=1) if grid.prefix else kept

    @staticmethod
    def _split(x: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
        """Prefix tokens and the others, of (…, tokens, channels)."""
        if not grid.prefix:
            return x[..., :0, :], x
        # Split, not sliced: the gradient of a slice is as large as the whole.
        return x.split_with_sizes([grid.prefix, x.shape[-2] - grid.prefix], dim=-2)

    def _down(
        self, x: Tensor, grid: PatchGrid, way: nn.Module | None = None, state: State = None
    ) -> tuple[Tensor, State]:
        way = way or self.compress.down
        if not grid.prefix:
            return way(x, grid, state)
        prefix, patches = self._split(x, grid)
        kept, state = way(patches, grid, state)
        return torch.cat([prefix.to(kept.dtype), kept], dim=-2), state

    def up(self, y: Tensor, grid: PatchGrid, state: State) -> Tensor:
        """Kept tokens back to all: (…, m, C) → (…, N, C)."""
        if not grid.prefix:
            return self.compress.up(y, grid, state)
        prefix, kept = self._split(y, grid)
        return torch.cat([prefix, self.compress.up(kept, grid, state)], dim=-2)

    def num_attended(self, grid: PatchGrid) -> int:
        return grid.prefix + self.compress.num_kept(grid)

    def extra_repr(self) -> str:
        return f"place='{self.place}'"


# A leaf for FX, to which nothing is None.
@torch.fx.wrap
@register_notrace_function
def check_kept(title: str, shape, kept, attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raises the errors of `CompressedAttention.forward` at place 'block'."""
    check_tokens(title, shape, 1, shape[1], 0, attn_mask, is_causal)
    num_tokens = shape[1]
    if type(num_tokens) is int and type(kept) is int and num_tokens != kept:
        raise UserError(
            f"{title} at place='block' attends among the {kept} tokens that its block keeps, and was "
            f'given {num_tokens}: it needs a block that goes down and up, such as those of the models here'
        )
