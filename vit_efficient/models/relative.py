"""timm's `Beit` and `VisionTransformerRelPos`, ViTs with a relative position bias, on a patch grid.

Biases follow the image size by timm's own resizing, in `set_input_size`; they are those of one size at a time.
"""

from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from vit_efficient.attention.base import FullAttention
from vit_efficient.attention.relative import RelativeBias, relative_bias, whole_bias, without_index
from vit_efficient.models import blocks
from vit_efficient.models.forward import GridForward


class _RelativeForward(GridForward):
    """What both have: tokens after a class token, if there is one, and a bias that blocks may share."""

    def use_grid(self) -> None:
        super().use_grid()
        for name in blocks.SHARED_BIASES:
            if getattr(self, name, None) is not None:
                setattr(self, name, without_index(getattr(self, name)))

    def construction(self) -> dict[str, Any]:
        norms = [not isinstance(norm, nn.Identity) for norm in (self.norm, self.fc_norm)]
        before_head = 'use_fc_norm' if isinstance(self, Beit) else 'fc_norm'
        # timm's classes have one of the two, unless `features_only=True` has left it out.
        return super().construction() | {before_head: norms[1]} | ({} if any(norms) else {'without_norm': True})

    def _after_class_token(self, patches: Tensor) -> Tensor:
        if self.cls_token is None:
            return patches
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)

    def _shared_bias(self, module: nn.Module | None) -> RelativeBias | None:
        """Made once for all blocks: an MLP that makes it may have dropout."""
        bias = relative_bias(module)
        if bias is None or not any(isinstance(attention, FullAttention) for attention in blocks.attentions(self)):
            return bias
        return bias._replace(whole=whole_bias(bias, self.num_prefix_tokens))


class EfficientBeit(_RelativeForward, Beit):
    """timm's `Beit`; what `convert` makes of it."""

    def tokens(self, patches: Tensor) -> tuple[Tensor, RelativeBias | None]:
        x = self._after_class_token(patches)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return self.pos_drop(x), self._shared_bias(self.rel_pos_bias)


class EfficientVisionTransformerRelPos(_RelativeForward, VisionTransformerRelPos):
    """timm's `VisionTransformerRelPos`, pre-norm and post-norm; what `convert` makes of it."""

    def tokens(self, patches: Tensor) -> tuple[Tensor, RelativeBias | None]:
        return self._after_class_token(patches), self._shared_bias(self.shared_rel_pos)
