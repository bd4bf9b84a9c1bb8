"""The recipe by which a model is healed of which only the essentials are said."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from vit_efficient.models.create import create_from_spec, parse_layers
from vit_efficient.models.inputs import image_size
from vit_efficient.models.plans import is_plan
from vit_efficient.models.saving import model_folder, read_model_config
from vit_efficient.train.config import Config
from vit_efficient.train.recipe import load_recipe
from vit_efficient.utils.checks import as_integer, as_share, multiples_around, nearest
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.options import parse_spec, parse_value

HELD_OUT = 10  # one image in so many is not learned from
SMALL = 0.55  # of the side of images at use, that of those which most is learned from


def recipe_of_model(
    template: Path,
    model: str,
    images: str | None,
    attention: str | None,
    keep_ratio: str | None = None,
    img_size: int | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """The template, filled in.

    Args:
        template: A recipe of task features.
        model: A run or model folder, or timm's name of a pretrained model.
        images: A folder, or a list, of which every tenth image is held out.
        attention: `NAME[:KEY=VALUE,…]`, or the file of a plan.
        keep_ratio: An option of that attention.
        img_size: Side of images at use; by default the model's own.
        out: Of the run.
        overrides: As of `load_recipe`; they go first.

    Raises:
        UserError: If something is missing, there is no such model, or the patches do not divide the images.
    """
    if images is None or attention is None:
        raise UserError(
            f'{model} is no recipe (.yaml), and to heal a model --images and --attention must be given, such as '
            '--images photographs --attention dct:keep_ratio=1/4'
        )
    if images.lower().endswith('.tar'):
        raise UserError(
            f'--images {images}: of shards none is held out; copy a recipe, `vit-efficient recipe copy heal/images`, '
            'and set data.train, data.val, data.args={} and data.val_args={}'
        )
    name, options = (attention, {}) if is_plan(attention) else parse_spec(attention)
    layers = parse_layers(options.pop('layers', None))
    if keep_ratio is not None:
        if is_plan(attention) or 'keep_ratio' in options:
            raise UserError(f'--keep-ratio={keep_ratio} beside --attention {attention}, which says it already')
        options['keep_ratio'] = as_share('--keep-ratio', parse_value(keep_ratio))
    architecture, saved, source = _source(model)
    with torch.device('meta'):
        built = create_from_spec(architecture, saved)
    patch = getattr(getattr(built, 'patch_embed', None), 'patch_size', None)
    if not patch:
        raise UserError(f'{model}: a {type(built).__name__} has no one grid of patches, and cannot be healed')
    size = list(image_size(built) or (224, 224)) if img_size is None else [as_integer('--img-size', img_size)] * 2
    step = math.lcm(*patch)
    if img_size is not None and img_size % step:
        of = step if patch[0] == patch[1] else f'{patch[0]} × {patch[1]}'
        instead = multiples_around(img_size, step)
        raise UserError(f'--img-size={img_size} is not a multiple of the patch size {of}; use {instead}')
    any_size = hasattr(built, 'dynamic_img_size')
    small = [max(8, round(SMALL * side / of)) * of for side, of in zip(size, patch, strict=True)]
    args = {'img_size': size if len({*size}) > 1 else size[0], **({'dynamic_img_size': True} if any_size else {})}
    keys: dict[str, Any] = {
        'model.name': architecture,
        'model.args': args if source else {**args, 'pretrained': True},
        'model.attention': name,
        'model.attention_kwargs': options,
        **({} if layers is None else {'model.layers': layers}),
        'data.train': images,
        'data.val': images,
        'data.img_size': size,
        'output': str(out or Path('runs/heal', f'{Path(model).name}-{Path(name).stem}')),
    }
    if source:
        keys['model.init_from'] = source
    texts = [f'{key}={value if isinstance(value, str) else json.dumps(value)}' for key, value in keys.items()]
    # The last stage is at the size of use.
    later = sum(stage.epochs for stage in load_recipe(template, [*texts, *overrides]).stages[:-1])
    if any_size and later and all(a < b for a, b in zip(small, size, strict=True)):
        sizes = [{'epoch': 0, 'img_size': small}, {'epoch': later, 'img_size': size}]
        texts.append(f'data.schedule={json.dumps(sizes)}')
    config = load_recipe(template, [*texts, *overrides])
    if source and Path(config.output).resolve() == Path(source).resolve():
        raise UserError(f'--out {config.output} is the model that is to be healed; give the run a folder of its own')
    return config


def _source(model: str) -> tuple[str, dict[str, Any], str]:
    """The architecture of a model and its arguments, and the folder of its weights; '' for those that timm fetches."""
    if Path(model).is_dir():
        saved = read_model_config(model_folder(Path(model)))
        return saved['architecture'], dict(saved.get('model_args') or {}), model
    if not timm.is_model(model):
        raise UserError(f'{model}: no such recipe, folder, or model of timm{nearest(model, timm.list_models())}')
    if not timm.get_pretrained_cfg(model).has_weights:
        raise UserError(f'{model}: timm has no pretrained weights of it')
    return model, {}, ''
