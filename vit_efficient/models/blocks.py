"""Transformer blocks that work with attentions on a patch grid, which attention each layer of a model has, and what the
layers have in common."""

from collections.abc import Sequence
from typing import Any

from timm.layers import Attention, AttentionRope, PatchDropout, PatchDropoutWithIndices
from timm.models import beit
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from vit_efficient.attention import GridAttention, layer_options, swap_attention
from vit_efficient.grid import PackedGrids, PatchGrid
from vit_efficient.utils.errors import UserError

SHARED_BIASES = ('rel_pos_bias', 'shared_rel_pos')  # what timm's models call them
LayerSpec = str | tuple[str, dict[str, Any]]  # a name, or a name and its options
Grid = PatchGrid | PackedGrids
AttentionSpec = LayerSpec | Sequence[LayerSpec]  # of all layers, or of each


class OnGrid:
    """A block of timm's that hands the grid to its attention, or works on the tokens that this one keeps.

    A class of timm's and one of this kind before it make a block; it adds nothing to the state. Tokens of images of
    several sizes are one sequence, of which each image is attended to apart.
    """

    #: The argument of its attention by which the positions that it is given go on.
    positions: str = 'rope'

    def attention_adds(self, x: Tensor, grid: Grid, *given) -> Tensor:
        """What attention adds to the tokens x, before drop path; `given` as of `attend`."""
        raise NotImplementedError

    def mlp_adds(self, x: Tensor) -> Tensor:
        """What the MLP adds to the tokens x, before drop path."""
        raise NotImplementedError

    def attend(self, x: Tensor, grid: Grid, rope, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if isinstance(grid, PackedGrids):
            parts, ropes = self._split(x, grid), rope or [None] * len(grid.groups)
            grids = [of_group for of_group, _ in grid.groups]
            given = zip(parts, grids, ropes, strict=True)
            return grid.join(self.attend(*of_group, attn_mask, is_causal) for of_group in given)
        positions = {} if rope is None else {self.positions: rope}
        return self.attn(x, grid, **positions, attn_mask=attn_mask, is_causal=is_causal)

    def forward(
        self,
        x: Tensor,
        grid: Grid | None = None,
        rope: Tensor | Sequence[Tensor] | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The block.

        Args:
            x: (B, N, C); of images of several sizes (1, T, C).
            grid: The layout of the tokens; exact attention needs none.
            rope: Rotary positions of the patches, or a relative bias that all blocks share, if there are any; of
                several sizes those of each.
            attn_mask, is_causal: As timm's.
        """
        given = grid, rope, attn_mask, is_causal
        if self.attn.of_block:
            y = self._down(x, grid)
            added = self._drop(self.drop_path1, self.attention_adds(y, *given), grid)
            added = added + self._drop(self.drop_path2, self.mlp_adds(y + added), grid)
            return x + self._up(added, grid)
        x = x + self._drop(self.drop_path1, self.attention_adds(x, *given), grid)
        return x + self._drop(self.drop_path2, self.mlp_adds(x), grid)

    def _split(self, x: Tensor, grid: PackedGrids) -> list[Tensor]:
        """The tokens that attention is given, of each grid."""
        return grid.split(x, self.attn.num_attended if self.attn.of_block else None)

    def _down(self, x: Tensor, grid: Grid) -> Tensor:
        if not isinstance(grid, PackedGrids):
            return self.attn.down(x, grid)
        return grid.join(self.attn.down(part, g) for part, (g, _) in zip(grid.split(x), grid.groups, strict=True))

    def _up(self, y: Tensor, grid: Grid) -> Tensor:
        if not isinstance(grid, PackedGrids):
            return self.attn.up(y, grid)
        return grid.join(self.attn.up(part, g) for part, (g, _) in zip(self._split(y, grid), grid.groups, strict=True))

    def _drop(self, drop_path: nn.Module, x: Tensor, grid: Grid) -> Tensor:
        """Drop path, which drops what is added to some images."""
        if not isinstance(grid, PackedGrids) or isinstance(drop_path, nn.Identity) or not self.training:
            return drop_path(x)
        return grid.join(drop_path(part) for part in self._split(x, grid))


class _PreNorm(OnGrid):
    def attention_adds(self, x: Tensor, *given) -> Tensor:
        return self.ls1(self.attend(self.norm1(x), *given))

    def mlp_adds(self, x: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))


class _PreNormGamma(OnGrid):
    """The scale of a layer is a parameter of the block."""

    def attention_adds(self, x: Tensor, *given) -> Tensor:
        return _scaled(self.gamma_1, self.attend(self.norm1(x), *given))

    def mlp_adds(self, x: Tensor) -> Tensor:
        return _scaled(self.gamma_2, self.mlp(self.norm2(x)))


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


class _PostNorm(OnGrid):
    """What attention and MLP add is normalised."""

    def attention_adds(self, x: Tensor, *given) -> Tensor:
        return self.norm1(self.attend(x, *given))

    def mlp_adds(self, x: Tensor) -> Tensor:
        return self.norm2(self.mlp(x))


class GridBlock(_PreNorm, Block):
    """timm's pre-norm block on a grid."""


class GridResPostBlock(_PostNorm, ResPostBlock):
    """timm's post-norm block on a grid."""


class GridEvaBlock(_PreNormGamma, EvaBlock):
    """The pre-norm block of timm's `Eva` on a grid."""


class GridEvaBlockPostNorm(_PostNorm, EvaBlockPostNorm):
    """The post-norm block of timm's `Eva` on a grid."""


class _SharedBias(OnGrid):
    positions = 'shared_bias'


class GridBeitBlock(_SharedBias, _PreNormGamma, beit.Block):
    """The block of timm's `Beit` on a grid."""


class GridRelPosBlock(_SharedBias, _PreNorm, RelPosBlock):
    """The pre-norm block of timm's `VisionTransformerRelPos` on a grid."""


class GridResPostRelPosBlock(_SharedBias, _PostNorm, ResPostRelPosBlock):
    """The post-norm block of timm's `VisionTransformerRelPos` on a grid."""


# Classes of timm's that are served, and ours that know of the grid.
BLOCKS = {
    Block: GridBlock,
    ResPostBlock: GridResPostBlock,
    EvaBlock: GridEvaBlock,
    EvaBlockPostNorm: GridEvaBlockPostNorm,
    beit.Block: GridBeitBlock,
    RelPosBlock: GridRelPosBlock,
    ResPostRelPosBlock: GridResPostRelPosBlock,
}
ATTENTIONS = (Attention, AttentionRope, EvaAttention, beit.Attention, RelPosAttention)

# Others, in messages.
_KINDS = {
    'ParallelScalingBlock': 'a parallel block, in which attention and MLP have one projection',
    'ParallelThingsBlock': 'a parallel block, in which several attentions stand side by side',
    'DiffParallelScalingBlock': 'a parallel block of differential attention',
    'DiffAttention': 'differential attention, the difference of two',
}


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attentions of a model's blocks."""
    return [block.attn for block in model.blocks]


def build_attentions(model: nn.Module, attention: AttentionSpec, options: dict[str, Any] | None) -> None:
    """Gives each block of a model that is being built its attention.

    Raises:
        UserError: If an attention or an option is unknown or out of range, or cannot be had in this model.
    """
    layers = attention_per_layer(attention, options, len(model.blocks))
    check_patch_dropout(model, layers)
    for i, (block, (name, given)) in enumerate(zip(model.blocks, layers, strict=True)):
        given = layer_options(name, given, i, len(layers), model.patch_embed.grid_size)
        block.attn = swap_attention(block.attn, name, **given)
    check_positions(model, attentions(model))
    own_common_part(model)


def check_positions(model: nn.Module, attentions: Sequence[nn.Module]) -> None:
    """Raises UserError if a model has positions that one of the attentions cannot have."""
    if getattr(model, 'rope', None) is not None:
        for attention in attentions:
            attention.check_rotary()
    if any(getattr(model, name, None) is not None for name in SHARED_BIASES):
        for attention in attentions:
            attention.check_relative_bias()


def attention_per_layer(attention: AttentionSpec, options: dict[str, Any] | None, depth: int) -> list[tuple[str, dict]]:
    """Spells a specification out: a name and its options for each of `depth` layers."""
    if isinstance(attention, str):
        return [(attention, dict(options or {}))] * depth
    if options:
        raise UserError(f'attention_kwargs={options} beside {attention=}: put the options there, as (name, options)')
    if _is_named(attention):
        return [tuple(attention)] * depth
    layers = attention if isinstance(attention, (list, tuple)) else [attention]
    for layer in layers:
        if not isinstance(layer, str) and not _is_named(layer):
            raise UserError(f"attention: a layer is 'name' or ('name', {{options}}), got {layer!r}")
    if len(layers) != depth:
        raise UserError(f'attention lists {len(layers)} layers, there are {depth}')
    return [(layer, {}) if isinstance(layer, str) else tuple(layer) for layer in layers]


def _is_named(spec: Any) -> bool:
    """Whether it is a name with its options."""
    pair = isinstance(spec, (list, tuple)) and len(spec) == 2
    return pair and isinstance(spec[0], str) and isinstance(spec[1], dict)


def check_blocks(model: nn.Module) -> None:
    """Raises UserError, naming the module, if a block or its attention is none that is served."""
    for i, block in enumerate(model.blocks):
        if type(block) not in BLOCKS and not isinstance(block, OnGrid):
            raise UserError(f'blocks.{i}: {_what_is(block)}, which is not served')
        if type(block.attn) not in ATTENTIONS and not isinstance(block.attn, GridAttention):
            raise UserError(f'blocks.{i}.attn: {_what_is(block.attn)}, which is not served')


def _what_is(module: nn.Module) -> str:
    """What a block or attention is that is none of `BLOCKS` and `ATTENTIONS`."""
    name = type(module).__name__
    return f'{name} is {_KINDS.get(name, "another kind")}'


def check_patch_dropout(model: nn.Module, layers: Sequence[tuple[str, dict]]) -> None:
    """Raises UserError if a layer needs the whole patch grid and the model drops patches."""
    mixing = sorted({name for name, _ in layers} - {'full'})
    if mixing and isinstance(getattr(model, 'patch_drop', None), (PatchDropout, PatchDropoutWithIndices)):
        raise UserError(
            f'patch_drop_rate={model.patch_drop.prob}: attention {mixing[0]!r} needs the whole patch grid; '
            "set patch_drop_rate=0, or use attention 'full'"
        )


def common_part(attentions: Sequence[nn.Module], owned: nn.Module | None = None) -> nn.Module | None:
    """The part that the layers of a model have in common: the one that it has, if that is of use, or the first layer's.

    Raises a UserError if layers want parts of different shapes.
    """
    parts = {i: attn.common_part() for i, attn in enumerate(attentions) if isinstance(attn, GridAttention)}
    parts = {i: part for i, part in parts.items() if part is not None}
    if not parts:
        return None
    shapes = {i: [tuple(p.shape) for p in part.parameters()] for i, part in parts.items()}
    first = next(iter(parts))
    for i, shape in shapes.items():
        if shape != shapes[first]:
            raise UserError(
                f'blocks {first} and {i} have one projection in common and want it in two shapes, {shapes[first]} and '
                f"{shape}; give them the same num_tokens, or sharing='key-value'"
            )
    return next((part for part in parts.values() if part is owned), parts[first])


def own_common_part(model: nn.Module) -> None:
    """Makes the model the one owner of what its layers have in common, under the name `shared`."""
    part = common_part(attentions(model), getattr(model, 'shared', None))
    if hasattr(model, 'shared'):
        del model.shared
    if part is not None:
        model.shared = part
        for attention in attentions(model):
            if isinstance(attention, GridAttention) and attention.common_part() is not None:
                attention.use_common_part(part)
