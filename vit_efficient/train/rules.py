"""What a recipe must fulfil: each key its range, and the keys together what they ask of each other."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from vit_efficient.train.config import Config, DistillConfig, HealConfig, StageConfig
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.keys import check_ranges, flatten

# The values with which augmentation and mixing leave every pixel at its place.
_STILL = {
    'data.schedule': [],
    **dict.fromkeys(('data.augment.crop_scale', 'data.augment.crop_zoom')),
    **dict.fromkeys(('data.augment.hflip', 'data.augment.vflip'), 0.0),
    **dict.fromkeys((f'data.augment.affine.{name}' for name in ('rotate', 'translate', 'scale', 'shear')), 0.0),
    'data.augment.rand_ops': 0,
    **dict.fromkeys(('data.augment.erasing', 'loss.mixup', 'loss.cutmix'), 0.0),
}
# The values with which an image has the pixels of one image.
_OF_MASKS = {
    'data.decode': 'pixels',
    'data.crop_pct': None,
    **dict.fromkeys(('loss.mixup', 'loss.cutmix'), 0.0),
    'loss.bce': False,
}
# The values with which nothing is done to coefficients that only pixels allow.
_ON_COEFFICIENTS = {
    'task': 'classification',
    **dict.fromkeys(('data.interpolation', 'data.crop_pct', 'data.crop_mode')),
    **{name: value for name, value in _STILL.items() if name.rpartition('.')[2] not in ('hflip', 'vflip', 'mixup')},
    'data.augment.three': False,
    **dict.fromkeys(('data.augment.color_jitter', 'data.augment.hue', 'data.augment.dct_truncate'), 0.0),
}


def validate(config: Config) -> None:
    """Checks the ranges of values, and values that go together.

    Raises:
        UserError: Naming the first key whose value does not fit, with the value and what it must be.
    """
    check_ranges(config)
    _check_text(config)
    data = config.data
    if config.parallel == 'fsdp' and config.channels_last:
        raise UserError('channels_last must be false for parallel=fsdp, which takes contiguous weights only; got true')
    _check_length(config)
    _check_sizes(config)
    if data.on_error == 'skip' and data.batch_size < 2:
        raise UserError(
            'data.batch_size must be at least 2 for data.on_error=skip, got 1: another image of its batch takes the '
            'place of one that cannot be read'
        )
    if not config.model.head:
        of_head = {'model.head_args': {}, 'model.freeze': False, 'model.reduce': 1, 'model.upsample': False}
        _require(config, of_head, 'no model.head, which it is of; set model.head=multilayer')
    if config.model.freeze and any(
        stage.attention or stage.freeze or stage.prune is not None for stage in config.stages
    ):
        raise UserError('stages must not change the model with model.freeze=true, by which only its head learns')
    if config.model.head and config.task != 'segmentation':
        raise UserError(f'model.head={config.model.head} is for task=segmentation, got task={config.task}')
    if config.truncation.budget and not config.truncation.penalty:
        raise UserError(
            f'truncation.budget={config.truncation.budget:g} has no effect without a penalty; set truncation.penalty, '
            'or truncation.budget=0'
        )
    if not config.model.attention and (config.model.attention_kwargs or config.model.layers is not None):
        raise UserError(
            'model.attention_kwargs or model.layers are set, and no model.attention to give them to; options of the '
            "model's own attention are model.args.attention_kwargs"
        )
    _check_teacher(config)
    _check_healing(config)
    if config.stages:
        _check_stages(config)
    elif config.sched.epochs and config.sched.warmup_epochs > config.sched.epochs:
        limit, warmup = config.sched.epochs, config.sched.warmup_epochs
        raise UserError(f'sched.warmup_epochs must be at most sched.epochs={limit}, got {warmup}')
    if (config.loss.mixup or config.loss.cutmix) and data.batch_size % 2:
        raise UserError(f'data.batch_size must be even for mixup and cutmix, got {data.batch_size}')
    if data.decode == 'coefficients':
        reason = 'they can be cropped by whole patches, flipped and mixed (mixup), no more'
        _require(config, _ON_COEFFICIENTS, f'data.decode=coefficients: {reason}')


def check_targets(config: Config, of_patches: bool, of_pixels: bool) -> None:
    """Checks what a task of patches asks of augmentation, or one of pixels (masks), which move with their image; and
    that what is for these alone is not asked for elsewhere.

    Raises:
        UserError: Naming the first key whose value does not fit.
    """
    if of_pixels:
        return _require(config, _OF_MASKS, 'masks: each pixel has one class')
    _require(config, {'loss.masks': 'cross_entropy', 'loss.class_weights': None}, 'data without masks')
    if of_patches:
        _require(config, _STILL, f'task={config.task}: the target of patches does not move with the pixels')


def check_cached(config: Config) -> None:
    """Checks what `data.cache_features` asks of a recipe.

    Raises:
        UserError: Naming the first key whose value does not fit.
    """
    required = {**_STILL, 'data.augment.three': False}
    required |= dict.fromkeys((f'data.augment.{name}' for name in ('color_jitter', 'hue', 'dct_truncate')), 0.0)
    reason = 'data.cache_features: each image goes once through a model that does not learn'
    if config.task == 'features':
        if any(stage.heal == 'align' for stage in config.stages):
            raise UserError(
                "stages must not align with data.cache_features: what a teacher's attentions do is not kept"
            )
        return _require(config, required, reason)
    _require(config, required | {'model.freeze': True, 'parallel': 'ddp', 'channels_last': False}, reason)


def without_effect(config: Config) -> str:
    """The keys that have been given another value than the default, and do nothing beside the others; '' if none."""
    values, defaults, augment = flatten(config), flatten(Config()), config.data.augment
    untaught = config.distill.teacher and not config.distill.weight
    idle = {
        'sched.sched=none': config.sched.sched == 'none' and ('sched.warmup_epochs', 'sched.warmup_lr', 'sched.min_lr'),
        f'task={config.task}': config.task != 'both' and ('loss.patch_weight',),
        'loss.masks=dice': config.loss.masks == 'dice' and ('loss.smoothing',),
        'model.freeze=true': config.model.freeze and ('optim.layer_decay',),
        'ema.decay=0': not config.ema.decay and ('ema.warmup',),
        'distill.kind=hard': config.distill.kind == 'hard' and ('distill.temperature',),
        'distill.weight=0': untaught and ('distill.kind', 'distill.temperature'),
        'distill.weight=0, distill.outputs=0': untaught and not config.distill.outputs and ('distill.teacher',),
        'heal.solve=0': not config.heal.solve and ('heal.ridge',),
        'heal.blocks=[]': config.heal.blocks == [] and ('heal.blocks_weight',),
        'no data.dataset': not config.data.dataset and ('data.root',),
        'data.augment.crop_scale=null': augment.crop_scale is None and ('data.augment.crop_ratio',),
        'data.augment.crop_zoom': augment.crop_zoom and ('data.augment.crop_scale', 'data.augment.crop_ratio'),
        'data.augment.rand_ops=0': not augment.rand_ops and ('data.augment.rand_magnitude',),
        'data.augment.dct_truncate=0': not augment.dct_truncate and ('data.augment.dct_truncate_ratio',),
    }
    found = [
        f'{key}={values[key]} ({reason})'
        for reason, keys in idle.items()
        for key in keys or ()
        if values[key] != defaults[key]
    ]
    return ', '.join(found)


def _check_text(config: Config) -> None:
    for name, value in flatten(config).items():
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            reason = 'a recipe is kept as UTF-8, and a name that is none cannot stand in it'
            raise UserError(f'{name}={value!r}: {reason}; rename it, or give another name by a link') from error


def _require(config: Config, required: dict[str, Any], reason: str) -> None:
    values = flatten(config)
    for name, value in required.items():
        if values[name] != value:
            raise UserError(f'{name} must be {"null" if value is None else value} for {reason}; got {values[name]!r}')


def _check_length(config: Config) -> None:
    if config.sched.epochs:
        return
    if config.task != 'features' or not config.heal.solve:
        raise UserError(
            'sched.epochs must be at least 1, got 0: without training only least squares change a model, which '
            f'task=features has with heal.solve; got task={config.task}, heal.solve={config.heal.solve}'
        )
    if config.stages or config.data.schedule:
        raise UserError('sched.epochs=0 trains nothing: set stages=[] and data.schedule=[]')


def _check_sizes(config: Config) -> None:
    before = -1
    for number, part in enumerate(config.data.schedule):
        if not before < part.epoch < config.sched.epochs:
            limits = (
                f'{"above the one before" if number else "at least 0"}, and below sched.epochs={config.sched.epochs}'
            )
            raise UserError(f'data.schedule[{number}].epoch must be {limits}, got {part.epoch}')
        before = part.epoch
        if len(part.img_size) != 2 or min(part.img_size) < 1:
            raise UserError(f'data.schedule[{number}].img_size must be height and width in pixels, got {part.img_size}')


def _check_teacher(config: Config) -> None:
    if not config.distill.teacher:
        given, defaults = vars(config.distill), vars(DistillConfig())
        idle = [f'distill.{key}={json.dumps(defaults[key])}' for key in given if given[key] != defaults[key]]
        if idle:
            without = ' '.join(map(shlex.quote, idle))
            raise UserError(f'distill has options, and no teacher; set distill.teacher, or {without}')
        return
    if config.distill.weights and Path(config.distill.teacher).is_dir():
        raise UserError(
            f'distill.weights must be empty for distill.teacher={config.distill.teacher}, a folder, which has its own; '
            f'got {config.distill.weights!r}'
        )
    if config.distill.outputs and config.compile:
        raise UserError('compile must be false for distill.outputs, which looks into blocks; got true')
    if not config.distill.weight:
        return
    values = flatten(config)
    for name, allowed in (('task', ('classification',)), ('data.decode', ('pixels', 'scaled'))):
        if values[name] not in allowed:
            raise UserError(f'{name} must be {" or ".join(allowed)} with distill.teacher, got {values[name]!r}')
    if config.loss.bce:  # a mean over the classes, in the place of a sum
        raise UserError(
            'loss.bce=true is too small to be heard beside a teacher; set loss.bce=false with distill.teacher'
        )


def _check_healing(config: Config) -> None:
    keys = config.heal
    if config.task != 'features':
        given, defaults = vars(keys), vars(HealConfig())
        idle = [f'heal.{key}={json.dumps(defaults[key])}' for key in given if given[key] != defaults[key]]
        if idle:
            raise UserError(f'heal has options, and task={config.task}; set task=features, or {" ".join(idle)}')
        for number, stage in enumerate(config.stages):
            if stage.heal:
                raise UserError(f'stages[{number}].heal is for task=features, got task={config.task}')
        return
    off = {'loss.mixup': 0.0, 'loss.cutmix': 0.0, 'loss.bce': False, 'distill.teacher': ''}
    _require(config, off, 'task=features, which has no labels, and a teacher of its own')
    if not any((keys.prefix, keys.patch, keys.centred, keys.smooth)):
        raise UserError('heal: one of prefix, patch, centred and smooth must be above 0, or nothing is learned')
    if keys.teacher_size and (keys.solve or any(stage.heal == 'align' for stage in config.stages)):
        raise UserError(
            'heal.teacher_size: least squares and align compare what blocks make of one and the same image; set '
            'heal.solve=0, and let no stage align'
        )


def _check_stages(config: Config) -> None:
    for number, stage in enumerate(config.stages):
        warmup = config.sched.warmup_epochs if stage.warmup_epochs is None else stage.warmup_epochs
        if not 0 <= warmup <= stage.epochs or not math.isfinite(warmup):
            limits = f'from 0 to the {stage.epochs} epochs of the stage'
            raise UserError(f'stages[{number}].warmup_epochs must be {limits}, got {warmup!r}')
        if stage.attention and stage.freeze:
            raise UserError(f'stages[{number}] has attention and freeze; give the second of them a stage of its own')
        if not stage.attention and (stage.attention_kwargs or stage.layers is not None):
            raise UserError(f'stages[{number}] has attention_kwargs or layers, and no attention to give them to')
    _check_pruning(config)
    freezing = [number for number, stage in enumerate(config.stages) if stage.freeze]
    if len(freezing) > 1:
        raise UserError(f'freeze is for one stage, that of {" and ".join(map(str, freezing))} is true (stages)')
    if freezing == [0]:
        raise UserError(
            'stages[0].freeze must be false: a run freezes what it has learned; for another model there is '
            'vit_efficient.freeze_truncation'
        )
    epochs = sum(stage.epochs for stage in config.stages)
    if epochs != config.sched.epochs:
        raise UserError(f'sched.epochs must be {epochs}, as all stages together have, got {config.sched.epochs}')


def _check_pruning(config: Config) -> None:
    pruned = None
    for number, stage in enumerate(config.stages):
        for key in ('prune_method', 'prune_skip'):
            if stage.prune is None and getattr(stage, key) != getattr(StageConfig(), key):
                raise UserError(f'stages[{number}] has {key}={getattr(stage, key)}, and no prune; set both')
        if stage.prune is not None and config.task == 'features':
            raise UserError(
                f'stages[{number}].prune is for a task with labels, got task=features; prune what has been healed'
            )
        pruned = number if pruned is None and stage.prune is not None else pruned
        for key in ('attention', 'freeze'):
            if pruned is not None and getattr(stage, key):
                raise UserError(
                    f'stages[{number}].{key}={json.dumps(getattr(stage, key))} changes layers that stages[{pruned}] '
                    'prunes, and masks would not fit them; give the change an earlier stage'
                )
