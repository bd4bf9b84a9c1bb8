"""The keys of a recipe, typed: what each means, which values it may have, and whether it may change on resumption."""

from dataclasses import dataclass
from typing import Any

from vit_efficient.data.config import IMAGES_PER_UPDATE, DataConfig
from vit_efficient.prune import METHODS
from vit_efficient.utils import keys
from vit_efficient.utils.keys import BELOW_1, POSITIVE, SET, Range, at_least, between, key, one_of, section

ABOVE_0_TO_1 = Range('above 0 and at most 1', lambda v: 0 < v <= 1)
HEADS = ('linear', 'multilayer')  # those of `vit_efficient.dense`, which is not imported to read a recipe
TASKS = ('classification', 'segmentation', 'both', 'features')
HEALING = ('align', 'recover', 'refine')  # those of `vit_efficient.healing`
NO_METRIC = Range('a schedule that needs no metric', lambda v: v not in ('', 'plateau'))
BELOW_2_32 = Range('at least 0 and below 2**32', lambda v: 0 <= v < 2**32)
# From some number on, that of the system, threads end the process.
THREADS = Range('from 1 to 1024', lambda v: 1 <= v <= 1024)
_WEIGHTS = Range(
    'numbers of at least 0, not all of them 0', lambda v: all(0 <= weight < 1e6 for weight in v) and any(v)
)
_SIZES = Range('height and width in pixels', lambda v: len(v) == 2 and min(v) > 0)
MAX_NUMBER = 1e300  # of a key that has a type of its own; beyond it integers have no float


@dataclass
class ModelConfig:
    name: str = key('', 'a model of timm.list_models()', SET)
    args: dict[str, Any] = key({}, 'its keyword arguments')
    init_from: str = key('', 'weights to start from: a model or run folder, or a checkpoint file of timm')
    attention: str = key('', 'that its layers change to once its weights are there, as by `convert`; none: all stay')
    attention_kwargs: dict[str, Any] = key({}, 'options of that attention')
    layers: list[int] | None = key(None, 'blocks that change, negative ones counted from the end; null: all')
    head: str = key(
        '',
        'for segmentation: linear, multilayer; none: the classifier of the model, on every token',
        one_of('', *HEADS),
    )
    head_args: dict[str, Any] = key({}, 'its options')
    reduce: int = key(1, 'with a head: images are reduced by this factor before the model sees them', at_least(1))
    upsample: bool = key(False, 'with reduce: features are brought back to the whole image by a learned upsampler')
    freeze: bool = key(False, 'whether only that head learns')


@dataclass
class OptimConfig:
    opt: str = key('adamw', 'a name that timm.optim knows', SET)
    lr: float = key(1e-3, 'learning rate at its highest; it is not scaled by the batch size', POSITIVE)
    weight_decay: float = key(0.05, 'of all weights but biases and norms', at_least(0))
    layer_decay: float | None = key(None, 'factor of the learning rate from one layer to the one before', ABOVE_0_TO_1)
    args: dict[str, Any] = key({}, 'further arguments, such as betas; AdamW on GPUs has fused=true')


@dataclass
class SchedConfig:
    sched: str = key('cosine', 'a name in timm.scheduler, other than plateau; stepped after every update', NO_METRIC)
    epochs: int = key(100, 'of the whole run; 0, for task=features: least squares alone (heal.solve)', at_least(0))
    warmup_epochs: float = key(5.0, 'part of epochs', at_least(0))
    warmup_lr: float = key(1e-6, 'where the warm-up starts', at_least(0))
    min_lr: float = key(1e-5, 'where the schedule ends', at_least(0))
    args: dict[str, Any] = key({}, "further arguments of timm's create_scheduler_v2")


