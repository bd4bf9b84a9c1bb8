"""Features of models that do not learn, kept in memory or in files: each image goes through them once."""

import hashlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vit_efficient.data import Samples
from vit_efficient.data.samples import Unreadable
from vit_efficient.dense import DenseModel
from vit_efficient.train.tasks import Task
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import write_bytes
from vit_efficient.utils.measurements import digest
from vit_efficient.utils.modes import evaluating
from vit_efficient.utils.precision import autocast
from vit_efficient.version import __version__

MEMORY = 'memory'


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, 'little')


class CachedFeatures(Dataset):
    """Samples with something that a model makes of each image, computed when a sample is first asked for, in this
    process. Nothing may be drawn for a sample.

    Args:
        samples: Whose items begin with an image and end with the index.
        compute: What is kept of an image (C, H, W), normalised: tensors on the CPU.
        about: What, beside the image, that depends on.
        place: `memory`, the CPU's; or a folder of files, which any number of processes and runs share: each is named by
            the image and by `about`.
        beside: Whether they stand after the image, rather than in its place.
    """

    cached = None  # as of `Samples`: no decoded images

    def __init__(
        self,
        samples: Samples,
        compute: Callable[[Tensor], list[Tensor]],
        about: Any,
        place: str,
        beside: bool = False,
    ):
        self.samples, self.compute, self.beside = samples, compute, beside
        self.on_error = samples.on_error
        self.kept: dict[int, tuple] | None = {} if place == MEMORY else None
        name = hashlib.sha256(repr((about, __version__)).encode()).hexdigest()[:16]
        self.folder = None if place == MEMORY else Path(place) / name
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f'data.cache_features={place}: cannot be a folder ({error.strerror})') from error

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, ...]) -> tuple | Unreadable:
        index = key[1]
        if self.kept and index in self.kept:
            return self.kept[index]
        item = self.samples[key]
        if not isinstance(item, Unreadable):
            image, *rest, last = item
            found = self._features(self.samples.normalize(image))
            item = (image, *rest, *found, last) if self.beside else (*found, *rest, last)
        if self.kept is not None:
            self.kept[index] = item
        return item

    def _features(self, image: Tensor) -> list[Tensor]:
        if self.folder is None:
            return self.compute(image)
        name = hashlib.sha256(f'{image.dtype} {tuple(image.shape)}'.encode() + image.numpy().tobytes()).hexdigest()
        path = self.folder / f'{name}.npz'
        content = path.read_bytes() if path.exists() else b''
        if content and content[-4:] == _checksum(content[:-4]):
            kept = np.load(io.BytesIO(content[:-4]), allow_pickle=False)
            return [torch.from_numpy(kept[f'arr_{number}']) for number in range(len(kept.files))]
        features, file = self.compute(image), io.BytesIO()  # there is none, or it is damaged
        np.savez(file, *(each.numpy() for each in features))
        write_bytes(path, file.getvalue() + _checksum(file.getvalue()))
        return features

    def normalize(self, images: Tensor) -> Tensor:
        """As of `Samples`; features are as they are."""
        return self.samples.normalize(images) if self.beside else images


class DenseFeatures:
    """What the head of a `DenseModel` reads of an image, (L, C, h, w); its backbone must not learn.

    Args:
        model: With the backbone.
        task: Of pixels or patches.
        amp: none or bf16, as of the run.
        half: Whether they are kept in half precision, where it holds them.
    """

    def __init__(self, model: DenseModel, task: Task, amp: str, half: bool = True):
        self.model, self.task, self.amp, self.half = model, task, amp, half

    @torch.no_grad()
    def __call__(self, image: Tensor) -> list[Tensor]:
        device = next(self.model.parameters()).device
        images = self.task.padded(image[None].to(device))
        with evaluating(self.model), autocast(device, self.amp):
            features = self.model.features(images)[0].float().cpu()
        return [as_half(features) if self.half else features]

    def about(self) -> Any:
        """All but the image that features depend on."""
        weights = ((name, each) for name, each in self.model.state_dict().items() if not name.startswith('head.'))
        built = {key: each for key, each in self.model.construction().items() if key in ('backbone', 'backbone_args')}
        return digest(weights), built, self.model.head.layers, self.task.patch_size, self.amp, self.half


def as_half(features: Tensor) -> Tensor:
    """In half precision, where it holds them."""
    half = features.half()
    return half if half.isfinite().all() else features
