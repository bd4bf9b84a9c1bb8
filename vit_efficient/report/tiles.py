"""`vit-efficient table tiles`: whole images against tiles of them, by the same weights on the same validation set."""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from vit_efficient.benchmark.live_memory import LiveMemory
from vit_efficient.data import Samples, check_same_classes, class_names, has_masks
from vit_efficient.data.files.frames import Windows
from vit_efficient.data.files.masks import IGNORED
from vit_efficient.prediction import Predictor, predictor_of
from vit_efficient.report.evaluation import SavedModel
from vit_efficient.report.masks import compare_areas, mean_share, shares
from vit_efficient.report.table import Column, Table
from vit_efficient.train.masks import PixelScore
from vit_efficient.train.tasks import nothing
from vit_efficient.train.tiles import seams
from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.environment import describe_environment, one_line
from vit_efficient.utils.errors import UserError

_COLUMNS = [
    *(Column('model'), Column('seen')),
    *(Column('miou', 'mIoU (%)', 2), Column('difference', 'to the first', 2), Column('interval', '95 % interval')),
    *(Column('boundary_f', 'boundary F (%)', 2), Column('near', 'mIoU near seams (%)', 2)),
    *(Column('whole_near', 'whole, there (%)', 2), Column('seconds', 's', 2), Column('peak', 'peak MiB', 0)),
]


def tiles_table(
    models: Sequence[str],
    split: str,
    layouts: Sequence[tuple[int, float]],
    limit: int | None = None,
    near: int | None = None,
    device: str = 'auto',
    format: str = 'markdown',
) -> str:
    """Masks of whole images, and by each layout of tiles, one image after the other.

    mIoU is without the class `none` (or background), if there is one. Near seams it is of the pixels that are at most
    `near` from where two tiles meet, and beside it is that of the same pixels by the whole image. Seconds are the
    median of an image, from its pixels to its logits; the peak is of the tensors that live meanwhile, in the largest
    image, weights left out.

    Args:
        models: Run or model folders of segmentation; all differences are to the first row, the first model on whole
            images.
        split: Images with masks, as `SavedModel.open_data` takes it.
        layouts: Of tiles, the side in pixels and the least overlap.
        limit: Images, from the beginning; all by default.
        near: Pixels; by default the side of a patch.
        device: As the key of a recipe.
        format: As of `Table`.

    Raises:
        UserError: If the data have no masks, or a model or layout does not fit.
    """
    rows, first, about, of_first = [], None, None, None
    for name in models:
        saved = SavedModel(name)
        kinds = saved.model.num_classes, saved.model.pretrained_cfg.get('label_names')
        of_first = of_first or kinds
        if kinds != of_first:
            raise UserError(f'{name} tells {_kinds(kinds)}, {models[0]} {_kinds(of_first)}; compare models of the same')
        predictor, _ = predictor_of(saved, name, device=device)
        samples = _samples(saved, predictor, split, limit)
        wanted = [(None, 0.0), *layouts]
        for tile, overlap in layouts:
            predictor.tiled(tile, overlap)  # says what does not fit
        distance = as_integer('--near', max(predictor.task.patch_size) if near is None else near)
        found = [_Layout(predictor, tile, overlap, distance) for tile, overlap in wanted]
        for index in tqdm(range(len(samples)), name, disable=None, leave=False):
            image, _, classes = samples.decode(index)
            for layout in found:
                layout.see(image, classes, found[0])
        if not np.sum(found[0].areas):
            raise UserError(f'none of the pixels of {split} counts; see ignore_index and values (data.args)')
        none = nothing(saved.model.pretrained_cfg.get('label_names') or [])
        first = first or (found[0], none)
        rows += [{'model': name, **layout.row(none)} | _against(layout, *first) for layout in found]
        sizes = sorted(found[0].sizes)
        about = f'{len(samples)} images of {_size(sizes[0])}' + (f' to {_size(sizes[-1])}' if len(sizes) > 1 else '')
    text = Table(_COLUMNS, rows).render(format)
    if format != 'markdown':
        return text
    threads = f' (threads: {torch.get_num_threads()})' if predictor.device.type == 'cpu' else ''
    what = 'mIoU without the class none. ' if first[1] is not None else ''
    return (
        f'{text}\n{about} px. {what}Near seams: at most {distance} px from where two tiles meet. Interval: bootstrap '
        f'over images. {predictor.device}{threads}, {one_line(describe_environment(predictor.device))}.\n'
    )


