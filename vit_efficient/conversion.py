"""Swap the attention of a timm ViT that you already have, keeping its weights."""

import copy
import logging
import os
from collections.abc import Iterable
from typing import Any

import timm
import torch
from timm.models import (
    Eva,
    VisionTransformer,
    generate_default_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
)
from torch import nn

from vit_efficient.attention import trained_options
from vit_efficient.models import blocks
from vit_efficient.models.aggregation import Aggregation, ClassHead, queries_of
from vit_efficient.models.eva import EfficientEva
from vit_efficient.models.forward import GridForward
from vit_efficient.models.patch_embed import PATCH_OPTIONS, DctPatchEmbed, Keep, patch_embed_layer
from vit_efficient.models.plans import Plan, as_spec
from vit_efficient.models.pooled_cnn import aggregate_maps, pooled_maps
from vit_efficient.models.registered import DEFAULT_CFG, build_model
from vit_efficient.models.saving import model_arguments
from vit_efficient.models.served import MODELS, served_model
from vit_efficient.models.vit import EfficientVisionTransformer
from vit_efficient.utils.checks import is_integer
from vit_efficient.utils.compat import model_args, set_model_args, unwrap
from vit_efficient.utils.errors import UserError

logger = logging.getLogger(__name__)

PRUNED = 0.01  # of the weights of a patch embedding, those that are 0


def convert(
    model: nn.Module,
    attention: blocks.AttentionSpec | Plan | os.PathLike,
    layers: int | Iterable[int] | None = None,
    **options,
) -> nn.Module:
    """Swaps the attention of a model in place; every weight stays the same tensor.

        model = timm.create_model('vit_base_patch14_dinov2', pretrained=True)
        convert(model, 'dct', keep_ratio=1 / 4)

    The model becomes one of ours, such as an `EfficientVisionTransformer`: it trains, compiles, exports and saves as
    registered ones do. Other layers keep the attention they have. `convert(model, 'full')` is the way back.

    What a mechanism adds starts so that outputs change as little as they can: convolutions at zero, Linformer's
    projections as means of cells of the patch grid. A warning is logged where they, or trees, have to be trained. For
    the same reason `pool` at place 'kv' has summary='local' here, unless `summary` is given.

    Args:
        model: A timm `VisionTransformer` (plain, DeiT, DINOv2, CLIP, SigLIP, …), `Eva` (EVA-02, Perception Encoder,
            RoPE-ViT, DINOv3, …), `Beit`, `VisionTransformerRelPos`, `NaFlexVit` or `VisionTransformerSAM`, or one
            converted before; also in the wrapper that `features_only=True` or `torch.compile` puts around it.
        attention: A registered attention's name, or (name, options), or a list with one of these for each of `layers`;
            or a plan (`vit_efficient.plan`) or the path of its file, .yaml.
        layers: Indices of the blocks to convert, negative ones from the end; all by default. Blocks of SAM that attend
            in windows of their own stay as they are, and cannot be among them.
        **options: Of a single attention, such as `keep_ratio`.

    Returns:
        The model itself.

    Raises:
        UserError: If the model, or a layer of it, has parts that cannot be served (windows, several grids): it
            names the module and the reason. Or if a name, option or index is wrong, or an attention cannot have
            the positions of the model. The model is then as it was.
    """
    vit = served_model(model)
    if not blocks.grid_blocks(vit):
        raise UserError(
            'cannot convert this model: each of its blocks attends in windows of its own, none among all patches'
        )
    before = set(vit.parameters())
    swap_attentions(vit, as_spec(attention), layers, trained=True, **options)
    notes = set()
    for module in vit.modules():
        start = getattr(module, 'start_in_trained', None)
        if start and not before.issuperset(module.parameters(recurse=False)):
            notes.add(start())
    if notes and not next(vit.parameters()).is_meta:  # where it is only tried
        logger.warning(f'convert adds {", and ".join(sorted(notes))}: no checkpoint has them; fine-tune the model')
    return model


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of a model with the same parameters and buffers: to convert, while the model stays as it is."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def swap_attentions(
    model: nn.Module,
    attention: blocks.AttentionSpec,
    layers: int | Iterable[int] | None = None,
    trained: bool = False,
    **options,
) -> None:
    """As `convert`, of a model that is served; what a mechanism adds starts as in a model that is trained with it.

    Args:
        trained: Whether options that are not given are those for a model that is trained already.
    """
    depth, served = len(model.blocks), blocks.grid_blocks(model)
    indices = list(served) if layers is None else _indices(layers)
    for i in indices:
        if not is_integer(i, -depth) or i >= depth:
            raise UserError(f'layers: the model has blocks 0 … {depth - 1}, got {i!r}')
        if i % depth not in served:
            others = ', '.join(map(str, served))
            raise UserError(
                f'layers: block {i} attends in windows of its own and stays as it is; those to name are {others}'
            )
    spec = blocks.attention_per_layer(attention, options, len(indices))
    if trained:
        spec = [(name, trained_options(name, given)) for name, given in spec]
    wanted = dict(zip([i % depth for i in indices], spec, strict=True))
    if len(wanted) < len(indices):
        raise UserError(f'layers names a block twice: {indices}')
    attentions = blocks.swapped_attentions(model, wanted)

    # Nothing can fail from here on.
    was_timms = type(model) in MODELS
    model.__class__ = MODELS.get(type(model), type(model))
    model.use_grid()
    blocks.set_attentions(model, attentions)
    if was_timms:
        _call_converted(model)
    set_model_args(model, model_arguments(model))


