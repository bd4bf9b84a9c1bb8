"""Reading images: grey, RGB and many-channel, 8-bit, 16-bit and floating point."""

import errno
import io
import logging
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from vit_efficient.data.files import tiff
from vit_efficient.data.files.pixels import UnfitImage, WithAlpha, WithExtra, too_large
from vit_efficient.data.files.tiff import decode_by_opencv
from vit_efficient.utils.compat import pil_decoder_arguments
from vit_efficient.utils.errors import UserError, is_own
from vit_efficient.utils.packages import MissingPackage

logger = logging.getLogger(__name__)

EXTENSIONS = ('.bmp', '.jpeg', '.jpg', '.npy', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
_NPY_MAGIC = b'\x93NUMPY'
# What the system lacks, whatever the file.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as in PIL
# How far floating-point samples may lie outside [0, 1]: at an edge, and at a corner, OpenCV's bicubic resampling
# overshoots by 1/9 of the step, and by (10/9)² - 1 = 0.23. Pixels in 0…255 and normalised ones lie further out.
_OVERSHOOT = 0.25
_PIL_MODES = {1: 'L', 3: 'RGB'}
# Of what OpenCV makes of a PNG, by the colour type in its header: RGB, without the transparency that a chunk may add;
# grey and alpha; RGB and alpha.
_PNG_CHANNELS = {2: [0, 1, 2], 4: [0, 3], 6: [0, 1, 2, 3]}


def name_of(source: str | Path | BinaryIO) -> str:
    """The beginning of a message about a source: its name if it is a file, nothing if it is a stream."""
    return f'{source}: ' if isinstance(source, str | Path) else ''


def read_bytes(source: str | Path | BinaryIO) -> bytes:
    """What is in a file or a stream; a UserError if it cannot be read."""
    try:
        return Path(source).read_bytes() if isinstance(source, str | Path) else source.read()
    except OSError as error:
        if error.errno in EXHAUSTED:
            raise
        raise UserError(f'{name_of(source)}not a readable image ({error.strerror or error})') from error
    except Exception as error:  # of a stream, whatever its library raises
        raise UserError(f'{name_of(source)}not a readable image ({type(error).__name__}: {error})') from error


def read_image(source: str | Path | BinaryIO) -> Image.Image | np.ndarray:
    """Decodes one image.

    Args:
        source: A file or an open stream: any format of PIL with 8 bits per sample; a PNG, PGM or PPM with more; a
            TIFF with more, or with any number of channels, which may lie in its samples, its planes or its pages; or a
            NumPy array (`.npy`) of shape (H, W), (H, W, C) or (C, H, W). The orientation of a TIFF is part of its
            format and applied, that of EXIF in other formats is not, as in timm. No decoder takes more pixels than PIL
            does; an array, which is as large as its file, may have any number.

    Returns:
        A PIL image if the file is a photograph of 8 bits, else an array: as stored (`.npy`), or (H, W) or (H, W, C).

    Raises:
        UserError: If it cannot be decoded, naming the file; `UnfitImage` if it is whole nevertheless, MissingPackage if
            what reads it is not installed.
    """
    data, prefix = read_bytes(source), name_of(source)
    try:
        if data.startswith(_NPY_MAGIC):
            return np.load(io.BytesIO(data), allow_pickle=False)
        if data.startswith(tiff.MAGIC):
            return tiff.read_tiff(data)
        image = Image.open(io.BytesIO(data))
        if _is_deep(image, data):
            return _decode_deep(image, data)
        image.load()
        return image
    except UnidentifiedImageError as error:
        raise UserError(f'{prefix}not a readable image (unknown format)') from error
    except Image.DecompressionBombError as error:
        raise UnfitImage(f'{prefix}{too_large(str(error).rstrip("."))}') from error
    except (MissingPackage, UnfitImage) as error:
        raise type(error)(f'{prefix}{error}') from error
    # PIL, OpenCV and NumPy raise all kinds of errors on damaged files: SyntaxError, struct.error, EOFError, …
    except Exception as error:
        if is_own(error):
            raise
        raise UserError(f'{prefix}not a readable image ({type(error).__name__}: {error})') from error


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether samples have more than 8 bits. PIL opens deep RGB files as 8-bit ones, so the header has to tell."""
    if image.format == 'PNG':
        return data[24] > 8
    return image.mode.startswith(('I', 'F')) or _ppm_maximum(image) > 255


def _ppm_maximum(image: Image.Image) -> int:
    """The sample that stands for 1 in a PPM, by what PIL hands to its decoder; 255 for other files."""
    args = pil_decoder_arguments(image) if image.format == 'PPM' and image.mode == 'RGB' else ()
    return args[1] if args else 255


def _decode_deep(image: Image.Image, data: bytes) -> np.ndarray:
    if image.mode.startswith(('I', 'F')):  # one channel, which PIL keeps in full depth
        pixels = np.asarray(image)
        # PIL widens some 16-bit greys to 32 bits.
        return pixels.astype(np.uint16) if image.format in ('PNG', 'PPM') and image.mode != 'F' else pixels
    if image.format == 'PPM':
        # Samples that are text may end with the file, but not for OpenCV. It leaves their scale as it is, unlike PIL.
        pixels = decode_by_opencv(data + b'\n' if data.startswith(b'P3') else data)
        return (pixels * (65535 / _ppm_maximum(image))).round().astype(np.uint16)
    channels = _PNG_CHANNELS[data[25]]
    pixels = decode_by_opencv(data)[..., channels]
    return pixels if len(channels) == 3 else pixels.view(WithAlpha)


def to_array(image: Image.Image | np.ndarray, in_chans: int) -> np.ndarray:
    """Brings an image to the channels of the model and to one of two sample types.

    Grey is repeated for a model of 3 channels, RGB is weighed to luma for a model of 1 channel. An alpha channel of a
    PIL image, a PNG or a TIFF (an unassociated one) is dropped for a model of 1 or 3 channels, else it is a channel:
    RGBA fits a model of 4. So is the fourth sample of an RGB TIFF that does not tell what it is, with a warning. CMYK
    is converted for a model of 1 or 3 channels and fits no other. Of 8-bit PIL images, `Image.convert` makes 1 or 3
    channels, as in timm.

    Args:
        image: What `read_image` gives: a PIL image, or an array (H, W) or (H, W, C), or (C, H, W) where only that fits
            the model: uint8, uint16, or floating point in [0, 1], clipped where bicubic resampling overshoots.
        in_chans: Of the model.

    Returns:
        (H, W, in_chans): uint8 if the image has 8 bits, else float32, with uint16 scaled to [0, 1].

    Raises:
        UserError: If the channels do not fit, or the array has another shape, type or range, or is not finite.
    """
    if isinstance(image, Image.Image):
        if not image.mode.startswith(('I', 'F')):
            image = _convert(image, in_chans)
        image = np.asarray(image)
        image = image.astype(np.uint8) * 255 if image.dtype == bool else image
    if isinstance(image, WithAlpha):
        image = np.asarray(image[..., :-1] if in_chans in _PIL_MODES else image)
    if isinstance(image, WithExtra):
        if in_chans in _PIL_MODES:
            _say_left_out(in_chans)
        image = np.asarray(image[..., :3] if in_chans in _PIL_MODES else image)
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or 0 in image.shape:
        shape = getattr(image, 'shape', type(image).__name__)
        raise UserError(f'an image must be a PIL image or an array (H, W) or (H, W, C), got {shape}')
    pixels = image[..., None] if image.ndim == 2 else image
    pixels = pixels.astype(pixels.dtype.newbyteorder('='), copy=False)
    if pixels.dtype == np.uint16:
        pixels = pixels.astype(np.float32) / 65535
    elif pixels.dtype.kind == 'f':
        pixels = pixels.astype(np.float32)
        low, high = pixels.min(), pixels.max()
        if not np.isfinite([low, high]).all():
            raise UserError('it holds values that are not finite')
        if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
            raise UserError(
                f'floating-point samples must lie in [0, 1], these lie in [{low:g}, {high:g}]; scale them '
                '(8-bit values by 1/255), or store uint8 or uint16'
            )
        pixels = pixels.clip(0, 1)
    elif pixels.dtype != np.uint8:
        raise UserError(f'samples must be uint8, uint16 or floating point in [0, 1], got {pixels.dtype}')
    return np.ascontiguousarray(_fit_channels(pixels, in_chans))


@cache
def _say_left_out(in_chans: int) -> None:
    logger.warning(
        'images of red, green, blue and a fourth channel that is no alpha are read as RGB for a model of %d channels; '
        'model.args.in_chans=4 takes all',
        in_chans,
    )


def _convert(image: Image.Image, in_chans: int) -> Image.Image:
    if in_chans in _PIL_MODES:
        try:
            return image.convert(_PIL_MODES[in_chans])
        except ValueError as error:
            raise UserError(f'PIL does not convert it ({error}); store it as grey or RGB') from error
    if image.mode == 'CMYK':
        raise UserError(
            f'it is CMYK, the model takes {in_chans} channels; set model.args.in_chans=3, to which it is converted, or '
            'store its inks as .npy (H, W, 4)'
        )
    return image.convert('RGB') if image.mode == 'P' else image


def _fit_channels(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    channels = pixels.shape[2]
    if channels == in_chans:
        return pixels
    if (channels, in_chans) == (1, 3):
        return pixels.repeat(3, axis=2)
    if (channels, in_chans) == (3, 1):
        grey = pixels @ _LUMA
        return (grey.round() if pixels.dtype == np.uint8 else grey).astype(pixels.dtype)[..., None]
    if pixels.shape[0] == in_chans < min(pixels.shape[1:]):
        return pixels.transpose(1, 2, 0)
    raise UserError(
        f'it has {channels} channels, the model takes {in_chans}; set model.args.in_chans={channels}, '
        f'or store images of {in_chans} channels (arrays are height × width × channels)'
    )
