"""Transformer blocks that work with attentions on a patch grid, which attention each layer of a model has, and what the
layers have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import (
    Attention,
    AttentionRope,
    DiffAttention,
    PatchDropout,
    PatchDropoutWithIndices,
    register_notrace_function,
)
from timm.models import beit
from timm.models import vision_transformer_sam as sam
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from vit_efficient.attention import GridAttention, layer_options, swap_attention
from vit_efficient.grid import PackedGrids, PatchGrid, plain_sizes
from vit_efficient.models.parallel import ParallelAttention, ParallelMlp, attention_of_parallel
from vit_efficient.models.rope_steps import with_steps
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.options import write_options
from vit_efficient.utils.projections import Part

SHARED_BIASES = ('rel_pos_bias', 'shared_rel_pos')  # what timm's models call them
Grid = PatchGrid | PackedGrids
LayerSpec = str | tuple[str, dict[str, Any]]  # a name, or a name and its options
AttentionSpec = LayerSpec | Sequence[LayerSpec]  # of all layers, or of each


class OnGrid:
    """A block of timm's that hands the grid to its attention, or works on the tokens that this one keeps.

    A class of timm's and one of this kind before it make a block; it adds nothing to the state. Tokens of images of
    several sizes are one sequence, of which each image is attended to apart.
    """

    #: The argument of its attention by which the positions that it is given go on.
    positions: str = 'rope'

    def complete(self) -> None:
        """Adds what timm's class lacks, and has no parameters, to a block that was of it."""

    def own_attentions(self) -> dict[str, nn.Module]:
        """The attentions by their names in the block, also of a block that is still timm's: `attentions_of`."""
        return {'attn': self.attn}

    def sublayers(self, grid: Grid, *given) -> list[Callable[[Tensor], Tensor]]:
        """What the block adds to the tokens, one after the other; its arguments are those of `forward`."""
        return [lambda x: self.attention_adds(x, grid, *given), lambda x: self.mlp_adds(x, grid)]

    def attention_adds(self, x: Tensor, grid: Grid, *given) -> Tensor:
        """What attention adds to the tokens x; `grid` and `given` as of `attend`."""
        raise NotImplementedError

    def mlp_adds(self, x: Tensor, grid: Grid) -> Tensor:
        """What the MLP adds to the tokens x."""
        raise NotImplementedError

    def mlp_macs(self) -> int:
        """The multiply-accumulates of the MLP for a token."""
        return linear_macs(self.mlp)

    def forward(
        self,
        x: Tensor,
        grid: Grid | None = None,
        rope: Any = None,
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
        attention, *_ = self.own_attentions().values()
        if not attention.of_block:
            for adds in self.sublayers(grid, rope, attn_mask, is_causal):
                x = x + adds(x)
            return x
        y, state = down_on_each(attention, x, grid)
        first, *others = self.sublayers(grid, rope, attn_mask, is_causal, state)
        added = first(y)
        for adds in others:
            added = added + adds(y + added)
        return x + on_each(attention.up, added, grid, attention, state)

    def attend(
        self, attention: nn.Module, x: Tensor, grid: Grid, rope: Any, attn_mask, is_causal, state: Any = None
    ) -> Tensor:
        """What an attention makes of x; one that knows of no positions is not told that there are none.

        Args:
            state: What its way down gave with x, at place 'block'.
        """
        if isinstance(grid, PackedGrids):

            def of_one(part: Tensor, g: PatchGrid, rope: Any, state: Any) -> Tensor:
                return self.attend(attention, part, g, rope, attn_mask, is_causal, state)

            return on_each(of_one, x, grid, attention, rope, state)
        given = {} if rope is None else {self.positions: rope}
        if state is not None:
            given['state'] = state
        return attention(x, grid, **given, attn_mask=attn_mask, is_causal=is_causal)

    def run_attention(self, name: str, *args, **kwargs) -> Tensor:
        """What one of its attentions makes of what it is called with. Where the weights of the block are split among
        processes, they are gathered for it, as for `forward` (`train.sharding`)."""
        return self.own_attentions()[name](*args, **kwargs)

    def drop(self, drop_path: nn.Module, x: Tensor, grid: Grid) -> Tensor:
        """Drop path, which drops what is added to some images."""
        if isinstance(drop_path, nn.Identity) or not self.training:
            return x
        attention, *_ = self.own_attentions().values()
        return on_each(lambda part, _: drop_path(part), x, grid, attention)


def on_each(
    function: Callable[..., Tensor], x: Tensor, grid: Grid, attention: nn.Module, *given: Sequence | None
) -> Tensor:
    """function(tokens, grid, *given); of images of several sizes, of those of each size.

    Args:
        x: The tokens that the attention is given, which at place 'block' are those that it keeps.
        given: What else the function takes; of several sizes that of each, or None.
    """
    if not isinstance(grid, PackedGrids):
        return function(x, grid, *given)
    parts = grid.split(x, attention.num_attended if attention.of_block else None)
    of_each = (each or [None] * len(parts) for each in given)
    grids = (g for g, _ in grid.groups)
    return grid.join(function(*arguments) for arguments in zip(parts, grids, *of_each, strict=True))


def down_on_each(attention: nn.Module, x: Tensor, grid: Grid) -> tuple[Tensor, Any]:
    """The tokens that a block keeps and the state; of images of several sizes, those of each size."""
    if not isinstance(grid, PackedGrids):
        return attention.down(x, grid)
    kept = [attention.down(part, g) for part, (g, _) in zip(grid.split(x), grid.groups, strict=True)]
    return grid.join(part for part, _ in kept), [state for _, state in kept]


def linear_macs(module: nn.Module) -> int:
    """The multiply-accumulates of the linear layers in a module for a token."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, (nn.Linear, Part)))


class _Added(OnGrid):
    """Attention and MLP of the normalised tokens are added, each scaled."""

    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """The scales of what attention and MLP add, (C,) each; None without."""
        raise NotImplementedError

    def before_linear(self, x: Tensor, grid: PatchGrid, rope: Any, place: int) -> tuple[Tensor, Tensor]:
        """The tokens without what its attention (place 0), or then its MLP (place 1), adds; and for each of them what
        the last layer of that is given, if this layer gives its input back."""
        attention, given = self.attn, (rope, None, False)
        if not attention.of_block:
            if place == 0:
                return x, self.attend(attention, self.norm1(x), grid, *given)
            x = x + self.attention_adds(x, grid, *given)
            return x, self.mlp(self.norm2(x))
        y, state = attention.down(x, grid)
        if place == 0:
            return x, attention.up(self.attend(attention, self.norm1(y), grid, *given, state), grid, state)
        added = self.attention_adds(y, grid, *given, state)
        hidden = self.mlp(self.norm2(y + added))
        return x + attention.up(added, grid, state), attention.up(hidden, grid, state)


class _PreNorm(_Added):
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        return tuple(getattr(scale, 'gamma', None) for scale in (self.ls1, self.ls2))

    def attention_adds(self, x: Tensor, grid: Grid, *given) -> Tensor:
        return self.drop(self.drop_path1, self.ls1(self.attend(self.attn, self.norm1(x), grid, *given)), grid)

    def mlp_adds(self, x: Tensor, grid: Grid) -> Tensor:
        return self.drop(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), grid)


class _PreNormGamma(_Added):
    """The scale of a layer is a parameter of the block."""

    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        return self.gamma_1, self.gamma_2

    def attention_adds(self, x: Tensor, grid: Grid, *given) -> Tensor:
        y = _scaled(self.gamma_1, self.attend(self.attn, self.norm1(x), grid, *given))
        return self.drop(self.drop_path1, y, grid)

    def mlp_adds(self, x: Tensor, grid: Grid) -> Tensor:
        return self.drop(self.drop_path2, _scaled(self.gamma_2, self.mlp(self.norm2(x))), grid)


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


class _PostNorm(OnGrid):
    """What attention and MLP add is normalised."""

    def attention_adds(self, x: Tensor, grid: Grid, *given) -> Tensor:
        return self.drop(self.drop_path1, self.norm1(self.attend(self.attn, x, grid, *given)), grid)

    def mlp_adds(self, x: Tensor, grid: Grid) -> Tensor:
        return self.drop(self.drop_path2, self.norm2(self.mlp(x)), grid)


class _Fused(OnGrid):
    """Attention and MLP side by side, with one projection; as modules they are parts of it."""

    def complete(self) -> None:
        self.mlp = ParallelMlp(self)

    def own_attentions(self) -> dict[str, nn.Module]:
        return {'attn': self.attn if hasattr(self, 'attn') else attention_of_parallel(self)}

    def sublayers(self, grid: Grid, *given) -> list[Callable[[Tensor], Tensor]]:
        return [lambda x: self.both_add(x, grid, *given)]

    def both_add(self, x: Tensor, grid: Grid, *given) -> Tensor:
        x = self.in_norm(x)
        return self.drop(self.drop_path, self.ls(self.attend(self.attn, x, grid, *given) + self.mlp(x)), grid)


class GridBlock(_PreNorm, Block):
    """timm's pre-norm block on a grid."""


class GridResPostBlock(_PostNorm, ResPostBlock):
    """timm's post-norm block on a grid."""


class GridParallelThingsBlock(OnGrid, ParallelThingsBlock):
    """timm's block of several attentions side by side, then several MLPs, on a grid."""

    def own_attentions(self) -> dict[str, nn.Module]:
        return {f'attns.{i}.attn': part.attn for i, part in enumerate(self.attns)}

    def attention_adds(self, x: Tensor, grid: Grid, *given) -> Tensor:
        added = [(part, self.attend(part.attn, part.norm(x), grid, *given)) for part in self.attns]
        return torch.stack([self.drop(part.drop_path, part.ls(y), grid) for part, y in added]).sum(dim=0)

    def mlp_adds(self, x: Tensor, grid: Grid) -> Tensor:
        added = [(part, part.mlp(part.norm(x))) for part in self.ffns]
        return torch.stack([self.drop(part.drop_path, part.ls(y), grid) for part, y in added]).sum(dim=0)

    def mlp_macs(self) -> int:
        return linear_macs(self.ffns)


class GridParallelScalingBlock(_Fused, ParallelScalingBlock):
    """timm's block of an attention and an MLP with one projection, on a grid."""


class GridDiffParallelScalingBlock(_Fused, DiffParallelScalingBlock):
    """The same with differential attention."""


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


class GridSAMBlock(_PreNorm, sam.Block):
    """The global block of timm's `VisionTransformerSAM` on a grid."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H, W, C)"""
        _, height, width, _ = x.shape
        grid, rope = PatchGrid(*plain_sizes((height, width))), self.attn.rope
        if rope is not None:
            check_rope_grid(rope.feat_shape, grid.height, grid.width)
            rope = with_steps(rope.get_embed(), rope, grid.height, grid.width)
        return super().forward(x.flatten(1, 2), grid, rope).unflatten(1, (grid.height, grid.width))


# A leaf for FX, where sizes are not known.
@torch.fx.wrap
@register_notrace_function
def check_rope_grid(grid_size: tuple[int, int], height, width) -> None:
    """Raises UserError if rotary positions made for one grid are to be those of another."""
    if type(height) is type(width) is int and tuple(grid_size) != (height, width):
        raise UserError(
            f'the rotary positions are those of {grid_size[0]} × {grid_size[1]} patches, the input has {height} × '
            f'{width}; create the model with this img_size'
        )


# Classes of timm's that are served, and ours that know of the grid.
BLOCKS = {
    Block: GridBlock,
    ResPostBlock: GridResPostBlock,
    ParallelThingsBlock: GridParallelThingsBlock,
    ParallelScalingBlock: GridParallelScalingBlock,
    DiffParallelScalingBlock: GridDiffParallelScalingBlock,
    EvaBlock: GridEvaBlock,
    EvaBlockPostNorm: GridEvaBlockPostNorm,
    beit.Block: GridBeitBlock,
    RelPosBlock: GridRelPosBlock,
    ResPostRelPosBlock: GridResPostRelPosBlock,
    sam.Block: GridSAMBlock,
}
ATTENTIONS = (Attention, AttentionRope, EvaAttention, DiffAttention, beit.Attention, RelPosAttention, sam.Attention)


def built_grid(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches that a model of timm's is built for; of a NaFlexVit, that its embedding is for."""
    return model.patch_embed.grid_size if hasattr(model, 'patch_embed') else tuple(model.embeds.pos_embed_grid_size)


def grid_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """The blocks whose attention is among all patches, by their numbers: those that attend in windows of their own, of
    timm's `VisionTransformerSAM`, stay as they are."""
    return {
        i: block for i, block in enumerate(model.blocks) if not (isinstance(block, sam.Block) and block.window_size)
    }


def attentions_of(block: nn.Module) -> dict[str, nn.Module]:
    """The attentions of a block by their names in it: one, or those that stand side by side.

    Where timm's block has no module for it, what stands for it.
    """
    return BLOCKS.get(type(block), type(block)).own_attentions(block)


def first_attention(block: nn.Module) -> nn.Module:
    """The attention of a block, or the first of several, whose options are the same."""
    return next(iter(attentions_of(block).values()))


def named_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attentions of all `grid_blocks` by their names in the model."""
    return {
        f'blocks.{i}.{name}': attention
        for i, block in grid_blocks(model).items()
        for name, attention in attentions_of(block).items()
    }


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attentions of all `grid_blocks`."""
    return list(named_attentions(model).values())


def swapped_attentions(model: nn.Module, layers: Mapping[int, tuple[str, dict[str, Any]]]) -> dict[str, nn.Module]:
    """New attentions for blocks of a model, by their names in it, and the old ones of the others; nothing is changed.

    Args:
        layers: The name and the options of the attention of each block that gets one. What is timm's becomes 'full'.

    Raises:
        UserError: If an attention or an option is unknown or out of range, or cannot be had in this model.
    """
    check_patch_dropout(model, list(layers.values()))
    found, grid_size = {}, built_grid(model)
    for i, block in grid_blocks(model).items():
        of_block = attentions_of(block)
        for name, attention in of_block.items():
            if i in layers or not isinstance(attention, GridAttention):
                kind, options = layers.get(i, ('full', {}))
                attention = swap_attention(
                    attention, kind, **layer_options(kind, options, i, len(model.blocks), grid_size)
                )
            learns = getattr(getattr(attention, 'compress', None), 'window', None) is not None
            if learns and not hasattr(model, 'patch_embed'):
                raise UserError(
                    f'blocks.{i}: learned=True needs a model that is built for one image size, whose costs are '
                    f'weighed; a {type(model).__name__} is built for none'
                )
            if attention.of_block and len(of_block) > 1 and any(True for _ in attention.compress.parameters()):
                raise UserError(
                    f"blocks.{i}: place='block' goes down and up once for {len(of_block)} attentions, which cannot "
                    f"each learn how ({write_options(attention.compress.options)}); use place='x', or learned=False"
                )
            found[f'blocks.{i}.{name}'] = attention
    common_part(found)
    check_positions(model, list(found.values()))
    return found


def build_attentions(model: nn.Module, attention: AttentionSpec, options: dict[str, Any] | None) -> None:
    """Gives each block of a model that is being built its attention.

    Raises:
        UserError: If an attention or an option is unknown or out of range, or cannot be had in this model.
    """
    layers = attention_per_layer(attention, options, len(model.blocks))
    set_attentions(model, swapped_attentions(model, dict(enumerate(layers))))


def set_attentions(model: nn.Module, attentions: Mapping[str, nn.Module]) -> None:
    """Gives the blocks of a model their attentions, by their names in it."""
    for name, attention in attentions.items():
        model.set_submodule(name, attention)
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
    if is_named(attention):
        return [tuple(attention)] * depth
    layers = attention if isinstance(attention, (list, tuple)) else [attention]
    for layer in layers:
        if not isinstance(layer, str) and not is_named(layer):
            raise UserError(f"attention: a layer is 'name' or ('name', {{options}}), got {layer!r}")
    if len(layers) != depth:
        said = f'attention lists {len(layers)} layers, there are {depth}'
        raise UserError(f'{said}: name one for each, or make a plan for this model')
    return [(layer, {}) if isinstance(layer, str) else tuple(layer) for layer in layers]


def is_named(spec: Any) -> bool:
    """Whether it is a name with its options, and no list of several."""
    pair = isinstance(spec, (list, tuple)) and len(spec) == 2
    named = pair and isinstance(spec[0], str) and isinstance(spec[1], dict)
    return named and all(isinstance(key, str) for key in spec[1])


def check_blocks(model: nn.Module) -> None:
    """Raises UserError, naming the module, if a block or its attention is none that is served."""
    for i, block in enumerate(model.blocks):
        if type(block) not in BLOCKS and not isinstance(block, OnGrid):
            raise UserError(f'blocks.{i}: {type(block).__name__} is another kind of block, which is not served')
        for name, attention in attentions_of(block).items():
            if type(attention) not in ATTENTIONS and not isinstance(attention, (GridAttention, ParallelAttention)):
                kind = type(attention).__name__
                raise UserError(f'blocks.{i}.{name}: {kind} is another kind of attention, which is not served')


def check_patch_dropout(model: nn.Module, layers: Sequence[tuple[str, dict]]) -> None:
    """Raises UserError if a layer needs the whole patch grid and the model drops patches."""
    mixing = sorted({name for name, _ in layers} - {'full'})
    if mixing and isinstance(getattr(model, 'patch_drop', None), (PatchDropout, PatchDropoutWithIndices)):
        raise UserError(
            f'patch_drop_rate={model.patch_drop.prob}: attention {mixing[0]!r} needs the whole patch grid; '
            "set patch_drop_rate=0, or use attention 'full'"
        )


def common_part(attentions: Mapping[str, nn.Module], owned: nn.Module | None = None) -> nn.Module | None:
    """The part that the layers of a model have in common: the one that it has, if that is of use, or the first layer's.

    Raises a UserError if layers want parts of different shapes.
    """
    parts = {name: attn.common_part() for name, attn in attentions.items() if isinstance(attn, GridAttention)}
    parts = {name: part for name, part in parts.items() if part is not None}
    if not parts:
        return None
    shapes = {name: [tuple(p.shape) for p in part.parameters()] for name, part in parts.items()}
    first = next(iter(parts))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise UserError(
                f'{first} and {name} have one projection in common and want it in two shapes, {shapes[first]} and '
                f"{shape}; give them the same num_tokens, or sharing='key-value'"
            )
    return next((part for part in parts.values() if part is owned), parts[first])


def own_common_part(model: nn.Module) -> None:
    """Makes the model the one owner of what its layers have in common, under the name `shared`."""
    part = common_part(named_attentions(model), getattr(model, 'shared', None))
    if hasattr(model, 'shared'):
        del model.shared
    if part is not None:
        model.shared = part
        for attention in attentions(model):
            if isinstance(attention, GridAttention) and attention.common_part() is not None:
                attention.use_common_part(part)
