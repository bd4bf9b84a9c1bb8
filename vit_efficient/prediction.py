"""Masks of images of any size by a trained model of pixels: of whole images, or of tiles that overlap.

Dimensions: B images, K classes, h × w cells of the logits, H × W pixels.
"""

import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vit_efficient.data.files.frames import Windows, open_windows, read_frame
from vit_efficient.data.files.images import EXTENSIONS, to_array
from vit_efficient.data.files.mask_files import palette, write_mask
from vit_efficient.data.files.pixels import UnfitImage
from vit_efficient.data.preprocessing import Preprocessing, WholeTransform
from vit_efficient.data.sources.folders import is_hidden, is_image, natural_order
from vit_efficient.dense import DenseModel
from vit_efficient.prediction_costs import Costs, duration
from vit_efficient.report.evaluation import SavedModel
from vit_efficient.train.masks import padded_size, strips
from vit_efficient.train.tasks import Task
from vit_efficient.train.tiles import Tiled
from vit_efficient.utils.device import choose_device
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import read_text, replacing, write_bytes, write_json
from vit_efficient.utils.measurements import digest
from vit_efficient.utils.modes import evaluating
from vit_efficient.utils.packages import MissingPackage
from vit_efficient.utils.precision import autocast

logger = logging.getLogger(__name__)

SETTINGS = 'predict.json'  # of a folder of masks: what has made them
_LARGE = 128**2  # patches of an image whose time is told
_LONG = 60  # seconds, above which it is
_TINT = 0.5  # the share of the colour of a class in an overlay


@dataclass(frozen=True)
class Job:
    """An image, and the name of what is predicted of it, without an ending."""

    path: Path
    name: str


def list_images(paths: Sequence[str | Path]) -> list[Job]:
    """Images that are named, and those in folders, with their paths in these as names.

    Raises:
        UserError: If there is no such path, a folder has no image, or two images would have one name.
    """
    jobs: dict[str, Job] = {}
    for path in map(Path, paths):
        if path.is_dir():
            names = [each.relative_to(path).as_posix() for each in path.rglob('*') if each.is_file()]
            names = natural_order(name for name in names if is_image(name) and not is_hidden(name))
            if not names:
                raise UserError(f'{path}: no image in it (files that are read end in {", ".join(EXTENSIONS)})')
        elif path.is_file():
            path, names = path.parent, [path.name]
        else:
            raise UserError(f'{path}: no such image or folder of images')
        for name in names:
            stem = Path(name).with_suffix('').as_posix()
            other = jobs.setdefault(stem, Job(path / name, stem)).path
            if other != path / name:
                raise UserError(f'{path / name}: {other} has the same name, and so would its mask; give them apart')
    return list(jobs.values())


