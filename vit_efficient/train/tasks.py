"""What a run learns: the class of each image, of each patch or pixel, or of image and patches, from one model.

With `global_pool=''` timm's head is applied to every token: the same model and the same linear head serve all.

Dimensions: B images, N tokens (prefix tokens, then h · w patches), K classes, H × W patches or pixels of the target.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_efficient.data import Preprocessing
from vit_efficient.dense import DenseModel
from vit_efficient.train.config import TASKS, StageConfig
from vit_efficient.train.masks import PixelScore, pad_to_patches, padded_size, upsampled
from vit_efficient.utils.checks import check_choice
from vit_efficient.utils.errors import UserError

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """How logits are read.

    Those of classification, (B, K), are of images. Of segmentation, (B, N, K), the last h · w tokens' are of patches;
    or all are, (B, K, h, w), as a `DenseModel` gives them. Of both, (B, N, K), likewise, and the first token's, which
    is the class token, are of the image. The target of segmentation has a class for each patch of an image of one size;
    or for each pixel, of images of any size (`of_pixels`), which are padded to whole patches.
    """

    name: str = 'classification'
    grid: tuple[int, int] = (0, 0)  # h and w, of patch tasks
    cut_to: tuple[int, int] | None = None  # height and width of the input, if images of another aspect are cut to it
    patch_weight: float = 1.0  # of the loss of patches beside that of images, for both
    none: int | None = None  # the class of patches or pixels that show nothing, if there is one
    of_pixels: bool = False  # whether targets are of pixels
    patch_size: tuple[int, int] = (1, 1)  # in pixels, where they are

    @classmethod
    def of(
        cls,
        name: str,
        model: nn.Module,
        preprocessing: Preprocessing,
        classes: list[str] | None,
        patch_weight: float,
        of_pixels: bool = False,
    ) -> 'Task':
        """The task for a timm model and its preprocessing; the class called none, or background, is of patches and
        pixels that show nothing.

        `of_pixels` is whether the data have a mask for each image.

        Raises:
            UserError: If there is no such task, the model does not give the logits that it needs, images are cropped
                whose targets are not, or the data have no labels.
        """
        check_choice('task', name, TASKS)
        if name == 'features':
            raise UserError(
                'task=features tells no classes; `vit-efficient table fidelity` measures what it has learned'
            )
        if of_pixels and name != 'segmentation':
            raise UserError(f'task={name} needs labels, and the data have masks; set task=segmentation')
        if name == 'classification':
            return cls()
        patch_embed = getattr(model, 'patch_embed', None)
        dense = isinstance(model, DenseModel)
        if not hasattr(patch_embed, 'dynamic_img_pad') or not (dense or hasattr(model, 'global_pool')):
            raise UserError(f'task={name} needs a plain vision transformer, {type(model).__name__} is none')
        if dense and name == 'both':
            raise UserError(
                "task=both needs the logits of the class token, which model.head does not give; set it to ''"
            )
        if not dense and model.global_pool != '':
            raise UserError(
                f"task={name} needs the logits of every token: set model.args.global_pool to '', it is "
                f'{model.global_pool!r}'
            )
        if name == 'both' and not getattr(model, 'has_class_token', False):
            raise UserError('task=both reads the class of the image off the class token: set model.args.class_token')
        size, none = preprocessing.input_size[1:], nothing(classes or [])
        if of_pixels:
            patch = model.patch_size if dense else tuple(patch_embed.patch_size)
            if padded_size(size, patch) != size:
                raise UserError(
                    f'data.img_size={list(size)} must be multiples of the patches, {list(patch)}, for masks: it is the '
                    'size of crops for training'
                )
            return cls(name, (size[0] // patch[0], size[1] // patch[1]), None, 1.0, none, True, patch)
        if preprocessing.crop_pct != 1:
            raise UserError(
                f'data.crop_pct must be 1 for task={name}: the target of patches is of the whole image; it is '
                f'{preprocessing.crop_pct}'
            )
        if patch_embed.dynamic_img_pad and any(a % b for a, b in zip(size, patch_embed.patch_size, strict=True)):
            raise UserError(
                f'task={name}: images of {size[0]}×{size[1]} pixels would be padded, their target would not; use a '
                'data.img_size that the patches divide'
            )
        grid, cut_to = tuple(patch_embed.dynamic_feat_size(size)), None if preprocessing.crop_mode == 'squash' else size
        return cls(name, grid, cut_to, patch_weight, none)

    reads_labels = True  # whether samples are to have a class, among those of the model

    @property
    def metric(self) -> str:
        """The accuracy by which a model is the best one."""
        return 'top1' if self.of_images else 'miou'

    @property
    def of_images(self) -> bool:
        return self.name != 'segmentation'

    @property
    def of_patches(self) -> bool:
        return self.name != 'classification'

    def check_logits(self, logits: Tensor) -> None:
        """Raises UserError if these are not the logits that the task needs."""
        if self.name == 'segmentation' and logits.ndim == 4:
            return
        if logits.ndim != 2 + self.of_patches or (self.of_patches and logits.shape[1] < self.grid[0] * self.grid[1]):
            needed = '(images, tokens, classes)' if self.of_patches else '(images, classes)'
            raise UserError(
                f'task={self.name} needs logits {needed}, the model gives {tuple(logits.shape)}; see task and '
                'model.args.global_pool'
            )

    def check_stage(self, name: str, stage: StageConfig, model: nn.Module) -> None:
        """Raises UserError if a stage cannot be had of a model, which has no data."""

    def try_inputs(self, images: Tensor) -> None:
        """Raises UserError if what the task has beside the model does not take images."""

    def begin_stage(self, stage: StageConfig, model: nn.Module) -> None:
        """A stage begins, before there is an optimiser: what learns in it may be chosen."""

    def learn(
        self,
        model: nn.Module,
        forward: Callable[[Tensor], Any],
        images: Tensor,
        truth: Sequence[Tensor],
        criterion: Criterion,
    ) -> tuple[Any, Tensor]:
        """What a model gives for a batch, and the loss of that.

        Args:
            model: That learns.
            forward: Its forward pass, as updates call it.
            images: (B, C, H, W), normalised.
            truth: As of `split`.
            criterion: As of `loss`.
        """
        logits = forward(images)
        return logits, self.loss(self.split(logits, truth), truth, criterion)

    def product(self, model: nn.Module) -> nn.Module:
        """What is saved of a model that has learned, which stays as it is."""
        return model

    def check_target(self, image: tuple[int, int], target: tuple[int, int]) -> None:
        """Raises UserError if patches of an image (h, w) are not where its target (rows, columns) says, or finer; or
        if a mask is not of the size of its image."""
        if self.of_pixels:
            if image != target:
                raise UserError(f'its mask has {target[0]}×{target[1]} pixels, the image has {image[0]}×{image[1]}')
            return
        if self.grid[0] > target[0] or self.grid[1] > target[1]:
            raise UserError(
                f'the {self.grid[0]}×{self.grid[1]} patches of the model are finer than its target of {target[0]}×'
                f'{target[1]}; use larger ones (model.args.patch_size), smaller images (data.img_size) or finer targets'
            )
        if self.cut_to and image[0] * self.cut_to[1] != image[1] * self.cut_to[0]:
            raise UserError(
                f'its {image[0]}×{image[1]} pixels would be cut to the aspect of data.img_size={list(self.cut_to)}, '
                'but not its target; give both one aspect, or set data.crop_mode=squash'
            )

    def maps(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """The logits of the patches of images of a size, padded, where they lie: (B, K, h, w), or finer ones."""
        if logits.ndim == 4:
            return logits
        h, w = (side // step for side, step in zip(padded_size(size, self.patch_size), self.patch_size, strict=True))
        return logits[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))

    def padded(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) as the model takes them: those of any size, padded to whole patches."""
        return pad_to_patches(images, self.patch_size) if self.of_pixels and images.ndim == 4 else images

    def score_pixels(self, logits: Tensor, classes: Tensor) -> list[PixelScore]:
        """How well the model's logits of padded images tell the classes (B, H, W) of their pixels, image by image."""
        maps = self.maps(logits.to(torch.promote_types(logits.dtype, torch.float32)), tuple(classes.shape[1:]))
        return [PixelScore.of(*pair, self.patch_size) for pair in zip(maps, classes, strict=True)]

    def split(self, logits: Tensor, truth: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The model's logits of images (B, K) and of patches (B, K, H, W), as far as the task has them.

        They are of float32, or finer if the model's are. A grid that is coarser than the target is resized bilinearly.
        `truth` is labels (B,), and targets (B, H, W) if the task has patches.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self.of_patches:
            return logits, None
        if self.of_pixels:
            size = tuple(truth[1].shape[1:])
            return None, upsampled(self.maps(logits, size), size, self.patch_size)
        patches_BKHW = self.maps(logits, self.grid)
        if patches_BKHW.shape[2:] != truth[1].shape[1:]:
            patches_BKHW = F.interpolate(patches_BKHW, truth[1].shape[1:], mode='bilinear', align_corners=False)
        return logits[:, 0] if self.of_images else None, patches_BKHW

    def loss(
        self, logits: tuple[Tensor | None, Tensor | None], truth: Sequence[Tensor], criterion: Criterion
    ) -> Tensor:
        """The mean loss of images, or of patches; for both, the former plus `patch_weight` times the latter.

        Logits and truth are those of `split`; the criterion is (logits (n, K), classes (n,)) -> their mean loss, of
        pixels (logits (B, K, H, W), classes (B, H, W)).
        """
        images_BK, patches_BKHW = logits
        if self.of_pixels:
            return criterion(patches_BKHW, truth[1])
        if not self.of_patches:
            return criterion(images_BK, truth[0])
        patch_loss = criterion(patches_BKHW.movedim(1, -1).flatten(0, 2), truth[1].flatten())
        return criterion(images_BK, truth[0]) + self.patch_weight * patch_loss if self.of_images else patch_loss


def nothing(classes: list[str]) -> int | None:
    """The class of what shows nothing."""
    return next((classes.index(name) for name in ('none', 'background') if name in classes), None)
