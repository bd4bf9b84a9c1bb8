"""Writing masks: indexed PNGs and TIFFs, which lie as the file of their image does, and where that does."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vit_efficient.data.files import tiff
from vit_efficient.data.files.frames import ORIENTATION, Frame
from vit_efficient.utils.files import replacing, write_bytes
from vit_efficient.utils.packages import import_optional

_TILE = 256  # px, of the tiles of TIFFs


def palette(classes: int) -> list[int]:
    """Colours of classes, red, green and blue one after the other: those of PASCAL VOC, whose first one is black."""
    colours = []
    for number in range(classes):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
        colours += colour
    return colours


def write_mask(path: Path, classes: np.ndarray, frame: Frame | None = None) -> None:
    """Writes the class of each pixel: of uint8 with a palette, of uint16 as grey levels.

    Args:
        path: Ends in .png or .tif.
        classes: (H, W), as `read_image` gives the image, turned or not.
        frame: Of the image. Its resolution is kept; so is its orientation where readers treat it as that of the image:
            by a TIFF, which is stored as the image is, of a TIFF, and by a PNG of all others; a TIFF has its place on
            the earth too.
    """
    if path.suffix == '.tif':
        return _write_tiff(path, classes, frame)
    image = Image.fromarray(classes)
    if classes.dtype == np.uint8:
        image = image.convert('L')
        image.putpalette(palette(256))
    options = {}
    if frame and frame.resolution:
        options['dpi'] = frame.resolution
    if frame and frame.orientation != 1 and not frame.turned:
        options['exif'] = Image.Exif()
        options['exif'][ORIENTATION] = frame.orientation
    content = io.BytesIO()
    image.save(content, 'PNG', **options)
    write_bytes(path, content.getvalue())


def _write_tiff(path: Path, classes: np.ndarray, frame: Frame | None) -> None:
    tifffile = import_optional('tifffile', 'TIFFs are written by', 'train')
    options, extra = {}, []
    if classes.dtype == np.uint8:
        colours = np.array(palette(256), np.uint16).reshape(256, 3).T * 257
        options |= {'photometric': 'palette', 'colormap': colours}
    else:
        options['photometric'] = 'minisblack'
    if frame and frame.resolution:
        options |= {'resolution': frame.resolution, 'resolutionunit': 'INCH'}
    if frame and frame.turned and frame.orientation != 1:
        classes = tiff.turned_back(classes, frame.orientation)
        extra.append((ORIENTATION, 3, 1, frame.orientation, True))
    extra += [(*tag, True) for tag in frame.geo] if frame else []
    with replacing(path) as temporary:
        tifffile.imwrite(
            temporary, classes, compression='zlib', tile=(_TILE, _TILE), extratags=extra, metadata=None, **options
        )
