"""The vision transformer whose attentions know the patch grid.

timm's ViT (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, arXiv 2010.11929) with two changes: each block's
attention is one of `vit_efficient.list_attentions()`, and the patch grid goes down through the blocks with the tokens.

    timm.create_model('vit_dct_base', img_size=1024, attention_kwargs=dict(keep_ratio=1 / 16))
    timm.create_model('vit_full_base', attention=['full', ('dct', dict(keep_ratio=0.25)), …])     # a layer each
"""

from typing import Any

from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from vit_efficient.models import blocks
from vit_efficient.models.aggregation import PoolsByAttention
from vit_efficient.models.forward import GridForward, check_image_size
from vit_efficient.models.patch_embed import DctPatchEmbed, Keep, patch_embed_layer
from vit_efficient.utils.checks import plain_integers
from vit_efficient.utils.errors import UserError


class _VisionTransformerForward(GridForward):
    """What both classes of timm have: the `VisionTransformer` and DeiT's."""

    def tokens(self, patches: Tensor) -> tuple[Tensor, None]:
        return self.norm_pre(self.patch_drop(self._pos_embed(patches))), None

    def construction(self) -> dict[str, Any]:
        first, embedding = blocks.attentions(self)[0], self.patch_embed
        return super().construction() | dict(
            embed_dim=self.embed_dim,
            num_heads=first.num_heads,
            qk_norm=not isinstance(first.q_norm, nn.Identity),
            dynamic_img_size=self.dynamic_img_size,
            dynamic_img_pad=embedding.dynamic_img_pad,
            patch_embed='dct' if isinstance(embedding, DctPatchEmbed) else 'conv',
            no_embed_class=self.no_embed_class,
            class_token=self.has_class_token,
            reg_tokens=self.num_reg_tokens,
            fc_norm=not isinstance(self.fc_norm, nn.Identity),
            final_norm=not (isinstance(self.norm, nn.Identity) and isinstance(self.fc_norm, nn.Identity)),
        )

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


class EfficientVisionTransformer(PoolsByAttention, _VisionTransformerForward, VisionTransformer):
    """timm's `VisionTransformer` with any registered attention in each block.

    Args:
        *args, **kwargs: As timm's `VisionTransformer`.
        attention: A registered attention's name, or (name, options), or a list with one of these per layer.
        attention_kwargs: Options of a single attention, such as `keep_ratio`.
        patch_embed: 'conv', timm's, or 'dct', a `DctPatchEmbed`, whose arguments are
        patch_keep, patch_color, patch_input, patch_window: its `keep`, `color`, `input` and `window`.
        pool_heads, pool_tokens, pool_init: As of `PoolsByAttention`.

    Raises:
        UserError: If an attention, a patch embedding, a pooling or an option of theirs is unknown or out of range, or
            the patches do not divide the image.
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
        pool_heads: int = 1,
        pool_tokens: str = 'one',
        pool_init: float = 1e-4,
        **kwargs,
    ):
        dim, heads = kwargs.get('embed_dim', 768), kwargs.get('num_heads', 12)
        if heads < 1 or dim % heads:
            raise UserError(f'num_heads must divide embed_dim, got embed_dim={dim}, num_heads={heads}')
        layer = patch_embed_layer(patch_embed, patch_keep, patch_color, patch_input, patch_window)
        if patch_embed != 'conv' and 'embed_layer' in kwargs:
            raise UserError(f'embed_layer cannot be had with {patch_embed=}: leave out one of them')
        kwargs.setdefault('embed_layer', layer)
        super().__init__(*args, pool_heads=pool_heads, pool_tokens=pool_tokens, pool_init=pool_init, **kwargs)
        if not self.patch_embed.dynamic_img_pad:
            check_image_size(*plain_integers(self.patch_embed.img_size), self.patch_embed.patch_size)
        blocks.check_blocks(self)
        self.use_grid()
        blocks.build_attentions(self, attention, attention_kwargs)


class EfficientVisionTransformerDistilled(_VisionTransformerForward, VisionTransformerDistilled):
    """DeiT's distilled ViT, class and distillation token both prefix tokens; what `convert` makes of it."""
