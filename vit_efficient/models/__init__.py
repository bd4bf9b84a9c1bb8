"""The timm model, its registered variants, and how they are saved."""

from vit_efficient.models.patch_embed import DctPatchEmbed
from vit_efficient.models.saving import model_arguments, save_model
from vit_efficient.models.truncation import freeze_truncation
from vit_efficient.models.vit import (
    SIZES,
    EfficientVisionTransformer,
    EfficientVisionTransformerDistilled,
    GridBlock,
    GridForward,
    attention_per_layer,
    kept_tokens,
)

__all__ = [
    'SIZES',
    'DctPatchEmbed',
    'EfficientVisionTransformer',
    'EfficientVisionTransformerDistilled',
    'GridBlock',
    'GridForward',
    'attention_per_layer',
    'freeze_truncation',
    'kept_tokens',
    'model_arguments',
    'save_model',
]
