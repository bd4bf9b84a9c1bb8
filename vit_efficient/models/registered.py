"""The models that timm knows by name: `vit_{attention}_{size}` for each registered attention, now and later."""

from collections.abc import Callable

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from vit_efficient.attention import on_register
from vit_efficient.models.blocks import AttentionSpec
from vit_efficient.models.checkpoints import checkpoint_filter_fn
from vit_efficient.models.patch_embed import DctPatchEmbed
from vit_efficient.models.vit import EfficientVisionTransformer
from vit_efficient.utils.checks import plain_integers
from vit_efficient.utils.compat import keep_first_layer, model_args, set_model_args

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
# What variants of a mechanism add to its name, its description and the arguments.
VARIANTS = {
    '': ('ViT-{size}/16 with attention {attention!r}.', {}),
    '_dctpatch32': (
        'ViT-{size}/32 with attention {attention!r} and an embedding of the 16 × 16 lowest frequencies of each patch.',
        dict(patch_size=32, patch_embed='dct', patch_keep=16),
    ),
}

default_cfgs = {}  # where timm looks for them


def build_model(model_cls: Callable[..., nn.Module], variant: str, pretrained: bool = False, **kwargs) -> nn.Module:
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
        if isinstance(model.patch_embed, DctPatchEmbed):
            keep_first_layer(model)
        # What rebuilds it: the arguments of the entry point too, and not only those of create_model.
        recorded = {**model_args(model), **arguments}
        set_model_args(model, {key: value for key, value in recorded.items() if key not in ('device', 'dtype')})
        return model

    return build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        pretrained_strict=kwargs.pop('pretrained_strict', True),
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **kwargs,
    )


def register_variants(attention: str, suffix: str = '') -> None:
    """Makes the models of an attention, one of each size, known to timm; the suffix is one of `VARIANTS`."""
    for size in SIZES:
        _register(attention, size, suffix)


def _register(mechanism: str, size: str, suffix: str) -> None:
    variant = f'vit_{mechanism}_{size}{suffix}'
    description, own = VARIANTS[suffix]

    # The default of `attention` tells whose options a model takes (models/create.py).
    def entry_point(pretrained: bool = False, attention: AttentionSpec = mechanism, **kwargs) -> nn.Module:
        arguments = {'patch_size': 16, **SIZES[size], 'attention': attention, **own, **kwargs}
        # A model whose embedding was swapped for a convolution, and saved.
        if arguments.get('patch_embed') == 'conv' and 'patch_keep' not in kwargs:
            arguments.pop('patch_keep', None)
        return build_model(EfficientVisionTransformer, variant, pretrained, **arguments)

    entry_point.__name__ = entry_point.__qualname__ = variant
    entry_point.__doc__ = description.format(size=size.capitalize(), attention=mechanism)
    config = {**DEFAULT_CFG, 'first_conv': 'patch_embed.linear'} if suffix == '_dctpatch32' else DEFAULT_CFG
    default_cfgs.update(generate_default_cfgs({variant: config}))
    register_model(entry_point)


on_register(register_variants)
for _name in ('full', 'dct'):
    register_variants(_name, '_dctpatch32')
