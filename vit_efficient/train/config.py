"""Recipes: YAML files checked against typed defaults.

A recipe may start from another (`extends: base.yaml`, relative to its own folder) and be overridden from the command
line (`optim.lr=1e-3`). Whatever does not fit the dataclasses below is a ValueError that names the key and its source.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from vit_efficient.data.config import DECODE, ON_ERROR, DataConfig
from vit_efficient.utils.errors import UserError, first_line


@dataclass
class ModelConfig:
    name: str = ''  # as in timm.create_model
    args: dict[str, Any] = field(default_factory=dict)  # its keyword arguments
    init_from: str = ''  # weights to start from: a model or run folder, or a checkpoint file of timm


@dataclass
class OptimConfig:
    opt: str = 'adamw'  # a name that timm.optim knows
    lr: float = 1e-3  # at its highest, for the batch size as it is: there is no scaling
    weight_decay: float = 0.05
    layer_decay: float | None = None  # factor of the learning rate from one layer to the one before
    args: dict[str, Any] = field(default_factory=dict)  # further arguments, such as betas


@dataclass
class SchedConfig:
    sched: str = 'cosine'  # a name that timm.scheduler knows, other than plateau; it is stepped after every update
    epochs: int = 100
    warmup_epochs: float = 5.0  # part of epochs
    warmup_lr: float = 1e-6  # where the warm-up starts
    min_lr: float = 1e-5
    args: dict[str, Any] = field(default_factory=dict)  # further arguments of timm's create_scheduler_v2


@dataclass
class StageConfig:
    """A part of a run. Weights go on from one to the next; optimiser, schedule and average of weights start anew."""

    epochs: int = 1  # of sched.epochs, which is their sum
    attention: str = ''  # that its layers change to where the stage begins, as by `convert`; none: all stays
    attention_kwargs: dict[str, Any] = field(default_factory=dict)
    layers: list[int] | None = None  # blocks, negative ones from the end; null: all
    lr: float | None = None  # null: optim.lr
    warmup_epochs: float | None = None  # null: sched.warmup_epochs
    freeze: bool = False  # truncations that are learned become hard ones where the stage begins


@dataclass
class LossConfig:
    smoothing: float = 0.1
    mixup: float = 0.0  # alpha of its beta distribution; 0: off
    cutmix: float = 0.0  # alpha; with both on, each batch takes one of them at even odds
    bce: bool = False  # binary cross-entropy in the place of softmax cross-entropy
    patch_weight: float = 1.0  # of the loss of patches beside that of images, for `task` both


@dataclass
class DistillConfig:
    """A teacher that is heard beside the labels. It sees what the student sees, mixed images too."""

    teacher: str = ''  # a model of timm, with its pretrained weights, or the folder of a run or model; none: no teacher
    weights: str = ''  # the checkpoint file of that model, instead of its pretrained weights
    kind: str = 'soft'  # soft: the divergence from its probabilities; hard: the cross-entropy of its first class
    weight: float = 0.5  # of what the teacher says in the loss; the labels have the rest
    temperature: float = 1.0  # of soft probabilities, the student's and the teacher's


@dataclass
class TruncationConfig:
    """The price of truncations that are learned (`patch_window`, `learned`).

    Where a stage has `freeze`, or else at the end of a run, they become hard ones.
    """

    penalty: float = 0.0  # times what they cost above the budget, as a share of the uncut cost, is added to the loss
    budget: float = 0.0  # the share of the multiply-accumulates of the parts that have one which is free


@dataclass
class EmaConfig:
    decay: float = 0.0  # of an exponential moving average of the weights, which is then what is evaluated; 0: off
    warmup: bool = False  # raise the decay from 0 at the start


@dataclass
class Config:
    """A run. See `DataConfig` and the other sections for their keys."""

    task: str = 'classification'  # of images; segmentation: of patches; both: one model for the two
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sched: SchedConfig = field(default_factory=SchedConfig)
    stages: list[StageConfig] = field(default_factory=list)  # one after the other; none: a single one
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    truncation: TruncationConfig = field(default_factory=TruncationConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    seed: int = 0  # weights, order, augmentation, mixing and dropout follow from it
    output: str = ''  # the run's folder; by default runs/FOLDER/NAME for recipes/FOLDER/NAME.yaml (FOLDER may be deep)
    resume: str = 'never'  # never: refuse a folder that holds a run; auto: go on with it; restart: replace it
    device: str = 'auto'  # auto: the GPU where there is one
    amp: str = 'none'  # none or bf16: the type of matrix products
    compile: bool = False
    channels_last: bool = False  # layout of images and convolutions in memory, for those that a GPU computes faster so
    parallel: str = 'ddp'  # of several processes: ddp, each holds the weights; fsdp, they share them out
    grad_accum: int = 1  # micro-batches of each process per update
    clip_grad: float | None = None  # largest norm of the gradient
    # What a loss or gradient does that is not finite. error: it ends the run, the files of its batch are named. skip:
    # no process takes the update, which is counted; 25 of them in a row end the run.
    on_nonfinite: str = 'error'
    grad_checkpointing: bool = False
    threads: int | None = None  # of PyTorch on the CPU; null: as many as it takes by itself
    log_every: int = 50  # updates
    eval_every: int = 1  # epochs; the last epoch is evaluated in any case
    checkpoint_every: int = 1  # epochs
    checkpoint_steps: int = 0  # updates, within an epoch; 0: at the end of epochs only
    checkpoint_keep: int = 1  # the last ones; if the newest cannot be read, resume=auto takes the one before
    checkpoint_best: bool = False  # keep the model of the best evaluation too, in best/
    recipe: str = ''  # the file; load_recipe fills it in


MAX_THREADS = 1024  # of PyTorch; from some number on, that of the system, they end the process
MAX_NUMBER = 1e300  # of a key that has a type of its own; beyond it integers have no float
TASKS = ('classification', 'segmentation', 'both')

# What may change when a run goes on, because the weights do not depend on it beyond rounding.
_FREE_KEYS = {
    'output',
    'resume',
    'recipe',
    'device',
    'compile',
    'channels_last',
    'parallel',
    'grad_checkpointing',
    'threads',
    'log_every',
    'eval_every',
    'checkpoint_every',
    'checkpoint_steps',
    'checkpoint_keep',
    'checkpoint_best',
    'on_nonfinite',  # where both values lead to weights, these are the same
    'data.train',
    'data.val',
    'data.root',
    'data.val_args',
    'data.eval_batch_size',
    'data.workers',
    'data.cache',
    'data.on_error',  # where both values lead to weights, these are the same
}

# The values with which augmentation and mixing leave every pixel at its place.
_STILL = {
    'data.schedule': [],
    'data.augment.crop_scale': None,
    'data.augment.hflip': 0.0,
    'data.augment.vflip': 0.0,
    'data.augment.affine.rotate': 0.0,
    'data.augment.affine.translate': 0.0,
    'data.augment.affine.scale': 0.0,
    'data.augment.affine.shear': 0.0,
    'data.augment.rand_ops': 0,
    'data.augment.erasing': 0.0,
    'loss.mixup': 0.0,
    'loss.cutmix': 0.0,
}


# The values with which nothing is done to coefficients that only pixels allow.
_ON_COEFFICIENTS = {
    'task': 'classification',
    'data.schedule': [],
    'data.interpolation': None,
    'data.crop_pct': None,
    'data.crop_mode': None,
    'data.augment.crop_scale': None,
    'data.augment.affine.rotate': 0.0,
    'data.augment.affine.translate': 0.0,
    'data.augment.affine.scale': 0.0,
    'data.augment.affine.shear': 0.0,
    'data.augment.three': False,
    'data.augment.color_jitter': 0.0,
    'data.augment.hue': 0.0,
    'data.augment.rand_ops': 0,
    'data.augment.erasing': 0.0,
    'data.augment.dct_truncate': 0.0,
    'loss.cutmix': 0.0,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe.

    Args:
        path: The YAML file.
        overrides: `key=value` with dots in the key; the value is YAML.

    Raises:
        UserError: For a file that cannot be read, an unknown key, or a value of the wrong type or out of its range.
    """
    path = Path(path)
    config = OmegaConf.structured(Config)
    for layer_path, layer in _layers(path):
        config = _merge(config, layer, str(layer_path))
    for override in overrides:
        key, equals, _ = override.partition('=')
        if not equals or not key:
            raise UserError(f'command line: expected key=value, got {override!r}')
        try:
            layer = OmegaConf.from_dotlist([override])
        except Exception as error:  # see `_layers`
            raise UserError(f'command line: {override!r} is not valid: {first_line(error)}') from error
        config = _merge(config, layer, 'command line')
    try:
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f'{path}: {_key_of(error)}{first_line(error)}') from error
    recipe.recipe = path.as_posix()
    if not recipe.output:
        recipe.output = default_output(path).as_posix()
    validate(recipe)
    return recipe


