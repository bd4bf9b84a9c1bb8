"""Model folders: timm's `local-dir:` layout, `model.safetensors` beside `config.json`, written and read.

A DCT has no weights, so only the config can tell a keep ratio: it holds the architecture, the attention of each layer
and its options, and `timm.create_model('local-dir:FOLDER', pretrained=True)` gives the same outputs back.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from vit_efficient.models.blocks import grid_blocks
from vit_efficient.models.forward import GridForward, backbone_of
from vit_efficient.models.patch_embed import PATCH_OPTIONS, DctPatchEmbed
from vit_efficient.utils.compat import model_args, save_model_config, unwrap
from vit_efficient.utils.errors import UserError, one_line
from vit_efficient.utils.files import replacing

_OF_HEAD = {'num_classes', 'global_pool'}  # what `reset_classifier` changes


def model_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments with which its entry point builds this model as it stands.

    Args:
        model: A registered or converted model, wrapped or not; of other timm models, what timm recorded.

    Raises:
        UserError: If an attention in it is not a registered one, it is timm's with a patch embedding of ours, or what
            `features_only=True` has left of a model that is not ours.
    """
    parts = [*unwrap(model)]
    arguments = {name: value for part in parts for name, value in model_args(part).items()}
    features_only = arguments.pop('features_only', False)
    for name in ('out_indices', 'feature_cls'):
        arguments.pop(name, None)
    model = parts[-1]
    embedding = getattr(model, 'patch_embed', None)
    in_coefficients = isinstance(embedding, DctPatchEmbed)
    if features_only and not isinstance(model, GridForward):
        raise UserError(
            'features_only=True leaves out parts of a timm model, and what is left could not be built again; save the '
            "model built without it, and load that with features_only=True, or convert() it first, if only to 'full'"
        )
    if backbone_of(model) is not model:  # with a head for patches
        return model.construction()
    if not isinstance(model, GridForward):
        if in_coefficients:
            kind = type(model).__name__
            raise UserError(f'{kind} has a DctPatchEmbed, unknown to timm; convert_patch_embed() makes it one to save')
        # Its head may have been replaced since.
        return arguments | {key: getattr(model, key, arguments[key]) for key in _OF_HEAD & arguments.keys()}
    spec = model.attention_spec()
    for i, (name, _) in zip(grid_blocks(model), spec, strict=True):
        if not name:
            raise UserError(f'the attention of blocks.{i} is no registered one; build it by name, with convert()')
    # Name and options together, so that another attention asked for when it is read back does not get the options.
    layers = [list(layer) for layer in spec]
    arguments['attention'] = layers[0] if layers and all(layer == layers[0] for layer in layers) else layers
    arguments['attention_kwargs'] = {}
    # What can be changed after construction is read off the model.
    for name in ('patch_embed', *(f'patch_{name}' for name in PATCH_OPTIONS)):
        arguments.pop(name, None)
    if in_coefficients:
        arguments.update({f'patch_{name}': embedding.options[name] for name in PATCH_OPTIONS})
    return arguments | model.construction()


def save_model(
    model: nn.Module, folder: str | os.PathLike, label_names: Sequence[str] | None = None, **about: Any
) -> None:
    """Saves a model to a folder in timm's `local-dir:` layout.

    Both files are written before the first one takes its place: what can fail leaves the earlier model as it was.

    Args:
        model: Built by `timm.create_model`, converted or not; what is wrapped is saved as what the wrapper holds.
        folder: Made where it does not exist.
        label_names: Names of the classes, in order; they go into the config.
        **about: What else goes there, of types that JSON has.

    Raises:
        UserError: If the model was not built by `timm.create_model`, or an attention in it is not registered.
    """
    import safetensors.torch  # not needed to use a model

    *_, inner = unwrap(model)
    if not getattr(inner, 'pretrained_cfg', {}).get('architecture'):
        raise UserError(f'{type(inner).__name__} has no pretrained_cfg; build it with timm.create_model to save it')
    arguments = model_arguments(model)
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in inner.state_dict().items()}
    labels = {} if label_names is None else {'label_names': list(label_names)}
    with replacing(folder / 'config.json') as config_path, replacing(folder / 'model.safetensors') as weights_path:
        save_model_config(inner, config_path, arguments, **labels, **about)
        safetensors.torch.save_file(tensors, weights_path)


def model_folder(folder: Path) -> Path:
    """The folder itself or, of a run's folder, the model folder in it.

    Raises:
        UserError: If there is no such folder, or it is that of a run that is not done.
    """
    if not folder.is_dir():
        raise UserError(f'{folder}: no such model folder')
    if (folder / 'config.json').exists():
        return folder
    in_run, best = folder / 'model', folder / 'best'
    if not (in_run / 'config.json').exists() and (folder / 'recipe.yaml').exists():
        instead = f', or take the best model so far, {best}' if (best / 'config.json').exists() else ''
        raise UserError(f'{folder}: the run has not come to its end, and saved no model; go on with it{instead}')
    return in_run if (in_run / 'config.json').exists() else folder


def read_model_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder."""
    path = folder / 'config.json'
    try:
        saved = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise UserError(f'{folder}: not a model folder (there is no config.json)') from error
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: not readable ({error})') from error
    if not isinstance(saved, dict) or 'architecture' not in saved:
        raise UserError(f'{path}: not the config.json of a timm model (it names no architecture)')
    if not isinstance(saved.get('model_args') or {}, dict):
        raise UserError(f'{path}: model_args must be a mapping, got {saved["model_args"]!r}')
    return saved


def load_model(folder: str | Path, **args: Any) -> nn.Module:
    """Loads a model folder (timm's local-dir layout), or the `model` folder in a run's folder.

    Args:
        folder: Holds config.json and the weights.
        **args: Arguments of timm.create_model that replace the saved ones.

    Raises:
        UserError: If it is not a model folder, or its weights are not those of its config.json.
    """
    folder = model_folder(Path(folder))
    architecture = read_model_config(folder)['architecture']
    try:
        return timm.create_model(f'local-dir:{folder}', pretrained=True, **args)
    # Weights of another model surface as anything from a KeyError in a checkpoint filter to a RuntimeError of PyTorch.
    except Exception as error:
        if '.starts' in str(error):
            raise UserError(f'{folder}: a sparse model; vit_efficient.sparse.load_sparse reads it') from error
        raise UserError(f'{folder}: cannot load its weights into {architecture}: {one_line(error)}') from error
