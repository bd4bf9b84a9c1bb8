"""The model of a recipe."""

import logging
from typing import Any

import timm
import torch
from torch import nn

from vit_efficient.dense import DenseModel
from vit_efficient.models import model_arguments
from vit_efficient.models.create import attention_of, create_from_spec
from vit_efficient.train.config import Config, ModelConfig
from vit_efficient.train.same_attention import convert_as_asked
from vit_efficient.train.weights import STATISTICS, model_from_weights, say_assumed, take_parts
from vit_efficient.utils.checks import is_integer, nearest
from vit_efficient.utils.errors import UserError, first_line

logger = logging.getLogger(__name__)


def create_model(config: Config, classes: list[str] | None) -> nn.Module:
    """The recipe's model, its weights drawn from the seed or taken from `model.init_from` or `model.args`.

    `classes` are the names of the data's classes, if known.

    Raises:
        UserError: If there is no such model, its arguments do not fit, the number of classes is unknown or too small,
            or `model.init_from` is not for this model.
    """
    args = dict(config.model.args)
    num_classes = args.pop('num_classes', len(classes) if classes else None)
    if num_classes is None:
        raise UserError('the data set does not tell its classes; set model.args.num_classes')
    if not is_integer(num_classes, 1):
        raise UserError(f'model.args.num_classes must be at least 1, got {num_classes!r}')
    if classes and num_classes < len(classes):
        raise UserError(f'model.args.num_classes={num_classes} is below the {len(classes)} classes of the data')
    if classes and num_classes > len(classes):
        logger.warning(
            'model.args.num_classes=%d is above the %d classes of the data: the model is saved without their names',
            *(num_classes, len(classes)),
        )
    model = create_backbone(config, {**args, 'num_classes': 0 if config.model.head else num_classes})
    if config.model.head:
        return _with_head(model, config.model, num_classes)
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)
    return model


def create_backbone(config: Config, args: dict[str, Any] | None = None) -> nn.Module:
    """The recipe's model without a head of ours, with the classifier that it has.

    `args` are those of timm.create_model, by default `model.args`; with `model.init_from`, the number of classes is
    that of the weights.

    Raises:
        UserError: As `create_model`, but for the classes.
    """
    args = dict(config.model.args if args is None else args)
    _check_name(config.model.name)
    torch.manual_seed(config.seed)
    _check_rates(args)
    if not config.model.init_from:
        _check_pretrained(config, args)
        model = convert_as_asked(create_from_spec(config.model.name, args), config.model)
    else:
        args.pop('num_classes', None)
        model = model_from_weights(config, args)
    _check_usable(model, config.model)
    return model


def _with_head(backbone: nn.Module, config: ModelConfig, num_classes: int) -> DenseModel:
    try:
        model = DenseModel(backbone, config.head, num_classes, config.reduce, config.upsample, **config.head_args)
    except UserError as error:
        raise UserError(f'model.head={config.head}, model.head_args={config.head_args}: {error}') from error
    if config.init_from:
        take_parts(model, config.init_from)
    elif config.upsample and config.freeze:
        raise UserError(
            'model.upsample=true with model.freeze=true: an upsampler that nobody has trained would stay; name the '
            'folder of a model that has one by model.init_from (see recipes/cutouts/train_upsampler.py)'
        )
    if config.freeze:
        model.freeze_backbone()
    return model


def _check_name(name: str) -> None:
    """A recipe names an architecture: a run is built again, from what it has saved and not from where weights were."""
    source, _, place = name.partition(':')
    if place:
        ways = {
            'local-dir': f'model.init_from={place}',
            'hf-hub': f'model.args.pretrained=true and model.args.pretrained_cfg_overlay={{hf_hub_id: {place}}}',
        }
        kind = {'hf_hub': 'hf-hub'}.get(source.lower(), source.lower())
        way = f'its weights come by {ways[kind]}' if kind in ways else f'of a place, timm knows {" and ".join(ways)}'
        raise UserError(
            f'model.name={name} is a place of weights, and must be the name of the model that they are of, as '
            f'timm.list_models() has it; {way}'
        )
    if '/' in name or not timm.is_model(name):
        near = nearest(name.rpartition('/')[2], timm.list_models()) or '; see timm.list_models()'
        raise UserError(f'model.name: timm knows no model {name!r}{near}')


def _check_rates(args: dict[str, Any]) -> None:
    """Models take rates below 0 for none, and find out about those above 1 when they train."""
    for key, value in args.items():
        if 'drop' in key and key.endswith('_rate') and isinstance(value, (int, float)) and not 0 <= value < 1:
            raise UserError(f'model.args.{key} must be at least 0 and below 1, got {value!r}')


def _check_pretrained(config: Config, args: dict[str, Any]) -> None:
    """What `model.args` say of weights: that there are some, and what images they were trained on."""
    overlay, default = args.get('pretrained_cfg_overlay') or {}, timm.get_pretrained_cfg(config.model.name)
    own = any(overlay.get(key) for key in ('file', 'url', 'hf_hub_id', 'state_dict'))
    if args.get('pretrained') and not (own or args.get('pretrained_cfg') or (default and default.has_weights)):
        attention = attention_of(config.model.name, args)
        change = f' model.attention={attention}' if isinstance(attention, str) else ''
        raise UserError(
            f'model.args.pretrained: there are no pretrained weights of {config.model.name}; take those of a timm '
            f'model, such as model.name=vit_base_patch16_224{change}, or a file or folder, model.init_from=…'
        )
    if (own and args.get('pretrained')) or args.get('checkpoint_path'):
        told = {**overlay, **args['pretrained_cfg']} if isinstance(args.get('pretrained_cfg'), dict) else overlay
        if not {*STATISTICS} <= told.keys():
            key = 'checkpoint_path' if args.get('checkpoint_path') else 'pretrained_cfg_overlay'
            say_assumed(f'model.args.{key}', config)


def _check_usable(model: nn.Module, config: ModelConfig) -> None:
    """Whether it tells classes, and can be saved once it is trained."""
    what = f'model.name={config.name} with model.args={config.args}'
    if not isinstance(getattr(model, 'num_classes', None), int):
        raise UserError(f'{what}: {type(model).__name__} is no classifier (it has no num_classes)')
    try:
        model_arguments(model)
    except Exception as error:
        raise UserError(f'{what} could not be saved: {type(error).__name__}: {first_line(error)}') from error