def default_output(path: Path) -> Path:
    """runs/… where the recipe is recipes/…; of recipes elsewhere, their folder and name."""
    parts = path.resolve().with_suffix('').parts
    below = parts[::-1].index('recipes') if 'recipes' in parts else 2
    return Path('runs', *parts[-below:])


def _layers(path: Path, below: tuple[Path, ...] = ()) -> Iterator[tuple[Path, Any]]:
    """The recipes that this one extends, the most basic first, then this one."""
    if path.resolve() in below:
        raise UserError(f'{path}: extends itself')
    try:
        layer = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f'{path}: cannot read the recipe: {error.strerror or first_line(error)}') from error
    except Exception as error:  # a value that is not of the type its tag tells raises anything
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(f'{path}: not valid YAML: {reason}') from error
    if not OmegaConf.is_dict(layer):
        raise UserError(f'{path}: a recipe is a mapping of keys to values')
    content = OmegaConf.to_container(layer)
    base = content.get('extends')
    if 'extends' in content:
        del layer['extends']
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f'{path}: extends must name a recipe, got {base!r}')
        yield from _layers(path.parent / base, (*below, path.resolve()))
    yield path, layer


def _merge(config: Any, layer: Any, source: str) -> Any:
    _check_sections(Config(), OmegaConf.to_container(layer), source)
    try:
        return OmegaConf.merge(config, layer)
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = str(error.full_key)
        raise UserError(f'{source}: unknown key {key}{_suggestion(key)}') from error
    except TypeError as error:  # a list under a mapping, or the other way round
        raise UserError(f'{source}: {first_line(error)}; a list is replaced as a whole') from error
    except OmegaConfBaseException as error:
        raise UserError(f'{source}: {_key_of(error)}{first_line(error)}') from error


