"""timm's `VisionTransformerSAM`, whose global blocks know the patch grid; those that attend in windows stay timm's.

Source: Kirillov et al., "Segment Anything", ICCV 2023, arXiv 2304.02643. Tokens go through the model as (B, H, W, C),
so each global block makes its grid itself: the forward passes are timm's, at any image size.
"""

from typing import Any

from timm.models import VisionTransformerSAM
from torch import Tensor, nn

from vit_efficient.models.forward import GridForward
from vit_efficient.utils.errors import UserError


class EfficientVisionTransformerSAM(GridForward, VisionTransformerSAM):
    """timm's `VisionTransformerSAM`; what `convert` makes of it."""

    num_prefix_tokens = 0
    forward = VisionTransformerSAM.forward

    def forward_features(self, x: Tensor) -> Tensor:
        """As timm's; no list of images of several sizes."""
        _check_tensor(x)
        return VisionTransformerSAM.forward_features(self, x)

    def forward_intermediates(self, x: Tensor, *args, **kwargs):
        """As timm's; no list of images of several sizes."""
        _check_tensor(x)
        return VisionTransformerSAM.forward_intermediates(self, x, *args, **kwargs)

    def construction(self) -> dict[str, Any]:
        return super().construction() | ({'without_norm': True} if isinstance(self.neck, nn.Identity) else {})

    def set_input_size(self, *args, **kwargs) -> None:
        """Raises UserError: timm's class has none."""
        raise UserError(
            'a VisionTransformerSAM takes images of other sizes as it is; where its positions are rotary, create it '
            'with another img_size'
        )


def _check_tensor(x: Tensor) -> None:
    if isinstance(x, (list, tuple)):
        raise UserError('a VisionTransformerSAM takes images of one size, as a tensor, and no list of them')
