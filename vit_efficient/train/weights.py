"""Weights that a run starts from (`model.init_from`): where they lie, what they are of, and how they are loaded."""

import logging
import struct
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict
from torch import Tensor, nn

from vit_efficient.dense import DenseModel
from vit_efficient.models.checkpoints import checkpoint_filter_fn
from vit_efficient.models.saving import load_model, model_folder, read_model_config
from vit_efficient.train.checkpoint import damaged_part, load_checkpoint
from vit_efficient.train.config import Config, ModelConfig
from vit_efficient.train.same_attention import (
    SOURCES,
    SPELLED_OUT,
    base_of,
    check_same_attention,
    convert_as_asked,
    way_out,
)
from vit_efficient.utils.compat import saved_model_config
from vit_efficient.utils.errors import UserError, first_line, one_line

# Entries of timm's pretrained_cfg: what weights were trained on.
STATISTICS = ('mean', 'std')
_OF_IMAGES = (*STATISTICS, 'input_size', 'interpolation', 'crop_pct', 'crop_mode')
# What the unpickler raises for a file that is none of its own, and that says nothing of it.
_STUMBLING = (ArithmeticError, AttributeError, EOFError, LookupError, TypeError, ValueError, struct.error)

DENSE = 'vit_dense'
_OF_HEAD = ('head', 'head_args', 'num_classes')

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Weights, and what is known of the model that they were saved from."""

    path: Path
    weights: dict[str, Tensor] | None = None  # of a file; None: of the model folder `path`
    model: ModelConfig = field(default_factory=ModelConfig)  # that the weights are of; its name is '' if none knows
    told: dict[str, Any] = field(default_factory=dict)  # entries of pretrained_cfg on images and classes

    @classmethod
    def open(cls, name: str) -> 'Source':
        """A model folder, that of a run, a checkpoint of a run, or a checkpoint of timm, beside a config.json or not.

        Raises:
            UserError: If it is none of these, or cannot be read.
        """
        path = Path(name)
        if path.is_dir():
            source = cls(model_folder(path), **_saved_model(model_folder(path)))
            return source._of_backbone() if source.model.name == DENSE else source
        if not path.exists():
            raise UserError(f'model.init_from={path}: no such file or folder')
        beside = _saved_model(path.parent) if (path.parent / 'config.json').exists() else {}
        state = None
        with suppress(UserError):
            state = load_checkpoint(path)
        if not state:
            return cls(path, _load_weights(path), **beside)
        identity = state['identity']
        if any(stage['attention'] or stage.get('freeze') for stage in identity.get('stages') or []):
            raise UserError(
                f'model.init_from={path} belongs to a run whose stages change the model; give the folder of the '
                'finished run, which says what it has become'
            )
        if identity.get('heal.lora'):
            raise UserError(
                f'model.init_from={path} belongs to a run with heal.lora, whose updates lie apart there; give the '
                'folder of the finished run'
            )
        given = {key.removeprefix('model.'): value for key, value in identity.items() if key.startswith('model.')}
        model = ModelConfig(**{key: value for key, value in given.items() if key in vars(ModelConfig())})
        return cls(path, state.get('ema') or state['model'], model, state.get('preprocessing', {}))

    def _of_backbone(self) -> 'Source':
        """Of a model with a head for patches, the backbone's part; the head follows by `take_head`."""
        args = self.model.args
        weights = dict(load_model(self.path).backbone.state_dict())
        told = {key: value for key, value in self.told.items() if key != 'num_classes'}
        return replace(
            self, weights=weights, model=ModelConfig(args['backbone'], dict(args['backbone_args'])), told=told
        )