def _samples(saved: SavedModel, predictor: Predictor, split: str, limit: int | None) -> Samples:
    dataset = saved.open_data(split)
    if not has_masks(dataset):
        raise UserError(f'{split} has no masks, which say how well images and tiles are seen')
    if limit is not None:
        dataset = _First(dataset, min(as_integer('--limit', limit), len(dataset)))
    names = saved.model.pretrained_cfg.get('label_names')
    check_same_classes(names, class_names(dataset), 'the model', split)
    return saved.samples(dataset, 'error', check_target=predictor.task.check_target)


class _First(Dataset):
    """The first images of a data set."""

    moves_with_pixels = True

    def __init__(self, dataset: Dataset, count: int):
        self.dataset, self.count, self.classes = dataset, count, class_names(dataset)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def filename(self, index: int) -> str:
        return getattr(self.dataset, 'filename', str)(index)


def _kinds(kinds: tuple[int, list[str] | None]) -> str:
    return ', '.join(kinds[1]) if kinds[1] else f'{kinds[0]} classes'


class _Layout:
    """What is found by a way to see images."""

    def __init__(self, predictor: Predictor, tile: int | None, overlap: float, near: int):
        self.predictor, self.tile, self.overlap, self.near = predictor, tile, overlap, near
        self.areas, self.areas_near, self.whole_near, self.outlines, self.seconds = [], [], [], [], []
        self.sizes, self.peak, self.predicted = set(), 0, None

    def see(self, image: np.ndarray, classes: np.ndarray, whole: '_Layout') -> None:
        """An image (H, W, C) and the classes of its pixels (H, W)."""
        predictor, window = self.predictor, Windows.of(image)
        start = time.perf_counter()
        logits = predictor.logits(window, self.tile, self.overlap).cpu()
        self.seconds.append(time.perf_counter() - start)
        if image.size > max((height * width for height, width in self.sizes), default=0) * image.shape[2]:
            with LiveMemory() as memory:
                predictor.logits(window, self.tile, self.overlap)
            self.peak = memory.peak
        self.sizes.add(image.shape[:2])
        score = PixelScore.of(logits[0], torch.from_numpy(classes), predictor.task.patch_size)
        self.areas.append(score.areas().numpy())
        self.outlines.append(score.boundary_f)
        self.predicted = score.predicted
        if self.tile is not None:
            there = self._near_seams(image.shape[:2]) & (classes != IGNORED)
            for found, predicted in ((self.areas_near, self.predicted), (self.whole_near, whole.predicted)):
                found.append(_areas(predicted[there], classes[there], logits.shape[1]))

    def _near_seams(self, size: tuple[int, int]) -> np.ndarray:
        """(H, W), whether a pixel is near one."""
        lines = seams(size, self.predictor.task.patch_size, self.tile, self.overlap)
        rows, columns = (
            np.any([abs(np.arange(length) + 0.5 - place) <= self.near for place in [-np.inf, *places]], axis=0)
            for length, places in zip(size, lines, strict=True)
        )
        return rows[:, None] | columns[None]

    def row(self, none: int | None) -> dict[str, Any]:
        outlines = np.array(self.outlines)
        seen = 'whole' if self.tile is None else f'tiles of {self.tile} px, overlap {self.overlap:g}'
        row = {'seen': seen, 'miou': _miou(self.areas, none), 'seconds': median(self.seconds)}
        row |= {'boundary_f': 100 * float(np.nanmean(outlines)), 'peak': self.peak / 2**20}
        if self.tile is not None:
            row |= {'near': _miou(self.areas_near, none), 'whole_near': _miou(self.whole_near, none)}
        return row


def _against(layout: _Layout, first: _Layout, none: int | None) -> dict[str, Any]:
    if layout is first:
        return {}
    found = compare_areas([(np.stack(first.areas), np.stack(layout.areas))], none)
    return {name: found[name] for name in ('difference', 'interval')}


def _miou(areas: Sequence[np.ndarray], none: int | None) -> float:
    return float(mean_share(shares(np.sum(areas, 0)), none))


def _areas(predicted: np.ndarray, classes: np.ndarray, kinds: int) -> np.ndarray:
    """As `PixelScore.areas`, of some pixels."""
    counted = (classes, predicted, classes[classes == predicted])
    return np.stack([np.bincount(each, minlength=kinds) for each in counted])


def _size(size: tuple[int, int]) -> str:
    return f'{size[0]:,} × {size[1]:,}'
