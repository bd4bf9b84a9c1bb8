"""Images of any folders as a model takes them, without labels: what is measured on photographs that nobody sorted."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vit_efficient.data.files.images import EXTENSIONS, read_image, to_array
from vit_efficient.data.preprocessing import EvalTransform, Preprocessing
from vit_efficient.data.sources.folders import is_hidden, is_image, natural_order
from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.errors import UserError


def read_crops(
    folders: Iterable[str | Path], preprocessing: Preprocessing, img_size: int, limit: int, enlarge: bool = False
) -> tuple[list[Tensor], int]:
    """Images, resized until their shorter side is the crop's, and cropped in the middle.

    Where there are more than `limit`, they are taken evenly from all, in the natural order of their paths.

    Args:
        folders: Searched with the folders in them; or files.
        preprocessing: Has the channels, the statistics and the interpolation.
        img_size: Side of the crops, in pixels.
        limit: The most images.
        enlarge: Whether smaller images are enlarged; they are left out by default.

    Returns:
        Tensors (C, img_size, img_size), and how many images were left out as too small until there were enough.

    Raises:
        UserError: If there is no image, or none is large enough; or one cannot be read.
    """
    img_size, limit = as_integer('img_size', img_size), as_integer('limit', limit)
    folders = [Path(folder) for folder in folders]
    files = [path for folder in folders for path in _images(folder)]
    where = ', '.join(map(str, folders))
    if not files:
        raise UserError(f'{where}: no image (files that are read end in {", ".join(EXTENSIONS)})')
    step = -(-len(files) // limit)
    channels = preprocessing.input_size[0]
    size = (channels, img_size, img_size)
    transform = EvalTransform(replace(preprocessing, input_size=size, crop_pct=1.0, crop_mode='center'))
    crops, too_small = [], 0
    for path in (path for first in range(step) for path in files[first::step]):
        try:
            pixels = to_array(read_image(path), channels)
        except UserError as error:
            raise error if str(path) in str(error) else UserError(f'{path}: {error}') from error
        if min(pixels.shape[:2]) < img_size and not enlarge:
            too_small += 1
            continue
        crops.append(transform(pixels))
        if len(crops) == limit:
            break
    if not crops:
        raise UserError(
            f'{where}: none of {too_small} images has {img_size} pixels on each side; take larger images, a smaller '
            'size, or enlarge them (--enlarge), which flatters every attention'
        )
    return crops, too_small


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return [folder]
    names = [path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()]
    return [folder / name for name in natural_order(name for name in names if is_image(name) and not is_hidden(name))]
