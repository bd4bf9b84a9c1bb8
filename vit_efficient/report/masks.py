"""What an evaluation on masks says: intersections over unions by class with their intervals, and the confusion matrix.

Dimensions: N images, K classes. The areas of an image are (3, K): pixels that have a class, those that were taken for
it, and those that are both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vit_efficient.data.files.mask_files import write_mask
from vit_efficient.report.table import Column, Table
from vit_efficient.train import Evaluation
from vit_efficient.train.evaluation import describe
from vit_efficient.train.run_folder import predictions_table
from vit_efficient.train.tasks import nothing
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import check_can_write, save_figure, write_text
from vit_efficient.utils.packages import needing

RESAMPLES = 2000
_NAMED = 30  # classes that fit beside a picture of the confusion matrix


def shares(areas: np.ndarray) -> np.ndarray:
    """Sums of areas (…, 3, K) -> intersection over union of each class (…, K), in percent; NaN of one in neither."""
    labelled, predicted, both = np.moveaxis(np.asarray(areas, dtype=np.float64), -2, 0)
    union = labelled + predicted - both
    return 100 * np.divide(both, union, out=np.full(both.shape, np.nan), where=union > 0)


def mean_share(found: np.ndarray, without: int | None = None) -> np.ndarray:
    """Of `shares` (…, K), the mean over the classes that occur, but for one."""
    kept = np.delete(found, without, -1) if without is not None else found
    occurs = np.isfinite(kept)
    total = np.where(occurs, kept, 0).sum(-1)
    return np.divide(total, occurs.sum(-1), out=np.full(total.shape, np.nan), where=occurs.any(-1))


def resampled(areas: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray:
    """The sums (resamples, 3, K) over as many images as there are, drawn from (N, 3, K). The draws are seeded:
    those of as many images are the same."""
    n = len(areas)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples)
    return (draws.astype(np.float64) @ areas.reshape(n, -1).astype(np.float64)).reshape(resamples, *areas.shape[1:])


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of what a bootstrap gave; None if that is nothing."""
    values = values[np.isfinite(values)]
    return tuple(np.quantile(values, [0.025, 0.975]).tolist()) if values.size else None


def _span(values: np.ndarray, sign: str = '') -> str | None:
    found = interval(values)
    return found and f'{found[0]:{sign}.2f} … {found[1]:{sign}.2f}'


def class_table(evaluation: Evaluation, names: Sequence[str], none: int | None) -> str:
    """A line for each class, and one for the means, with percentile intervals of a bootstrap over images."""
    areas = evaluation.areas.numpy()
    total, draws = areas.sum(0), resampled(areas)
    iou, of_draws = shares(total), shares(draws)
    rows = [
        {
            'class': name,
            'iou': iou[k],
            'interval': _span(of_draws[:, k]),
            'recall': 100 * total[2, k] / total[0, k] if total[0, k] else None,
            'precision': 100 * total[2, k] / total[1, k] if total[1, k] else None,
            'pixels': 100 * total[0, k] / total[0].sum(),
            'images': int((areas[:, 0, k] > 0).sum()),
        }
        for k, name in enumerate(names)
    ]
    means = [('mean', None)] + ([(f'mean without {names[none]}', none)] if none is not None else [])
    rows += [
        {'class': title, 'iou': float(mean_share(iou, left_out)), 'interval': _span(mean_share(of_draws, left_out))}
        for title, left_out in means
    ]
    columns = [Column('class'), Column('iou', 'IoU (%)', 2), Column('interval', '95 % interval')]
    columns += [Column('recall', 'recall (%)', 2), Column('precision', 'precision (%)', 2)]
    return Table(
        [*columns, Column('pixels', 'of the pixels (%)', 2), Column('images', 'images with it')], rows
    ).render()


