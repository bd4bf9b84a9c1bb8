"""Reading images: grey, RGB and many-channel, 8-bit, 16-bit and floating point."""

import errno
import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from vit_efficient.utils.compat import pil_decoder_arguments
from vit_efficient.utils.errors import UserError, is_own
from vit_efficient.utils.packages import MissingPackage, import_optional

EXTENSIONS = ('.bmp', '.jpeg', '.jpg', '.npy', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
_NPY_MAGIC = b'\x93NUMPY'
_TIFF_MAGIC = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # of either byte order; + is BigTIFF
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


class WithAlpha(np.ndarray):
    """Pixels (H, W, C) whose last channel is alpha, as the mode of a PIL image or the header of a deep file says."""


class UnfitImage(UserError):
    """A file is whole and not read, such as one of more pixels than PIL decodes, a volume, or a compression for which a
    package is missing. It is no damage: under `on_error` skip, too, it is an error."""


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
            NumPy array (`.npy`) of shape (H, W), (H, W, C) or (C, H, W).

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
        if data.startswith(_TIFF_MAGIC) and (pixels := _read_tiff(data)) is not None:
            return pixels
        image = Image.open(io.BytesIO(data))
        if _is_deep(image, data):
            return _decode_deep(image, data)
        image.load()
        return image
    except UnidentifiedImageError as error:
        raise UserError(f'{prefix}not a readable image (unknown format)') from error
    except Image.DecompressionBombError as error:
        most, reason = f'{2 * Image.MAX_IMAGE_PIXELS:,}', str(error).rstrip('.')
        raise UnfitImage(
            f'{prefix}PIL decodes at most {most} pixels, twice PIL.Image.MAX_IMAGE_PIXELS ({reason}); raise that in a '
            'script of your own, store the image smaller, or as .npy; data.decode=scaled reads large JPEGs'
        ) from error
    except MissingPackage:
        raise
    except UnfitImage as error:
        raise UnfitImage(f'{prefix}{error}') from error
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
        pixels = _decode_by_opencv(data + b'\n' if data.startswith(b'P3') else data)
        return (pixels * (65535 / _ppm_maximum(image))).round().astype(np.uint16)
    channels = _PNG_CHANNELS[data[25]]
    pixels = _decode_by_opencv(data)[..., channels]
    return pixels if len(channels) == 3 else pixels.view(WithAlpha)


def _decode_by_opencv(data: bytes) -> np.ndarray:
    """(H, W), or (H, W, C) with colours in the order of RGB."""
    cv2 = import_optional('cv2', 'deep and compressed images are read by', 'train', 'opencv-python-headless')
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise UserError('damaged, or of a layout that OpenCV cannot read; store it as .npy')
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]] if pixels.ndim == 3 else pixels


def _read_tiff(data: bytes) -> np.ndarray | None:
    """(H, W) or (H, W, C), with all channels; None for a photograph of 8 bits, which PIL knows how to convert."""
    tifffile = import_optional('tifffile', 'TIFFs are read by', 'train')
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if not file.series:
            raise UserError('it has no pages')
        page, series, pages = file.pages.first, file.series[0], len(file.pages)
        single = len(series.pages) == 1
        # Each page says where the next one is, and the last one 0; tifffile goes without pages that are not there.
        if data[file.pages.next_page_offset :][:4] != bytes(4):
            raise UserError(f'it is cut off after {pages} pages')
        # PIL takes any second sample for alpha. One of which the file does not tell what it is is a channel.
        told = any(page.extrasamples[:1])
        plain = page.samplesperpixel == 1 or page.photometric != tifffile.PHOTOMETRIC.MINISBLACK or told
        if single and np.max(page.bitspersample) <= 8 and page.samplesperpixel <= 4 and plain:
            return None
        if series.ndim > 3 or not {'Y', 'X'} <= set(series.axes):
            raise UnfitImage(f'its pages and planes have shape {series.shape}; store it as .npy (H, W, C)')
        try:
            pixels = np.moveaxis(series.asarray(), (series.axes.index('Y'), series.axes.index('X')), (0, 1))
        except ValueError as error:
            # LZW and other compressions are a large package of their own; OpenCV has them, for what is laid out as RGB.
            if 'imagecodecs' not in str(error):
                raise
            if not (single and page.planarconfig == 1 and page.samplesperpixel in (1, 3, 4)):
                raise UnfitImage(
                    f'tifffile reads its compression with the imagecodecs package only ({error}): pip install '
                    'imagecodecs, or store it uncompressed'
                ) from error
            pixels = _decode_by_opencv(data)
        # Grey or RGB, and an alpha by which it is not multiplied.
        alpha = page.samplesperpixel in (2, 4) and page.extrasamples == (tifffile.EXTRASAMPLE.UNASSALPHA,)
        return pixels.view(WithAlpha) if alpha else pixels


def to_array(image: Image.Image | np.ndarray, in_chans: int) -> np.ndarray:
    """Brings an image to the channels of the model and to one of two sample types.

    Grey is repeated for a model of 3 channels, RGB is weighed to luma for a model of 1 channel. An alpha channel of a
    PIL image, a PNG or a TIFF (an unassociated one) is dropped for a model of 1 or 3 channels, else it is a channel:
    RGBA fits a model of 4. CMYK is converted for a model of 1 or 3 channels and fits no other. Of 8-bit PIL images,
    `Image.convert` makes 1 or 3 channels, as in timm.

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
