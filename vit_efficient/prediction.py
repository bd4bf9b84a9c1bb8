"""Masks of images of any size by a trained model of pixels: of whole images, or of tiles that overlap.

Dimensions: B images, K classes, h × w cells of the logits, H × W pixels.
"""

import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vit_efficient.data.files.frames import Frame, Windows, open_windows, read_frame
from vit_efficient.data.files.images import EXTENSIONS, to_array
from vit_efficient.data.files.mask_files import palette, write_mask
from vit_efficient.data.files.pixels import DamagedImage
from vit_efficient.data.preprocessing import Preprocessing, WholeTransform
from vit_efficient.data.sources.folders import is_hidden, is_image, natural_order
from vit_efficient.dense import DenseModel
from vit_efficient.models import model_arguments
from vit_efficient.prediction_costs import Costs, duration
from vit_efficient.report.evaluation import SavedModel
from vit_efficient.train.masks import padded_size, strips
from vit_efficient.train.tasks import Task
from vit_efficient.train.tiles import Tiled, as_overlap
from vit_efficient.utils.device import choose_device
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import check_can_write, read_text, replacing, write_bytes, write_json, writing
from vit_efficient.utils.measurements import digest
from vit_efficient.utils.modes import evaluating
from vit_efficient.utils.packages import MissingPackage
from vit_efficient.utils.precision import autocast

logger = logging.getLogger(__name__)

SETTINGS = 'predict.json'  # of a folder of masks: what has made them
IMAGES = 'predict.jsonl'  # and of which images they are
_ENDS = 2**20  # bytes of both ends of a file by which it is known
_STRIP_ROWS = 256  # of an overlay that are tinted at a time
_LARGE = 128**2  # patches of an image whose time is told
_LONG = 60  # seconds, above which it is
_TINT = 0.5  # the share of the colour of a class in an overlay


@dataclass(frozen=True)
class Job:
    """An image, and the name of what is predicted of it, without an ending."""

    path: Path
    name: str


def list_images(paths: Sequence[str | Path], out: Path | None = None) -> list[Job]:
    """Images that are named, and those in folders, with their paths in these as names; without those within `out`.

    Raises:
        UserError: If there is no such path, a folder has no image, or two images would have one name.
    """
    jobs: dict[str, Job] = {}
    for path in map(Path, paths):
        if path.is_dir():
            names = [each.relative_to(path).as_posix() for each in path.rglob('*') if each.is_file()]
            names = natural_order(name for name in names if is_image(name) and not is_hidden(name))
            if out is not None:
                names = [name for name in names if not (path / name).resolve().is_relative_to(out.resolve())]
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
        self.model, self.task, self.device, self.amp, self.overlap = (
            model.to(device),
            task,
            device,
            amp,
            as_overlap(overlap),
        )
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
    seen = saved.preprocessing
    about = digest(saved.model.state_dict().items()), model_arguments(saved.model), seen.mean, seen.std
    settings = {'model': hashlib.sha256(repr(about).encode()).hexdigest()[:16], 'amp': amp}
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
        predictor.tiled(wanted.tile)  # says what does not fit
    if wanted.tile == 'auto' and wanted.memory is None:
        raise UserError('--tile auto takes the largest tile within a limit; set --memory, such as --memory 8GB')
    folder = _Masks(out, settings | _decisive(wanted, predictor.overlap))
    costs = Costs(predictor, wanted.overlays) if wanted.memory is not None else None
    written, skipped = 0, {}
    for job in jobs:
        if folder.has(job):
            continue
        try:
            frame = read_frame(job.path, predictor.channels)
            parts = open_windows(job.path, predictor.channels) if (wanted.tile or wanted.memory) is not None else None
            tile = wanted.tile
            if costs is None and tile is None and math.prod(frame.size) > _LARGE * math.prod(predictor.task.patch_size):
                costs = Costs(predictor)
            if wanted.memory is not None:
                tile = costs.tile_within(job.path, frame, tile, parts and parts.held, wanted.memory)
            _announce(job, frame, tile, wanted, costs, say)
            image = parts if parts and tile is not None else Windows.whole(job.path, predictor.channels)
            folder.claim(job)
            classes = _predict(predictor, image, tile, job, out, wanted)
        except DamagedImage as error:
            named = f'{error}' if str(job.path) in str(error) else f'{job.path}: {error}'
            if on_error == 'error':
                raise UserError(f'{named}; --on-error skip goes on without it') from error
            skipped[job.path] = named
            continue
        ending = ('tif' if frame.turned else 'png') if wanted.format == 'auto' else wanted.format
        write_mask(folder.path(job, ending), classes, frame)
        written += 1
    return written, skipped


def _decisive(wanted: Wanted, overlap: float) -> dict[str, Any]:
    """What masks and what is beside them depend on."""
    found = asdict(wanted)
    if wanted.tile is not None:
        found['overlap'] = overlap
    if wanted.tile != 'auto':
        del found['memory']
    return found


