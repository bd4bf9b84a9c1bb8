"""`vit-efficient table accuracy`: recipes to runs, runs to a table, a comparison and a plot."""

import json
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vit_efficient.benchmark import take_turns
from vit_efficient.data import create_dataset, has_masks
from vit_efficient.flops import count_flops
from vit_efficient.models import kept_tokens
from vit_efficient.report import parts
from vit_efficient.report.comparison import compare_with_first
from vit_efficient.report.evaluation import SavedModel
from vit_efficient.report.plot import BUDGETS, Panel, Point, plot_accuracy
from vit_efficient.report.runs import Entry, check_runs, open_runs, train_missing
from vit_efficient.report.table import Column, Table
from vit_efficient.train import Config, load_model
from vit_efficient.train.recipe import default_output
from vit_efficient.utils.device import choose_device, limit_threads
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import write_text
from vit_efficient.utils.packages import import_optional

logger = logging.getLogger(__name__)

# The speed measurement. Batches of long sequences are smaller: all patches of a batch together are at most so many.
BATCH_SIZE = 64
BATCH_PATCHES = 2**17
ROUNDS = 9
# For costs that depend on the data.
COUNTED_IMAGES = 16
# Keys of recipes that say which run it is.
OF_RUN = ('recipe', 'output', 'seed', 'resume')


def accuracy_table(
    recipes: Sequence[Path],
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    runs: Path | None = None,
    out: Path | None = None,
) -> str:
    """Trains what is not trained yet, and saves the table as results.md, results.csv and results.png.

    In the plot a line joins recipes that differ in nothing but a budget, such as the keep ratio.

    Args:
        recipes: YAML files; the first one is what the others are compared against.
        overrides: `key=value` for all recipes.
        seeds: One run of every recipe for each; by default the recipe's own.
        runs: The runs are its folders RECIPE-sSEED, or RECIPE where that is a finished run of the seed; by default the
            folder in which the first recipe would run.
        out: Where the results go; `runs` by default.

    Returns:
        What results.md holds.

    Raises:
        UserError: For a recipe, a run or data that do not fit, before anything is trained where that can be known.
        Interrupted: If the process is asked to stop while it trains. The same call goes on.
    """
    runs = runs or default_output(recipes[0]).parent
    out = out or runs
    entries = open_runs(recipes, overrides, seeds or (), runs)
    for entry in entries:
        if entry.configs[0].task == 'features':
            raise UserError(
                f'{entry.recipe}: runs of task=features have no accuracy; `vit-efficient table fidelity` compares them'
            )
    remarks = check_runs(entries)
    import_optional('matplotlib', 'the plot beside the table is drawn with', 'train')  # hours before it is
    train_missing(entries)
    names = [parts.model_title(entry.results[0]['model'], entry.saved.model) for entry in entries]
    for entry, name in zip(entries, names, strict=True):
        entry.label = name if names.count(name) == 1 else f'{name} ({entry.recipe.stem})'
    results = [result for entry in entries for result in entry.results]
    accuracies = [name for name in parts.ACCURACIES if all(name in result for result in results)]
    config = entries[0].configs[0]
    device = choose_device(config.device)
    limit_threads(config.threads)
    speeds, about_speed = measure_speeds([entry.saved for entry in entries], device)
    rows = [
        measure(entry, accuracies) | {'images_per_second': speed, 'speed_ratio': speed / speeds[0]}
        for entry, speed in zip(entries, speeds, strict=True)
    ]

    table = Table(_columns(rows, accuracies), rows)
    sections = [
        table.render(),
        f'{parts.explanation(entries)} {about_speed}\n{remarks}' + ''.join(map(costs_of_images, entries)),
        parts.stage_table(entries, accuracies),
        parts.truncation_table(entries, accuracies),
        compare_with_first(entries) if len(entries) > 1 else '',
        parts.environments(entries, device),
    ]
    text = '\n'.join(part for part in sections if part)
    write_text(out / 'results.md', text)
    write_text(out / 'results.csv', table.render('csv'))
    labels = line_labels([entry.label for entry in entries], [(e.recipe.stem, e.configs[0]) for e in entries])
    plot_accuracy(panels_of(rows, labels, accuracies), out / 'results.png')
    logger.info('saved %s, results.csv, results.png', out / 'results.md')
    return text


def measure(entry: Entry, accuracies: Sequence[str]) -> dict[str, Any]:
    """A recipe's row of the table, without the speed."""
    # What is learned of a truncation is another one for each seed.
    others = [load_model(run.path) for run in entry.runs[1:]] if entry.learns_truncation else []
    counts = [count_flops(model, entry.saved.input_shape) for model in (entry.saved.model, *others)]
    try:
        tokens = kept_tokens(entry.saved.model, entry.saved.preprocessing.input_size[1:])
        attended = tokens[0] if len(set(tokens)) == 1 else f'{min(tokens)}–{max(tokens)}'  # the range over the layers
    except UserError:  # not a model of this package
        attended = None
    return {
        'model': entry.label,
        'parameters_m': statistics.fmean(result['parameters'] for result in entry.results) / 1e6,
        'gmacs': statistics.fmean(count.total for count in counts) / 1e9,
        'attention_gmacs': statistics.fmean(count.attention for count in counts) / 1e9,
        'kept_tokens': attended,
        **parts.mean_and_spread(entry.results, accuracies),
        'seeds': ' '.join(str(config.seed) for config in entry.configs),
    }


