"""The timm model, its registered variants, and how they are made, saved and loaded."""

from vit_efficient.models.blocks import GridBlock
from vit_efficient.models.compiled import compile_blocks
from vit_efficient.models.create import create_from_spec
from vit_efficient.models.eva import EfficientEva
from vit_efficient.models.forward import kept_tokens
from vit_efficient.models.inputs import input_size
from vit_efficient.models.naflex import EfficientNaFlexVit
from vit_efficient.models.patch_convnet import PatchConvNet
from vit_efficient.models.patch_embed import DctPatchEmbed
from vit_efficient.models.registered import SIZES
from vit_efficient.models.relative import EfficientBeit, EfficientVisionTransformerRelPos
from vit_efficient.models.sam import EfficientVisionTransformerSAM
from vit_efficient.models.saving import load_model, model_arguments, save_model
from vit_efficient.models.truncation import freeze_truncation
from vit_efficient.models.vit import EfficientVisionTransformer

__all__ = [
    'SIZES',
    'DctPatchEmbed',
    'EfficientBeit',
    'EfficientEva',
    'EfficientNaFlexVit',
    'EfficientVisionTransformer',
    'EfficientVisionTransformerRelPos',
    'EfficientVisionTransformerSAM',
    'GridBlock',
    'PatchConvNet',
    'compile_blocks',
    'create_from_spec',
    'freeze_truncation',
    'input_size',
    'kept_tokens',
    'load_model',
    'model_arguments',
    'save_model',
]