@dataclass
class StageConfig:
    """A part of a run. Weights go on from one to the next; optimiser, schedule and average of weights start anew."""

    epochs: int = key(1, 'of sched.epochs, which is their sum', at_least(1))
    attention: str = key('', 'that its layers change to where it begins, as by `convert`; none: all of them stay')
    attention_kwargs: dict[str, Any] = key({}, 'options of that attention')
    layers: list[int] | None = key(None, 'blocks that change, negative ones counted from the end; null: all')
    lr: float | None = key(None, 'null: optim.lr', POSITIVE)
    warmup_epochs: float | None = key(None, 'null: sched.warmup_epochs')
    freeze: bool = key(False, 'truncations that are learned become hard ones where the stage begins')
    prune: float | None = key(
        None,
        'the share, of the weights that are left, that becomes 0 where the stage begins, and stays so in all that '
        'follow; 0: those that are 0 already stay so; null: none',
        BELOW_1,
    )
    prune_method: str = key('lamp', 'how `prune` chooses them', one_of(*METHODS))
    prune_skip: list[str] = key(['head'], 'modules that `prune` leaves as they are, with all that is in them')
    heal: str = key(
        '',
        "for features: align, each converted attention by itself, on what the teacher's is given; recover, the whole "
        "model, by the teacher's features; refine, the same, at the size of use; none: recover",
        one_of('', *HEALING),
    )


@dataclass
class LossConfig:
    smoothing: float = key(0.1, 'of labels', BELOW_1)
    mixup: float = key(0.0, 'alpha of its beta distribution; 0: off', at_least(0))
    cutmix: float = key(0.0, 'alpha; with both on, each batch takes one of them at even odds', at_least(0))
    bce: bool = key(False, 'binary cross-entropy in the place of softmax cross-entropy')
    masks: str = key(
        'cross_entropy', 'of pixels: cross_entropy, dice, or both, their sum', one_of('cross_entropy', 'dice', 'both')
    )
    class_weights: list[float] | None = key(None, 'of pixels: a weight for each class; null: 1', _WEIGHTS)
    patch_weight: float = key(1.0, 'of the loss of patches beside that of images, for `task` both', at_least(0))


@dataclass
class DistillConfig:
    """A teacher that is heard beside the labels. It sees what the student sees, mixed images too."""

    teacher: str = key('', 'a model of timm, pretrained, or the folder of a run or model; none: no teacher')
    weights: str = key('', 'the checkpoint file of that model, instead of its pretrained weights')
    kind: str = key('soft', 'its probabilities (soft), or its first class (hard)', one_of('soft', 'hard'))
    weight: float = key(0.5, 'of what the teacher says in the loss; the labels have the rest', between(0, 1))
    outputs: float = key(
        0.0,
        'times the mean squared error of what attentions give, to what they give in the teacher, mean over blocks, is '
        'added to the loss, for a student that is the teacher converted; 50 in the source',
        at_least(0),
    )
    temperature: float = key(1.0, "of soft probabilities, the student's and the teacher's", POSITIVE)


@dataclass
class HealConfig:
    """What is learned of a teacher's features (`task` features): the loss is a sum of weighted means over tokens."""

    teacher: str = key('', 'a run or model folder; none: the model as it was before its attention was converted')
    teacher_size: list[int] | None = key(
        None,
        "height, width of what the teacher sees, whose features are resized to the student's patches; null: the same",
        _SIZES,
    )
    blocks: list[int] | None = key(
        None, 'blocks whose tokens are learned too, negative ones counted from the end; null: all; []: none'
    )
    prefix: float = key(1.0, 'weight of 1 - cosine of class and register tokens', at_least(0))
    patch: float = key(1.0, 'of 1 - cosine of patch tokens', at_least(0))
    centred: float = key(1.0, 'of the same less the mean patch token that the image has for the teacher', at_least(0))
    smooth: float = key(1.0, "of the smooth-L1 of patch tokens, in units of the teacher's norm of each", at_least(0))
    blocks_weight: float = key(3.0, 'of these four, mean over `blocks`, beside those at the end', at_least(0))
    solve: int = key(
        0,
        'training images, drawn as for training, at data.img_size, by which the layers that end attention and MLP are '
        'solved for before the first update (vit_efficient.least_squares); a few hundred; 0: none',
        at_least(0),
    )
    ridge: float = key(1.0, 'of these, in units of the mean square of an input of a layer', POSITIVE)
    lora: int = key(
        0, 'rank of what is learned of each linear layer, added to its weight when saved; 0: all learns', at_least(0)
    )


@dataclass
class TruncationConfig:
    """The price of truncations that are learned (`patch_window`, `learned`).

    Where a stage has `freeze`, or else at the end of a run, they become hard ones.
    """

    penalty: float = key(0.0, 'times what they cost above the budget is added to the loss', at_least(0))
    budget: float = key(0.0, 'the share of the multiply-accumulates of these parts that is free', BELOW_1)


