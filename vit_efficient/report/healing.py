"""What healing has given back: the table of a run, and pictures of features."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_efficient.conversion import convert
from vit_efficient.data.files.images import read_image, to_array
from vit_efficient.data.preprocessing import EvalTransform
from vit_efficient.fidelity import final_tokens, given_back
from vit_efficient.healing import SOLVED, on_grid
from vit_efficient.report.evaluation import open_model
from vit_efficient.report.plot import show_image
from vit_efficient.report.table import Column, Table
from vit_efficient.train.evaluation import COSINES
from vit_efficient.train.run_folder import RunFolder
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import save_figure
from vit_efficient.utils.options import parse_spec
from vit_efficient.utils.packages import needing


def healing_table(result: Mapping[str, Any]) -> Table:
    """The features of the teacher, of the model once its attention was swapped, and after each stage.

    Args:
        result: Of a run of `task` features (result.json).
    """
    lines = result['healing']
    columns = [Column('features'), Column('images', 'images seen', 0), Column('hours', 'hours', 2)]
    columns += [Column(name, title, 4) for name, title in COSINES.items()]
    columns.insert(4, Column('given_back', 'given back (%)', 1))
    rows = [{'features': 'teacher', **dict.fromkeys(COSINES, 1.0)}]
    for line in lines:
        row = {column.key: line.get(column.key) for column in columns}
        if line is not lines[0]:
            row['given_back'] = _given_back(lines[0], line)
        rows.append(row)
    return Table(columns, rows)


def healed_table(runs: Sequence[str | Path]) -> Table:
    """What each run has reached, and what least squares had given it; a mean over seeds.

    Args:
        runs: Finished runs of `task` features; NAME-s0, NAME-s1, … are the seeds of one row.

    Raises:
        UserError: If one is not finished, or is of another task.
    """
    groups: dict[Path, list[dict[str, float]]] = {}
    folders = [Path(run).resolve() for run in runs]
    for path, folder in zip(runs, folders, strict=True):
        run = RunFolder(folder)
        if not run.is_finished or 'healing' not in run.result:
            raise UserError(f'{path}: no finished run of vit-efficient heal')
        if folders.count(folder) > 1:
            raise UserError(f'{path} is given twice')
        group = folder.with_name(re.sub(r'-s\d+$', '', folder.name))
        groups.setdefault(group, []).append(_reached(run.result['healing']))
    titles = COSINES | {'centred_cosine': 'healed'}
    columns = [Column('run'), Column('images', 'images seen', 0), Column('hours', digits=2)]
    columns += [Column('swapped', 'centred cosine, swapped', 4), Column('solved', digits=4)]
    columns += [Column(name, title, 4) for name, title in titles.items()]
    columns.insert(6, Column('given_back', 'given back (%)', 1, spread='given_back_std'))
    columns += [Column('given_back_std'), Column('seeds')]
    rows = []
    for folder, found in groups.items():
        row = {'run': folder.name, 'seeds': len(found)}
        for key in [key for key in found[0] if all(key in each for each in found)]:
            values = [each[key] for each in found]
            row[key] = fmean(values)
            if key == 'given_back' and len(values) > 1:
                row['given_back_std'] = stdev(values)
        rows.append(row)
    return Table(columns, rows)


def _reached(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    first, last = lines[0], lines[-1]
    found = {key: last.get(key) for key in ('images', 'hours', *COSINES)}
    found |= {'swapped': first['centred_cosine'], 'given_back': _given_back(first, last)}
    if lines[1]['features'] == SOLVED:
        found['solved'] = lines[1]['centred_cosine']
    return {key: value for key, value in found.items() if value is not None}


def _given_back(swapped: Mapping[str, Any], line: Mapping[str, Any]) -> float | None:
    """Of the centred cosine, in percent; None where the swap costs nothing, something else was swapped since, or one of
    the two is not finite."""
    values = swapped['centred_cosine'], line['centred_cosine']
    if line.get('converted') != swapped.get('converted') or None in values:
        return None
    return given_back(*values)


def blocks_table(result: Mapping[str, Any]) -> Table:
    """The patch cosine after each block, a row for each of the lines of `healing_table`."""
    count = len(result['healing'][0]['after_blocks'])
    columns = [Column('features'), *(Column(f'block{i}', str(i), 3) for i in range(count))]
    return Table(
        columns,
        [
            {'features': line['features'], **{f'block{i}': value for i, value in enumerate(line['after_blocks'])}}
            for line in result['healing']
        ],
    )


def plot_features(
    models: Sequence[str],
    image: str | Path,
    img_size: int,
    out: Path,
    at: tuple[float, float] | None = None,
    swapped: Sequence[str] = (),
) -> None:
    """Saves a picture of the patch tokens of an image, a column for each model: above, their first three principal
    components as colours; below, the cosine of each to that of one patch, after the mean token is taken from all.

    The components are those of the first model, so that like colours are like features.

    Args:
        models: As `report.evaluation.open_model` takes them; their tokens have as many channels.
        image: A file.
        img_size: Side of the square that is seen of it, in pixels.
        out: PNG, or by another suffix PDF or SVG.
        swapped: Attentions, `NAME[:KEY=VALUE,…]`: the first model with each of them has a column after its own.
        at: Down and across, from 0 to 1: the patch that others are compared to; by default the middle.

    Raises:
        UserError: If a model or the image cannot be had, or the tokens are not of one width.
    """
    with needing('train', 'plots are drawn with'):
        from matplotlib.figure import Figure

    down, across = at or (0.5, 0.5)
    if not (0 <= down <= 1 and 0 <= across <= 1):
        raise UserError(f'--at must be two numbers from 0 to 1, got {down:g} {across:g}')
    shown, maps, models = None, [], [models[0], *swapped, *models[1:]]
    for number, name in enumerate(models):
        changed = 0 < number <= len(swapped)
        model, preprocessing = open_model(models[0] if changed else name, img_size)
        if changed:
            attention, options = parse_spec(name)
            convert(model, attention, **options)
        tensor = EvalTransform(preprocessing)(to_array(read_image(image), preprocessing.input_size[0]))
        if shown is None:
            mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
            shown = tensor * std + mean
        maps.append(_map(on_grid(model), tensor))
    widths = {name: each.shape[-1] for name, each in zip(models, maps, strict=True)}
    if len(set(widths.values())) > 1:
        raise UserError(f'tokens of several widths cannot be compared: {widths}')
    components = Components(maps[0])
    figure = Figure(figsize=(2.6 * (len(models) + 1), 5.4), dpi=100, layout='constrained')
    upper, lower = figure.subplots(2, len(models) + 1, squeeze=False)
    show_image(upper[0], shown)
    show_image(lower[0], shown)
    height, width = shown.shape[1:]
    lower[0].plot(across * (width - 1), down * (height - 1), 'o', markerfacecolor='none', color='white', markersize=9)
    upper[0].set_title('image', fontsize='small')
    for name, each, top, bottom in zip(models, maps, upper[1:], lower[1:], strict=True):
        top.imshow(components.colours(each).numpy())
        top.set_title(name, fontsize='small')
        bottom.imshow(similarity(each, down, across).numpy(), cmap='viridis', vmin=-1, vmax=1)
        for axes in (top, bottom):
            axes.set(xticks=[], yticks=[])
    save_figure(figure, out)


def _map(model: nn.Module, image: Tensor) -> Tensor:
    grid = model.grid_of(*image.shape[1:])
    (tokens,) = final_tokens(model, [image])
    return tokens[grid.prefix :].unflatten(0, (grid.height, grid.width))


class Components:
    """The first three principal components of tokens (h, w, C), and the range in which nearly all of them lie."""

    def __init__(self, tokens: Tensor):
        flat = tokens.flatten(0, 1)
        self.mean = flat.mean(0)
        _, _, vectors = torch.linalg.svd(flat - self.mean, full_matrices=False)
        # Which way a component points is the solver's choice: its largest part points up.
        signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
        self.vectors = (signs * vectors)[:3]
        found = (flat - self.mean) @ self.vectors.T
        self.low, self.high = (found.quantile(share, dim=0) for share in (0.01, 0.99))

    def colours(self, tokens: Tensor) -> Tensor:
        """(h, w, 3), from 0 to 1; of fewer than three components the others are 0."""
        found = (tokens - self.mean) @ self.vectors.T
        found = ((found - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1)
        return F.pad(found, (0, 3 - found.shape[-1]))


def similarity(tokens: Tensor, down: float, across: float) -> Tensor:
    """(h, w): the cosine of tokens (h, w, C), less their mean, to that of the patch at a place, from 0 to 1 each."""
    height, width = tokens.shape[:2]
    centred = tokens - tokens.mean((0, 1))
    one = centred[min(int(down * height), height - 1), min(int(across * width), width - 1)]
    return F.cosine_similarity(centred, one, dim=-1)
