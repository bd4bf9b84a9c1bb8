"""What an image file says besides its pixels, which its mask keeps; and parts of an image, read without the rest."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from vit_efficient.data.files import tiff
from vit_efficient.data.files.images import read_image
from vit_efficient.data.files.pixels import DamagedImage, UnfitImage
from vit_efficient.utils.errors import UserError, first_line, is_own
from vit_efficient.utils.packages import MissingPackage, import_optional

ORIENTATION = 0x0112  # of EXIF and TIFF
_UNITS = {1: None, 2: 1.0, 3: 2.54}  # of a TIFF's resolution: inches in it, of cm; 1 has no unit
# ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory, GeoDoubleParams, GeoAsciiParams: OGC GeoTIFF 1.1
_GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
_VIPS_IN_MEMORY = 100 * 2**20  # bytes of an image from which on it is a file, by default
_NPY = b'\x93NUMPY'


@dataclass(frozen=True)
class Frame:
    """What a file says of its image.

    Attributes:
        height, width: In pixels, of what `read_image` gives.
        channels, itemsize: Samples of a pixel as they are stored, and the bytes of each.
        orientation: The tag of EXIF and TIFF that says where the first row and column are; 1 if there is none.
        turned: Whether `read_image` turns the image by it, as it does TIFFs.
        resolution: Pixels per inch, across and down.
        geo: The tags of a GeoTIFF: (number, type, count, value).
    """

    height: int
    width: int
    channels: int
    itemsize: int = 1
    orientation: int = 1
    turned: bool = False
    resolution: tuple[float, float] | None = None
    geo: tuple[tuple[int, int, int, Any], ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


def read_frame(path: Path, channels: int = 3) -> Frame:
    """What a file says of its image, without its pixels.

    Args:
        path: The file.
        channels: Of the model, by which an array of three axes is told to be (H, W, C) or (C, H, W).

    Raises:
        DamagedImage: If it cannot be read.
        UserError: If it is whole, and no image that is read here.
    """
    try:
        with open(path, 'rb') as file:
            magic = file.read(6)
            file.seek(0)
            if magic == _NPY:
                return _frame_of_array(np.load(path, mmap_mode='r', allow_pickle=False), channels)
            if magic.startswith(tiff.MAGIC):
                return _frame_of_tiff(path)
            with _open_header(file, magic) as image:
                orientation = image.getexif().get(ORIENTATION, 1)
                dpi = image.info.get('dpi')
                resolution = dpi and tuple(float(each) for each in dpi)
                itemsize = 4 if image.mode in 'IF' else 2 if image.mode.startswith('I;16') else 1
                size = image.height, image.width, len(image.getbands()), itemsize
                return Frame(*size, orientation, False, resolution or None)
    except UnidentifiedImageError as error:
        raise DamagedImage(f'{path}: not a readable image (unknown format)') from error
    except UserError as error:
        raise type(error)(f'{path}: {error}') from error
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        if is_own(error):
            raise
        raise DamagedImage(f'{path}: not a readable image ({type(error).__name__}: {first_line(error)})') from error


def _open_header(file: BinaryIO, magic: bytes) -> Image.Image:
    """An image of PIL of which nothing is decoded. `Image.open` would refuse large ones, before it can be known whether
    parts of them are read."""
    file.seek(0)
    if magic.startswith(b'\xff\xd8'):
        return JpegImagePlugin.JpegImageFile(file)
    return PngImagePlugin.PngImageFile(file) if magic.startswith(b'\x89PNG') else Image.open(file)


def _frame_of_array(array: np.ndarray, channels: int) -> Frame:
    if array.ndim not in (2, 3):
        raise UserError(f'an image has the shape (H, W), (H, W, C) or (C, H, W), this array has {array.shape}')
    height, width = array.shape[1:] if _channels_first(array, channels) else array.shape[:2]
    return Frame(height, width, array.size // max(height * width, 1), array.itemsize)


def _channels_first(array: np.ndarray, channels: int) -> bool:
    """Whether an array is (C, H, W): if only that fits, as `to_array` has it."""
    return array.ndim == 3 and array.shape[2] != channels and array.shape[0] == channels


def _frame_of_tiff(path: Path) -> Frame:
    tifffile = import_optional('tifffile', 'TIFFs are read by', 'train')
    with tifffile.TiffFile(path) as file:
        series = tiff.series_of(file)
        page = series.keyframe
        value = page.tags.valueof
        orientation = value('Orientation', 1)
        resolution, inches = None, _UNITS.get(int(value('ResolutionUnit', 2)))
        if inches and page.tags.get('XResolution') and page.tags.get('YResolution'):
            sides = (value('XResolution'), value('YResolution'))
            if all(whole and part for whole, part in sides):
                resolution = tuple(whole / part * inches for whole, part in sides)
        geo = tuple((tag.code, int(tag.dtype), tag.count, tag.value) for tag in page.tags if tag.code in _GEO_TAGS)
        size = page.imagelength, page.imagewidth
        channels = series.size // max(size[0] * size[1], 1)
        height, width = size[::-1] if orientation in (5, 6, 7, 8) else size
        return Frame(height, width, channels, page.dtype.itemsize, int(orientation), True, resolution, geo)


class Windows:
    """An image of which parts are read: without the rest where its format allows that.

    Attributes:
        height, width: In pixels.
        held: Bytes that are kept for it at most while parts are read; None of an image that is there as a whole.
    """

    def __init__(self, height: int, width: int, read: Callable[[int, int, int, int], Any], held: int | None = None):
        self.height, self.width, self._read, self.held = height, width, read, held

    @classmethod
    def of(cls, image: Image.Image | np.ndarray, held: int | None = None) -> 'Windows':
        """Of an image that is there: of PIL, or (H, W, …)."""
        if isinstance(image, Image.Image):
            return cls(image.height, image.width, lambda y, x, h, w: image.crop((x, y, x + w, y + h)), held)
        height, width = image.shape[:2]
        return cls(height, width, lambda y, x, h, w: image[y : y + h, x : x + w], held)

    @classmethod
    def whole(cls, path: Path, channels: int = 3) -> 'Windows':
        """Of an image that is read now, as a whole; arguments and errors as of `read_frame`."""
        try:
            image = read_image(path)
        except (UnfitImage, MissingPackage):
            raise
        except UserError as error:
            raise DamagedImage(str(error)) from error
        if isinstance(image, np.ndarray) and _channels_first(image, channels):
            image = image.transpose(1, 2, 0)
        return cls.of(image)

    def __call__(self, top: int, left: int, height: int, width: int) -> Image.Image | np.ndarray:
        """So many pixels from there, within the image, as `read_image` gives them.

        Raises:
            DamagedImage: If they cannot be read.
        """
        try:
            return self._read(top, left, height, width)
        except Exception as error:  # decoders raise all kinds of errors on damaged files
            if is_own(error) or isinstance(error, MissingPackage):
                raise
            raise DamagedImage(f'not a readable image ({type(error).__name__}: {first_line(error)})') from error


def open_windows(path: Path, channels: int = 3) -> Windows | None:
    """Parts of the image of a file: of `.npy` files, of TIFFs of tiles or strips and, with the `pyvips` package, of
    JPEGs and PNGs of 8 bits that are not progressive or interlaced; None for others, which are to be read whole. Parts
    are those of what `read_image` gives.

    No limit of pixels holds, since they are never there at once. Arguments and errors are those of `read_frame`.
    """
    frame = read_frame(path, channels)
    with open(path, 'rb') as file:
        magic = file.read(6)
    if magic == _NPY:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
        return Windows.of(array.transpose(1, 2, 0) if _channels_first(array, channels) else array, 0)
    found = tiff.parts_of(path) if magic.startswith(tiff.MAGIC) else _parts_by_vips(path, frame)
    return found and Windows(frame.height, frame.width, *found)


def _parts_by_vips(path: Path, frame: Frame) -> tuple[Callable[[int, int, int, int], Image.Image], int] | None:
    """What reads parts, and the bytes that it holds. As it is decoded, a large image goes to a temporary file."""
    with suppress(ImportError, OSError):  # a package, and a library of the system
        import pyvips

        with open(path, 'rb') as file, _open_header(file, file.read(6)) as image:
            mode, opaque = image.mode, 'transparency' not in image.info
            in_order = not (image.info.get('progressive') or image.info.get('interlace'))
            fits = image.format in ('JPEG', 'PNG', 'PPM') and mode in ('L', 'RGB') and opaque and in_order
        with suppress(pyvips.Error):
            whole = pyvips.Image.new_from_file(str(path), access='random', fail_on='truncated')
            if fits and whole.format == 'uchar' and whole.bands == len(mode):

                def read(top: int, left: int, height: int, width: int) -> Image.Image:
                    pixels = whole.crop(left, top, width, height).write_to_memory()
                    return Image.frombytes(mode, (width, height), bytes(pixels))

                return read, min(_VIPS_IN_MEMORY, frame.height * frame.width * frame.channels)
    return None
