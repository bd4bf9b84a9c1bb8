"""`vit-efficient table accuracy`: recipes to runs, runs to a table, a comparison and a plot."""

import csv
import json
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import timm
import torch
from torch import nn

from vit_efficient.attention.treeformer.tf import LeafAttention
from vit_efficient.benchmark import take_turns
from vit_efficient.data import Preprocessing, Samples, create_dataset, eval_input, input_shape
from vit_efficient.flops import count_flops
from vit_efficient.models import kept_tokens
from vit_efficient.report.statistics import compare, interval_of_mean
from vit_efficient.report.table import Column, Panel, Point, Table, plot_accuracy
from vit_efficient.train import Config, Interrupted, load_model, load_recipe, train
from vit_efficient.train.config import identity
from vit_efficient.train.recipe import default_output
from vit_efficient.train.stages import list_stages
from vit_efficient.utils.environment import describe_environment, one_line
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import write_text
from vit_efficient.utils.keys import flatten

# The speed measurement. Batches of long sequences are smaller: all patches of a batch together are at most so many.
BATCH_SIZE = 64
BATCH_PATCHES = 2**17
ROUNDS = 9
# For costs that depend on the data.
COUNTED_IMAGES = 16

# With the number of processes, how many images an update takes.
_SHARED_OUT = ('data.batch_size', 'grad_accum')

# The accuracies of the table: what its column is called, and an axis of the plot.
ACCURACIES = {
    'top1': ('top-1 (%)', 'top-1 accuracy (%)'),
    'foreground_miou': ('foreground mIoU (%)', 'mIoU without the class none (%)'),
    'miou': ('mIoU (%)', 'mIoU (%)'),
}


@dataclass
class Entry:
    """A recipe and its runs, one for each seed."""

    recipe: Path
    configs: list[Config]
    results: list[dict[str, Any]]
    label: str = ''

    @property
    def folders(self) -> list[Path]:
        return [Path(config.output) for config in self.configs]

    @property
    def task(self) -> str:
        return self.configs[0].task


def accuracy_table(
    recipes: Sequence[Path],
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    runs: Path | None = None,
    out: Path | None = None,
) -> int | None:
    """Trains what is not trained yet, prints the table, and saves results.md, results.csv and results.png.

    In the plot a line joins the recipes of files called NAME-ANYTHING: the same attention with other budgets.

    Args:
        recipes: YAML files; the first one is what the others are compared against.
        overrides: `key=value` for all recipes.
        seeds: One run of every recipe for each; by default the recipe's own.
        runs: The runs are its folders RECIPE-sSEED, or RECIPE where that is a finished run of the seed; by default the
            folder in which the first recipe would run.
        out: Where the results go; `runs` by default.

    Returns:
        The exit status of an interrupted command; None when all is done.

    Raises:
        UserError: For a recipe, a run or data that do not fit, before anything is trained where that can be known.
    """
    runs = runs or default_output(recipes[0]).parent
    entries = [Entry(recipe, _configs(recipe, overrides, seeds, runs), []) for recipe in recipes]
    stems = [recipe.stem for recipe in recipes]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f'two recipes are called {stem}.yaml and would share runs; rename one')
    for entry in entries:
        if entry.task != entries[0].task:
            raise UserError(
                f'{entry.recipe} has task={entry.task}, {recipes[0]} has task={entries[0].task}: a table is of one task'
            )
    moved = [_check_reusable(config) for entry in entries for config in entry.configs]
    for entry in entries:
        _check_same_updates(entry)
    try:
        for entry in entries:
            entry.results = [_result(config) for config in entry.configs]
    except Interrupted as stop:
        print(f'vit-efficient table: {stop}; the same command goes on', file=sys.stderr)
        return stop.exit_status
    names = [entry.results[0]['model'] for entry in entries]
    for entry, name in zip(entries, names, strict=True):
        entry.label = name if names.count(name) == 1 else f'{name} ({entry.recipe.stem})'

    results = [result for entry in entries for result in entry.results]
    accuracies = [name for name in ACCURACIES if all(name in result for result in results)]
    rows, device, batch_size = _measure(entries, accuracies)
    table = _table(rows, accuracies)
    parts = [table.render(), _explanation(entries, device, batch_size) + ''.join(moved) + _costs_of_images(entries)]
    if any(config.stages for entry in entries for config in entry.configs):
        parts.append(_stages(entries, accuracies))
    if any(_is_learned(entry) for entry in entries):
        parts.append(_truncations(entries, accuracies))
    if len(entries) > 1:
        parts.append(_comparison(entries))
    parts.append(_environment(entries, device))
    text = '\n'.join(parts)
    print(text, end='')
    out = out or runs
    write_text(out / 'results.md', text)
    write_text(out / 'results.csv', table.render('csv'))
    _plot(entries, rows, accuracies, out / 'results.png')
    print(f'saved {out / "results.md"}, results.csv, results.png', file=sys.stderr)
    return None