def _announce(
    job: Job, frame: Frame, tile: int | None, wanted: Wanted, costs: Costs | None, say: Callable[[str], None]
) -> None:
    """Says which tile was chosen, and that a whole image takes more than a minute."""
    if wanted.tile == 'auto':
        say(f'{job.path}: {"whole" if tile is None else f"by tiles of {tile} px"}')
    if costs and tile is None:
        patches = costs.patches(frame.size)
        seconds = costs.seconds(patches)
        if seconds > _LONG:
            say(f'{job.path}: {patches:,} patches, whole: about {duration(seconds)}; --tile takes less')


class _Masks:
    """A folder of masks of one kind, and of which images they are: a line of predict.jsonl for each.

    Raises:
        UserError: If it holds masks of other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.out, self.settings, self.claimed = out, settings, False
        check_can_write(out / SETTINGS)
        if any((out / 'masks').glob('**/*.*')):
            _check_settings(out, settings)
            self.claimed = True
        self.known = _read_known(out / IMAGES) if self.claimed else {}

    def path(self, job: Job, ending: str) -> Path:
        return self.out / 'masks' / f'{job.name}.{ending}'

    def has(self, job: Job) -> bool:
        """Whether there is a mask of an image; a UserError if it is of another one."""
        there = [self.path(job, ending) for ending in ('png', 'tif') if self.path(job, ending).exists()]
        if there and self.known.get(job.name) != _identify(job.path):
            raise UserError(
                f'{there[0]}: is the mask of another image than {job.path}; remove it, or name another folder'
            )
        return bool(there)

    def claim(self, job: Job) -> None:
        """Says, before its mask is written, that it is of this image."""
        if not self.claimed:
            write_json(self.out / SETTINGS, self.settings)
            (self.out / IMAGES).unlink(missing_ok=True)
            self.claimed = True
        self.known[job.name] = _identify(job.path)
        with writing(self.out / IMAGES), open(self.out / IMAGES, 'a', encoding='utf-8') as file:
            file.write(json.dumps({'name': job.name, 'image': self.known[job.name]}) + '\n')


def _identify(path: Path) -> str:
    """Tells a file from others, without reading all of a large one: its size, and a hash of both ends."""
    size = path.stat().st_size
    with open(path, 'rb') as file:
        content = file.read(_ENDS)
        file.seek(max(size - _ENDS, 0))
        content += file.read(_ENDS)
    return f'{size} {hashlib.sha256(content).hexdigest()[:16]}'


def _read_known(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    found = {}
    for line in read_text(path).splitlines():
        with suppress(ValueError, TypeError, KeyError):  # the last one may be cut off
            entry = json.loads(line)
            found[entry['name']] = entry['image']
    return found


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / SETTINGS
    if not path.exists():
        raise UserError(f'{out}: holds masks, and does not say of which model ({SETTINGS}); name another folder')
    try:
        earlier = dict(json.loads(read_text(path)))
    except (ValueError, TypeError) as error:
        raise UserError(f'{path}: is not what `vit-efficient predict` writes; name another folder') from error
    differing = [name for name in {**settings, **earlier} if earlier.get(name) != settings.get(name)]
    if differing:
        said = ', '.join(f'{name} was {earlier.get(name)}, is {settings.get(name)}' for name in differing)
        raise UserError(f'{out}: holds masks of other settings ({said}); name another folder')


def _predict(predictor: Predictor, image: Windows, tile: int | None, job: Job, out: Path, wanted: Wanted) -> np.ndarray:
    """The classes of an image; what is wanted besides its mask is written."""
    try:
        classes = _write_probabilities(predictor, image, tile, out / 'probabilities' / f'{job.name}.npy', wanted)
        if wanted.overlays:
            _write_overlay(out / 'overlays' / f'{job.name}.jpg', image, classes, predictor.channels)
    except (DamagedImage, MissingPackage):
        raise
    except UserError as error:
        raise UserError(f'{job.path}: {error}') from error
    return classes


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


def _write_overlay(path: Path, image: Windows, classes: np.ndarray, channels: int) -> None:
    """The image tinted by class, row by row of strips."""
    shown = np.empty((*classes.shape, 3), np.uint8)
    for top in range(0, image.height, _STRIP_ROWS):
        rows = min(_STRIP_ROWS, image.height - top)
        part = to_array(image(top, 0, rows, image.width), channels)
        shown[top : top + rows] = overlay(part, classes[top : top + rows])
    content = io.BytesIO()
    Image.fromarray(shown).save(content, 'JPEG', quality=90)
    write_bytes(path, content.getvalue())


def overlay(image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """An image (H, W, C), of its first channel or its first three, tinted with the colours of all classes (H, W) but
    the first: (H, W, 3), uint8."""
    shown = image if image.dtype == np.uint8 else (255 * image).round().astype(np.uint8)
    shown = shown[..., :3] if shown.shape[2] >= 3 else shown[..., :1].repeat(3, axis=2)
    colours = np.array(palette(int(classes.max()) + 1), np.uint8).reshape(-1, 3)[classes]
    mixed = (shown * (1 - _TINT) + colours * _TINT).round().astype(np.uint8)
    return np.where(classes[..., None] > 0, mixed, shown)