def take_parts(model: DenseModel, name: str) -> None:
    """Gives a model what was saved beside the weights of the backbone it starts from: the upsampler of features, and
    the head, if it is of the same kind.

    Raises:
        UserError: If the model has an upsampler, and none was saved that fits it.
    """
    path = Path(name)
    dense = path.is_dir() and read_model_config(model_folder(path))['architecture'] == DENSE
    saved = load_model(path) if dense else None
    if model.upsampler is not None:
        if saved is None or saved.upsampler is None or saved.reduce != model.reduce:
            raise UserError(
                f'model.init_from={path} has no upsampler for model.reduce={model.reduce}, which model.upsample asks '
                'for; name the folder of a model that has one (see recipes/cutouts/train_upsampler.py)'
            )
        model.upsampler.load_state_dict(saved.upsampler.state_dict())
    if saved is None:
        return
    ours, theirs = ({key: each.construction()[key] for key in _OF_HEAD} for each in (model, saved))
    if ours == theirs:
        model.head.load_state_dict(saved.head.state_dict())
        logger.info('model.init_from=%s: the head goes on from there', path)
    else:
        logger.info('model.init_from=%s: the head is new, since that one is of %s', path, theirs)


def _saved_model(folder: Path) -> dict[str, Any]:
    read_model_config(folder)  # for what it says of a file that is none
    config, name, args = saved_model_config(folder)
    told = {key: config[key] for key in (*_OF_IMAGES, 'num_classes') if config.get(key) is not None}
    return {'model': ModelConfig(name, dict(args or {})), 'told': told}