# --- runs ----------------------------------------------------------------------------------------------------------


def _configs(recipe: Path, overrides: Sequence[str], seeds: Sequence[int] | None, runs: Path) -> list[Config]:
    for key in ('seed', 'output', 'resume'):
        if any(override.startswith(f'{key}=') for override in overrides):
            raise UserError(f'{key}= is set by the table; see --seeds and --runs')
    configs = []
    for seed in dict.fromkeys(seeds) if seeds else [load_recipe(recipe, overrides).seed]:
        own = [f'seed={seed}', f'output={_folder(recipe, seed, runs)}', 'resume=auto']
        configs.append(load_recipe(recipe, [*overrides, *own]))
    return configs


def _folder(recipe: Path, seed: int, runs: Path) -> Path:
    """Of a run: one of the table, or one that `vit-efficient train` has finished with that seed."""
    folder, trained = runs / f'{recipe.stem}-s{seed}', runs / recipe.stem
    if not folder.exists() and (trained / 'result.json').exists() and load_recipe(trained / 'recipe.yaml').seed == seed:
        return trained
    return folder


def _check_reusable(config: Config) -> str:
    """Raises UserError if the run's folder holds the finished run of another recipe; else what is to be said of it."""
    folder = Path(config.output)
    if not _is_finished(config):
        return ''
    saved = load_recipe(folder / 'recipe.yaml')
    theirs, ours = flatten(saved), flatten(config)

    def refuse(*keys: str, why: str = '') -> NoReturn:
        values = ', '.join(f'{key}={theirs[key]!r}' for key in keys)
        asked = ', '.join(f'{key}={ours[key]!r}' for key in keys)
        same = ' '.join(shlex.quote(f'{key}={json.dumps(theirs[key])}') for key in keys)
        raise UserError(
            f'{folder} holds a finished run with {values}, but {config.recipe} now asks for {asked}{why}; train '
            f'another in a folder that --runs names, or ask for what it was trained with: {same}'
        )

    # Weights depend on the keys of the identity, what is measured on the images too. How an update is shared out
    # depends on the processes, and folders move.
    keys = [key for key in (*identity(config), 'data.val_args') if key not in _SHARED_OUT]
    moved = [key for key in ('data.train', 'data.val') if theirs[key] != ours[key]]
    for key in (*keys, *(moved if config.data.dataset else ())):
        if theirs[key] != ours[key]:
            refuse(key)
    trained, shares, share = _images_per_update(_result(config)), _share(saved), _share(config)
    if share not in (shares, trained):
        of = f' ({trained} images per update)' if trained else ''
        refuse(*_SHARED_OUT, why=f', {share} images per update and process, where the run took {shares}{of}')
    for key in moved:
        if not _has_images_of(config, key):
            refuse(key, why=', where other images are or none')
    places = ', '.join(f'{key}={theirs[key]}' for key in moved)
    return f'{folder} was trained with {places}: images of the same names and number.\n' if moved else ''


def _has_images_of(config: Config, key: str) -> bool:
    """Whether the folder that a recipe now names has the images of its finished run, by their names or number."""
    is_val = key == 'data.val'
    args = {**config.data.args, **(config.data.val_args if is_val else {})}
    try:
        dataset = create_dataset(config.data.val if is_val else config.data.train, key=key, args=args)
    except ValueError:
        return False
    result = _result(config)
    if not is_val:
        return len(dataset) == result['train_images']
    if len(dataset) != result['val_images'] + result.get('val_skipped', 0) or not hasattr(dataset, 'filename'):
        return False
    return all(dataset.filename(int(row['index'])) == row['file'] for row in _predictions(config))


