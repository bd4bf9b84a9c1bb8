"""The model of a recipe, and a model folder read back."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import nn

from vit_efficient.models import model_arguments
from vit_efficient.train.config import Config, ModelConfig, first_line

# The parts of a model's arguments that say what its attention computes, beyond its parameters.
_ATTENTION_ARGS = ('attention', 'attention_kwargs')


def create_model(config: Config, classes: list[str] | None) -> nn.Module:
    """The recipe's model, its weights drawn from the seed or taken from `model.init_from`.

    Args:
        config: The recipe.
        classes: Names of the data's classes, if known.

    Raises:
        ValueError: If there is no such model, its arguments do not fit, the number of classes is unknown or too small,
            or `model.init_from` is not for this model.
    """
    args = dict(config.model.args)
    num_classes = args.pop('num_classes', len(classes) if classes else None)
    if num_classes is None:
        raise ValueError('the data set does not tell its classes; set model.args.num_classes')
    if classes and num_classes < len(classes):
        raise ValueError(f'model.args.num_classes={num_classes} is below the {len(classes)} classes of the data')
    if not timm.is_model(config.model.name):
        raise ValueError(f'model.name: timm knows no model {config.model.name!r}; see timm.list_models()')
    torch.manual_seed(config.seed)
    if not config.model.init_from:
        return _create(config.model.name, num_classes=num_classes, **args)
    model = _create_from(config.model, args)
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)
    return model


def _create(name: str, **args: Any) -> nn.Module:
    try:
        return timm.create_model(name, **args)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f'model {name}: {first_line(error)}') from error


def _create_from(config: ModelConfig, args: dict[str, Any]) -> nn.Module:
    """The model with the classes of its source, so that all weights are loaded strictly."""
    source = Path(config.init_from)
    if source.is_dir():
        source = _model_folder(source)
        _check_same_attention(source, config, args)
        return load_model(source, **args)
    if not source.exists():
        raise ValueError(f'model.init_from={source}: no such file or folder')
    try:
        weights = load_state_dict(str(source), use_ema=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f'model.init_from={source}: {first_line(error)}') from error
    default = timm.get_pretrained_cfg(config.name).to_dict() if timm.get_pretrained_cfg(config.name) else {}
    overlay: dict[str, Any] = {'file': str(source), 'custom_load': False}
    head = weights.get(f'{default.get("classifier")}.weight')
    stem = weights.get(f'{default.get("first_conv")}.weight')
    if head is not None:
        args = {**args, 'num_classes': head.shape[0]}
        overlay['num_classes'] = head.shape[0]
    if stem is not None:
        overlay['input_size'] = (stem.shape[1], *default['input_size'][1:])
    try:
        return timm.create_model(config.name, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split())[:300]
        raise ValueError(f'model.init_from={source} does not fit {config.name}: {reason}') from error


def _check_same_attention(source: Path, config: ModelConfig, args: dict[str, Any]) -> None:
    """Weights may fit another attention, or another keep ratio, without being any good for it."""
    saved = read_model_config(source)
    theirs = {'architecture': saved['architecture'], **(saved.get('model_args') or {})}
    ours = {'architecture': config.name, **args}
    if theirs['architecture'] == config.name:
        # Defaults count as well, hence the model as it is built.
        ours |= json.loads(json.dumps(_arguments(_create(config.name, **args)), default=str))
    for key in ('architecture', *_ATTENTION_ARGS):
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f'model.init_from={source} was saved with {key}={theirs.get(key)!r}, '
                f'the recipe says {key}={ours.get(key)!r}; make them equal'
            )


def _arguments(model: nn.Module) -> dict[str, Any]:
    return model_arguments(model) if hasattr(model, 'attention_spec') else {}


def _model_folder(folder: Path) -> Path:
    """The folder itself, or the one in a run's folder."""
    if not folder.is_dir():
        raise ValueError(f'{folder}: no such model folder')
    in_run = folder / 'model'
    return in_run if (in_run / 'config.json').exists() and not (folder / 'config.json').exists() else folder


def read_model_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        ValueError: If the folder is not one.
    """
    path = folder / 'config.json'
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f'{folder}: not a model folder (there is no config.json)') from error
    except (OSError, ValueError) as error:
        raise ValueError(f'{path}: not readable ({error})') from error
    if not isinstance(saved, dict) or 'architecture' not in saved:
        raise ValueError(f'{path}: not the config.json of a timm model (it names no architecture)')
    return saved


def load_model(folder: str | Path, **args: Any) -> nn.Module:
    """Loads a model folder (timm's local-dir layout), or the `model` folder in a run's folder.

    Args:
        folder: Holds config.json and the weights.
        **args: Arguments of timm.create_model that replace the saved ones.

    Raises:
        ValueError: If it is not a model folder, or its weights are not those of its config.json.
    """
    folder = _model_folder(Path(folder))
    saved = read_model_config(folder)
    try:
        return timm.create_model(f'local-dir:{folder}', pretrained=True, **args)
    # Weights of another model surface as anything from a KeyError in a checkpoint filter to a RuntimeError of PyTorch.
    except Exception as error:
        reason = ' '.join(str(error).split())[:300]
        raise ValueError(f'{folder}: cannot load its weights into {saved["architecture"]}: {reason}') from error
