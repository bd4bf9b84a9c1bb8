"""The models that timm knows by name: `vit_{attention}_{size}` for each registered attention, now and later; and with
rotary positions, `vit_{attention}_rope_{size}`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from vit_efficient.attention import create_attention, layer_options, on_register
from vit_efficient.models.blocks import AttentionSpec
from vit_efficient.models.checkpoints import checkpoint_filter_fn
from vit_efficient.models.eva import EfficientEva
from vit_efficient.models.patch_embed import DctPatchEmbed
from vit_efficient.models.vit import EfficientVisionTransformer
from vit_efficient.utils.checks import plain_integers
from vit_efficient.utils.compat import keep_first_layer, model_args, set_model_args
from vit_efficient.utils.errors import UserError

SIZES = {
    'tiny': dict(embed_dim=192, depth=12, num_heads=3),
    'small': dict(embed_dim=384, depth=12, num_heads=6),
    'base': dict(embed_dim=768, depth=12, num_heads=12),
    'large': dict(embed_dim=1024, depth=24, num_heads=16),
}
# The rest is as timm has it by default, such as 224 × 224 pixels.
DEFAULT_CFG = dict(
    url='',
    num_classes=1000,
    crop_pct=0.9,
    fixed_input_size=True,
    mean=IMAGENET_INCEPTION_MEAN,
    std=IMAGENET_INCEPTION_STD,
    first_conv='patch_embed.proj',
    classifier='head',
    license='apache-2.0',
)


class Variant(NamedTuple):
    """A kind of model that there is of a mechanism, in each size."""

    name: str
    description: str
    model_cls: type[nn.Module]
    arguments: dict[str, Any]
    first_layer: str = 'patch_embed.proj'


PLAIN = Variant(
    'vit_{attention}_{size}',
    'ViT-{Size}/16 with attention {attention!r}.',
    EfficientVisionTransformer,
    dict(patch_size=16),
)
DCT_PATCHES = Variant(
    'vit_{attention}_{size}_dctpatch32',
    'ViT-{Size}/32 with attention {attention!r} and an embedding of the 16 × 16 lowest frequencies of each patch.',
    EfficientVisionTransformer,
    dict(patch_size=32, patch_embed='dct', patch_keep=16),
    'patch_embed.linear',
)
# Positions as DINOv3 has them (Siméoni et al., 2025, arXiv 2508.10104): from −1 to 1 on each side, whatever the size of
# the image; in training at a scale that is drawn for each forward pass.
ROPE = Variant(
    'vit_{attention}_rope_{size}',
    'ViT-{Size}/16 with attention {attention!r} and rotary positions in place of an embedding, for images of any size.',
    EfficientEva,
    dict(
        patch_size=16,
        global_pool='token',
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type='dinov3',
        rope_temperature=100.0,
        rope_rotate_half=True,
        rope_rescale_coords=2.0,
        dynamic_img_size=True,
    ),
)

default_cfgs = {}  # where timm looks for them


def build_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool = False,
    filter_fn: Callable[..., dict[str, Tensor]] = checkpoint_filter_fn,
    **kwargs,
) -> nn.Module:
    """timm's builder, for registered and converted models alike. NumPy's integers become Python's, which timm wants."""
    kwargs = {key: plain_integers(value) for key, value in kwargs.items()}
    if pretrained:
        config = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        if not (config.has_weights or config.state_dict):
            raise RuntimeError(
                f'No pretrained weights exist for {variant}. Use `pretrained=False` for random init, or convert a '
                "pretrained timm model: vit_efficient.convert(timm.create_model('vit_base_patch16_224', "
                "pretrained=True), 'dct')."
            )

    def build(**arguments) -> nn.Module:
        model = model_cls(**arguments)
        if isinstance(getattr(model, 'patch_embed', None), DctPatchEmbed):
            keep_first_layer(model)
        # What rebuilds it: the arguments of the entry point too, and not only those of create_model.
        recorded = {**model_args(model), **arguments}
        set_model_args(model, {key: value for key, value in recorded.items() if key not in ('device', 'dtype')})
        return model

    return build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        pretrained_strict=kwargs.pop('pretrained_strict', True),
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **kwargs,
    )


def register_variants(attention: str) -> None:
    """Makes the models of an attention, one of each size, known to timm: plain ones and, where it can have them as it
    is by default, those with rotary positions."""
    register_sizes(attention, PLAIN)
    if _can_rotate(attention):
        register_sizes(attention, ROPE)


def _can_rotate(attention: str) -> bool:
    try:
        with torch.device('meta'):
            made = create_attention(attention, 8, 1, **layer_options(attention, {}, 0, 1, (16, 16)))
        made.check_rotary()
    except (UserError, TypeError):  # or it has options that must be given
        return False
    return made.places_patches


def register_sizes(attention: str, variant: Variant) -> None:
    """Makes the models of an attention and a variant known to timm, one of each size."""
    for size in SIZES:
        _register(attention, size, variant)


def _register(mechanism: str, size: str, variant: Variant) -> None:
    names = dict(attention=mechanism, size=size, Size=size.capitalize())
    name = variant.name.format(**names)

    # The default of `attention` tells whose options a model takes (models/create.py).
    def entry_point(pretrained: bool = False, attention: AttentionSpec = mechanism, **kwargs) -> nn.Module:
        arguments = {**SIZES[size], 'attention': attention, **variant.arguments, **kwargs}
        # A model whose embedding was swapped for a convolution, and saved.
        if arguments.get('patch_embed') == 'conv' and 'patch_keep' not in kwargs:
            arguments.pop('patch_keep', None)
        return build_model(variant.model_cls, name, pretrained, **arguments)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = variant.description.format(**names)
    entry_point.model_cls = variant.model_cls
    config = {**DEFAULT_CFG, 'first_conv': variant.first_layer}
    config['fixed_input_size'] = not variant.arguments.get('dynamic_img_size', False)
    default_cfgs.update(generate_default_cfgs({name: config}))
    register_model(entry_point)


on_register(register_variants)
for _name in ('full', 'dct'):
    register_sizes(_name, DCT_PATCHES)