def _check_same_updates(entry: Entry) -> None:
    """Raises UserError if the runs of a recipe, whose mean the table has, differ in the images per update."""
    taken = {}
    for config in entry.configs:
        images = _images_per_update(_result(config)) if _is_finished(config) else _share(config)
        if images:
            taken.setdefault(images, config.output)
    if len(taken) > 1:
        told = ', '.join(f'{folder} {images}' for images, folder in taken.items())
        raise UserError(
            f'{entry.recipe}: the table has the mean of its runs, which would be of different images per update: '
            f'{told}; train them alike, with vit-efficient train on as many processes or in a folder that --runs names'
        )


def _share(config: Config) -> int:
    """Images of an update that one process takes; the table itself trains in one."""
    return math.prod(flatten(config)[key] for key in _SHARED_OUT)


def _images_per_update(result: dict[str, Any]) -> int | None:
    """Of all processes together; None of runs that do not tell."""
    return result['environment'].get('scale', {}).get('images_per_update')


def _is_finished(config: Config) -> bool:
    return (Path(config.output) / 'result.json').exists()


def _result(config: Config) -> dict[str, Any]:
    path = Path(config.output) / 'result.json'
    if not _is_finished(config):
        print(f'training {config.recipe}, seed {config.seed}: {config.output}', file=sys.stderr)
        train(config)
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except json.JSONDecodeError as error:
        raise UserError(
            f'{path} is damaged ({error}); without that file the same command writes it anew, from the checkpoint'
        ) from error


# --- the table -----------------------------------------------------------------------------------------------------


