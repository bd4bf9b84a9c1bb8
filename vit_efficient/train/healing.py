"""The task of learning a teacher's features: what a batch costs, and how near the features are."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from tqdm import tqdm

from vit_efficient.data import iterate
from vit_efficient.fidelity import fidelity, same_neighbours
from vit_efficient.healing import (
    ALIGN,
    RECOVER,
    FeatureLoss,
    Student,
    Teacher,
    converted_parts,
    part_loss,
)
from vit_efficient.low_rank import add_low_rank, merge_low_rank
from vit_efficient.models import load_model
from vit_efficient.train.build import create_backbone
from vit_efficient.train.config import Config, StageConfig
from vit_efficient.train.distributed import Processes
from vit_efficient.train.evaluation import Evaluation
from vit_efficient.train.features import as_half
from vit_efficient.train.tasks import Task
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.modes import evaluates
from vit_efficient.utils.precision import autocast, real_dtype

_OF_SIZE = ('img_size', 'dynamic_img_size')


@dataclass(frozen=True)
class FeatureTask(Task):
    """Learning the features of `teacher`."""

    name: str = 'features'
    teacher: Teacher | None = None
    criterion: FeatureLoss = field(default_factory=FeatureLoss)
    amp: str = 'none'

    metric = 'centred_cosine'
    of_images = of_patches = False
    reads_labels = False

    @classmethod
    def of_teacher(cls, teacher: Teacher, config: Config) -> 'FeatureTask':
        keys = config.heal
        loss = FeatureLoss(keys.prefix, keys.patch, keys.centred, keys.smooth, keys.blocks_weight)
        return cls(teacher=teacher, criterion=loss, amp=config.amp)

    def check_logits(self, logits: Sequence[Tensor]) -> None:
        """Student and teacher have tokens of one shape: `create_student` has seen to it."""

    def check_stage(self, name: str, stage: StageConfig, model: Student) -> None:
        if stage.heal != ALIGN:
            return
        parts = converted_parts(model.backbone, self.teacher.model)
        if not parts:
            raise UserError(f'{name}.heal=align: the attentions of the student are those of its teacher there')
        if not any(True for part in parts for _ in model.backbone.get_submodule(part).parameters()):
            kind = type(model.backbone.blocks[0]).__name__
            raise UserError(f'{name}.heal=align: the attentions of a {kind} have no weights of their own; take recover')

    def try_inputs(self, images: Tensor) -> None:
        key = 'heal.teacher' if self.teacher.size is None else f'heal.teacher_size={list(self.teacher.size)}'
        try:
            self.taught(images.to(next(self.teacher.model.parameters()).dtype), ())
        except UserError as error:
            fixed = '' if self.teacher.size is None else ' (one of a fixed size has no heal.teacher_size)'
            raise UserError(f'{key}: the teacher does not take such images{fixed}: {error}') from error

    def begin_stage(self, stage: StageConfig, model: Student) -> None:
        model.begin(stage.heal or RECOVER, self.teacher)

    def learn(
        self, model: Student, forward: Callable[..., Any], images: Tensor, truth: Sequence[Tensor], criterion: Any
    ) -> tuple[Sequence[Tensor], Tensor]:
        if model.kind == ALIGN:
            with autocast(images.device, self.amp):
                given, taught = self.teacher.parts(images, model.parts)
            found = forward(images, given)
            return found, part_loss(taught, found)
        found = forward(images)
        taught = truth[1:] or self.taught(images, model.layers)  # those that are kept
        return found, self.criterion(taught, found, model.prefix)

    def taught(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """What a student learns of images: the teacher's tokens at the end, and after blocks."""
        with autocast(images.device, self.amp):
            return self.teacher.tokens(images, layers)

    def kept(self, image: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """What is kept of an image (C, H, W), on the CPU, in half precision where it holds them."""
        device = next(self.teacher.model.parameters()).device
        return [as_half(tokens[0].float().cpu()) for tokens in self.taught(image[None].to(device), layers)]

    def about(self, layers: Sequence[int]) -> Any:
        """All but the image that `kept` depends on."""
        return self.teacher.digest, str(self.teacher.model), self.teacher.size, tuple(layers), self.amp

    def product(self, model: Student) -> nn.Module:
        """The model that a student has become."""
        if any('.parametrizations.' in name for name, _ in model.named_parameters()):
            model = copy.deepcopy(model)
            merge_low_rank(model.backbone)
        return model.backbone


def create_student(config: Config) -> tuple[Student, Teacher]:
    """The model that learns, converted as the recipe says, and the one that it learns from.

    Raises:
        UserError: If they are one and the same, or their tokens cannot be compared.
    """
    keys = config.heal
    student = Student(create_backbone(config), keys.blocks)
    if keys.teacher:
        given = {name: value for name, value in config.model.args.items() if name in _OF_SIZE}
        try:
            loaded = load_model(keys.teacher, **given)
        except UserError as error:
            raise UserError(f'heal.teacher={keys.teacher}: {error}') from error
        teacher = Teacher(loaded, keys.teacher_size)
    else:
        try:
            as_it_was = create_backbone(replace(config, model=_unconverted(config.model)))
        except UserError as error:
            if not config.model.init_from:
                raise
            raise UserError(
                f'heal.teacher must name the model to learn from: model.init_from={config.model.init_from} has other '
                'attentions already'
            ) from error
        teacher = Teacher(as_it_was, keys.teacher_size)
    ours, theirs = (_tokens_of(each) for each in (student.backbone, teacher.model))
    if ours != theirs:
        raise UserError(f'heal.teacher: its tokens are of {theirs}, those of the student of {ours}')
    for key in ('mean', 'std'):
        theirs, ours = teacher.model.pretrained_cfg[key], getattr(config.data, key) or student.pretrained_cfg[key]
        if len(theirs) == len(ours) and any(abs(a - b) > 1e-3 for a, b in zip(theirs, ours, strict=True)):
            raise UserError(
                f'heal.teacher takes images of {key} {list(theirs)}, the student of {list(ours)}; both are given the '
                f'same: set data.{key}={list(theirs)}'
            )
    changes = any(stage.attention for stage in config.stages)
    if not changes and not converted_parts(student.backbone, teacher.model) and not keys.teacher:
        raise UserError(
            'task=features: the model is the one that it is to learn from; set model.attention, or heal.teacher'
        )
    if keys.lora:
        add_low_rank(student.backbone, keys.lora)
    return student, teacher


def _unconverted(model: Any) -> Any:
    return replace(model, attention='', attention_kwargs={}, layers=None)


def _tokens_of(model: nn.Module) -> str:
    grid = 'x'.join(map(str, model.patch_embed.patch_size))
    return (
        f'images of {model.in_chans} channels, {model.embed_dim} channels, {model.num_prefix_tokens} prefix tokens, '
        f'patches of {grid} px, {len(model.blocks)} blocks'
    )


# Not inference_mode: see `train.evaluation.evaluate`.
@torch.no_grad()
@evaluates
@parametrize.cached()  # weights with a change beside them are put together once
def evaluate_features(
    model: nn.Module,
    loader: DataLoader,
    processes: Processes,
    task: FeatureTask,
    amp: str = 'none',
    progress: bool = True,
    after_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Measures how near the features of a student are to its teacher's, image by image.

    Args:
        model: A `Student`. If it is sharded, all processes of the run must call.
        loader, processes, amp, progress, after_batch: As of `train.evaluation.evaluate`.
        task: Has the teacher.
    """
    layers = range(len(task.teacher.model.blocks))
    rows, low, skipped, start = [], [], {}, time.perf_counter()
    disable = None if progress and processes.is_first else True
    batches = tqdm(iterate(loader, skipped, processes.device), 'evaluate', len(loader), leave=False, disable=disable)
    prefix = task.teacher.model.num_prefix_tokens
    for (images, *rest), own in processes.in_step(batches):
        images = images.to(processes.device, non_blocking=True)
        with autocast(processes.device, amp):
            found = model(images, layers=layers)
        if after_batch:
            after_batch()
        if not own:
            continue
        taught = task.taught(images, layers)
        for number, index in enumerate(rest[-1].tolist()):
            pairs = [
                tuple(each[number].to(real_dtype(each.device)) for each in both)
                for both in zip(taught, found, strict=True)
            ]
            final, ours = pairs[0]
            kept = fidelity(final, ours, prefix)
            loss = task.criterion([final[None]], [ours[None]], prefix)
            of_blocks = [_patch_cosine(*pair, prefix).mean() for pair in pairs[1:]]
            numbers = torch.stack([loss, *of_blocks]).tolist()
            low.append(_patch_cosine(final, ours, prefix).float().cpu())
            same = same_neighbours(final, ours, prefix)
            rows.append((index, kept.centred, kept.patch, kept.prefix, same, *numbers))
    parts = processes.gather((rows, torch.cat(low) if low else torch.zeros(0), time.perf_counter() - start, skipped))
    rows_of, low_of, seconds_of, skipped_of = zip(*parts, strict=True)
    rows = sorted(chain(*rows_of))
    left_out = {index: reason for each in skipped_of for index, reason in each.items()}
    if not rows:
        reason = f': none of {len(left_out)} can be read; {next(iter(left_out.values()))}' if left_out else ''
        raise UserError(f'there are no images to evaluate{reason}')
    _, centred, patch, first, same, loss, *after = (fmean(column) for column in zip(*rows, strict=True))
    columns = ('index', 'centred_cosine', 'patch_cosine', 'prefix_cosine', 'neighbours')
    return Evaluation(
        loss,
        len(rows),
        len(rows) / max(seconds_of),
        columns,
        [row[: len(columns)] for row in rows],
        centred_cosine=centred,
        patch_cosine=patch,
        patch_low=torch.cat(low_of).quantile(0.05).item() if sum(map(len, low_of)) < 2**24 else None,
        prefix_cosine=first if prefix else None,
        neighbours=same,
        after_blocks=after,
        skipped=left_out,
    )


def _patch_cosine(a: Tensor, b: Tensor, prefix: int) -> Tensor:
    return F.cosine_similarity(a[prefix:], b[prefix:], dim=-1)
