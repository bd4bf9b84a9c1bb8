"""Learning from a teacher: what its logits add to the loss.

Sources: soft, Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, arXiv 1503.02531; hard, and
at the same crops and mixed images as the student, Touvron et al., "Training data-efficient image transformers &
distillation through attention", ICML 2021, arXiv 2012.12877. The student has no token of its own for it.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from timm.task import DistillationTeacher
from torch import Tensor, nn

from vit_efficient.data import Preprocessing, check_same_classes
from vit_efficient.models import load_model
from vit_efficient.train.config import DistillConfig
from vit_efficient.train.hooks import TrainingHook, register_hook
from vit_efficient.utils.errors import UserError, first_line
from vit_efficient.utils.precision import autocast


@register_hook('distillation')
class Distillation(TrainingHook):
    """The loss of a student that also hears a teacher: the `distill` of a recipe.

    Images are normalised anew for the teacher, and resized bilinearly to what it was trained at. A teacher that is a
    folder must have been trained on the student's classes, where their names are known.

    Raises:
        UserError: If the teacher cannot be had, or has other classes or channels than the student.
    """

    def __init__(
        self, config: DistillConfig, student: nn.Module, preprocessing: Preprocessing, device='cpu', classes=None
    ):
        super().__init__()
        self.config = config
        channels, num_classes = preprocessing.input_size[0], student.num_classes
        try:
            if Path(config.teacher).is_dir():
                teacher = DistillationTeacher(load_model(config.teacher).to(device), device=device)
            else:
                weights = config.weights or None
                teacher = DistillationTeacher(config.teacher, num_classes, channels, weights, device=device)
        except Exception as error:  # an unknown name, no weights, weights of another model, no network
            raise UserError(f'distill.teacher={config.teacher}: {first_line(error)}') from error
        self.teacher = teacher.requires_grad_(False)
        (taken, *self.size), told = self.teacher.model.pretrained_cfg['input_size'], self.teacher.model.num_classes
        if (taken, told) != (channels, num_classes):
            raise UserError(
                f'distill.teacher={config.teacher} takes {taken} channels and tells {told} classes, the student '
                f'{channels} and {num_classes}'
            )
        if Path(config.teacher).is_dir():  # models on a hub may name theirs in other words
            names = self.teacher.model.pretrained_cfg.get('label_names')
            check_same_classes(names, classes, f'distill.teacher={config.teacher}', 'the training set')
        statistics = torch.tensor([preprocessing.mean, preprocessing.std], device=device)
        self.mean, self.std = statistics[:, None, :, None, None]

    @classmethod
    def of(cls, experiment, options):
        given = experiment.model, experiment.preprocessing, experiment.team.device, experiment.classes
        heard = experiment.config.distill.teacher and experiment.config.distill.weight
        return cls(experiment.config.distill, *given) if heard else None

    def penalty(self, state, images, logits, loss):
        with autocast(images.device, state.experiment.config.amp):
            return self.loss(images, logits.float(), loss)

    def loss(self, images: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        """(1 - weight) · loss + weight · the loss of the student's logits (B, K) against the teacher's."""
        config = self.config
        with torch.no_grad():
            images = self.teacher.normalize_input(images, self.mean, self.std)
            if list(images.shape[2:]) != self.size:
                images = F.interpolate(images, self.size, mode='bilinear', antialias=True)
            taught = self.teacher(images).float()
        if config.kind == 'hard':
            from_teacher = F.cross_entropy(logits, taught.argmax(1))
        else:
            T = config.temperature
            told, heard = F.log_softmax(taught / T, 1), F.log_softmax(logits / T, 1)
            from_teacher = T**2 * F.kl_div(heard, told, reduction='batchmean', log_target=True)
        return (1 - config.weight) * loss + config.weight * from_teacher