def _call_converted(model: nn.Module) -> None:
    """What timm saves beside the weights stays true: the architecture becomes the base of `vit_converted`."""
    config = dict(getattr(model, 'pretrained_cfg', {}))
    if config.get('architecture') and config['architecture'] != 'vit_converted':
        set_model_args(model, {**model_args(model), 'base': config['architecture']})
        config['architecture'] = 'vit_converted'
        model.pretrained_cfg = model.default_cfg = config


def convert_patch_embed(model: nn.Module, patch_embed: str = 'dct', keep: Keep = None, **options) -> nn.Module:
    """Swaps the patch embedding of a model for a `DctPatchEmbed`, in place, keeping its weights.

        model = timm.create_model('vit_base_patch16_224', pretrained=True)
        convert_patch_embed(model, keep=8)  # the 8 × 8 lowest frequencies of each patch: a quarter of the products

    Args:
        model: As for `convert`; one that has a `DctPatchEmbed` gets another.
        patch_embed: 'dct', or 'conv', the way back.
        keep, **options: As `DctPatchEmbed.from_conv`. With `keep` None, the outputs stay as they are.

    Returns:
        The model itself. Its attention is as it was.

    Raises:
        UserError: If the model cannot be served, its patch embedding is pruned, or an option is out of range. The model
            is then as it was.
    """
    whole, model = model, served_model(model)
    patch_embed_layer(patch_embed, keep, **options)
    if not hasattr(model, 'patch_embed'):
        raise UserError(f'cannot convert the patch embedding of a {type(model).__name__}: it is a part of its embeds')
    embedding = model.patch_embed
    weight = next(embedding.parameters())
    if not weight.is_meta and (pruned := 1 - float(weight.count_nonzero()) / weight.numel()) > PRUNED:
        raise UserError(
            f'{pruned:.0%} of the weights of the patch embedding are 0, which no other basis keeps; convert it '
            'first, and prune then'
        )
    if isinstance(embedding, DctPatchEmbed):
        embedding = embedding.to_conv()
    if patch_embed == 'dct':
        embedding = DctPatchEmbed.from_conv(embedding, keep, **options)
    swap_attentions(model, 'full', layers=[])
    model.patch_embed = embedding
    if not isinstance(model, EfficientVisionTransformer):  # whose entry points build it
        _call_converted(model)
    set_model_args(model, model_arguments(model))
    return whole


def convert_pool(
    model: nn.Module, pool: str = 'aggregate', heads: int = 1, tokens: str = 'one', init: float = 1e-4
) -> nn.Module:
    """Swaps the pooling of a model for attention of a learned token to all patches, in place (`Aggregation`).

        model = timm.create_model('vit_base_patch16_224', pretrained=True)
        convert_pool(model)  # and fine-tune it; or a convolutional network, such as resnet50 or convnext_base

    Of a ViT, the class token starts the query, the final norm becomes that of what is pooled, and the classifier stays;
    with a token for each class its rows become their classifiers. What pools has to be trained. Of a convolutional
    network, give the number of classes before: `reset_classifier` of some of timm's does not know this pooling.

    Args:
        model: As for `convert`, of timm's `VisionTransformer` or `Eva`; or a network with one `SelectAdaptivePool2d`.
        pool: 'aggregate'.
        heads, init: As of `AggregationBlock`.
        tokens: 'one'; or 'class', of ViTs, one for each class.

    Returns:
        The model itself.

    Raises:
        UserError: If there is no such pooling, or an option is out of range. The model is then as it was.
    """
    if pool != 'aggregate':
        raise UserError(f"convert_pool: pool must be 'aggregate', got {pool!r}")
    if not isinstance(model, nn.Module):
        raise UserError(f'convert_pool: model must be an nn.Module, made by timm.create_model, got {model!r}')
    *_, inner = unwrap(model)
    served = type(inner) in (VisionTransformer, EfficientVisionTransformer, Eva, EfficientEva)
    if not served and not isinstance(inner, (*MODELS, GridForward)) and pooled_maps(inner):
        if tokens != 'one':
            raise UserError(f"convert_pool: tokens={tokens!r} is for ViTs; a {type(inner).__name__} has 'one'")
        aggregate_maps(inner, heads, init)
        return model
    if not served:
        raise UserError(
            f'cannot convert the pooling of a {type(inner).__name__}: it is neither a VisionTransformer nor an Eva of '
            'timm, nor does it pool its maps by one SelectAdaptivePool2d'
        )
    vit = served_model(model)
    queries, weight = queries_of(tokens, vit.num_classes), next(vit.parameters())
    place = dict(device=weight.device, dtype=weight.dtype)
    aggregation = Aggregation(vit.embed_dim, heads, queries, init, **place).train(vit.training)
    head = _head_of(vit, queries, place)
    swap_attentions(vit, 'full', layers=[])
    if getattr(vit, 'cls_token', None) is not None:
        aggregation.cls_token.data.copy_(vit.cls_token.expand_as(aggregation.cls_token))
    vit.head = head
    if isinstance(vit.fc_norm, nn.Identity):
        vit.norm, vit.fc_norm = vit.fc_norm, vit.norm
    vit.attn_pool, vit.global_pool = aggregation, 'aggregate'
    vit.pool_heads, vit.pool_tokens, vit.pool_init = heads, tokens, init
    set_model_args(vit, model_arguments(vit))
    return model