def _measure(entries: Sequence[Entry], accuracies: Sequence[str]) -> tuple[list[dict[str, Any]], torch.device, int]:
    """The rows of the table, and the device and the batch size that the speeds were measured on."""
    config = entries[0].configs[0]
    name = config.device if config.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    device = torch.device(name)
    if config.threads:
        torch.set_num_threads(config.threads)
    models = [load_model(entry.folders[0] / 'model').eval() for entry in entries]
    images = [_preprocessing(entry, model) for entry, model in zip(entries, models, strict=True)]
    sizes = [input_shape(*pair) for pair in zip(models, images, strict=True)]
    patches = max(_patches(model, image.input_size[1:]) for model, image in zip(models, images, strict=True))
    batch_size = max(1, min(BATCH_SIZE, BATCH_PATCHES // patches))
    speeds = images_per_second(models, sizes, device, batch_size)
    rows = []
    for entry, model, image, size, speed in zip(entries, models, images, sizes, speeds, strict=True):
        # What is learned of a truncation is another one for each seed.
        others = [load_model(folder / 'model') for folder in entry.folders[1:]] if _is_learned(entry) else []
        counts = [count_flops(each, size) for each in (model, *others)]
        rows.append(
            {
                'model': entry.label,
                'parameters_m': statistics.fmean(result['parameters'] for result in entry.results) / 1e6,
                'gmacs': statistics.fmean(count.total for count in counts) / 1e9,
                'attention_gmacs': statistics.fmean(count.attention for count in counts) / 1e9,
                'kept_tokens': _kept(model, image.input_size[1:]),
                'images_per_second': speed,
                'speed_ratio': speed / speeds[0],
                **_mean_and_spread(entry.results, accuracies),
                'seeds': ' '.join(str(config.seed) for config in entry.configs),
            }
        )
    return rows, device, batch_size


def _mean_and_spread(results: Sequence[dict[str, Any]], accuracies: Sequence[str]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in accuracies:
        values = [result[name] for result in results]
        found[name] = statistics.fmean(values)
        found[f'{name}_std'] = statistics.stdev(values) if len(values) > 1 else None
    return found


def _preprocessing(entry: Entry, model: nn.Module) -> Preprocessing:
    """That of the runs, of one of their models."""
    return Preprocessing.of(model, entry.configs[0].data)


def _patches(model: nn.Module, size: tuple[int, int]) -> int:
    """Of an image of this size; 1 for models without."""
    embedding = getattr(model, 'patch_embed', None)
    built = getattr(embedding, 'img_size', None) or size
    return max(1, (getattr(embedding, 'num_patches', None) or 1) * math.prod(size) // math.prod(built))


def _kept(model: nn.Module, size: tuple[int, int]) -> int | str | None:
    try:
        kept = kept_tokens(model, size)
    except ValueError:  # not a model of this package
        return None
    return kept[0] if len(set(kept)) == 1 else f'{min(kept)}–{max(kept)}'


@torch.inference_mode()
def images_per_second(
    models: Sequence[nn.Module],
    sizes: Sequence[tuple[int, int, int]],
    device: torch.device,
    batch_size: int = BATCH_SIZE,
) -> list[float]:
    """Speeds of the forward pass on random images: medians over rounds in which the models take turns."""
    calls = [
        partial(model.to(device), torch.randn(batch_size, *size, device=device))
        for model, size in zip(models, sizes, strict=True)
    ]
    return [batch_size / statistics.median(times) for times in take_turns(calls, device, ROUNDS)]


def _table(rows: Sequence[dict[str, Any]], accuracies: Sequence[str]) -> Table:
    columns = [
        Column('model'),
        Column('parameters_m', 'parameters (M)', 2),
        *_cost_columns(),
        Column('kept_tokens', 'kept tokens'),
        Column('images_per_second', 'img/s', 0),
        Column('speed_ratio', '× first', 2),
        *_accuracy_columns(accuracies),
        Column('seeds', 'seed' if all(' ' not in row['seeds'] for row in rows) else 'seeds'),
    ]
    return Table(columns, rows)


def _cost_columns() -> list[Column]:
    return [Column('gmacs', 'GMACs', 4), Column('attention_gmacs', 'in attention', 4)]


def _accuracy_columns(accuracies: Sequence[str]) -> list[Column]:
    pairs = (
        (Column(name, ACCURACIES[name][0], 2, spread=f'{name}_std'), Column(f'{name}_std', digits=2))
        for name in accuracies
    )
    return [column for pair in pairs for column in pair]


def _plot(entries: Sequence[Entry], rows: Sequence[dict[str, Any]], accuracies: Sequence[str], path: Path) -> None:
    """Against GMACs (for tasks of patches, those of attention) and against speed."""
    costs = {'gmacs': 'GMACs per image', 'images_per_second': 'images per second'}
    if 'miou' in accuracies:
        costs = {'attention_gmacs': 'GMACs in attention per image', 'images_per_second': 'images per second'}
    series = [entry.recipe.stem.partition('-')[0] for entry in entries]
    labels = series if len(set(series)) < len(series) else [entry.label for entry in entries]
    panels = [
        [
            Panel(
                [
                    Point(label, row[cost], row[name], row[f'{name}_std'])
                    for label, row in zip(labels, rows, strict=True)
                ],
                x,
                ACCURACIES[name][1],
            )
            for cost, x in costs.items()
        ]
        for name in accuracies
        if name != 'miou' or 'foreground_miou' not in accuracies
    ]
    plot_accuracy(panels, path)


# --- what stands below it ------------------------------------------------------------------------------------------


def _explanation(entries: Sequence[Entry], device: torch.device, batch_size: int) -> str:
    images = ' or '.join(sorted({str(result['val_images']) for entry in entries for result in entry.results}))
    spread = ', mean ± standard deviation over seeds' if len(entries[0].results) > 1 else ''
    skipped = [
        max(result.get(name, 0) for entry in entries for result in entry.results)
        for name in ('train_skipped', 'val_skipped')
    ]
    unread = ''
    if any(skipped):
        unread = f'A run skipped up to {skipped[0]} training and {skipped[1]} validation images that cannot be read. '
    what = {'classification': 'Top-1', 'segmentation': 'mIoU', 'both': 'Top-1 and mIoU'}[entries[0].task]
    patches = ''
    if entries[0].task != 'classification':
        patches = (
            'mIoU: intersection over union of the patches of each class, all images together, averaged over the '
            'classes; foreground mIoU: without the class none. '
        )
    threads = f' (threads: {torch.get_num_threads()})' if device.type == 'cpu' else ''
    return (
        f'{what} on {images} validation images{spread}. {unread}{_updates(entries)}{patches}GMACs per image; in '
        'attention: projections, products and transforms. Kept tokens: what a query attends to. Speed: forward pass, '
        f'batch {batch_size}, float32, {device.type}{threads}, median of {ROUNDS} rounds in which the models take '
        'turns.\n'
    )


def _updates(entries: Sequence[Entry]) -> str:
    """What an update took in training, of each model where they differ."""
    told = {entry.label: ' or '.join(dict.fromkeys(map(_update, entry.results))) for entry in entries}
    if len(set(told.values())) == 1:
        return f'Trained with {next(iter(told.values()))}. '
    return f'Trained with: {"; ".join(f"{label}, {update}" for label, update in told.items())}. '


def _update(result: dict[str, Any]) -> str:
    scale = result['environment'].get('scale')
    if not scale:
        return 'updates of a number of images that the run does not tell'
    return '{images_per_update} images per update ({batch_size} × {grad_accum} accumulated × {processes} {of})'.format(
        of='process' if scale['processes'] == 1 else 'processes', **scale
    )


def _comparison(entries: Sequence[Entry]) -> str:
    """Every model against the first, on the same images with the same seeds."""
    first = entries[0]
    of_images, of_patches, remarks = [], [], []
    for other in entries[1:]:
        pairs = _paired_predictions(first, other)
        if not pairs:
            remarks.append(f'{other.label} and {first.label} have no seed in common.\n')
            continue
        if any(_images(ours) != _images(theirs) for ours, theirs in pairs):
            remarks.append(f'{other.label} was measured on other validation images than {first.label}.\n')
            continue
        columns = pairs[0][0][0]
        if 'predicted' in columns:
            of_images.append({'model': other.label, **_compare_answers(pairs)})
        if 'patch_accuracy' in columns:
            of_patches.append({'model': other.label, **_compare_patches(pairs)})
    text = ''
    if of_images:
        columns = [
            Column('model', f'against {first.label}'),
            Column('pairs', 'images × seeds'),
            Column('only_first', 'only the first right'),
            Column('only_this', 'only this one right'),
            Column('difference', 'difference (points)', 2),
            Column('interval', '95 % interval'),
            Column('p', 'p'),
        ]
        text += Table(columns, of_images).render() + (
            '\nPaired by image and seed. p: exact McNemar test, pairs of all seeds pooled. Interval: bootstrap over '
            'images, each with all its seeds.\n'
        )
    if of_patches:
        columns = [
            Column('model', f'patches, against {first.label}'),
            Column('pairs', 'images × seeds'),
            Column('difference', 'difference (points)', 2),
            Column('interval', '95 % interval'),
        ]
        text += ('\n' if text else '') + Table(columns, of_patches).render()
        text += '\nShare of patches that are right, paired by image and seed. Interval: bootstrap over images.\n'
    return text + ''.join(remarks)


def _costs_of_images(entries: Sequence[Entry]) -> str:
    """A line for each model whose cost depends on the data; the table has it in expectation."""
    lines = []
    for entry in entries:
        model = load_model(entry.folders[0] / 'model').eval()
        if not any(isinstance(module, LeafAttention) for module in model.modules()):
            continue
        data, preprocessing = entry.configs[0].data, _preprocessing(entry, model)
        dataset = create_dataset(data.val, data.dataset, data.root, 'data.val', {**data.args, **data.val_args})
        samples = Samples(
            *eval_input(dataset, model, preprocessing, data.decode),
            preprocessing.input_size[0],
            model.num_classes,
            on_error=data.on_error,
        )
        images = samples.spread(COUNTED_IMAGES)
        count = count_flops(model, images=images)
        lines.append(
            f'{entry.label}: GMACs as if all leaves held as many patches; as {len(images)} validation images fall into '
            f'those of seed {entry.configs[0].seed}, {count.total / len(images) / 1e9:.4f}, of which in attention '
            f'{count.attention / len(images) / 1e9:.4f}.\n'
        )
    return ''.join(lines)


def _stages(entries: Sequence[Entry], accuracies: Sequence[str]) -> str:
    """What the models of recipes with stages cost, and how good they were, at the end of each."""
    rows = []
    for entry in entries:
        config = entry.configs[0]
        if not config.stages:
            continue
        trained = load_model(entry.folders[0] / 'model')
        preprocessing = _preprocessing(entry, trained)
        with torch.device('meta'):
            model = timm.create_model(config.model.name, **{**config.model.args, 'num_classes': trained.num_classes})
            for number, stage in enumerate(list_stages(config)):
                stage.begin(model, entry.results[0].get('truncation', {}).get('kept'))  # of the first seed
                count = count_flops(model, input_shape(model, preprocessing))
                at_end = [result['stages'][number] for result in entry.results]
                rows.append(
                    {
                        'model': entry.label if not number else '',
                        'stage': str(stage),
                        'epochs': stage.end - stage.start,
                        'gmacs': count.total / 1e9,
                        'attention_gmacs': count.attention / 1e9,
                        **_mean_and_spread(at_end, accuracies),
                    }
                )
    columns = [
        Column('model', 'stage by stage'),
        Column('stage', 'begins with'),
        Column('epochs'),
        *_cost_columns(),
        *_accuracy_columns(accuracies),
    ]
    return Table(columns, rows).render()


def _is_learned(entry: Entry) -> bool:
    return 'truncation' in entry.results[0]


def _truncations(entries: Sequence[Entry], accuracies: Sequence[str]) -> str:
    """What each seed has learned to keep, what it cost to make that a hard truncation, and what training mended."""
    rows = []
    for entry in entries:
        if not _is_learned(entry):
            continue
        for config, result in zip(entry.configs, entry.results, strict=True):
            learned = result['truncation']
            rows.append(
                {
                    'model': entry.label if config is entry.configs[0] else '',
                    'seed': config.seed,
                    'kept': _sizes(learned['kept']),
                    'cost': learned['cost'],
                    **{f'{name}_before': learned['learned'][name] for name in accuracies},
                    **{f'{name}_frozen': learned['frozen'][name] for name in accuracies},
                    **{name: result[name] for name in accuracies},
                }
            )
    columns = [Column('model', 'learned truncation'), Column('seed'), Column('kept', 'coefficients kept')]
    columns.append(Column('cost', 'share of MACs', 3))
    for name in accuracies:
        columns += [
            Column(f'{name}_before', f'{ACCURACIES[name][0]}, as learned', 2),
            Column(f'{name}_frozen', 'made hard', 2),
            Column(name, 'at the end', 2),
        ]
    return Table(columns, rows).render()


def _sizes(kept: dict[str, Any]) -> str:
    """Such as '4×4', of a patch, or '3×4, 2×2', of the grid in each layer."""
    sizes = []
    for size in kept.values():
        channels = size if isinstance(size[0], list) else [size]
        texts = list(dict.fromkeys(f'{h}×{w}' for h, w in channels))
        sizes.append('/'.join(texts))
    return ', '.join(sizes)


Predictions = list[dict[str, str]]  # a run's predictions.csv


def _paired_predictions(entry: Entry, other: Entry) -> list[tuple[Predictions, Predictions]]:
    """What both predict, for every seed that both have."""
    theirs = {config.seed: config for config in other.configs}
    return [
        (_predictions(config), _predictions(theirs[config.seed])) for config in entry.configs if config.seed in theirs
    ]


def _predictions(config: Config) -> Predictions:
    # Images that are made up are told by what they are made with.
    made_with = json.dumps({**config.data.args, **config.data.val_args}, sort_keys=True)
    with open(Path(config.output) / 'predictions.csv', newline='', encoding='utf-8') as file:
        return [{**row, 'made_with': made_with} for row in csv.DictReader(file)]


def _images(rows: Predictions) -> list[tuple[str | None, ...]]:
    return [(row['index'], row['file'], row.get('label'), row['made_with']) for row in rows]


def _compare_answers(pairs: Sequence[tuple[Predictions, Predictions]]) -> dict[str, Any]:
    ours, theirs = (
        [[row['label'] == row['predicted'] for row in rows] for rows in runs] for runs in zip(*pairs, strict=True)
    )
    found = compare(ours, theirs)
    return {
        'pairs': found.pairs,
        'only_first': found.only_first,
        'only_this': found.only_other,
        'difference': found.difference,
        'interval': f'{found.low:+.2f} … {found.high:+.2f}',
        'p': f'{found.p:.2g}',
    }


def _compare_patches(pairs: Sequence[tuple[Predictions, Predictions]]) -> dict[str, Any]:
    ours, theirs = (
        np.array([[float(row['patch_accuracy']) for row in rows] for rows in runs]) for runs in zip(*pairs, strict=True)
    )
    gains = (theirs - ours).mean(axis=0)
    low, high = interval_of_mean(gains)
    return {'pairs': ours.size, 'difference': float(gains.mean()), 'interval': f'{low:+.2f} … {high:+.2f}'}


def _environment(entries: Sequence[Entry], device: torch.device) -> str:
    here = one_line(describe_environment(device))
    trained = {one_line(result['environment']) for entry in entries for result in entry.results}
    lines = [f'Measured on {here}.', *(f'Trained on {there}.' for there in sorted(trained - {here}))]
    return ' '.join(lines) + '\n'
