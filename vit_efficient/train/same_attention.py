"""Whether weights that were trained with an attention are any good for that of a recipe, and which keys make it so.

Those of exact attention go into every mechanism. Those of another one may fit another attention, keep ratio or number
of heads without being any good for it.
"""

import json
import re
import shlex
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vit_efficient.conversion import convert, swap_attentions
from vit_efficient.models import DctPatchEmbed, model_arguments
from vit_efficient.models.create import attention_of, create_from_spec
from vit_efficient.models.patch_embed import PATCH_OPTIONS
from vit_efficient.models.served import served_model
from vit_efficient.train.config import ModelConfig
from vit_efficient.utils.errors import UserError

# What a saved model tells of its attention.
SPELLED_OUT = ('attention', 'attention_kwargs')
# Arguments of timm.create_model that name weights.
SOURCES = ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path')
_EXACT = ('full', {})


def convert_as_asked(model: nn.Module, config: ModelConfig, weights_follow: bool = False) -> nn.Module:
    """The model with the attention of `model.attention`, if the recipe has one.

    Where `weights_follow`, what the attention adds is among them, and nobody is told to train it.
    """
    if not config.attention:
        return model
    change = partial(swap_attentions, trained=True) if weights_follow else convert
    try:
        change(served_model(model), config.attention, config.layers, **config.attention_kwargs)
    except UserError as error:
        raise UserError(f'model.attention={config.attention}: {error}') from error
    return model


def base_of(model: ModelConfig) -> str:
    return str(model.args.get('base', '')).partition('.')[0]


def check_same_attention(
    path: Path, saved: ModelConfig, wanted: ModelConfig, epochs: int, weights: dict[str, Tensor] | None = None
) -> bool:
    """Whether weights are of exact attention; a UserError if they are of another one than the recipe's.

    Args:
        path: A model folder, whose arguments the recipe need not repeat, or a file.
        saved: The model that they are of; of unknown name, they are taken for those of exact attention.
        wanted: The recipe's.
        epochs: Of the run.
        weights: Of a file.
    """
    theirs = _computed(saved) if saved.name else _sizes(weights or {})
    if not theirs:
        return True
    theirs = {'attention': _EXACT, **theirs}
    exact, same = theirs['attention'] == _EXACT, saved.name == wanted.name.partition('.')[0]
    inherited = {key: value for key, value in saved.args.items() if key not in SPELLED_OUT}
    if path.is_dir() and same:
        ours = _computed(replace(wanted, args={**inherited, **wanted.args}))
    elif path.is_dir() and not exact and base_of(saved) == wanted.name.partition('.')[0]:
        ours = _computed(replace(wanted, name=saved.name, args={**inherited, **wanted.args}))
    else:
        ours = _computed(wanted)
    differing = {key: value for key, value in theirs.items() if value != ours.get(key, value)}
    if exact:
        differing.pop('attention', None)
    if wanted.args.get('pretrained_strict') is False:
        differing.pop('depth', None)
    if not differing:
        return exact
    what, was = f'model.init_from={path} was saved with', 'the recipe says'
    if sizes := {key: value for key, value in differing.items() if key not in ('attention', 'patch_embed')}:
        had, has = (', '.join(f'{key}={values[key]!r}' for key in sizes) for values in (theirs, ours))
        keys = _listed({f'args.{key}': value for key, value in sizes.items()}) if 'depth' in theirs else []
        raise UserError(f'{what} {had}, {was} {has}; make them equal{": " if keys else ""}{shlex.join(keys)}')
    if 'patch_embed' in differing:
        had, has = (f'patch_embed={values["patch_embed"]!r}' for values in (theirs, ours))
        raise UserError(f'{what} {had}, {was} {has}; make them equal{way_out(path, saved, wanted)}')
    if same or wanted.attention:
        had, has = (f'attention={values["attention"]!r}' for values in (theirs, ours))
    else:
        had, has = (f'architecture={model.name!r}' for model in (saved, wanted))
    raise UserError(
        f'{what} {had}, {was} {has}; go on with that, {shlex.join(keys_of(saved, wanted))}, and move to another by '
        f'{_stage(wanted, ours["attention"], epochs)}'
    )


def _computed(config: ModelConfig) -> dict[str, Any]:
    """What a model computes beyond its parameters: its heads, its attention, and what it sees of patches.

    It is read off the model, since defaults count as well; on the meta device, it takes neither memory nor time.
    """
    if not timm.is_model(config.name):
        raise UserError(f'model.init_from: timm knows no model {config.name!r}, of which it is; see plugins')
    args = {key: value for key, value in config.args.items() if key not in SOURCES}
    with torch.device('meta'):
        model = convert_as_asked(create_from_spec(config.name, args), config)
    found = {'attention': _EXACT, **_sizes(model.state_dict())}
    if hasattr(model, 'attention_spec'):
        found['attention'] = tuple(json.loads(json.dumps(model_arguments(model)['attention'], default=str)))
    # Those of pooling are told apart: it may be trained anew.
    modules = (module for name, module in model.named_modules() if not name.startswith('attn_pool'))
    heads = [module.num_heads for module in modules if isinstance(getattr(module, 'num_heads', None), int)]
    if heads:
        found['num_heads'] = heads[0] if len(set(heads)) == 1 else heads
    if getattr(model, 'global_pool', '') == 'aggregate' and hasattr(model, 'pool_heads'):
        found['pool_heads'] = model.pool_heads
    embedding = getattr(model, 'patch_embed', None)
    if isinstance(embedding, DctPatchEmbed):  # kernels over pixels load into any
        options = {key: value for key, value in embedding.options.items() if key != 'input'}
        found['patch_embed'] = json.loads(json.dumps({'patch_size': embedding.patch_size, **options}, default=str))
    return found