@dataclass
class EmaConfig:
    decay: float = key(0.0, 'of a moving average of the weights, which is then what is evaluated; 0: off', BELOW_1)
    warmup: bool = key(False, 'raise the decay from 0 at the start')


@dataclass
class Config:
    """A run. See `DataConfig` and the other sections for their keys."""

    task: str = key(
        'classification',
        'classification of images, segmentation of patches or pixels, or classification and that of patches (both); or '
        'features, those of a teacher, from images without labels',
        one_of(*TASKS),
    )
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    optim: OptimConfig = section(OptimConfig)
    sched: SchedConfig = section(SchedConfig)
    stages: list[StageConfig] = key([], 'one after the other; none: a single one')
    loss: LossConfig = section(LossConfig)
    distill: DistillConfig = section(DistillConfig)
    heal: HealConfig = section(HealConfig)
    truncation: TruncationConfig = section(TruncationConfig)
    ema: EmaConfig = section(EmaConfig)
    hooks: dict[str, Any] = key({}, 'training hooks of plug-ins, by name, with their options')
    plugins: list[str] = key([], 'Python modules that are imported first', resume=True)
    seed: int = key(0, 'weights, order, augmentation, mixing and dropout follow from it', BELOW_2_32)
    output: str = key('', "the run's folder; by default runs/FOLDER/NAME for recipes/FOLDER/NAME.yaml", resume=True)
    resume: str = key(
        'never',
        'never: refuse a folder that holds a run; auto: go on with it; restart: replace it',
        one_of('never', 'auto', 'restart'),
        resume=True,
    )
    device: str = key('auto', 'auto: the GPU where there is one', resume=True)
    amp: str = key('none', 'none or bf16: the type of matrix products', one_of('none', 'bf16'))
    compile: bool = key(False, 'whether the blocks of the model are compiled, in training and evaluation', resume=True)
    channels_last: bool = key(False, 'layout of images and convolutions in memory', resume=True)
    parallel: str = key('ddp', 'each process holds the weights, or a part of them', one_of('ddp', 'fsdp'), resume=True)
    grad_accum: int = key(
        1, 'micro-batches of each process per update', at_least(1), resume=f'while {IMAGES_PER_UPDATE} stays'
    )
    clip_grad: float | None = key(None, 'largest norm of the gradient', POSITIVE)
    on_nonfinite: str = key(
        'error',
        'for a loss or gradient that is not finite, error: it ends the run, the files of its batch are named; skip: no '
        'process takes the update, which is counted, and 25 of them in a row end the run',
        one_of('error', 'skip'),
        resume=True,  # where both values lead to weights, these are the same
    )
    grad_checkpointing: bool = key(False, 'recompute activations instead of keeping them', resume=True)
    threads: int | None = key(
        None,
        'of PyTorch on the CPU; fewer, if there are fewer cores or OMP_NUM_THREADS is lower; null: as many as it likes',
        THREADS,
        resume=True,
    )
    log_every: int = key(50, 'updates', at_least(1), resume=True)
    eval_every: int = key(1, 'epochs; the last epoch is evaluated in any case', at_least(1), resume=True)
    checkpoint_every: int = key(1, 'epochs', at_least(1), resume=True)
    checkpoint_steps: int = key(0, 'updates, within an epoch; 0: at the end of epochs only', at_least(0), resume=True)
    checkpoint_keep: int = key(
        1, 'the last ones; if the newest cannot be read, resume=auto takes the one before', at_least(1), resume=True
    )
    checkpoint_best: bool = key(False, 'keep the model of the best evaluation too, in best/', resume=True)
    recipe: str = key('', 'the file; load_recipe fills it in', resume=True)


def describe_keys() -> list[dict[str, Any]]:
    """A row for each key of a recipe: key, type, default, range, resume and help."""
    return keys.describe(Config())


def identity(config: Config) -> dict[str, Any]:
    """The keys on which the weights of a run depend, with their values; not those whose product alone counts."""
    free = {name for name, item, _ in keys.walk(config) if item.metadata.get('resume')}
    return {name: value for name, value in keys.flatten(config).items() if name not in free}