def _key_of(error: OmegaConfBaseException) -> str:
    return f'{error.full_key}: ' if error.full_key else ''


def _check_sections(config: Any, layer: dict[Any, Any], source: str, prefix: str = '') -> None:
    """What OmegaConf does not name: the section that is not one, what is in a list, an integer beyond floats."""
    items = {item.name: item for item in fields(config)}
    for key in layer:
        name = f'{prefix}{key}'
        if key not in items:
            raise UserError(f'{source}: unknown key {name}{_suggestion(name, [prefix + item for item in items])}')
        value, section = layer[key], getattr(config, key)
        part = next(iter(get_args(items[key].type)), None)
        if is_dataclass(section):
            if not isinstance(value, dict):
                raise UserError(f'{source}: {name} must be a section of keys, got {value!r}')
            _check_sections(section, value, source, f'{name}.')
        elif is_dataclass(part):
            if not isinstance(value, list):
                raise UserError(
                    f'{source}: {name} must be a list of sections, got {value!r}; it is replaced as a whole'
                )
            for number, element in enumerate(value):
                if not isinstance(element, dict):
                    raise UserError(f'{source}: {name}[{number}] must be a section of keys, got {element!r}')
                _check_sections(part(), element, source, f'{name}[{number}].')
                try:
                    OmegaConf.merge(OmegaConf.structured(part), element)
                except OmegaConfBaseException as error:
                    raise UserError(f'{source}: {name}[{number}].{_key_of(error)}{first_line(error)}') from error
        else:
            origins = {get_origin(kind) for kind in (items[key].type, *get_args(items[key].type))}
            for kind, what in ((list, 'a list'), (dict, 'a mapping of keys to values')):
                if kind in origins and not isinstance(value, (kind, type(None))):
                    raise UserError(f'{source}: {name} must be {what}, got {value!r}')
            for number in value if isinstance(value, list) else [value]:
                if number is not value and isinstance(number, (dict, list)):
                    raise UserError(f'{source}: {name} must be a list of single values, got {value!r}')
                if isinstance(number, int) and abs(number) > MAX_NUMBER:
                    raise UserError(f'{source}: {name} must be at most {MAX_NUMBER:g} in size')