def _load_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of timm; their moving average, if it holds one."""
    with suppress(OSError, zipfile.BadZipFile):  # timm says what is wrong with it, if anything
        if damaged := damaged_part(path):
            raise UserError(f'model.init_from={path}: damaged ({damaged} is not what was written)')
    try:
        weights = load_state_dict(str(path), use_ema=True)
    # A damaged file raises whatever the archive reader or the unpickler stumbles over.
    except Exception as error:
        reason, cause = f'{type(error).__name__}: {first_line(error)}', error.__cause__ or error
        if isinstance(error, AttributeError) and error.name == 'items':
            reason = f'it holds a {type(error.obj).__name__}, not a dict of tensors'
        elif isinstance(cause, _STUMBLING) or 'Unsupported operand' in str(cause):
            reason = 'it is no file of PyTorch'
        raise UserError(f'model.init_from={path}: not a file of weights that timm can read ({reason})') from error
    if not _are_weights(weights):
        parts = [name for name, part in weights.items() if isinstance(part, dict) and _are_weights(part)]
        within = f' but those within {" and ".join(parts)}; save one of these alone' if parts else ''
        raise UserError(f'model.init_from={path}: holds no weights{within}')
    return weights


def _are_weights(state: dict[str, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in state.values())


def _without_prefix(source: Source, name: str) -> Source:
    """Weights by the names that a model has for them, of a file where they lie below one, such as `backbone.`.

    A classifier is taken from beside them. What else is there, such as a head of self-supervised training, is told of.

    Raises:
        UserError: If there are several such.
    """
    config, weights = timm.get_pretrained_cfg(name), source.weights or {}
    defaults = {'first_conv': 'patch_embed.proj', 'classifier': 'head'}  # of our own models, which are ViTs
    first_conv, head = (_name_of_first(getattr(config, key, each)) for key, each in defaults.items())
    stems = [f'{stem}.weight' for stem in (first_conv, 'patch_embed.linear') if stem]
    found = sorted({key.removesuffix(stem) for key in weights for stem in stems if key.endswith(f'.{stem}')})
    # A layer may have the name of the first one in a block of the same model.
    prefixes = [each for each in found if not any(each != other and each.startswith(other) for other in found)]
    if not prefixes or any(stem in weights for stem in stems):
        return source
    if len(prefixes) > 1:
        raise UserError(
            f'model.init_from={source.path}: holds weights of several models, below {" and ".join(prefixes)}; save '
            'those of one alone'
        )
    (prefix,) = prefixes
    found = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    beside = [key for key in weights if not key.startswith(prefix)]
    found = {key: weights[key] for key in beside if head and key in (f'{head}.weight', f'{head}.bias')} | found
    left = [key for key in beside if key not in found]
    also = f', without {len(left)} others, such as {left[0]}' if left else ''
    logger.info('model.init_from=%s: the weights below %s are taken%s', source.path, prefix, also)
    return replace(source, weights=found)


def model_from_weights(config: Config, args: dict[str, Any]) -> nn.Module:
    """The model of a recipe as `model.init_from` fills it, converted if it says so, with the classes of the weights.

    What images they were trained on follows them, where it is known: normalisation, size and crop.

    Raises:
        UserError: If the weights cannot be read, or are of another model, attention or number of heads.
    """
    given = [key for key in SOURCES if args.pop(key, None)]
    if given:
        logger.info('model.args.%s: no effect beside model.init_from', ', model.args.'.join(given))
    wanted, source = replace(config.model, args=args), Source.open(config.model.init_from)
    source = _without_prefix(source, wanted.name)
    exact = check_same_attention(source.path, source.model, wanted, config.sched.epochs, source.weights)
    if not {*STATISTICS} <= source.told.keys():
        say_assumed(f'model.init_from={source.path}', config)
    arch = wanted.name.partition('.')[0]
    if source.weights is None and (
        source.model.name == arch or (not exact and base_of(source.model) == arch and wanted.attention)
    ):
        # The folder spells the same attention out; said twice, it would be refused.
        model = load_model(source.path, **{key: value for key, value in args.items() if key not in SPELLED_OUT})
    else:
        try:
            model = _load(source, wanted, into_converted=not exact and bool(wanted.attention))
        except Exception as error:
            reason = f'{one_line(error)}{way_out(source.path, source.model, wanted)}'
            raise UserError(f'model.init_from={source.path} does not fit {wanted.name}: {reason}') from error
    return convert_as_asked(model, wanted) if exact else model


def say_assumed(source: str, config: Config) -> None:
    """Tells what is assumed of images, of which weights do not say how they were normalised."""
    if config.data.mean is None or config.data.std is None:
        default = timm.get_pretrained_cfg(config.model.name)
        mean, std = (list(getattr(default, name, ())) for name in STATISTICS)
        logger.info(
            '%s does not say how its images were normalised: by mean %s and std %s, as those of %s, is assumed; '
            'else set data.mean and data.std',
            *(source, mean, std, config.model.name),
        )


def _load(source: Source, wanted: ModelConfig, into_converted: bool) -> nn.Module:
    """The model as it is built, or as it is converted, with the weights of a source by timm's own loader."""
    default = timm.get_pretrained_cfg(wanted.name)
    config = {**(default.to_dict(remove_source=True) if default else {}), **source.told, 'custom_load': False}
    if source.weights is None:
        origin: dict[str, Any] = {'file': str(source.path), 'source': 'local-dir'}
    else:
        origin = {'state_dict': source.weights}
        head, stem = (_first(source.weights, config.get(name)) for name in ('classifier', 'first_conv'))
        if head is not None:
            config['num_classes'] = head.shape[0]
        elif stem is not None:  # they are named as timm names them, and there is no head
            config['num_classes'] = 0
        if stem is not None and stem.ndim == 4:
            config['input_size'] = (stem.shape[1], *config['input_size'][1:])
    args = {**wanted.args, 'num_classes': config.get('num_classes', 1000)}
    if into_converted:
        model = timm.create_model(wanted.name, pretrained_cfg=config, **args)
        convert_as_asked(model, wanted, weights_follow=True)
        weights = load_model(source.path).state_dict() if source.weights is None else source.weights
        model.load_state_dict(checkpoint_filter_fn(dict(weights), model))
        return model
    model = timm.create_model(wanted.name, pretrained=True, pretrained_cfg={**config, **origin}, **args)
    for name in origin:  # timm would keep the weights in memory a second time
        model.pretrained_cfg.pop(name, None)
    return model


def _first(weights: dict[str, Tensor], module: str | tuple[str, ...] | None) -> Tensor | None:
    """The weight of a module, or of the first one of several, by the name that a pretrained_cfg gives."""
    return weights.get(f'{_name_of_first(module)}.weight')


def _name_of_first(module: str | tuple[str, ...] | None) -> str | None:
    return module[0] if isinstance(module, (tuple, list)) else module
