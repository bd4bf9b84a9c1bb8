"""Features of a backbone that does not learn, kept in memory: each image goes through it once."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vit_efficient.data import Samples
from vit_efficient.data.samples import Unreadable
from vit_efficient.dense import DenseModel
from vit_efficient.train.tasks import Task
from vit_efficient.utils.precision import autocast


class CachedFeatures(Dataset):
    """Samples with the features of their images in the place of these, as `DenseModel` takes them: (L, C, h, w).

    They are computed when a sample is first asked for, in this process, and kept on the CPU in half precision where it
    holds them. Nothing may be drawn for a sample.

    Args:
        samples: Of images and masks.
        model: Its backbone must not learn.
        task: Of pixels or patches.
        amp: none or bf16, as of the run.
    """

    cached = None  # as of `Samples`: no decoded images

    def __init__(self, samples: Samples, model: DenseModel, task: Task, amp: str):
        self.samples, self.model, self.task, self.amp = samples, model, task, amp
        self.on_error = samples.on_error
        self.kept: dict[int, tuple] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, ...]) -> tuple | Unreadable:
        index = key[1]
        if index not in self.kept:
            item = self.samples[key]
            if not isinstance(item, Unreadable):
                image, *rest = item
                item = self._features(image), *rest
            self.kept[index] = item
        return self.kept[index]

    @torch.no_grad()
    def _features(self, image: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        images = self.task.padded(self.samples.normalize(image[None].to(device)))
        training = self.model.training
        with autocast(device, self.amp):
            features = self.model.eval().features(images)[0].float().cpu()
        self.model.train(training)
        half = features.half()
        return half if half.isfinite().all() else features

    @staticmethod
    def normalize(features: Tensor) -> Tensor:
        """As of `Samples`: features are as they are."""
        return features
