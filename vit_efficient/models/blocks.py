"""The transformer block that works with attentions on a patch grid, which attention each layer of a model has, and what
the layers have in common."""

from collections.abc import Sequence
from typing import Any

from timm.layers import Attention, PatchDropout
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vit_efficient.attention import GridAttention
from vit_efficient.grid import PatchGrid
from vit_efficient.utils.errors import UserError

LayerSpec = str | tuple[str, dict[str, Any]]  # a name, or a name and its options
AttentionSpec = LayerSpec | Sequence[LayerSpec]  # of all layers, or of each


# Blocks and attentions of timm, in messages.
_KINDS = {
    'ResPostBlock': 'a post-norm block, which normalises what attention and MLP add',
    'ParallelScalingBlock': 'a parallel block, in which attention and MLP have one projection',
    'ParallelThingsBlock': 'a parallel block, in which several attentions stand side by side',
    'DiffParallelScalingBlock': 'a parallel block of differential attention',
    'DiffAttention': 'differential attention, the difference of two',
}


class GridBlock(Block):
    """timm's pre-norm block, which hands the grid to its attention, or works on the tokens that this one keeps."""

    def forward(self, x: Tensor, grid: PatchGrid, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.attn.of_block:
            y = self.attn.down(x, grid)
            added = self.drop_path1(self.ls1(self.attn(self.norm1(y), grid, attn_mask=attn_mask, is_causal=is_causal)))
            return x + self.attn.up(added + self.drop_path2(self.ls2(self.mlp(self.norm2(y + added)))), grid)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid, attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


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


def check_blocks(model: VisionTransformer) -> None:
    """Raises UserError, naming the module, if a block or its attention is not timm's plain one, or ours."""
    for i, block in enumerate(model.blocks):
        if type(block) not in (Block, GridBlock):
            raise UserError(f'blocks.{i}: {_what_is(block)}, and not the pre-norm Block of timm')
        if type(block.attn) is not Attention and not isinstance(block.attn, GridAttention):
            raise UserError(f'blocks.{i}.attn: {_what_is(block.attn)}, and not the plain Attention of timm')


def _what_is(module: nn.Module) -> str:
    """What a block or attention of timm is that is not the plain one."""
    name = type(module).__name__
    return f'{name} is {_KINDS.get(name, "another kind")}'


def check_patch_dropout(model: VisionTransformer, layers: Sequence[tuple[str, dict]]) -> None:
    """Raises UserError if a layer needs the whole patch grid and the model drops patches."""
    mixing = sorted({name for name, _ in layers} - {'full'})
    if mixing and isinstance(model.patch_drop, PatchDropout):
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


def own_common_part(model: VisionTransformer) -> None:
    """Makes the model the one owner of what its layers have in common, under the name `shared`."""
    part = common_part([block.attn for block in model.blocks], getattr(model, 'shared', None))
    if hasattr(model, 'shared'):
        del model.shared
    if part is not None:
        model.shared = part
        for block in model.blocks:
            if isinstance(block.attn, GridAttention) and block.attn.common_part() is not None:
                block.attn.use_common_part(part)
