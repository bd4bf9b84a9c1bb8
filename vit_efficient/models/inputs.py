"""What a model takes as input: its size, in pixels or in the coefficients of their patches."""

import timm
from timm.layers import to_2tuple
from timm.models import get_model_input_config
from torch import nn

from vit_efficient.models.patch_embed import DctPatchEmbed
from vit_efficient.utils.compat import model_args


def takes_coefficients(model: nn.Module) -> bool:
    """Whether a model takes coefficient images in the place of pixels."""
    embedding = getattr(model, 'patch_embed', None)
    return isinstance(embedding, DctPatchEmbed) and embedding.input == 'coefficients'


def input_size(model: nn.Module, img_size: int | tuple[int, int]) -> tuple[int, int, int]:
    """Channels, height and width of what a model is given for an image.

    Args:
        model: Any of timm.
        img_size: Height and width of the image in pixels, or its side.
    """
    sides = to_2tuple(img_size)
    if takes_coefficients(model):
        sides = model.patch_embed.input_size(*sides)
    return getattr(model, 'in_chans', 3), *sides


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width in pixels of the images that a model of timm is meant for; None where it says none.

    It is the size that it is built for or, of a model that takes any (`dynamic_img_size`) and is as it was saved, the
    one that it was saved with, which then only the `input_size` of its `pretrained_cfg` says.
    """
    built = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    saved, config = getattr(model, 'pretrained_model_args', None), model.pretrained_cfg
    if not saved or get_model_input_config(model)['fixed_input_size']:
        return built
    if to_2tuple(saved.get('img_size')) != to_2tuple(model_args(model).get('img_size')):
        return built  # it was given another size when it was read, or since
    # That of the architecture is what every model says that nothing else was said of, whatever it is built for.
    default = timm.get_pretrained_cfg(saved.get('base', config['architecture']))
    unsaid = default is not None and tuple(default.input_size[-2:]) == tuple(config['input_size'][-2:])
    return built if unsaid else tuple(config['input_size'][-2:])
