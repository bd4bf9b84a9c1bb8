"""The timm model, its registered variants, and how they are saved."""

from vit_efficient.models.efficient_vit import (
    SIZES,
    EfficientVisionTransformer,
    EfficientVisionTransformerDistilled,
    GridBlock,
    GridForward,
    attention_per_layer,
    kept_tokens,
)
from vit_efficient.models.saving import model_arguments, save_model

__all__ = [
    'SIZES',
    'EfficientVisionTransformer',
    'EfficientVisionTransformerDistilled',
    'GridBlock',
    'GridForward',
    'attention_per_layer',
    'kept_tokens',
    'model_arguments',
    'save_model',
]
