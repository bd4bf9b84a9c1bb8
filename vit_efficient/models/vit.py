"""The vision transformer whose attentions know the patch grid.

timm's ViT (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, arXiv 2010.11929) with two changes: each block's
attention is one of `vit_efficient.list_attentions()`, and the patch grid goes down through the blocks with the tokens.

    timm.create_model('vit_dct_base', img_size=1024, attention_kwargs=dict(keep_ratio=1 / 16))
    timm.create_model('vit_full_base', attention=['full', ('dct', dict(keep_ratio=0.25)), …])     # a layer each
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import register_notrace_function, to_2tuple
from timm.models import VisionTransformer, checkpoint
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from vit_efficient.attention import layer_options, swap_attention
from vit_efficient.grid import PatchGrid, plain_sizes
from vit_efficient.models import blocks
from vit_efficient.models.patch_convolution import use_products
from vit_efficient.models.patch_embed import DctPatchEmbed, Keep, check_input, patch_embed_layer
from vit_efficient.utils.checks import as_sides, multiples_around, plain_integers
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


def _pixels(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, plain ints, of an argument that is a side or both."""
    return to_2tuple(as_sides(name, value, '(height, width)'))


class GridForward:
    """The forward passes of timm's `VisionTransformer`, with the patch grid made once and handed down."""

    def _embed(self, x: Tensor) -> tuple[Tensor, PatchGrid]:
        """Images (B, channels, height, width) → tokens (B, N, C), and where they lie."""
        height, width = plain_sizes((x.shape[-2], x.shape[-1]))
        if isinstance(self.patch_embed, DctPatchEmbed):
            height, width = self.patch_embed.pixel_size(height, width)
        elif getattr(self.patch_embed, 'strict_img_size', False):  # before timm's assertion, which names no way out
            check_input(height, width, self.patch_embed.patch_size, self.patch_embed.img_size, True, 'pixels')
        if self.dynamic_img_size and not self.patch_embed.dynamic_img_pad:
            check_image_size(height, width, self.patch_embed.patch_size)
        grid = PatchGrid(*self.patch_embed.dynamic_feat_size((height, width)), prefix=self.num_prefix_tokens)
        x = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(self.patch_drop(x)), grid

    def _run_block(self, block: blocks.GridBlock, x: Tensor, grid: PatchGrid, attn_mask, is_causal) -> Tensor:
        if self.grad_checkpointing and torch.is_tensor(x):  # FX traces with proxies, which cannot be checkpointed
            return checkpoint(block, x, grid, attn_mask, is_causal)
        return block(x, grid, attn_mask=attn_mask, is_causal=is_causal)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x, grid = self._embed(x)
        for block in self.blocks:
            x = self._run_block(block, x, grid, attn_mask, is_causal)
        return self.norm(x)

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
        """Arguments and results as timm's `VisionTransformer.forward_intermediates`."""
        if output_fmt not in ('NCHW', 'NLC'):
            raise UserError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt=}")
        taken, last = feature_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        features = []
        for i, block in enumerate(self.blocks):
            if stop_early and i > last:
                break
            x = self._run_block(block, x, grid, attn_mask, is_causal)
            if i in taken:
                features.append(self.norm(x) if norm else x)

        prefixes = [f[:, : grid.prefix] for f in features] if grid.prefix and return_prefix_tokens else None
        features = [f[:, grid.prefix :] for f in features]
        if output_fmt == 'NCHW':
            features = [f.transpose(1, 2).unflatten(2, (grid.height, grid.width)).contiguous() for f in features]

        if output_dict:
            result = {'image_intermediates': features}
            if prefixes is not None:
                result['image_intermediates_prefix'] = prefixes
            if not intermediates_only:
                result['image_features'] = self.norm(x)
            return result
        if prefixes is not None:
            features = list(zip(features, prefixes, strict=True))
        return features if intermediates_only else (self.norm(x), features)

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
        for block in self.blocks:
            block.attn.num_attended(grid)  # raises here rather than halfway
        super().set_input_size(img_size=pair[0], patch_size=pair[1])
        for block in self.blocks:
            block.attn.set_grid_size(*self.patch_embed.grid_size)

    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """As timm's, of .npz files, whose patch embeddings are convolutions."""
        embedding = self.patch_embed
        if not isinstance(embedding, DctPatchEmbed):
            return super().load_pretrained(checkpoint_path, prefix)
        self.patch_embed = embedding.to_conv()
        try:
            super().load_pretrained(checkpoint_path, prefix)
            embedding.load_state_dict(self.patch_embed.state_dict())
        finally:
            self.patch_embed = embedding

    def prune_intermediate_layers(self, *args, **kwargs) -> list[int]:
        """As timm's; what only the removed layers had in common goes with them."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        blocks.own_common_part(self)
        return taken

    def attention_spec(self) -> list[tuple[str, dict[str, Any]]]:
        """The attention of each block as it stands: its registered name and its options."""
        return [(block.attn.mechanism, block.attn.options) for block in self.blocks]


class EfficientVisionTransformer(GridForward, VisionTransformer):
    """timm's `VisionTransformer` with any registered attention in each block.

    Args:
        *args, **kwargs: As timm's `VisionTransformer`.
        attention: A registered attention's name, or (name, options), or a list with one of these per layer.
        attention_kwargs: Options of a single attention, such as `keep_ratio`.
        patch_embed: 'conv', timm's, or 'dct', a `DctPatchEmbed`, whose arguments are
        patch_keep, patch_color, patch_input, patch_window: its `keep`, `color`, `input` and `window`.

    Raises:
        UserError: If an attention, a patch embedding or an option of theirs is unknown or out of range, or the patches
            do not divide the image.
    """

    def __init__(
        self,
        *args,
        attention: blocks.AttentionSpec = 'full',
        attention_kwargs: dict[str, Any] | None = None,
        patch_embed: str = 'conv',
        patch_keep: Keep = None,
        patch_color: str = 'rgb',
        patch_input: str = 'pixels',
        patch_window: bool = False,
        **kwargs,
    ):
        dim, heads = kwargs.get('embed_dim', 768), kwargs.get('num_heads', 12)
        if heads < 1 or dim % heads:
            raise UserError(f'num_heads must divide embed_dim, got embed_dim={dim}, num_heads={heads}')
        layer = patch_embed_layer(patch_embed, patch_keep, patch_color, patch_input, patch_window)
        if patch_embed != 'conv' and 'embed_layer' in kwargs:
            raise UserError(f'embed_layer cannot be had with {patch_embed=}: leave out one of them')
        kwargs.setdefault('embed_layer', layer)
        super().__init__(*args, block_fn=kwargs.pop('block_fn', blocks.GridBlock), **kwargs)
        if not self.patch_embed.dynamic_img_pad:
            check_image_size(*plain_integers(self.patch_embed.img_size), self.patch_embed.patch_size)
        use_products(self.patch_embed)
        blocks.check_blocks(self)
        layers = blocks.attention_per_layer(attention, attention_kwargs, len(self.blocks))
        blocks.check_patch_dropout(self, layers)
        for i, (block, (name, options)) in enumerate(zip(self.blocks, layers, strict=True)):
            options = layer_options(name, options, i, len(layers), self.patch_embed.grid_size)
            block.attn = swap_attention(block.attn, name, **options)
        blocks.own_common_part(self)


class EfficientVisionTransformerDistilled(GridForward, VisionTransformerDistilled):
    """DeiT's distilled ViT, class and distillation token both prefix tokens; what `convert` makes of it."""


def kept_tokens(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> list[int]:
    """The number of keys each block's queries attend to, prefix tokens included.

    Args:
        model: A registered or converted model, wrapped or not.
        img_size: In pixels; that of the model by default.

    Raises:
        UserError: If the model is not one of ours, or the patches do not divide the image.
    """
    *_, model = unwrap(model)
    if not isinstance(model, GridForward):
        raise UserError(f'{type(model).__name__} is not a model of vit_efficient; convert() makes it one')
    size = model.patch_embed.img_size if img_size is None else _pixels('img_size', img_size)
    if not model.patch_embed.dynamic_img_pad:
        check_image_size(*size, model.patch_embed.patch_size)
    grid = PatchGrid(*model.patch_embed.dynamic_feat_size(size), prefix=model.num_prefix_tokens)
    return [block.attn.num_attended(grid) for block in model.blocks]
