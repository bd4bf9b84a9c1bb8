"""Features of a backbone that does not learn, kept in memory or in files: each image goes through it once."""

import hashlib
import io
import zlib
from pathlib import Path

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
from vit_efficient.utils.precision import autocast
from vit_efficient.version import __version__

MEMORY = 'memory'


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, 'little')


class CachedFeatures(Dataset):
    """Samples with the features of their images in the place of these, as `DenseModel` takes them: (L, C, h, w).

    They are computed when a sample is first asked for, in this process. Nothing may be drawn for a sample.

    Args:
        samples: Of images and masks.
        model: Its backbone must not learn.
        task: Of pixels or patches.
        amp: none or bf16, as of the run.
        place: `memory`, the CPU's; or a folder of files, which any number of processes and runs share: each is named by
            what its features depend on, the pixels, the backbone, its attention, the blocks and the precision.
        half: Whether they are kept in half precision, where it holds them.
    """

    cached = None  # as of `Samples`: no decoded images

    def __init__(self, samples: Samples, model: DenseModel, task: Task, amp: str, place: str, half: bool = True):
        self.samples, self.model, self.task, self.amp, self.half = samples, model, task, amp, half
        self.on_error = samples.on_error
        self.kept: dict[int, tuple] | None = {} if place == MEMORY else None
        self.folder = None if place == MEMORY else Path(place) / self._of_model()
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
            image, *rest = item
            item = self._features(self.samples.normalize(image)), *rest
        if self.kept is not None:
            self.kept[index] = item
        return item

    def _features(self, image: Tensor) -> Tensor:
        if self.folder is None:
            return self._compute(image)
        name = hashlib.sha256(f'{image.dtype} {tuple(image.shape)}'.encode() + image.numpy().tobytes()).hexdigest()
        path = self.folder / f'{name}.npy'
        content = path.read_bytes() if path.exists() else b''
        if content and content[-4:] == _checksum(content[:-4]):
            return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
        features, file = self._compute(image), io.BytesIO()  # there is none, or it is damaged
        np.save(file, features.numpy())
        write_bytes(path, file.getvalue() + _checksum(file.getvalue()))
        return features

    @torch.no_grad()
    def _compute(self, image: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        images = self.task.padded(image[None].to(device))
        training = self.model.training
        with autocast(device, self.amp):
            features = self.model.eval().features(images)[0].float().cpu()
        self.model.train(training)
        half = features.half() if self.half else features
        return half if half.isfinite().all() else features

    def _of_model(self) -> str:
        """A hash of all but the image that features depend on."""
        weights = ((name, each) for name, each in self.model.state_dict().items() if not name.startswith('head.'))
        built = {key: each for key, each in self.model.construction().items() if key in ('backbone', 'backbone_args')}
        about = digest(weights), built, self.model.head.layers, self.task.patch_size, self.amp, self.half, __version__
        return hashlib.sha256(repr(about).encode()).hexdigest()[:16]

    @staticmethod
    def normalize(features: Tensor) -> Tensor:
        """As of `Samples`: features are as they are."""
        return features
