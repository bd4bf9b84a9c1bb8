"""Learning from labels, and from what the attentions of the model as it was give: `distill.outputs`.

Source: "Copy the same, distil the difference", 2026: all weights are copied, and the loss of the task has beside it 50
times the mean over blocks of the mean squared error of attention outputs, each model on its own tokens.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_efficient.healing import Teacher, on_grid, parts_of, watch_parts
from vit_efficient.models import load_model
from vit_efficient.models.create import create_from_spec
from vit_efficient.models.forward import backbone_of
from vit_efficient.train.hooks import TrainingHook, register_hook
from vit_efficient.utils.errors import UserError, first_line
from vit_efficient.utils.precision import autocast


@register_hook('attention_outputs')
class AttentionOutputs(TrainingHook):
    """The difference that a student keeps to the attentions of its teacher, as a part of its loss.

    Raises:
        UserError: If the teacher cannot be had, or has other blocks or tokens.
    """

    def __init__(self, teacher: Teacher, weight: float):
        super().__init__()
        self.teacher, self.weight = teacher, weight
        self.handles, self.found, self.names = [], {}, []

    @classmethod
    def of(cls, experiment, options):
        keys, args = experiment.config.distill, experiment.config.model.args
        if not keys.outputs:
            return None
        given = {name: args[name] for name in ('img_size', 'dynamic_img_size') if name in args}
        try:
            if Path(keys.teacher).is_dir():
                model = load_model(keys.teacher, **given)
            else:
                model = create_from_spec(keys.teacher, {'pretrained': True, **given})
        except Exception as error:  # as in `distillation`
            raise UserError(f'distill.teacher={keys.teacher}: {first_line(error)}') from error
        teacher = Teacher(on_grid(backbone_of(model)))
        ours, theirs = (
            f'{len(each.blocks)} blocks of {each.embed_dim} channels, patches of {tuple(each.patch_embed.patch_size)}'
            for each in (on_grid(backbone_of(experiment.model)), teacher.model)
        )
        if ours != theirs:
            raise UserError(f'distill.outputs: the teacher has {theirs}, the student {ours}')
        teacher.model.to(experiment.team.device)
        return cls(teacher, keys.outputs)

    def begin_stage(self, trainer):
        for handle in self.handles:
            handle.remove()
        student = backbone_of(trainer.state.model)
        self.names = [name for i in range(len(student.blocks)) for name in parts_of(student, i)]
        self.handles = watch_parts(student, self.names, self.found)

    def penalty(self, state, images, logits, loss):
        with torch.no_grad(), autocast(images.device, state.experiment.config.amp):
            _, taught = self.teacher.parts(state.experiment.task.padded(images), self.names)
        found = [self.found.pop(name)[1] for name in self.names]
        return loss + self.weight * mean_error(taught, found)


def mean_error(taught: list[Tensor], found: list[Tensor]) -> Tensor:
    """The mean over parts of the mean squared error."""
    for a, b in zip(taught, found, strict=True):
        if a.shape != b.shape:
            raise UserError(f'distill.outputs: the teacher has tokens {tuple(a.shape)}, the student {tuple(b.shape)}')
    kind = torch.promote_types(found[0].dtype, torch.float32)
    return torch.stack([F.mse_loss(b.to(kind), a.to(kind)) for a, b in zip(taught, found, strict=True)]).mean()
