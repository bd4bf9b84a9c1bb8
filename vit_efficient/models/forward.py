"""The forward passes of timm's plain ViTs, with the patch grid made once and handed down through the blocks."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices, register_notrace_function, to_2tuple
from timm.models import checkpoint
from torch import Tensor, nn

from vit_efficient.grid import PackedGrids, PatchGrid, plain_sizes
from vit_efficient.models import blocks
from vit_efficient.models.patch_convolution import use_products
from vit_efficient.models.patch_embed import DctPatchEmbed, check_input
from vit_efficient.utils.checks import as_sides, multiples_around
from vit_efficient.utils.compat import feature_indices, unwrap
from vit_efficient.utils.errors import UserError


# A leaf for FX, where sizes are not yet numbers.
@torch.fx.wrap
@register_notrace_function
def check_image_size(height, width, patch_size: tuple[int, int]) -> None:
    """Raises UserError if the patches do not divide the image."""
    for side, size, patch in (('height', height, patch_size[0]), ('width', width, patch_size[1])):
        if type(size) is int and size % patch:
            raise UserError(
                f'image {side} {size} is not a multiple of the patch size {patch}; '
                f'use {multiples_around(size, patch)}, or dynamic_img_pad=True to pad'
            )


@torch.fx.wrap
@register_notrace_function
def check_built_size(height, width, img_size: tuple[int, int]) -> None:
    """Raises UserError if an image is not of the only size that a model takes."""
    if type(height) is type(width) is int and (height, width) != tuple(img_size):
        raise UserError(
            f'the input is {height} × {width} pixels, the model was built for {img_size[0]} × {img_size[1]}; call its '
            'set_input_size, or create it with this img_size'
        )


def _pixels(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, plain ints, of an argument that is a side or both."""
    return to_2tuple(as_sides(name, value, '(height, width)'))


def groups_of(sizes: Sequence[Any]) -> list[list[int]]:
    """The indices of equal sizes, together."""
    groups = defaultdict(list)
    for i, size in enumerate(sizes):
        groups[size].append(i)
    return list(groups.values())


class Batch(NamedTuple):
    """Images of several sizes as they are packed: which of them each group of the grids has."""

    groups: list[list[int]]
    grids: PackedGrids

    @property
    def of_images(self) -> list[PatchGrid]:
        """The grid of each image, in their own order."""
        return self._in_order([grid] * count for grid, count in self.grids.groups)

    def unpack(self, x: Tensor) -> list[Tensor]:
        """(1, T, C) → (N, C) of each image, in their own order"""
        return self._in_order(self.grids.split(x))

    def _in_order(self, of_groups: Iterable[Iterable[Any]]) -> list[Any]:
        images = dict(zip(chain(*self.groups), chain(*of_groups), strict=True))
        return [images[i] for i in range(len(images))]


def without_prefix(tokens: Tensor, grid: PatchGrid) -> Tensor:
    """(B, N, C) → (B, H · W, C)"""
    return tokens[:, grid.prefix :]


def as_maps(tokens: Tensor, grid: PatchGrid) -> Tensor:
    """(B, N, C) → (B, C, H, W)"""
    return without_prefix(tokens, grid).transpose(1, 2).unflatten(2, (grid.height, grid.width)).contiguous()


def as_timm_returns(features: list, prefixes: list | None, final: Any, output_dict: bool, **more: Any) -> Any:
    """What timm's `forward_intermediates` returns; prefixes and the final tokens are None where they are not wanted."""
    if output_dict:
        result = {
            'image_intermediates': features,
            'image_intermediates_prefix': prefixes,
            **more,
            'image_features': final,
        }
        return {key: value for key, value in result.items() if value is not None}
    if prefixes is not None:
        features = list(zip(features, prefixes, strict=True))
    return features if final is None else (final, features)


