"""Convolutional networks of timm that pool their maps by attention (`models.aggregation`)."""

from typing import Any

import timm
import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import generate_default_cfgs, get_pretrained_cfg, model_entrypoint, register_model
from torch import Tensor, nn

from vit_efficient.models.aggregation import Aggregation2d
from vit_efficient.models.inputs import image_size
from vit_efficient.models.registered import DEFAULT_CFG, build_model
from vit_efficient.utils.compat import model_args, set_model_args
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.modes import evaluating

NAME = 'cnn_aggregated'
default_cfgs = generate_default_cfgs({NAME: {**DEFAULT_CFG, 'fixed_input_size': False}})


def pooled_maps(model: nn.Module) -> list[str]:
    """The names of modules that pool maps as timm's convolutional networks do, or by attention already."""
    parts = [
        (name, part) for name, part in model.named_modules() if isinstance(part, (SelectAdaptivePool2d, Aggregation2d))
    ]
    return [name for name, part in parts if not part.is_identity()]


def aggregate_maps(model: nn.Module, heads: int = 1, init: float = 1e-4) -> nn.Module:
    """Swaps the one module that pools maps for an `Aggregation2d`, in place: `convert_pool`.

    Raises:
        UserError: If there are several such modules, or the one does not give means of the model's features.
    """
    names, kind = pooled_maps(model), type(model).__name__
    if len(names) > 1:
        raise UserError(f'cannot convert the pooling of a {kind}: it has several, {", ".join(names)}')
    (name,) = names
    old, weight = model.get_submodule(name), next(model.parameters())
    if isinstance(old, Aggregation2d):
        flattens, channels_last = old.flattens, old.channels_last
    else:
        flattens, channels_last = _read(old, kind)
    width = _shape_given(model, old)[-1 if channels_last else 1]
    place = dict(device=weight.device, dtype=weight.dtype)
    made = Aggregation2d(width, heads, init, flattens, channels_last, **place).train(model.training)
    model.set_submodule(name, made)
    config = dict(getattr(model, 'pretrained_cfg', {}))
    if config.get('architecture'):
        base = {} if config['architecture'] == NAME else {'base': config['architecture']}
        arguments = {key: value for key, value in model_args(model).items() if key != 'global_pool'}
        set_model_args(model, {**arguments, **base, 'pool_heads': heads, 'pool_init': init})
        model.pretrained_cfg = model.default_cfg = {**config, 'architecture': NAME}
    return model


def _read(pool: SelectAdaptivePool2d, kind: str) -> tuple[bool, bool]:
    """Whether it gives (B, C), and whether its maps are (B, H, W, C); tried on maps of which each size is another."""
    given: Tensor = pool(torch.zeros(1, 2, 3, 5))
    channels = {2: False, 5: True}.get(given.numel())
    if channels is None:
        raise UserError(
            f'cannot convert the pooling of a {kind}, which is {pool.pool_type or "none"!r}; build it with '
            "global_pool='avg'"
        )
    return given.ndim == 2, channels


@torch.no_grad()
def _shape_given(model: nn.Module, pool: nn.Module) -> torch.Size:
    """The shape of the maps that a module is given, of an image of zeros."""
    weight, shapes = next(model.parameters()), []
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    sides = image_size(model) or (224, 224)
    handle = pool.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    try:
        with evaluating(model):
            model(torch.zeros(1, channels, *sides, device=weight.device, dtype=weight.dtype))
    finally:
        handle.remove()
    return shapes[0]


@register_model
def cnn_aggregated(
    pretrained: bool = False, base: str | None = None, pool_heads: int = 1, pool_init: float = 1e-4, **kwargs: Any
) -> nn.Module:
    """The timm network `base` with attention in the place of its pooling: what a saved one is rebuilt by."""
    known = get_pretrained_cfg(base) if isinstance(base, str) and timm.is_model(base) else None
    if known is None:
        raise UserError(f"{NAME}: base must name a convolutional network of timm, such as 'resnet50', got {base=}")

    if kwargs.get('features_only'):
        raise UserError(f'{NAME}: features come before what pools; take {base} itself with features_only=True')

    def build(**arguments) -> nn.Module:
        if arguments.get('global_pool') == 'aggregate':  # as timm saves it
            del arguments['global_pool']
        model = model_entrypoint(base)(pretrained=False, **arguments)
        if not pooled_maps(model):
            raise UserError(f'{NAME}: {base} pools no maps; of a ViT, use convert_pool')
        return aggregate_maps(model, pool_heads, pool_init)

    if not kwargs.get('pretrained_cfg'):
        config = known.to_dict(remove_source=True)
        kwargs['pretrained_cfg'] = {**config, 'architecture': NAME, 'custom_load': False}
    return build_model(build, NAME, pretrained, _with_pooling, **kwargs)


def _with_pooling(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of a network that takes the mean, with the pooling that the model begins with."""
    (name,) = pooled_maps(model)
    return {f'{name}.{key}': value for key, value in model.get_submodule(name).state_dict().items()} | state_dict