def _suggestion(key: str, beside: Sequence[str] = ()) -> str:
    known = [*flatten(Config()), *beside]
    sections = {name.rpartition('.')[0] for name in known} - {''}
    close = difflib.get_close_matches(key, [*known, *sections], n=1)
    # A key in the wrong section is the other common slip.
    close = close or [name for name in known if name.rpartition('.')[2] == key.rpartition('.')[2]][:1]
    return f'; did you mean {close[0]}?' if close else ''


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
    """The leaves of a configuration by dotted key: {'optim.lr': 0.001, …}. Lists and dicts are leaves."""
    leaves: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            leaves.update(flatten(value, f'{prefix}{item.name}.'))
        else:
            several = isinstance(value, list) and value and is_dataclass(value[0])
            leaves[prefix + item.name] = [asdict(part) for part in value] if several else value
    return leaves


def identity(config: Config) -> dict[str, Any]:
    """The keys on which the weights of a run depend, with their values."""
    return {key: value for key, value in flatten(config).items() if key not in _FREE_KEYS}


def to_yaml(config: Config) -> str:
    """The resolved recipe, as load_recipe reads it."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def validate(config: Config) -> None:
    """Checks the ranges of values.

    Raises:
        UserError: Naming the first key whose value is out of range, with the value and what it must be.
    """
    values = flatten(config)

    def check(keys: str, requirement: str, holds: Any) -> None:
        for key in keys.split():
            value = values[key]
            finite = not isinstance(value, float) or math.isfinite(value)
            if value is not None and not (finite and holds(value)):
                raise UserError(f'{key} must be {requirement}, got {value!r}')

    check('model.name optim.opt sched.sched', 'set', lambda v: v != '')
    check(
        'sched.epochs data.batch_size data.eval_batch_size data.repeats data.mixed_shards grad_accum log_every '
        'eval_every checkpoint_every checkpoint_keep',
        'at least 1',
        lambda v: v >= 1,
    )
    check(
        'data.workers checkpoint_steps sched.warmup_epochs sched.warmup_lr sched.min_lr optim.weight_decay '
        'loss.mixup loss.cutmix loss.patch_weight truncation.penalty data.augment.rand_ops data.augment.affine.rotate '
        'data.augment.affine.shear',
        'at least 0',
        lambda v: v >= 0,
    )
    check('task', ', '.join(TASKS[:-1]) + f' or {TASKS[-1]}', lambda v: v in TASKS)
    check('data.decode', ', '.join(DECODE[:-1]) + f' or {DECODE[-1]}', lambda v: v in DECODE)
    check('seed', 'at least 0 and below 2**32', lambda v: 0 <= v < 2**32)
    check('optim.lr clip_grad distill.temperature', 'above 0', lambda v: v > 0)
    check('optim.layer_decay', 'above 0 and at most 1', lambda v: 0 < v <= 1)
    check('threads', f'from 1 to {MAX_THREADS}', lambda v: 1 <= v <= MAX_THREADS)
    check('data.crop_pct', 'at least 0.1 and at most 1', lambda v: 0.1 <= v <= 1)
    check('data.mean', 'numbers from -1e6 to 1e6', lambda v: all(-1e6 <= number <= 1e6 for number in v))
    check('data.std', 'numbers from 1e-6 to 1e6', lambda v: all(1e-6 <= number <= 1e6 for number in v))
    check(
        'data.augment.hflip data.augment.vflip data.augment.color_jitter data.augment.dct_truncate '
        'data.augment.erasing',
        'between 0 and 1',
        lambda v: 0 <= v <= 1,
    )
    check(
        'loss.smoothing ema.decay data.augment.affine.translate data.augment.affine.scale',
        'at least 0 and below 1',
        lambda v: 0 <= v < 1,
    )
    check('distill.kind', 'soft or hard', lambda v: v in ('soft', 'hard'))
    check('distill.weight', 'between 0 and 1', lambda v: 0 <= v <= 1)
    check('truncation.budget', 'at least 0 and below 1', lambda v: 0 <= v < 1)
    check('data.augment.hue', 'between 0 and 0.5', lambda v: 0 <= v <= 0.5)
    check('data.augment.rand_magnitude', 'between 0 and 10', lambda v: 0 <= v <= 10)
    check(
        'data.augment.crop_scale',
        'two shares of the area, 0 < least ≤ most ≤ 1',
        lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1,
    )
    check(
        'data.augment.dct_truncate_ratio',
        'two shares of the coefficients, 0 < least ≤ most ≤ 1',
        lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1,
    )
    check('data.augment.crop_ratio', 'two ratios, 0 < least ≤ most', lambda v: len(v) == 2 and 0 < v[0] <= v[1])
    check('sched.sched', 'a schedule that needs no metric', lambda v: v != 'plateau')
    check('resume', 'never, auto or restart', lambda v: v in ('never', 'auto', 'restart'))
    check('parallel', 'ddp or fsdp', lambda v: v in ('ddp', 'fsdp'))
    check('amp', 'none or bf16', lambda v: v in ('none', 'bf16'))
    check('on_nonfinite', 'error or skip', lambda v: v in ('error', 'skip'))
    check('data.on_error', ' or '.join(ON_ERROR), lambda v: v in ON_ERROR)
    if config.parallel == 'fsdp' and config.channels_last:
        raise UserError('channels_last must be false for parallel=fsdp, which takes contiguous weights only; got true')
    _check_schedule(config)
    if config.data.on_error == 'skip' and config.data.batch_size < 2:
        raise UserError(
            'data.batch_size must be at least 2 for data.on_error=skip, got 1: another image of its batch takes the '
            'place of one that cannot be read'
        )
    if config.truncation.budget and not config.truncation.penalty:
        raise UserError(
            f'truncation.budget={config.truncation.budget:g} has no effect without a penalty; set truncation.penalty'
        )
    if config.distill.teacher:
        for key, allowed in (('task', ('classification',)), ('data.decode', ('pixels', 'scaled'))):
            if values[key] not in allowed:
                raise UserError(f'{key} must be {" or ".join(allowed)} with distill.teacher, got {values[key]!r}')
        if config.loss.bce:  # a mean over the classes, in the place of a sum
            raise UserError(
                'loss.bce=true is too small to be heard beside a teacher; set loss.bce=false with distill.teacher'
            )
    elif config.distill != DistillConfig():
        raise UserError('distill has options, and no teacher; set distill.teacher')
    if config.stages:
        _check_stages(config)
    else:
        check('sched.warmup_epochs', f'at most sched.epochs={config.sched.epochs}', lambda v: v <= config.sched.epochs)
    if (config.loss.mixup or config.loss.cutmix) and config.data.batch_size % 2:
        raise UserError(f'data.batch_size must be even for mixup and cutmix, got {config.data.batch_size}')
    if config.task != 'classification':
        for key, still in _STILL.items():
            if values[key] != still:
                raise UserError(
                    f'{key} must be {"null" if still is None else still} for task={config.task}: the target of '
                    f'patches does not move with the pixels; got {values[key]!r}'
                )
    if config.data.decode == 'coefficients':
        for key, value in _ON_COEFFICIENTS.items():
            if values[key] != value:
                raise UserError(
                    f'{key} must be {"null" if value is None else value} for data.decode=coefficients: they can be '
                    f'cropped by whole patches, flipped and mixed (mixup), no more; got {values[key]!r}'
                )


def _check_schedule(config: Config) -> None:
    before = -1
    for number, part in enumerate(config.data.schedule):
        if not before < part.epoch < config.sched.epochs:
            raise UserError(
                f'data.schedule[{number}].epoch must be {"above the one before" if number else "at least 0"}, and '
                f'below sched.epochs={config.sched.epochs}, got {part.epoch}'
            )
        before = part.epoch
        if len(part.img_size) != 2 or min(part.img_size) < 1:
            raise UserError(f'data.schedule[{number}].img_size must be height and width in pixels, got {part.img_size}')


def _check_stages(config: Config) -> None:
    for number, stage in enumerate(config.stages):
        warmup = config.sched.warmup_epochs if stage.warmup_epochs is None else stage.warmup_epochs
        for key, value, requirement, holds in (
            ('epochs', stage.epochs, 'at least 1', stage.epochs >= 1),
            ('lr', stage.lr, 'above 0', stage.lr is None or 0 < stage.lr < math.inf),
            ('warmup_epochs', warmup, f'from 0 to the {stage.epochs} epochs of the stage', 0 <= warmup <= stage.epochs),
        ):
            if not holds:
                raise UserError(f'stages[{number}].{key} must be {requirement}, got {value!r}')
        if stage.attention and stage.freeze:
            raise UserError(f'stages[{number}] has attention and freeze; give the second of them a stage of its own')
        if not stage.attention and (stage.attention_kwargs or stage.layers is not None):
            raise UserError(f'stages[{number}] has attention_kwargs or layers, and no attention to give them to')
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