class GridForward:
    """The forward passes of a model of timm's with one patch grid, which is made once and handed down to the blocks.

    A class of timm's and this one before it make a model whose attentions know the grid. It adds nothing to the state.
    """

    #: Whether each block has rotary positions of its own.
    rope_mixed: bool = False

    def use_grid(self) -> None:
        """Makes of the parts of a timm model those that know of the grid, in place."""
        if hasattr(self, 'patch_embed'):
            use_products(self.patch_embed)
        for block in blocks.grid_blocks(self).values():
            if type(block) in blocks.BLOCKS:
                block.__class__ = blocks.BLOCKS[type(block)]
                block.complete()

    def tokens(self, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the first block is given, the tokens (B, N, C); and all blocks, the positions of patches: rotary ones
        (`vit_efficient.attention.rotary`), or a relative bias that they share (`vit_efficient.attention.relative`).

        Args:
            patches: As the patch embedding gives them.
        """
        raise NotImplementedError

    def construction(self) -> dict[str, Any]:
        """Arguments of its entry point that can be changed after the model is built, as they are now."""
        return dict(
            num_classes=self.num_classes,
            global_pool=self.global_pool,
            depth=len(self.blocks),
            in_chans=self.in_chans,
            img_size=tuple(self.patch_embed.img_size),
            patch_size=tuple(self.patch_embed.patch_size),
            **({'patch_embed': 'dct'} if isinstance(self.patch_embed, DctPatchEmbed) else {}),
        )

    def grid_of(self, height: int, width: int) -> PatchGrid:
        """The layout of the tokens of an image, given its sides in pixels."""
        return PatchGrid(*self.patch_embed.dynamic_feat_size((height, width)), prefix=self.num_prefix_tokens)

    def embed(self, x: Tensor) -> tuple[Tensor, PatchGrid, Tensor | None]:
        """Images (B, channels, height, width) → tokens (B, N, C), where they lie, and their positions."""
        height, width = plain_sizes((x.shape[-2], x.shape[-1]))
        if isinstance(self.patch_embed, DctPatchEmbed):
            height, width = self.patch_embed.pixel_size(height, width)
        elif not hasattr(self, 'dynamic_img_size'):
            check_built_size(height, width, self.patch_embed.img_size)
        elif getattr(self.patch_embed, 'strict_img_size', False):  # before timm's assertion, which names no way out
            check_input(height, width, self.patch_embed.patch_size, self.patch_embed.img_size, True, 'pixels')
        if getattr(self, 'dynamic_img_size', False) and not self.patch_embed.dynamic_img_pad:
            check_image_size(height, width, self.patch_embed.patch_size)
        x, rope = self.tokens(self.patch_embed(x))
        return x, self.grid_of(height, width), rope

    def run_block(
        self, i: int, x: Tensor, grid: blocks.Grid, rope: Any, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The tokens after block i.

        Args:
            x, grid, attn_mask, is_causal: As of a block.
            rope: What the blocks are given, or one after the other where `rope_mixed`.
        """
        block = self.blocks[i]
        rope = rope[i] if self.rope_mixed and rope is not None else rope
        if self.grad_checkpointing and torch.is_tensor(x):  # FX traces with proxies, which cannot be checkpointed
            return checkpoint(block, x, grid, rope, attn_mask, is_causal)
        return block(x, grid, rope, attn_mask=attn_mask, is_causal=is_causal)

    def run_blocks(
        self, x: Tensor, grid: blocks.Grid, rope: Any, indices: Any, norm: bool, stop_early: bool, *given
    ) -> tuple[Tensor, list[Tensor]]:
        """The tokens after the last block that is run, and those after the blocks that timm reads from `indices`.

        Args:
            x, grid, rope, *given: As of `run_block`.
            indices, norm, stop_early: As of `forward_intermediates`.
        """
        taken, last = feature_indices(len(self.blocks), indices)
        features = []
        for i in range(len(self.blocks)):
            if stop_early and i > last:
                break
            x = self.run_block(i, x, grid, rope, *given)
            if i in taken:
                features.append(self.norm(x) if norm else x)
        return x, features

    def forward_features(
        self, x: Tensor | Sequence[Tensor], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | list[Tensor]:
        """The tokens after the last block and the final norm.

        Args:
            x: Images (B, channels, height, width); or a list of images (channels, height, width) of any sizes.
            attn_mask, is_causal: As timm's; not of a list.

        Returns:
            (B, N, C); of a list one (N, C) for each image.
        """
        if isinstance(x, (list, tuple)):
            x, batch, rope = self._embed_list(x, attn_mask, is_causal)
            for i in range(len(self.blocks)):
                x = self.run_block(i, x, batch.grids, rope)
            return batch.unpack(self.norm(x))
        x, grid, rope = self.embed(x)
        for i in range(len(self.blocks)):
            x = self.run_block(i, x, grid, rope, attn_mask, is_causal)
        return self.norm(x)

    def forward_head(self, x: Tensor | list[Tensor], *args, **kwargs) -> Tensor | list[Tensor]:
        """As timm's; also of what `forward_features` makes of a list of images, for which timm's `forward` calls it."""
        if not isinstance(x, list):
            return super().forward_head(x, *args, **kwargs)
        outputs = [super(GridForward, self).forward_head(tokens[None], *args, **kwargs) for tokens in x]
        if self.global_pool == '':  # the tokens of each
            return [tokens[0] for tokens in outputs]
        if torch.is_tensor(outputs[0]):
            return torch.cat(outputs)
        return tuple(map(torch.cat, zip(*outputs, strict=True)))  # of both heads of a distilled model

    def _embed_list(self, images: Sequence[Tensor], attn_mask, is_causal) -> tuple[Tensor, Batch, list | None]:
        """As `_embed`, of images of any sizes: one sequence of all their tokens."""
        if attn_mask is not None or is_causal:
            raise UserError('a list of images cannot have attn_mask and is_causal: each is attended to by itself')
        if self.training and isinstance(getattr(self, 'patch_drop', None), (PatchDropout, PatchDropoutWithIndices)):
            raise UserError(
                f'patch_drop_rate={self.patch_drop.prob}: a list of images needs all patches of each; set '
                'patch_drop_rate=0, or give images of one size as a tensor'
            )
        if not images or not all(torch.is_tensor(image) and image.ndim == 3 for image in images):
            raise UserError('a list of images must hold tensors (channels, height, width), at least one')
        groups = groups_of([tuple(image.shape) for image in images])
        parts, grids, ropes = zip(
            *(self.embed(torch.stack([images[i] for i in group])) for group in groups), strict=True
        )
        grids = PackedGrids(tuple((grid, len(group)) for grid, group in zip(grids, groups, strict=True)))
        if ropes[0] is None:
            ropes = None
        elif self.rope_mixed:
            ropes = list(zip(*ropes, strict=True))
        return PackedGrids.join(parts), Batch(groups, grids), ropes

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ):
        """Arguments and results as timm's `VisionTransformer.forward_intermediates`.

        Of a list of images, each feature is a list with one tensor for each image, without an axis of images.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise UserError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt=}")
        batch = None
        if isinstance(x, (list, tuple)):
            x, batch, rope = self._embed_list(x, attn_mask, is_causal)
            grid = batch.grids
        else:
            x, grid, rope = self.embed(x)
        x, features = self.run_blocks(x, grid, rope, indices, norm, stop_early, attn_mask, is_causal)

        def of_images(tokens: Tensor, function: Callable[[Tensor, PatchGrid], Tensor]) -> Tensor | list[Tensor]:
            if batch is None:
                return function(tokens, grid)
            return [function(part[None], g)[0] for part, g in zip(batch.unpack(tokens), batch.of_images, strict=True)]

        prefix = self.num_prefix_tokens
        prefixes = None
        if prefix and return_prefix_tokens:
            prefixes = [of_images(f, lambda tokens, _: tokens[:, :prefix]) for f in features]
        shape = as_maps if output_fmt == 'NCHW' else without_prefix
        features = [of_images(f, shape) for f in features]
        final = None if intermediates_only else of_images(self.norm(x), lambda tokens, _: tokens)

        return as_timm_returns(features, prefixes, final, output_dict)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """As timm's; weights that are maps over the patch grid follow it. What raises a UserError changes nothing."""
        given = {'img_size': img_size, 'patch_size': patch_size}
        pair = [None if v is None else _pixels(name, v) for name, v in given.items()]
        size, patch = pair[0] or self.patch_embed.img_size, pair[1] or self.patch_embed.patch_size
        if not self.patch_embed.dynamic_img_pad:
            check_image_size(*size, patch)
        grid = PatchGrid(size[0] // patch[0], size[1] // patch[1], prefix=self.num_prefix_tokens)
        for attention in blocks.attentions(self):
            attention.num_attended(grid)  # raises here rather than halfway
        super().set_input_size(img_size=pair[0], patch_size=pair[1])
        for attention in blocks.attentions(self):
            attention.set_grid_size(*self.patch_embed.grid_size)

    def prune_intermediate_layers(self, *args, **kwargs) -> list[int]:
        """As timm's; what only the removed layers had in common goes with them."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        blocks.own_common_part(self)
        return taken

    def attention_spec(self) -> list[tuple[str, dict[str, Any]]]:
        """The attention of each block as it stands: its registered name and its options.

        Of a `VisionTransformerSAM` those of the global blocks.
        """
        attentions = [blocks.first_attention(block) for block in blocks.grid_blocks(self).values()]
        return [(attention.mechanism, attention.options) for attention in attentions]


def backbone_of(model: nn.Module) -> nn.Module:
    """The model, or its backbone if it is one of ours: of a model with a head for patches (`vit_efficient.dense`)."""
    backbone = getattr(model, 'backbone', None)
    return backbone if isinstance(backbone, GridForward) else model


def kept_tokens(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> list[int]:
    """The number of keys each block's queries attend to, prefix tokens included; of those that `attention_spec` lists.

    Args:
        model: A registered or converted model, wrapped or not.
        img_size: In pixels; that of the model by default.

    Raises:
        UserError: If the model is not one of ours, or the patches do not divide the image.
    """
    *_, model = unwrap(model)
    model = backbone_of(model)
    if not isinstance(model, GridForward):
        raise UserError(f'{type(model).__name__} is not a model of vit_efficient; convert() makes it one')
    embedding = getattr(model, 'patch_embed', None)
    if img_size is None and embedding is None:
        raise UserError(f'img_size must be given: a {type(model).__name__} is built for no size')
    size = embedding.img_size if img_size is None else _pixels('img_size', img_size)
    if embedding is not None and not embedding.dynamic_img_pad:
        check_image_size(*size, embedding.patch_size)
    grid = model.grid_of(*size)
    return [blocks.first_attention(block).num_attended(grid) for block in blocks.grid_blocks(model).values()]