def compare_areas(pairs: Sequence[tuple[np.ndarray, np.ndarray]], without: int | None) -> dict[str, Any]:
    """How much higher the mean intersection over union of a model is than that of another, on the same images.

    Args:
        pairs: For each seed the areas (N, 3, K) of both.
        without: A class that is left out.
    """
    gains = np.mean(
        [
            mean_share(shares(resampled(theirs)), without) - mean_share(shares(resampled(ours)), without)
            for ours, theirs in pairs
        ],
        axis=0,
    )
    whole = [mean_share(shares(each.sum(0)), without) for pair in pairs for each in pair]
    return {
        'pairs': sum(len(ours) for ours, _ in pairs),
        'difference': float(np.mean(whole[1::2]) - np.mean(whole[::2])),
        'interval': _span(gains, '+'),
    }


def plot_confusion(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """A picture of how often pixels of a class, by row, were taken for another one, by column, in percent."""
    with needing('train', 'the picture is drawn with', 'matplotlib'):
        from matplotlib.figure import Figure

    rows = confusion.sum(1, keepdims=True)
    percent = 100 * np.divide(confusion, rows, out=np.zeros(confusion.shape), where=rows > 0)
    side = 3 + 0.35 * min(len(names), _NAMED)
    figure = Figure(figsize=(side + 1, side), layout='constrained')
    axes = figure.subplots()
    image = axes.imshow(percent, cmap='Blues', vmin=0, vmax=100)
    figure.colorbar(image, label='of the pixels of the class (%)', shrink=0.8)
    axes.set_xlabel('taken for')
    axes.set_ylabel('class')
    if len(names) <= _NAMED:
        axes.set_xticks(range(len(names)), names, rotation=45, ha='right')
        axes.set_yticks(range(len(names)), names)
        for i, j in np.ndindex(percent.shape):
            if percent[i, j] >= 0.5:
                ink = 'w' if percent[i, j] > 50 else 'k'
                axes.text(j, i, f'{percent[i, j]:.0f}', ha='center', va='center', color=ink)
    save_figure(figure, path)


class MaskFiles:
    """What an evaluation on masks leaves in a folder: masks as predicted, `predictions/`; `classes.md`, the table of
    classes; `confusion.png`; and `predictions.csv`, a line for each image.

    Args:
        folder: A new one, or an empty one.
        classes: K.

    Raises:
        UserError: If the folder holds anything.
    """

    def __init__(self, folder: Path, classes: int):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f'--out {folder}: holds something already; name a new folder')
        check_can_write(folder / 'classes.md')
        self.folder, self.kind = folder, np.uint8 if classes <= 256 else np.uint16
        self.image_of: dict[Path, str] = {}

    def keep(self, name: str, classes: np.ndarray) -> None:
        """Writes the mask of an image.

        Args:
            name: Its path; of one that leads out of the data set's folder, what stays within counts.
            classes: The class of each pixel (H, W).

        Raises:
            UserError: If the mask would replace that of another image.
        """
        parts = [part for part in Path(name).parts if part not in (Path(name).anchor, '..')]
        path = self.folder / 'predictions' / Path(*parts).with_suffix('.png')
        if self.image_of.setdefault(path, name) != name:
            raise UserError(f'{name}: its mask would be {path}, as that of {self.image_of[path]}; name them apart')
        write_mask(path, classes.astype(self.kind))

    def finish(self, evaluation: Evaluation, dataset: Dataset, names: Sequence[str] | None) -> str:
        """Writes the rest, and gives the table.

        Args:
            evaluation: On masks.
            dataset: That it was on.
            names: Of the classes; by default their numbers.
        """
        names = names or [str(number) for number in range(evaluation.areas.shape[2])]
        table = class_table(evaluation, names, nothing(names))
        about = f'{describe(evaluation.accuracies)} of {evaluation.images} images. Intervals: bootstrap over images.'
        write_text(self.folder / 'classes.md', f'{table}\n{about}\n')
        filename = getattr(dataset, 'filename', str)
        write_text(self.folder / 'predictions.csv', predictions_table(evaluation, filename))
        plot_confusion(evaluation.confusion.numpy(), names, self.folder / 'confusion.png')
        return table