def _sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of a ViT that give its weights their shapes, by these weights; nothing of other models."""
    norm, hidden = (getattr(state.get(f'blocks.0.{name}.weight'), 'shape', ()) for name in ('norm1', 'mlp.fc1'))
    if len(norm) != 1 or len(hidden) != 2:
        return {}
    depth = sum(re.fullmatch(r'blocks\.\d+\.norm1\.weight', name) is not None for name in state)
    return {'embed_dim': norm[0], 'depth': depth, 'mlp_ratio': hidden[0] / norm[0]}


def way_out(path: Path, saved: ModelConfig, wanted: ModelConfig) -> str:
    """The keys that build the model of some weights as it was, and give it the attention of another, if any do."""
    name, theirs = saved.name, wanted.name.partition('.')[0]
    if not name or name == theirs:
        return ''
    with suppress(UserError):
        attention, keys = _computed(wanted)['attention'], {'name': name}
        if attention != _EXACT and isinstance(attention[0], str):
            keys |= _spelled(attention)
        others = {key: None for key in SPELLED_OUT if key in wanted.args}
        check_same_attention(path, saved, replace(wanted, args=wanted.args | others, **keys), 1)
        keys |= {f'args.{key}': None for key in others}
        return f'; they are of {name}: {shlex.join(_listed(keys))} takes them'
    return ''


def keys_of(saved: ModelConfig, wanted: ModelConfig) -> list[str]:
    """The keys `model.KEY=VALUE` that make a saved model, with its attention, of what a recipe has, `wanted`."""
    attention, base, given = _computed(saved)['attention'], base_of(saved), wanted.args.get('attention_kwargs') or {}
    keys = {'name': base or saved.name}
    if saved.attention and not isinstance(attention[0], str):
        keys |= _asked(saved)
    elif not isinstance(attention[0], str) or given.keys() - attention[1].keys():
        keys = {'name': saved.name} | ({'args.base': base} if base else {}) | {'args.attention': list(attention)}
    elif attention[0] == (attention_of(keys['name'], {}) or 'full'):
        options = _spelled(attention, ModelConfig(keys['name']), given).get('attention_kwargs')
        keys |= {'args.attention_kwargs': options} if options else {}
    else:
        keys |= _spelled(attention, given=wanted.attention_kwargs if wanted.attention == attention[0] else {})
    # What would stay of the recipe, and does not belong to it.
    if given:
        keys.setdefault('args.attention_kwargs', None)
    if wanted.attention:
        keys.setdefault('attention', '')
    if wanted.layers is not None and keys.get('attention'):
        keys.setdefault('layers', None)
    cut = [f'patch_{name}' for name in PATCH_OPTIONS]
    keys |= {f'args.{key}': saved.args[key] for key in cut if key in saved.args and key in wanted.args}
    return _listed(keys)


def _asked(model: ModelConfig) -> dict[str, Any]:
    """What `model.attention` and the keys beside it are set to."""
    keys = {'attention': model.attention, 'attention_kwargs': model.attention_kwargs, 'layers': model.layers}
    return {key: value for key, value in keys.items() if value not in ({}, None)}


def _stage(wanted: ModelConfig, attention: tuple, epochs: int) -> str:
    """What of a run goes on to the attention that a recipe has."""
    if wanted.attention:
        stage = _asked(wanted)
    elif isinstance(attention[0], str):
        stage = _spelled(attention)
    else:
        return 'stages, some layers in each'
    return f'a stage, {shlex.quote("stages=" + _flow([{"epochs": epochs, **stage}]))}'


def _spelled(
    attention: tuple, default: ModelConfig | None = None, given: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The keys `attention` and `attention_kwargs` of a stage or model: the options that are not the default ones.

    And those that would stay, since they are given already.
    """
    name, options = attention
    default = default or ModelConfig('vit_full_tiny', attention=name)
    with suppress(UserError):
        same, defaults = _computed(default)['attention']
        if same == name:
            options = {key: value for key, value in options.items() if key not in defaults or defaults[key] != value}
    options = {**options, **{key: attention[1].get(key) for key in given or {}}}
    return {'attention': name} | ({'attention_kwargs': options} if options else {})


def _listed(keys: dict[str, Any]) -> list[str]:
    return [f'model.{key}={_flow(value)}' for key, value in keys.items()]


def _flow(value: Any) -> str:
    """A value as it stands in a recipe, on one line."""
    if isinstance(value, dict):
        return '{' + ', '.join(f'{key}: {_flow(part)}' for key, part in value.items()) + '}'
    if isinstance(value, (list, tuple)):
        return '[' + ', '.join(map(_flow, value)) + ']'
    return value if value and isinstance(value, str) else json.dumps(value)
