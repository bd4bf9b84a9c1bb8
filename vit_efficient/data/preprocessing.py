"""What a model takes, and how images become that in evaluation: by timm's own transform."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.transforms import Normalize

from vit_efficient.data.config import DataConfig, SizeConfig
from vit_efficient.models.inputs import image_size
from vit_efficient.utils.checks import check_choice
from vit_efficient.utils.errors import UserError

_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'lanczos')
_CROP_MODES = ('center', 'squash', 'border')


@dataclass(frozen=True)
class Preprocessing:
    """The input (C, H, W) of a model, the statistics of its pixels, and how evaluation crops: of every transform."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @classmethod
    def of(cls, model: nn.Module, config: DataConfig | None = None) -> 'Preprocessing':
        """Reads it off a timm model; what `config` sets goes first.

        The size is that of `models.inputs.image_size`. A model of another number of channels than its statistics takes
        their mean for every channel.

        Raises:
            UserError: If the statistics in `config` do not have one value per channel, or a name is unknown.
        """
        config = config or DataConfig()
        in_chans = getattr(model, 'in_chans', None) or model.pretrained_cfg['input_size'][0]
        base = resolve_data_config(pretrained_cfg=dict(model.pretrained_cfg))
        size = tuple(config.img_size or image_size(model) or base['input_size'][-2:])
        if len(size) != 2 or min(size) < 1:
            raise UserError(f'data.img_size must be height and width in pixels, got {list(size)}')
        statistics = {}
        for name in ('mean', 'std'):
            values, given = getattr(config, name), base[name]
            if values is not None and len(values) != in_chans:
                raise UserError(f'data.{name} must have one value per channel of the model ({in_chans}), got {values}')
            if values is None:
                values = given if len(given) == in_chans else [sum(given) / len(given)] * in_chans
            statistics[name] = tuple(float(value) for value in values)
        if min(statistics['std']) <= 0:
            raise UserError(f'data.std must be above 0, got {list(statistics["std"])}')
        names = ('interpolation', 'crop_pct', 'crop_mode')
        crop = {name: getattr(config, name) or base[name] for name in names}
        check_choice('data.interpolation', crop['interpolation'], _INTERPOLATIONS)
        check_choice('data.crop_mode', crop['crop_mode'], _CROP_MODES)
        return cls((in_chans, *size), **statistics, **crop)

    def scheduled(self, schedule: Sequence[SizeConfig]) -> dict[int, 'Preprocessing']:
        """The same at the sizes of a schedule, by the first epoch that has each."""
        others = {part.epoch: replace(self, input_size=(self.input_size[0], *part.img_size)) for part in schedule}
        return {0: self, **others}

    def as_dict(self) -> dict[str, Any]:
        """The entries of timm's `pretrained_cfg`."""
        return dict(vars(self))


class EvalTransform:
    """timm's evaluation transform.

    8-bit images of 1 or 3 channels go through it as PIL images, exactly as in timm. Others (16-bit, floating point,
    many-channel) go through its resize and crop as float32 tensors, with the same target sizes, the same interpolation
    and antialiasing; then they are clipped to [0, 1], as 8-bit images are by their type, and normalised.
    """

    def __init__(self, preprocessing: Preprocessing):
        options = preprocessing.as_dict()
        self.crop_mode = preprocessing.crop_mode
        self.photograph = create_transform(is_training=False, **options)
        self.geometry = create_transform(is_training=False, normalize=False, **options)
        self.normalize = Normalize(preprocessing.mean, preprocessing.std)

    def __call__(self, image: np.ndarray, epoch: int = 0, index: int = 0, repeat: int = 0) -> torch.Tensor:
        """(H, W, C), uint8 or float32 in [0, 1] -> (C, H', W'), float32, normalised; the same for every epoch.

        Raises:
            UserError: For `crop_mode` border and an image that is not 8-bit grey or RGB: its padding is a colour.
        """
        if image.dtype == np.uint8 and image.shape[2] in (1, 3):
            return self.photograph(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image))
        if self.crop_mode == 'border':
            raise UserError('data.crop_mode=border works for 8-bit grey and RGB images only; use center or squash')
        if image.dtype == np.uint8:
            image = image.astype(np.float32) / 255
        tensor = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        return self.normalize(self.geometry(tensor).clamp_(0, 1))
