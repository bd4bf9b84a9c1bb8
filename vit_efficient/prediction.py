"""Masks of images of any size by a trained model of pixels: of whole images, or of tiles that overlap.

Dimensions: B images, K classes, h × w cells of the logits, H × W pixels.
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vit_efficient.data.files.images import EXTENSIONS, read_image, to_array
from vit_efficient.data.files.pixels import UnfitImage
from vit_efficient.data.preprocessing import Preprocessing, WholeTransform
from vit_efficient.data.sources.folders import is_hidden, is_image, natural_order
from vit_efficient.dense import DenseModel
from vit_efficient.report.evaluation import SavedModel
from vit_efficient.train.masks import strips
from vit_efficient.train.tasks import Task
from vit_efficient.train.tiles import Tiled
from vit_efficient.utils.device import choose_device
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import read_text, replacing, write_bytes, write_json
from vit_efficient.utils.measurements import digest
from vit_efficient.utils.modes import evaluating
from vit_efficient.utils.packages import MissingPackage
from vit_efficient.utils.precision import autocast

SETTINGS = 'predict.json'  # of a folder of masks: what has made them
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
        model: Images (B, C, H, W) -> logits, as `task` reads them; or a `Tiled` one.
        task: Of pixels.
        preprocessing: Of the images.
        device: Where it computes; the model is moved there.
        amp: none or bf16.
    """

    def __init__(
        self, model: nn.Module, task: Task, preprocessing: Preprocessing, device: torch.device, amp: str = 'none'
    ):
        self.model, self.task, self.device, self.amp = model.to(device), task, device, amp
        self.transform, self.channels = WholeTransform(preprocessing), preprocessing.input_size[0]

    def logits(self, image: np.ndarray) -> Tensor:
        """(H, W, C), as `to_array` gives it -> (1, K, h, w), of the image padded to whole patches."""
        size = image.shape[:2]
        images = self.transform.normalize(self.transform.pixels(image)[None].to(self.device))
        with torch.no_grad(), evaluating(self.model), autocast(self.device, self.amp):
            logits = self.task.maps(self.model(self.task.padded(images)), size)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def shares(self, logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        """The probabilities of the classes of pixels, (K, rows, W), in strips from above, and the rows of each."""
        for rows, strip in strips(logits, size, self.task.patch_size):
            yield rows, strip[0].softmax(0)

    def classes(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) -> the most likely class of each pixel (H, W), uint8, or uint16 of more than 256 classes."""
        logits, size = self.logits(image), image.shape[:2]
        found = np.empty(size, np.uint8 if logits.shape[1] <= 256 else np.uint16)
        for rows, strip in strips(logits, size, self.task.patch_size):
            found[rows] = strip[0].argmax(0).cpu().numpy()
        return found


def open_predictor(
    path: str | Path, tile: int | None = None, overlap: float = 0.25, device: str = 'auto', amp: str | None = None
) -> tuple[Predictor, dict[str, Any]]:
    """The predictor of a trained model, and what its masks depend on, by name.

    Args:
        path: A run folder, or a model folder, of segmentation.
        tile, overlap: As of `Tiled`; without a tile, images are seen whole.
        device, amp: As of a recipe; by default `amp` is that of the run.

    Raises:
        UserError: If there is no such model, or it does not tell the classes of patches.
    """
    saved = SavedModel(path)
    if saved.config.task != 'segmentation' and not isinstance(saved.model, DenseModel):
        raise UserError(f'{path}: it was trained for task={saved.config.task}; masks are of models of segmentation')
    task = Task.of('segmentation', saved.model, saved.preprocessing, None, 1.0, of_pixels=True)
    model, amp = saved.model, amp or saved.config.amp
    settings = {'weights': digest(model.state_dict().items()), 'tile': tile, 'amp': amp}
    if tile is not None:
        model = Tiled(model, task, tile, overlap)
        settings['overlap'] = model.overlap
    return Predictor(model, task, saved.preprocessing, choose_device(device, '--device'), amp), settings


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


@dataclass(frozen=True)
class Wanted:
    """What is written for an image besides its mask."""

    overlays: bool = False
    probabilities: bool = False


def predict_files(
    predictor: Predictor, jobs: Iterable[Job], out: Path, wanted: Wanted, settings: dict[str, Any], on_error: str
) -> tuple[int, dict[Path, str]]:
    """Writes the masks of images: `masks/NAME.png`, indexed; `overlays/NAME.jpg`; `probabilities/NAME.npy`, (K, H, W),
    float16. The mask is written last: an image that has one is passed over, and so a call goes on where it stopped.

    Args:
        settings: What masks depend on: a folder that holds those of others is refused.
        on_error: error or skip, for a file that cannot be read. One that can be and does not fit is an error.

    Returns:
        How many were written, and why others were skipped, by path.

    Raises:
        UserError: If the folder is of other settings, or an image cannot be read and is not to be skipped.
    """
    _claim(out, settings | asdict(wanted))
    written, skipped = 0, {}
    for job in jobs:
        mask_path = out / 'masks' / f'{job.name}.png'
        if mask_path.exists():
            continue
        try:
            image = read_image(job.path)
        except (UnfitImage, MissingPackage):
            raise
        except UserError as error:
            if on_error == 'error':
                raise UserError(f'{error}; --on-error skip goes on without it') from error
            skipped[job.path] = str(error)
            continue
        try:
            image = to_array(image, predictor.channels)
        except UserError as error:
            raise UserError(f'{job.path}: {error}') from error
        classes = _write_probabilities(
            predictor, image, out / 'probabilities' / f'{job.name}.npy', wanted.probabilities
        )
        if wanted.overlays:
            _write_image(out / 'overlays' / f'{job.name}.jpg', _overlay(image, classes), quality=90)
        _write_image(mask_path, _indexed(classes))
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


def _write_probabilities(predictor: Predictor, image: np.ndarray, path: Path, wanted: bool) -> np.ndarray:
    """Writes them, if they are wanted, strip by strip, and gives the classes."""
    if not wanted:
        return predictor.classes(image)
    logits, size = predictor.logits(image), image.shape[:2]
    classes = np.empty(size, np.uint8 if logits.shape[1] <= 256 else np.uint16)
    with replacing(path) as temporary:
        array = np.lib.format.open_memmap(temporary, 'w+', np.float16, (logits.shape[1], *size))
        for rows, shares in predictor.shares(logits, size):
            array[:, rows] = shares.cpu().numpy()
            classes[rows] = shares.argmax(0).cpu().numpy()
        array.flush()
    return classes


def _indexed(classes: np.ndarray) -> Image.Image:
    if classes.dtype != np.uint8:
        return Image.fromarray(classes)
    image = Image.fromarray(classes).convert('L')
    image.putpalette(palette(256))
    return image


def _overlay(image: np.ndarray, classes: np.ndarray) -> Image.Image:
    """The image, of its first channel or its first three, tinted with the colours of all classes but the first."""
    shown = image if image.dtype == np.uint8 else (255 * image).round().astype(np.uint8)
    shown = shown[..., :3] if shown.shape[2] >= 3 else shown[..., :1].repeat(3, axis=2)
    colours = np.array(palette(int(classes.max()) + 1), np.uint8).reshape(-1, 3)[classes]
    mixed = (shown * (1 - _TINT) + colours * _TINT).round().astype(np.uint8)
    return Image.fromarray(np.where(classes[..., None] > 0, mixed, shown))


def _write_image(path: Path, image: Image.Image, **options: Any) -> None:
    content = io.BytesIO()
    image.save(content, 'PNG' if path.suffix == '.png' else 'JPEG', **options)
    write_bytes(path, content.getvalue())
