"""The timm model, its registered variants, and how they are saved."""

from .efficient_vit import (
    SIZES,
    EfficientVisionTransformer,
    EfficientVisionTransformerDistilled,
    GridBlock,
    GridForward,
    attention_per_layer,
    kept_tokens,
)
from .saving import model_arguments, save_model

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