def _head_of(vit: nn.Module, queries: int, place: dict[str, Any]) -> nn.Module:
    """The classifier of a ViT, for one query token or for one of each class: with the weights that it has."""
    head, wanted = vit.head, ClassHead if queries > 1 else nn.Linear
    if isinstance(head, ClassHead) == (queries > 1):
        return head
    weight, bias = getattr(head, 'weight', None), getattr(head, 'bias', None)
    if getattr(weight, 'shape', None) != (vit.num_classes, vit.embed_dim):
        raise UserError(
            f"convert_pool: tokens='class' takes the classifier of {vit.num_classes} classes apart, a linear layer; "
            f'the model has a {type(head).__name__}'
        )
    made = wanted(vit.embed_dim, vit.num_classes, **place).train(vit.training)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.zero_() if bias is None else made.bias.copy_(bias)
    return made.requires_grad_(weight.requires_grad)


def _indices(layers: int | Iterable[int]) -> list:
    try:
        return [layers] if is_integer(layers) else list(layers)
    except TypeError as error:  # a tensor without axes is iterable, it says
        raise UserError(f'layers must be an index of a block, or several, got {layers!r}') from error


_POOLING = ('heads', 'tokens', 'init')
default_cfgs = generate_default_cfgs({'vit_converted': DEFAULT_CFG})


@register_model
def vit_converted(
    pretrained: bool = False,
    base: str | None = None,
    attention: blocks.AttentionSpec = 'full',
    attention_kwargs: dict[str, Any] | None = None,
    layers: int | Iterable[int] | None = None,
    patch_embed: str = 'conv',
    **kwargs,
) -> nn.Module:
    """The timm model `base`, converted: what a saved converted model is rebuilt by."""
    options = {name: kwargs.pop(f'patch_{name}') for name in PATCH_OPTIONS if f'patch_{name}' in kwargs}
    patch_embed_layer(patch_embed, **options)
    if not base or not timm.is_model(base):
        raise UserError(f"vit_converted: base must name a timm ViT, such as 'vit_base_patch16_224', got {base=}")

    def build(without_norm: bool = False, **arguments) -> nn.Module:
        pooling = {name: arguments.pop(f'pool_{name}') for name in _POOLING if f'pool_{name}' in arguments}
        if aggregates := arguments.get('global_pool') == 'aggregate':
            arguments['global_pool'] = 'avg'
        try:
            model = model_entrypoint(base)(pretrained=False, **arguments)
        except TypeError:  # it has no such argument, such as img_size, often because it is no ViT
            with torch.device('meta'):
                served_model(model_entrypoint(base)(pretrained=False))
            raise
        if without_norm:  # which features do not need, and the class of the base always has
            if hasattr(model, 'neck'):
                model.prune_intermediate_layers(prune_norm=True, prune_head=False)
            else:
                model.norm = model.fc_norm = nn.Identity()
        if patch_embed == 'dct':
            convert_patch_embed(model, **options)
        swap_attentions(served_model(model), attention, layers, **(attention_kwargs or {}))
        return convert_pool(model, **pooling) if aggregates else model

    if not kwargs.get('pretrained_cfg'):  # what images and classes it is for, it has from its base
        config = get_pretrained_cfg(base).to_dict(remove_source=True)
        kwargs['pretrained_cfg'] = {**config, 'architecture': 'vit_converted', 'custom_load': False}
    return build_model(build, 'vit_converted', pretrained, **kwargs)
