"""Whether weights that were trained with an attention are any good for that of a recipe, and which keys make it so.

Those of exact attention go into every mechanism. Those of another one may fit another attention, keep ratio or number
of heads without being any good for it.
"""

import json
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vit_efficient.conversion import convert
from vit_efficient.models import DctPatchEmbed, model_arguments
from vit_efficient.models.create import create_from_spec
from vit_efficient.train.config import ModelConfig
from vit_efficient.utils.errors import UserError

# What a saved model tells of its attention.
SPELLED_OUT = ('attention', 'attention_kwargs')
# Arguments of timm.create_model that name weights.
SOURCES = ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path')
_EXACT = ('full', {})


def convert_as_asked(model: nn.Module, config: ModelConfig) -> nn.Module:
    """The model with the attention of `model.attention`, if the recipe has one."""
    if not config.attention:
        return model
    try:
        return convert(model, config.attention, config.layers, **config.attention_kwargs)
    except UserError as error:
        raise UserError(f'model.attention={config.attention}: {error}') from error


def base_of(model: ModelConfig) -> str:
    return str(model.args.get('base', '')).partition('.')[0]


def check_same_attention(path: Path, saved: ModelConfig, wanted: ModelConfig, epochs: int) -> bool:
    """Whether weights are of exact attention; a UserError if they are of another one than the recipe's.

    Args:
        path: A model folder, whose arguments the recipe need not repeat, or a file.
        saved: The model that they are of; of unknown name, they are taken for those of exact attention.
        wanted: The recipe's.
        epochs: Of the run.
    """
    if not saved.name:
        return True
    theirs = _computed(saved)
    exact, same = theirs['attention'] == _EXACT, saved.name == wanted.name.partition('.')[0]
    inherited = {key: value for key, value in saved.args.items() if key not in SPELLED_OUT}
    if path.is_dir() and same:
        ours = _computed(replace(wanted, args={**inherited, **wanted.args}))
    elif path.is_dir() and not exact and base_of(saved) == wanted.name.partition('.')[0]:
        ours = _computed(replace(wanted, name=saved.name, args={**inherited, **wanted.args}))
    else:
        ours = _computed(wanted)
    for key, value in theirs.items():
        if value == ours.get(key, value) or (key == 'attention' and exact):
            continue
        both = [saved.name, wanted.name] if key == 'attention' and not (same or wanted.attention) else []
        what, had, has = ('architecture', *both) if both else (key, value, ours[key])
        error = f'model.init_from={path} was saved with {what}={had!r}, the recipe says {what}={has!r}; '
        if key != 'attention':
            raise UserError(f'{error}make them equal{"" if same else way_out(saved, wanted)}')
        stage = {'epochs': epochs, **_spelled(ours[key])}
        raise UserError(
            f'{error}go on with that, {_keys_of(saved, theirs[key])}, and move to another by a stage, '
            f'{shlex.quote("stages=" + _flow([stage]))}'
        )
    return exact


def _computed(config: ModelConfig) -> dict[str, Any]:
    """What a model computes beyond its parameters: its heads, its attention, and what it sees of patches.

    It is read off the model, since defaults count as well; on the meta device, it takes neither memory nor time.
    """
    if not timm.is_model(config.name):
        raise UserError(f'model.init_from: timm knows no model {config.name!r}, of which it is; see plugins')
    args = {key: value for key, value in config.args.items() if key not in SOURCES}
    with torch.device('meta'):
        model = convert_as_asked(create_from_spec(config.name, args), config)
    found: dict[str, Any] = {'attention': _EXACT}
    if hasattr(model, 'attention_spec'):
        found['attention'] = tuple(json.loads(json.dumps(model_arguments(model)['attention'], default=str)))
    heads = [module.num_heads for module in model.modules() if isinstance(getattr(module, 'num_heads', None), int)]
    if heads:
        found['num_heads'] = heads[0] if len(set(heads)) == 1 else heads
    embedding = getattr(model, 'patch_embed', None)
    if isinstance(embedding, DctPatchEmbed):  # kernels over pixels load into any
        options = {key: value for key, value in embedding.options.items() if key != 'input'}
        found['patch_embed'] = json.loads(json.dumps({'patch_size': embedding.patch_size, **options}, default=str))
    return found


def way_out(saved: ModelConfig, wanted: ModelConfig) -> str:
    """The keys that build the model of some weights as it was, and give it the attention of another."""
    name, theirs = saved.name, wanted.name.partition('.')[0]
    if not name or name == theirs:
        return ''
    with suppress(UserError):
        attention = _computed(wanted)['attention']
        keys = [f'model.name={name}']
        if attention != _EXACT and isinstance(attention[0], str):
            spelled = _spelled(attention)
            keys += [
                f'model.{key}={value if isinstance(value, str) else _flow(value)}' for key, value in spelled.items()
            ]
        return f'; they are of {name}: {" ".join(map(shlex.quote, keys))} takes them'
    return ''


def _keys_of(model: ModelConfig, attention: tuple) -> str:
    """The keys of a recipe that build a saved model with its attention, as `_computed` tells it."""
    base = base_of(model)
    if isinstance(attention[0], str) and (base or model.attention):
        keys = {'name': base or model.name, **_spelled(attention)}
    elif isinstance(attention[0], str):
        options = _spelled(attention, ModelConfig(model.name)).get('attention_kwargs')
        keys = {'name': model.name} | ({'args.attention_kwargs': options} if options else {})
    else:
        keys = {'name': model.name} | ({'args.base': base} if base else {}) | {'args.attention': list(attention)}
    return ' '.join(shlex.quote(f'model.{key}={_flow(value)}') for key, value in keys.items())


def _spelled(attention: tuple, default: ModelConfig | None = None) -> dict[str, Any]:
    """The keys `attention` and `attention_kwargs` of a stage or model: the options that are not the default ones."""
    if not isinstance(attention[0], str):
        return {'attention': 'NAME'}
    name, options = attention
    default = default or ModelConfig('vit_full_tiny', attention=name)
    with suppress(UserError):
        same, defaults = _computed(default)['attention']
        if same == name:
            options = {key: value for key, value in options.items() if key not in defaults or defaults[key] != value}
    return {'attention': name} | ({'attention_kwargs': options} if options else {})


def _flow(value: Any) -> str:
    """A value as it stands in a recipe, on one line."""
    if isinstance(value, dict):
        return '{' + ', '.join(f'{key}: {_flow(part)}' for key, part in value.items()) + '}'
    if isinstance(value, (list, tuple)):
        return '[' + ', '.join(map(_flow, value)) + ']'
    return value if isinstance(value, str) else json.dumps(value)
