"""timm's `Eva` with attentions that know the patch grid: EVA, EVA-02, Perception Encoder, RoPE-ViT, DINOv3.

Their blocks are given rotary positions, made once in a forward pass for all patches: where a model draws augmentations
of coordinates for them (DINOv3), queries and keys have the same, at any resolution.
"""

from typing import Any

from timm.models import Eva
from torch import Tensor, nn

from vit_efficient.models import blocks
from vit_efficient.models.forward import GridForward


class EfficientEva(GridForward, Eva):
    """timm's `Eva` with any registered attention in each block.

    Args:
        *args, **kwargs: As timm's `Eva`.
        attention: A registered attention's name, or (name, options), or a list with one of these per layer.
        attention_kwargs: Options of a single attention, such as `keep_ratio`.

    Raises:
        UserError: If an attention or an option is unknown or out of range, or it cannot have rotary positions.
    """

    def __init__(
        self,
        *args,
        attention: blocks.AttentionSpec = 'full',
        attention_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        blocks.build_attentions(self, attention, attention_kwargs)

    def tokens(self, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        x, rope = self._pos_embed(patches)
        return self.norm_pre(x), rope

    def construction(self) -> dict[str, Any]:
        return super().construction() | dict(
            dynamic_img_size=self.dynamic_img_size,
            dynamic_img_pad=self.patch_embed.dynamic_img_pad,
            use_fc_norm=not isinstance(self.fc_norm, nn.Identity),
            use_post_transformer_norm=not isinstance(self.norm, nn.Identity),
        )
