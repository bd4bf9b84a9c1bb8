"""Models by one line of text: `NAME[:KEY=VALUE,…]`, such as `vit_dct_small:keep_ratio=1/16,patch_embed=dct`.

A key is an option of the attention where the model's attention has such an option; any other one is an argument of
`timm.create_model`. `convert:BASE:ATTENTION[,KEY=VALUE,…]` is the timm model BASE, converted: in all of its blocks, or
in those that `layers` says, such as `layers=6-11` or `layers=[0,-2,-1]`. ATTENTION may be the YAML file of a plan.
"""

import inspect
import re
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import model_entrypoint
from torch import nn

from vit_efficient.attention import get_attention, trained_options
from vit_efficient.compress import get_compressor
from vit_efficient.models.plans import as_spec
from vit_efficient.models.served import MODELS
from vit_efficient.utils.checks import argument_names, check_options, is_integer, multiples_around, nearest
from vit_efficient.utils.errors import UserError, is_bug_of_plugin, one_line

# Arguments of timm.create_model that stand in no signature.
_OF_BUILDER = ('features_only', 'out_indices', 'pretrained_strict')


def create_from_spec(name: str, options: dict[str, Any], img_size: int | None = None, **factory: Any) -> nn.Module:
    """A model by its name and one set of options, those of its attention and those of timm.create_model.

    Args:
        name: A model of timm, or `convert:BASE:ATTENTION`, or `convert:BASE:PLAN.yaml`, whose options are the model's.
        options: As `utils.options.parse_spec` reads them. `attention_kwargs` may hold those of the attention, too.
        img_size: Side of square images, in pixels. A model that takes any size is built as it is.
        **factory: device and dtype.

    Raises:
        UserError: If there is no such model or option, an option is given twice, the image size is among the options,
            the patches do not divide the image, or timm refuses an argument.
    """
    entry, own = _entry_point(name, options)
    arguments = _arguments(name, options) | own
    if own and isinstance(own['attention'], str):  # what is not said is as `vit_efficient.convert` has it
        arguments['attention_kwargs'] = trained_options(own['attention'], arguments.get('attention_kwargs') or {})
    if img_size is not None:
        if 'img_size' in options:
            raise UserError(
                f'img_size={options["img_size"]!r} must not be among the options of {name}; sizes are given apart '
                '(--img-sizes)'
            )
        if _takes_img_size(name, entry, arguments):
            arguments['img_size'] = img_size
    model = _create(name, entry, arguments | factory)
    embedding = getattr(model, 'patch_embed', None)
    if img_size is not None and isinstance(embedding, PatchEmbed) and not embedding.dynamic_img_pad:
        for side in embedding.patch_size:
            if img_size % side:
                instead = multiples_around(img_size, side)
                raise UserError(f'{img_size=} is not a multiple of the patch size {side}; use {instead}')
    return model


def attention_of(name: str, options: dict[str, Any]) -> Any:
    """The `attention` that a model is built with, given these options; None where timm alone builds it."""
    entry, own = _entry_point(name, options)
    parameter = inspect.signature(model_entrypoint(entry)).parameters.get('attention')
    return None if parameter is None else (options | own).get('attention', parameter.default)