class Predictor:
    """Tells the class of each pixel of images.

    Args:
        model: Images (B, C, H, W) -> logits, as `task` reads them.
        task: Of pixels.
        preprocessing: Of the images.
        device: Where it computes; the model is moved there.
        amp: none or bf16.
        overlap: Of tiles, as of `Tiled`.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        preprocessing: Preprocessing,
        device: torch.device,
        amp: str = 'none',
        overlap: float = 0.25,
    ):
        self.model, self.task, self.device, self.amp, self.overlap = model.to(device), task, device, amp, overlap
        self.transform, self.channels = WholeTransform(preprocessing), preprocessing.input_size[0]

    def tiled(self, tile: int, overlap: float | None = None) -> Tiled:
        """The model on tiles of that side in pixels."""
        return Tiled(self.model, self.task, tile, self.overlap if overlap is None else overlap)

    def logits(self, image: Windows, tile: int | None = None, overlap: float | None = None) -> Tensor:
        """(1, K, h, w), of the image padded to whole patches; seen whole or by tiles, and read as it is seen."""
        size = padded_size((image.height, image.width), self.task.patch_size)

        def read(top: int, left: int, height: int, width: int) -> Tensor:
            """What lies beyond the image is its edge."""
            there = min(height, image.height - top), min(width, image.width - left)
            pixels = self.transform.pixels(to_array(image(top, left, *there), self.channels))
            images = self.transform.normalize(pixels[None].to(self.device))
            beyond = 0, width - there[1], 0, height - there[0]
            return F.pad(images, beyond, mode='replicate') if any(beyond) else images

        with torch.no_grad(), evaluating(self.model), autocast(self.device, self.amp):
            if tile is None:
                logits = self.task.maps(self.model(read(0, 0, *size)), size)
            else:
                logits = self.tiled(tile, overlap).blend(read, size)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def shares(self, logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        """The probabilities of the classes of pixels, (K, rows, W), in strips from above, and the rows of each."""
        for rows, strip in strips(logits, size, self.task.patch_size):
            yield rows, strip[0].softmax(0)

    def classes(self, image: Windows, tile: int | None = None) -> np.ndarray:
        """The most likely class of each pixel (H, W), uint8, or uint16 of more than 256 classes."""
        logits, size = self.logits(image, tile), (image.height, image.width)
        found = np.empty(size, np.uint8 if logits.shape[1] <= 256 else np.uint16)
        for rows, strip in strips(logits, size, self.task.patch_size):
            found[rows] = strip[0].argmax(0).cpu().numpy()
        return found


def open_predictor(
    path: str | Path, overlap: float = 0.25, device: str = 'auto', amp: str | None = None
) -> tuple[Predictor, dict[str, Any]]:
    """The predictor of a trained model, and what its masks depend on, by name.

    Args:
        path: A run folder, or a model folder, of segmentation.
        overlap: Of tiles, as of `Tiled`.
        device, amp: As of a recipe; by default `amp` is that of the run.

    Raises:
        UserError: If there is no such model, or it does not tell the classes of patches.
    """
    return predictor_of(SavedModel(path), path, overlap, device, amp)


def predictor_of(
    saved: SavedModel, path: str | Path, overlap: float = 0.25, device: str = 'auto', amp: str | None = None
) -> tuple[Predictor, dict[str, Any]]:
    """`open_predictor` of a model that is open."""
    if saved.config.task != 'segmentation' and not isinstance(saved.model, DenseModel):
        raise UserError(f'{path}: it was trained for task={saved.config.task}; masks are of models of segmentation')
    task = Task.of('segmentation', saved.model, saved.preprocessing, None, 1.0, of_pixels=True)
    amp = amp or saved.config.amp
    settings = {'weights': digest(saved.model.state_dict().items()), 'amp': amp}
    return Predictor(saved.model, task, saved.preprocessing, choose_device(device, '--device'), amp, overlap), settings


@dataclass(frozen=True)
class Wanted:
    """How images are seen, and what is written for each.

    Attributes:
        tile: Side of tiles in pixels; None: the whole image; auto: whole within `memory`, else the largest tile.
        memory: Bytes that the process may take; None: any.
        format: Of masks: png, tif, or auto, that of the image, TIFF or not.
        overlays, probabilities: What is written besides masks.
    """

    tile: int | str | None = None
    memory: int | None = None
    format: str = 'auto'
    overlays: bool = False
    probabilities: bool = False


def predict_files(
    predictor: Predictor,
    jobs: Iterable[Job],
    out: Path,
    wanted: Wanted,
    settings: dict[str, Any],
    on_error: str = 'error',
    say: Callable[[str], None] = logger.info,
) -> tuple[int, dict[Path, str]]:
    """Writes the masks of images: `masks/NAME.png` or `.tif` (`write_mask`); `overlays/NAME.jpg`;
    `probabilities/NAME.npy`, (K, H, W), float16. The mask is written last: an image that has one is passed over, and so
    a call goes on where it stopped.

    By tiles, an image is read part by part where its format allows that (`open_windows`).

    Args:
        settings: What masks depend on: a folder that holds those of others is refused.
        on_error: error or skip, for a file that cannot be read. One that can be and does not fit is an error.
        say: Is told of images that take more than a minute, before they do, and of tiles that were chosen.

    Returns:
        How many were written, and why others were skipped, by path.

    Raises:
        UserError: If the folder is of other settings, an image takes more than `wanted.memory`, or cannot be read and
            is not to be skipped.
    """
    if isinstance(wanted.tile, int):
        settings = settings | {'overlap': predictor.tiled(wanted.tile).overlap}
    elif wanted.tile == 'auto':
        if wanted.memory is None:
            raise UserError('--tile auto takes the largest tile within a limit; set --memory, such as --memory 8GB')
        settings = settings | {'overlap': predictor.overlap}
    of_masks = asdict(wanted)
    if wanted.tile != 'auto':
        del of_masks['memory']
    _claim(out, settings | of_masks)
    costs = Costs(predictor) if wanted.memory else None
    written, skipped = 0, {}
    for job in jobs:
        if any((out / 'masks' / f'{job.name}.{ending}').exists() for ending in ('png', 'tif')):
            continue
        try:
            frame = read_frame(job.path, predictor.channels)
            by_tiles = wanted.tile is not None or wanted.memory is not None
            by_parts = open_windows(job.path, predictor.channels) if by_tiles else None
            large = frame.height * frame.width > _LARGE * math.prod(predictor.task.patch_size)
            costs = costs or (Costs(predictor) if large and wanted.tile is None else None)
            tile = wanted.tile
            if wanted.memory:
                tile = costs.tile_within(job.path, frame, tile, bool(by_parts), wanted.memory)
            if wanted.tile == 'auto':
                say(f'{job.path}: {"whole" if tile is None else f"by tiles of {tile} px"}')
            if costs and tile is None and (seconds := costs.seconds(patches := costs.patches(frame.size))) > _LONG:
                say(f'{job.path}: {patches:,} patches, whole: about {duration(seconds)}; --tile takes less')
            image = (by_parts if tile else None) or Windows.whole(job.path, predictor.channels)
        except (UnfitImage, MissingPackage):
            raise
        except UserError as error:
            if on_error == 'error':
                raise UserError(f'{error}; --on-error skip goes on without it') from error
            skipped[job.path] = str(error)
            continue
        try:
            classes = _write_probabilities(predictor, image, tile, out / 'probabilities' / f'{job.name}.npy', wanted)
            if wanted.overlays:
                pixels = to_array(image(0, 0, image.height, image.width), predictor.channels)
                _write_overlay(out / 'overlays' / f'{job.name}.jpg', pixels, classes)
        except UserError as error:
            raise UserError(f'{job.path}: {error}') from error
        ending = ('tif' if frame.turned else 'png') if wanted.format == 'auto' else wanted.format
        write_mask(out / 'masks' / f'{job.name}.{ending}', classes, frame)
        written += 1
    return written, skipped


def _claim(out: Path, settings: dict[str, Any]) -> None:
    path = out / SETTINGS
    if not path.exists():
        if (out / 'masks').exists():
            raise UserError(f'{out}: holds masks, and does not say of which model ({SETTINGS}); name another folder')
        write_json(path, settings)
        return
    try:
        earlier = dict(json.loads(read_text(path)))
    except (ValueError, TypeError) as error:
        raise UserError(f'{path}: is not what `vit-efficient predict` writes; name another folder') from error
    differing = [name for name in settings if earlier.get(name) != settings[name]]
    if differing:
        said = ', '.join(f'{name} was {earlier.get(name)}, is {settings[name]}' for name in differing)
        raise UserError(f'{out}: holds masks of other settings ({said}); name another folder')


def _write_probabilities(
    predictor: Predictor, image: Windows, tile: int | None, path: Path, wanted: Wanted
) -> np.ndarray:
    """Writes them, if they are wanted, strip by strip, and gives the classes."""
    if not wanted.probabilities:
        return predictor.classes(image, tile)
    logits, size = predictor.logits(image, tile), (image.height, image.width)
    classes = np.empty(size, np.uint8 if logits.shape[1] <= 256 else np.uint16)
    with replacing(path) as temporary:
        array = np.lib.format.open_memmap(temporary, 'w+', np.float16, (logits.shape[1], *size))
        for rows, shares in predictor.shares(logits, size):
            array[:, rows] = shares.cpu().numpy()
            classes[rows] = shares.argmax(0).cpu().numpy()
        array.flush()
    return classes


def _write_overlay(path: Path, image: np.ndarray, classes: np.ndarray) -> None:
    content = io.BytesIO()
    _overlay(image, classes).save(content, 'JPEG', quality=90)
    write_bytes(path, content.getvalue())


def _overlay(image: np.ndarray, classes: np.ndarray) -> Image.Image:
    """The image, of its first channel or its first three, tinted with the colours of all classes but the first."""
    shown = image if image.dtype == np.uint8 else (255 * image).round().astype(np.uint8)
    shown = shown[..., :3] if shown.shape[2] >= 3 else shown[..., :1].repeat(3, axis=2)
    colours = np.array(palette(int(classes.max()) + 1), np.uint8).reshape(-1, 3)[classes]
    mixed = (shown * (1 - _TINT) + colours * _TINT).round().astype(np.uint8)
    return Image.fromarray(np.where(classes[..., None] > 0, mixed, shown))