def measure_speeds(models: Sequence[SavedModel], device: torch.device) -> tuple[list[float], str]:
    """Speeds of the forward pass on random images, per second, and a sentence on how they were measured."""
    batch_size = max(1, min(BATCH_SIZE, BATCH_PATCHES // max(map(_patches, models))))
    images = [torch.randn(batch_size, *saved.input_shape, device=device) for saved in models]
    calls = [partial(saved.model.to(device), batch) for saved, batch in zip(models, images, strict=True)]
    with torch.inference_mode():
        speeds = [batch_size / statistics.median(times) for times in take_turns(calls, device, ROUNDS)]
    for saved in models:
        saved.model.cpu()
    threads = f' (threads: {torch.get_num_threads()})' if device.type == 'cpu' else ''
    return speeds, (
        f'Speed: forward pass, batch {batch_size}, float32, {device.type}{threads}, median of {ROUNDS} rounds in which '
        'the models take turns.'
    )


def _patches(saved: SavedModel) -> int:
    """The number of patches of an image; 1 for models without."""
    size = saved.preprocessing.input_size[1:]
    embedding = getattr(saved.model, 'patch_embed', None)
    built = getattr(embedding, 'img_size', None) or size
    return max(1, (getattr(embedding, 'num_patches', None) or 1) * math.prod(size) // math.prod(built))


def costs_of_images(entry: Entry) -> str:
    """A line on a model whose cost depends on the data, which the table has in expectation; '' for others."""
    model, data = entry.saved.model, entry.configs[0].data
    if not any(getattr(module, 'cost_depends_on_data', False) for module in model.modules()):
        return ''
    dataset = create_dataset(data.val, data.dataset, data.root, 'data.val', {**data.args, **data.val_args})
    if has_masks(dataset):  # whole images, of any sizes, are no batch
        return ''
    images = entry.saved.samples(dataset, data.on_error).spread(COUNTED_IMAGES)
    count = count_flops(model, images=images)
    return (
        f'{entry.label}: GMACs as if all leaves held as many patches; as {len(images)} validation images fall into '
        f'those of seed {entry.configs[0].seed}, {count.total / len(images) / 1e9:.4f}, of which in attention '
        f'{count.attention / len(images) / 1e9:.4f}.\n'
    )


def _columns(rows: Sequence[dict[str, Any]], accuracies: Sequence[str]) -> list[Column]:
    seeds = 'seeds' if any(' ' in row['seeds'] for row in rows) else 'seed'
    costs = [Column('parameters_m', 'parameters (M)', 2), *parts.COSTS, Column('kept_tokens', 'kept tokens')]
    speeds = [Column('images_per_second', 'img/s', 0), Column('speed_ratio', '× first', 2)]
    return [Column('model'), *costs, *speeds, *parts.accuracy_columns(accuracies), Column('seeds', seeds)]


def line_labels(labels: Sequence[str], recipes: Sequence[tuple[str, Config] | None]) -> list[str]:
    """What a plot calls each model: a line joins those of one name, which differ in nothing but a budget.

    Args:
        labels: What the table calls the models.
        recipes: The name and content of each one's recipe; None where that is not known.
    """
    groups: dict[str, list[str]] = {}
    keys = []
    for label, recipe in zip(labels, recipes, strict=True):
        keys.append(json.dumps(_without_budgets(asdict(recipe[1])), default=str) if recipe else label)
        groups.setdefault(keys[-1], []).append(recipe[0] if recipe else label)
    if len(groups) == len(labels):
        return list(labels)
    names = {}
    for key, stems in groups.items():
        of_all = {stem.rpartition('-')[0] for stem in stems}  # of NAME-BUDGET
        name = of_all.pop() if len(stems) > 1 and len(of_all) == 1 else ''
        names[key] = ', '.join(stems) if name in ('', *names.values()) else name
    return [names[key] for key in keys]


def _without_budgets(values: Any) -> Any:
    """The keys of a recipe that say which model it is, and how it is trained."""
    if not isinstance(values, dict):
        return values
    return {key: _without_budgets(value) for key, value in values.items() if key not in (*BUDGETS, *OF_RUN)}


def panels_of(rows: Sequence[dict[str, Any]], labels: Sequence[str], accuracies: Sequence[str]) -> list[list[Panel]]:
    """Accuracies against GMACs (for tasks of patches, those of attention) and against speed, of the table's rows."""
    of_patches = 'miou' in accuracies
    costs = {'attention_gmacs': 'GMACs in attention per image'} if of_patches else {'gmacs': 'GMACs per image'}
    costs['images_per_second'] = 'images per second'
    shown = [name for name in accuracies if name != 'miou' or 'foreground_miou' not in accuracies]

    def points(cost: str, name: str) -> list[Point]:
        return [Point(label, row[cost], row[name], row[f'{name}_std']) for label, row in zip(labels, rows, strict=True)]

    return [[Panel(points(cost, name), x, parts.ACCURACIES[name][1]) for cost, x in costs.items()] for name in shown]