def _entry_point(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What timm calls a model, and the arguments that its name stands for."""
    kind, _, converted = name.partition(':')
    base, _, attention = converted.partition(':')
    known = base if kind == 'convert' else name
    if not timm.is_model(known):
        raise UserError(f'timm knows no model {known!r}{nearest(known, timm.list_models())}')
    if kind != 'convert':
        return name, {}
    for key, given in (('base', base), ('attention', attention)):
        if key in options:
            raise UserError(f'{name} is given {key}={options[key]!r} beside {given}: give it once')
    arguments = {'base': base, 'attention': as_spec(attention)}
    config = timm.get_pretrained_cfg(base)
    if config is not None:  # vit_converted has defaults of its own
        of_base = {'num_classes': config.num_classes, 'img_size': config.input_size[1:]}
        arguments |= {key: value for key, value in of_base.items() if key not in options}
    if 'layers' in options:
        arguments['layers'] = parse_layers(options['layers'])
    return 'vit_converted', arguments


def parse_layers(value: Any) -> list[int] | None:
    """The blocks that a spec names: an index, a range such as '6-11', or a list of them; all for None."""
    if value is None:
        return None
    indices = []
    for part in value if isinstance(value, (list, tuple)) else [value]:
        ends = re.fullmatch(r'(\d+)-(\d+)', part) if isinstance(part, str) else None
        if ends and int(ends[1]) <= int(ends[2]):
            indices += range(int(ends[1]), int(ends[2]) + 1)
        elif is_integer(part):
            indices.append(part)
        else:
            raise UserError(f'layers must be blocks, such as 6-11, 3 or [0,-2,-1], got layers={value}')
    return indices


def _arguments(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of timm.create_model that the options of `create_from_spec` stand for."""
    attention, given = attention_of(name, options), options.get('attention_kwargs') or {}
    if not isinstance(given, dict):
        raise UserError(f'attention_kwargs of {name} must be a mapping of options to values, got {given!r}')
    if attention is None:  # which arguments it takes, only a call can tell
        return dict(options)
    entry, _ = _entry_point(name, options)
    build = model_entrypoint(entry)
    of_converted = not hasattr(build, 'model_cls')  # it may be of any class
    classes = [*MODELS.values()] if of_converted else [build.model_cls]
    bases = {base for cls in classes for base in cls.__mro__ if '__init__' in vars(base)}
    functions = (build, timm.create_model, *bases)
    of_model = {*_OF_BUILDER, *(argument for function in functions for argument in argument_names(function)[0])}
    of_attention, takes_others = _attention_options(attention, given | options)
    if not takes_others:
        cls = 'its base' if of_converted else classes[0].__name__
        has = ', '.join([*of_attention, f'the arguments of {cls} and of timm.create_model'])
        check_options(name, options, [*of_attention, *sorted(of_model.difference(of_attention))], has)
    own = {key: value for key, value in options.items() if key in of_attention or key not in of_model}
    for key in own:
        if key in given:
            raise UserError(f'{name} is given {key}={own[key]!r} beside attention_kwargs={given}: give it once')
    arguments = {key: value for key, value in options.items() if key not in own}
    return arguments | {'attention_kwargs': given | own} if own else arguments


def _attention_options(attention: Any, options: dict[str, Any]) -> tuple[list[str], bool]:
    """The names of a mechanism's options and of those of its compressor, and whether it takes any others by name."""
    if not isinstance(attention, str):  # it is spelled out, with its options
        return [], False
    cls, preset = get_attention(attention)
    (_, *names), takes_others = argument_names(cls.configure)  # without self
    compressor = (preset | options).get('compressor')
    if not takes_others or compressor is None:
        return names, takes_others
    more, takes_others = get_compressor(compressor).option_names()
    return names + more, takes_others


def _takes_img_size(name: str, entry: str, arguments: dict[str, Any]) -> bool:
    config = timm.get_pretrained_cfg(entry)
    if config is not None and config.fixed_input_size:
        return True
    # Of other models timm does not say it, the class does.
    with torch.device('meta'):
        model = _create(name, entry, {**arguments, 'pretrained': False, 'checkpoint_path': ''})
    return 'img_size' in inspect.signature(type(model)).parameters


def _create(name: str, entry: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(entry, **arguments)
    except UserError:
        raise
    except OSError as error:
        if not arguments.get('pretrained'):
            raise
        raise UserError(
            f'the pretrained weights of {name} cannot be had: {one_line(error)}. Without a network, give weights that '
            'are here: model.init_from=… in a recipe, pretrained_cfg_overlay=dict(file=…) in Python'
        ) from error
    # timm's models check their arguments in many ways, or not at all.
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_bug_of_plugin(error):
            raise
        raise UserError(f'timm cannot build {name}: {one_line(error)}') from error
