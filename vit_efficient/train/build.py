"""The model of a recipe."""

import json
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import nn

from vit_efficient.models import DctPatchEmbed, model_arguments
from vit_efficient.models.create import create_from_spec
from vit_efficient.models.saving import load_model, model_folder, read_model_config
from vit_efficient.train.checkpoint import damaged_part, load_checkpoint
from vit_efficient.train.config import Config, ModelConfig
from vit_efficient.utils.checks import is_integer, nearest
from vit_efficient.utils.errors import UserError, first_line, one_line

# What a saved model tells of its attention.
_SPELLED_OUT = ('attention', 'attention_kwargs')


def create_model(config: Config, classes: list[str] | None) -> nn.Module:
    """The recipe's model, its weights drawn from the seed or taken from `model.init_from`.

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
    if not timm.is_model(config.model.name):
        near = nearest(config.model.name, timm.list_models()) or '; see timm.list_models()'
        raise UserError(f'model.name: timm knows no model {config.model.name!r}{near}')
    torch.manual_seed(config.seed)
    _check_rates(args)
    if not config.model.init_from:
        model = create_from_spec(config.model.name, {**args, 'num_classes': num_classes})
    else:
        model = _create_from(config.model, args)
    _check_usable(model, config.model)
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)
    return model


def _check_rates(args: dict[str, Any]) -> None:
    """Models take rates below 0 for none, and find out about those above 1 when they train."""
    for key, value in args.items():
        if 'drop' in key and key.endswith('_rate') and isinstance(value, (int, float)) and not 0 <= value < 1:
            raise UserError(f'model.args.{key} must be at least 0 and below 1, got {value!r}')


def _check_usable(model: nn.Module, config: ModelConfig) -> None:
    """Whether it tells classes, and can be saved once it is trained."""
    what = f'model.name={config.name} with model.args={config.args}'
    if not isinstance(getattr(model, 'num_classes', None), int):
        raise UserError(f'{what}: {type(model).__name__} is no classifier (it has no num_classes)')
    try:
        model_arguments(model)
    except Exception as error:
        raise UserError(f'{what} could not be saved: {type(error).__name__}: {first_line(error)}') from error


def _create_from(config: ModelConfig, args: dict[str, Any]) -> nn.Module:
    """The model with the classes of its source, so that all weights are loaded strictly."""
    source = Path(config.init_from)
    if source.is_dir():
        source = model_folder(source)
        _check_same_attention(source, config.name, args, *_saved_model(source))
        # The folder spells the same attention out; said twice, it would be refused.
        return load_model(source, **{key: value for key, value in args.items() if key not in _SPELLED_OUT})
    if not source.exists():
        raise UserError(f'model.init_from={source}: no such file or folder')
    if (source.parent / 'config.json').exists():
        _check_same_attention(source, config.name, args, *_saved_model(source.parent))
    weights = _load_weights(source, config.name, args)
    default = timm.get_pretrained_cfg(config.name).to_dict() if timm.get_pretrained_cfg(config.name) else {}
    overlay: dict[str, Any] = {'state_dict': weights}
    head = weights.get(f'{default.get("classifier")}.weight')
    stem = weights.get(f'{default.get("first_conv")}.weight')
    if head is not None:
        args = {**args, 'num_classes': head.shape[0]}
        overlay['num_classes'] = head.shape[0]
    if stem is not None:
        overlay['input_size'] = (stem.shape[1], *default['input_size'][1:])
    try:
        model = timm.create_model(config.name, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    except Exception as error:
        raise UserError(f'model.init_from={source} does not fit {config.name}: {one_line(error)}') from error
    model.pretrained_cfg.pop('state_dict', None)  # timm would keep the weights in memory a second time
    return model


def _load_weights(source: Path, name: str, args: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint of ours or of timm; their moving average, if it holds one."""
    state = None
    with suppress(UserError):
        state = load_checkpoint(source)
    if state:
        saved = state['identity']
        if any(stage['attention'] or stage.get('freeze') for stage in saved.get('stages') or []):
            raise UserError(
                f'model.init_from={source} belongs to a run whose stages change the model; give the folder of the '
                'finished run, which says what it has become'
            )
        _check_same_attention(source, name, args, saved.get('model.name'), saved.get('model.args') or {})
        return state.get('ema') or state['model']
    with suppress(OSError, zipfile.BadZipFile):  # timm says what is wrong with it, if anything
        if damaged := damaged_part(source):
            raise UserError(f'model.init_from={source}: damaged ({damaged} is not what was written)')
    try:
        weights = load_state_dict(str(source), use_ema=True)
    # A damaged file raises whatever the archive reader or the unpickler stumbles over.
    except Exception as error:
        reason = f'{type(error).__name__}: {first_line(error)}'
        raise UserError(f'model.init_from={source}: not a file of weights that timm can read ({reason})') from error
    if not weights:  # timm would look for others elsewhere
        raise UserError(f'model.init_from={source}: holds no weights')
    return weights


def _saved_model(folder: Path) -> tuple[str, dict[str, Any]]:
    saved = read_model_config(folder)
    return saved['architecture'], saved.get('model_args') or {}


def _check_same_attention(source: Path, name: str, args: dict, saved_name: str, saved_args: dict) -> None:
    """Weights may fit another attention, keep ratio or number of heads without being any good for it."""
    theirs, ours = {'architecture': saved_name}, {'architecture': name}
    if saved_name == name:
        theirs, ours = _attention(saved_name, saved_args), _attention(name, args)
    for key, value in ours.items():
        if theirs.get(key, value) != value:
            raise UserError(
                f'model.init_from={source} was saved with {key}={theirs[key]!r}, '
                f'the recipe says {key}={value!r}; make them equal'
            )


def _attention(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """What the attention of a model computes, beyond its parameters.

    It is read off the model, since defaults count as well; on the meta device, it takes neither memory nor time.
    """
    with torch.device('meta'):
        model = create_from_spec(name, args)
    heads = [module.num_heads for module in model.modules() if isinstance(getattr(module, 'num_heads', None), int)]
    found = {'num_heads': heads[0] if len(set(heads)) == 1 else heads}
    if hasattr(model, 'attention_spec'):
        found['attention'] = model_arguments(model)['attention']
    embedding = getattr(model, 'patch_embed', None)
    if isinstance(embedding, DctPatchEmbed):  # kernels over pixels load into any
        options = {key: value for key, value in embedding.options.items() if key != 'input'}
        found['patch_embed'] = {'patch_size': embedding.patch_size, **options}
    return json.loads(json.dumps(found, default=str))
