"""timm's `Eva` with attentions that know the patch grid: EVA, EVA-02, Perception Encoder, RoPE-ViT, DINOv3.

Their blocks are given rotary positions, made once in a forward pass for all patches: where a model draws augmentations
of coordinates for them (DINOv3), queries and keys have the same, at any resolution.
"""

import math
from typing import Any

import torch
from timm.layers import RotaryEmbeddingDinoV3
from timm.models import Eva
from torch import Tensor, nn

from vit_efficient.attention.rotary import Rope
from vit_efficient.grid import larger, plain_sizes, smaller
from vit_efficient.models import blocks
from vit_efficient.models.aggregation import PoolsByAttention
from vit_efficient.models.forward import GridForward, check_image_size
from vit_efficient.models.rope_steps import with_steps
from vit_efficient.utils.checks import plain_integers
from vit_efficient.utils.compat import are_numbers
from vit_efficient.utils.errors import UserError


def is_open(size: Any) -> bool:
    """Whether a size is a symbol of `torch.export`; to FX and a jit trace it is something else."""
    return isinstance(size, (int, torch.SymInt)) and not are_numbers(size)


class OpenRotaryEmbedding(RotaryEmbeddingDinoV3):
    """timm's positions of DINOv3, also of a grid whose sides are symbols, which timm's would fix (`torch.export`)."""

    def get_embed(self, shape: tuple[int, int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        if shape is None or not any(map(is_open, shape)) or (self.training and self.aug_active):
            return super().get_embed(shape, dtype)
        size = {'max': larger(*shape), 'min': smaller(*shape)}
        sides = [
            (torch.arange(n, device=self.periods.device) + 0.5 + self.grid_offset) / size.get(self.normalize_coords, n)
            for n in shape
        ]
        places = list(torch.meshgrid(*(2 * side - 1 for side in sides), indexing='ij'))
        if self.grid_indexing == 'xy':
            places.reverse()
        angles = torch.cat([2 * math.pi * place.flatten()[:, None] / self.periods for place in places], dim=-1)
        angles = angles.repeat(1, 2) if self.rotate_half else angles.repeat_interleave(2, dim=-1)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype or self.periods.dtype)


class EfficientEva(PoolsByAttention, GridForward, Eva):
    """timm's `Eva` with any registered attention in each block.

    Args:
        *args, **kwargs: As timm's `Eva`.
        attention: A registered attention's name, or (name, options), or a list with one of these per layer.
        attention_kwargs: Options of a single attention, such as `keep_ratio`.
        pool_heads, pool_tokens, pool_init: As of `PoolsByAttention`.

    Raises:
        UserError: If an attention or an option is unknown or out of range, or it cannot have rotary positions; or if
            heads do not divide the channels as these need it, or the patches do not divide the image.
    """

    def __init__(
        self,
        *args,
        attention: blocks.AttentionSpec = 'full',
        attention_kwargs: dict[str, Any] | None = None,
        pool_heads: int = 1,
        pool_tokens: str = 'one',
        pool_init: float = 1e-4,
        **kwargs,
    ):
        dim, heads = kwargs.get('embed_dim', 768), kwargs.get('num_heads', 12)
        if heads < 1 or dim % heads:
            raise UserError(f'num_heads must divide embed_dim, got embed_dim={dim}, num_heads={heads}')
        if kwargs.get('use_rot_pos_emb') and dim // heads % 4:
            raise UserError(
                'rotary positions turn pairs of channels, half of them by rows and half by columns: the channels of a '
                f'head must be a multiple of 4, got embed_dim={dim}, num_heads={heads}, {dim // heads} for each'
            )
        super().__init__(*args, pool_heads=pool_heads, pool_tokens=pool_tokens, pool_init=pool_init, **kwargs)
        if not self.patch_embed.dynamic_img_pad:
            check_image_size(*plain_integers(self.patch_embed.img_size), self.patch_embed.patch_size)
        self.use_grid()
        blocks.build_attentions(self, attention, attention_kwargs)

    def use_grid(self) -> None:
        super().use_grid()
        if type(self.rope) is RotaryEmbeddingDinoV3:
            self.rope.__class__ = OpenRotaryEmbedding

    def tokens(self, patches: Tensor) -> tuple[Tensor, Tensor | Rope | None]:
        x, rope = self._pos_embed(patches)
        if rope is not None and not self.rope_mixed and not (self.training and self.patch_drop is not None):
            sides = patches.shape[1:3] if self.dynamic_img_size else self.patch_embed.grid_size
            rope = with_steps(rope, self.rope, *plain_sizes((sides[0], sides[1])))
        return self.norm_pre(x), rope

    def construction(self) -> dict[str, Any]:
        return super().construction() | dict(
            dynamic_img_size=self.dynamic_img_size,
            dynamic_img_pad=self.patch_embed.dynamic_img_pad,
            use_fc_norm=not isinstance(self.fc_norm, nn.Identity),
            use_post_transformer_norm=not isinstance(self.norm, nn.Identity),
        )
