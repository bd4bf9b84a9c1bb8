"""What every decoder gives and refuses: pixels with an alpha, files that are whole and not read."""

import numpy as np
from PIL import Image

from vit_efficient.utils.errors import UserError


class WithAlpha(np.ndarray):
    """Pixels (H, W, C) whose last channel is alpha, as the mode of a PIL image or the header of a deep file says."""


class WithExtra(np.ndarray):
    """Pixels (H, W, 4) that are red, green, blue and something else that is no alpha, such as infrared."""


class DamagedImage(UserError):
    """A file cannot be read as an image."""


class UnfitImage(UserError):
    """A file is whole and not read, such as one of more pixels than PIL decodes, a volume, or colours that nobody here
    converts. It is no damage: under `on_error` skip, too, it is an error."""


def too_large(reason: str) -> UnfitImage:
    """The error about an image of more pixels than PIL decodes: `reason` says how many."""
    return UnfitImage(
        f'PIL decodes at most {2 * Image.MAX_IMAGE_PIXELS:,} pixels, twice PIL.Image.MAX_IMAGE_PIXELS ({reason}); '
        'raise that in a script of your own, store the image smaller, or as .npy; data.decode=scaled reads large JPEGs'
    )


def check_size(height: int, width: int, channels: int = 1) -> None:
    """Holds PIL's limit for decoders that have none: a file of a few bytes may claim any size.

    Four channels are a pixel, as in PIL; further ones count as further pixels.

    Raises:
        UnfitImage: If the image is above the limit.
    """
    if Image.MAX_IMAGE_PIXELS is not None and height * width * -(-channels // 4) > 2 * Image.MAX_IMAGE_PIXELS:
        of = f' of {channels} channels' if channels > 4 else ''
        raise too_large(f'it has {height:,} × {width:,}{of}')
