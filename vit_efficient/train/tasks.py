"""What a run learns: the class of each image, of each patch, or of both, from the logits of one vision transformer.

With `global_pool=''` timm's head is applied to every token: the same model and the same linear head serve all three.

Dimensions: B images, N tokens (prefix tokens, then h · w patches), K classes, H × W patches of the target.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_efficient.data import Preprocessing
from vit_efficient.train.config import TASKS
from vit_efficient.utils.checks import check_choice
from vit_efficient.utils.errors import UserError

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """How logits are read.

    Those of classification, (B, K), are of images; of segmentation, (B, N, K), the last h · w tokens' are of patches;
    of both, likewise, and the first token's, which is the class token, are of the image.
    """

    name: str = 'classification'
    grid: tuple[int, int] = (0, 0)  # h and w, of patch tasks
    cut_to: tuple[int, int] | None = None  # height and width of the input, if images of another aspect are cut to it
    patch_weight: float = 1.0  # of the loss of patches beside that of images, for both
    none: int | None = None  # the class of patches that show nothing, if there is one

    @classmethod
    def of(
        cls, name: str, model: nn.Module, preprocessing: Preprocessing, classes: list[str] | None, patch_weight: float
    ) -> 'Task':
        """The task for a timm model and its preprocessing; the class called none is of patches that show nothing.

        Raises:
            UserError: If there is no such task, the model does not give the logits that it needs, or images are
                cropped that have targets.
        """
        check_choice('task', name, TASKS)
        if name == 'classification':
            return cls()
        patch_embed = getattr(model, 'patch_embed', None)
        if not hasattr(patch_embed, 'dynamic_img_pad') or not hasattr(model, 'global_pool'):
            raise UserError(f'task={name} needs a plain vision transformer, {type(model).__name__} is none')
        if model.global_pool != '':
            raise UserError(
                f"task={name} needs the logits of every token: set model.args.global_pool to '', it is "
                f'{model.global_pool!r}'
            )
        if name == 'both' and not getattr(model, 'has_class_token', False):
            raise UserError('task=both reads the class of the image off the class token: set model.args.class_token')
        if preprocessing.crop_pct != 1:
            raise UserError(
                f'data.crop_pct must be 1 for task={name}: the target of patches is of the whole image; it is '
                f'{preprocessing.crop_pct}'
            )
        size = preprocessing.input_size[1:]
        if patch_embed.dynamic_img_pad and any(a % b for a, b in zip(size, patch_embed.patch_size, strict=True)):
            raise UserError(
                f'task={name}: images of {size[0]}×{size[1]} pixels would be padded, their target would not; use a '
                'data.img_size that the patches divide'
            )
        grid, cut_to = tuple(patch_embed.dynamic_feat_size(size)), None if preprocessing.crop_mode == 'squash' else size
        none = classes.index('none') if classes and 'none' in classes else None
        return cls(name, grid, cut_to, patch_weight, none)

    @property
    def of_images(self) -> bool:
        return self.name != 'segmentation'

    @property
    def of_patches(self) -> bool:
        return self.name != 'classification'

    def check_logits(self, logits: Tensor) -> None:
        """Raises UserError if these are not the logits that the task needs."""
        if logits.ndim != 2 + self.of_patches or (self.of_patches and logits.shape[1] < self.grid[0] * self.grid[1]):
            needed = '(images, tokens, classes)' if self.of_patches else '(images, classes)'
            raise UserError(
                f'task={self.name} needs logits {needed}, the model gives {tuple(logits.shape)}; see task and '
                'model.args.global_pool'
            )

    def check_target(self, image: tuple[int, int], target: tuple[int, int]) -> None:
        """Raises UserError if patches of an image (h, w) are not where its target (rows, columns) says, or finer."""
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

    def split(self, logits: Tensor, truth: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The model's logits of images (B, K) and of patches (B, K, H, W), as far as the task has them.

        They are of float32, or finer if the model's are. A grid that is coarser than the target is resized bilinearly.
        `truth` is labels (B,), and targets (B, H, W) if the task has patches.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self.of_patches:
            return logits, None
        h, w = self.grid
        patches_BKHW = logits[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))
        if (h, w) != truth[1].shape[1:]:
            patches_BKHW = F.interpolate(patches_BKHW, truth[1].shape[1:], mode='bilinear', align_corners=False)
        return logits[:, 0] if self.of_images else None, patches_BKHW

    def loss(
        self, logits: tuple[Tensor | None, Tensor | None], truth: Sequence[Tensor], criterion: Criterion
    ) -> Tensor:
        """The mean loss of images, or of patches; for both, the former plus `patch_weight` times the latter.

        Logits and truth are those of `split`; the criterion is (logits (n, K), classes (n,)) -> their mean loss.
        """
        images_BK, patches_BKHW = logits
        if not self.of_patches:
            return criterion(images_BK, truth[0])
        patch_loss = criterion(patches_BKHW.movedim(1, -1).flatten(0, 2), truth[1].flatten())
        return criterion(images_BK, truth[0]) + self.patch_weight * patch_loss if self.of_images else patch_loss
