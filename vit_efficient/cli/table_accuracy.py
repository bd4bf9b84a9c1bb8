"""`vit-efficient table accuracy`: recipes to runs, runs to a table, a comparison and a plot."""

import csv
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_efficient.benchmark import take_turns
from vit_efficient.cli.table import attention_macs
from vit_efficient.environment import describe_environment, one_line
from vit_efficient.files import write_text
from vit_efficient.flops import count_flops
from vit_efficient.models import kept_tokens
from vit_efficient.paired import compare
from vit_efficient.tables import Column, Point, Table, plot_accuracy
from vit_efficient.train import Config, Interrupted, load_model, load_recipe, train
from vit_efficient.train.config import flatten, identity

# The speed measurement.
BATCH_SIZE = 64
ROUNDS = 9


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


def accuracy_table(
    recipes: Sequence[Path],
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    runs: Path | None = None,
    out: Path | None = None,
) -> int | None:
    """Trains what is not trained yet, prints the table, and saves results.md, results.csv and results.png.

    Args:
        recipes: YAML files; the first one is what the others are compared against.
        overrides: `key=value` for all recipes.
        seeds: One run of every recipe for each; by default the recipe's own.
        runs: The runs are its folders RECIPE-sSEED; runs/FOLDER of the first recipe by default.
        out: Where the results go; `runs` by default.

    Returns:
        The exit status of an interrupted command; None when all is done.

    Raises:
        ValueError: For a recipe, a run or data that do not fit, before anything is trained where that can be known.
    """
    runs = runs or Path('runs') / recipes[0].resolve().parent.name
    entries = [Entry(recipe, _configs(recipe, overrides, seeds, runs), []) for recipe in recipes]
    stems = [recipe.stem for recipe in recipes]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ValueError(f'two recipes are called {stem}.yaml and would share runs; rename one')
    for entry in entries:
        for config in entry.configs:
            _check_reusable(config)
    try:
        for entry in entries:
            entry.results = [_result(config) for config in entry.configs]
    except Interrupted as stop:
        print(f'vit-efficient table: {stop}; the same command goes on', file=sys.stderr)
        return 128 + stop.signal
    names = [entry.results[0]['model'] for entry in entries]
    for entry, name in zip(entries, names, strict=True):
        entry.label = name if names.count(name) == 1 else f'{name} ({entry.recipe.stem})'

    rows, device = _measure(entries)
    table = _table(rows)
    parts = [table.render(), _explanation(entries, device)]
    if len(entries) > 1:
        parts.append(_comparison(entries))
    parts.append(_environment(entries, device))
    text = '\n'.join(parts)
    print(text, end='')
    out = out or runs
    write_text(out / 'results.md', text)
    write_text(out / 'results.csv', table.render('csv'))
    points = [Point(row['model'], row['gmacs'], row['top1'], row['top1_std']) for row in rows]
    plot_accuracy(points, out / 'results.png')
    print(f'saved {out / "results.md"}, results.csv, results.png', file=sys.stderr)
    return None


# --- runs ----------------------------------------------------------------------------------------------------------


def _configs(recipe: Path, overrides: Sequence[str], seeds: Sequence[int] | None, runs: Path) -> list[Config]:
    for key in ('seed', 'output', 'resume'):
        if any(override.startswith(f'{key}=') for override in overrides):
            raise ValueError(f'{key}= is set by the table; see --seeds and --runs')
    configs = []
    for seed in dict.fromkeys(seeds) if seeds else [load_recipe(recipe, overrides).seed]:
        own = [f'seed={seed}', f'output={runs / f"{recipe.stem}-s{seed}"}', 'resume=auto']
        configs.append(load_recipe(recipe, [*overrides, *own]))
    return configs


def _check_reusable(config: Config) -> None:
    """Raises ValueError if the run's folder holds the finished run of another recipe."""
    folder = Path(config.output)
    if not (folder / 'result.json').exists():
        return
    saved = load_recipe(folder / 'recipe.yaml')
    # Weights depend on the keys of the identity; what is measured, also on where the data lie.
    keys = [*identity(config), 'data.train', 'data.val']
    theirs, ours = flatten(saved), flatten(config)
    for key in keys:
        if theirs[key] != ours[key]:
            raise ValueError(
                f'{folder} holds a finished run with {key}={theirs[key]!r}, but {config.recipe} now asks for '
                f'{ours[key]!r}; delete that folder or name another with --runs'
            )


def _result(config: Config) -> dict[str, Any]:
    path = Path(config.output) / 'result.json'
    if not path.exists():
        print(f'training {config.recipe}, seed {config.seed}: {config.output}', file=sys.stderr)
        train(config)
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is damaged ({error}); delete {path.parent} to train it again') from error


# --- the table -----------------------------------------------------------------------------------------------------


def _measure(entries: Sequence[Entry]) -> tuple[list[dict[str, Any]], torch.device]:
    """The rows of the table, and the device that the speeds were measured on."""
    config = entries[0].configs[0]
    name = config.device if config.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    device = torch.device(name)
    if config.threads:
        torch.set_num_threads(config.threads)
    models = [load_model(entry.folders[0] / 'model').eval() for entry in entries]
    sizes = [tuple(model.pretrained_cfg['input_size']) for model in models]
    speeds = images_per_second(models, sizes, device)
    rows = []
    for entry, model, size, speed in zip(entries, models, sizes, speeds, strict=True):
        count = count_flops(model, size)
        top1 = [result['top1'] for result in entry.results]
        rows.append(
            {
                'model': entry.label,
                'parameters_m': entry.results[0]['parameters'] / 1e6,
                'gmacs': count.total / 1e9,
                'attention_gmacs': attention_macs(count) / 1e9,
                'kept_tokens': _kept(model, size[1:]),
                'images_per_second': speed,
                'speed_ratio': speed / speeds[0],
                'top1': statistics.fmean(top1),
                'top1_std': statistics.stdev(top1) if len(top1) > 1 else None,
                'seeds': ' '.join(str(config.seed) for config in entry.configs),
            }
        )
    return rows, device


def _kept(model: nn.Module, size: tuple[int, int]) -> int | str | None:
    try:
        kept = kept_tokens(model, size)
    except ValueError:  # not a model of this package
        return None
    return kept[0] if len(set(kept)) == 1 else f'{min(kept)}–{max(kept)}'


@torch.inference_mode()
def images_per_second(
    models: Sequence[nn.Module], sizes: Sequence[tuple[int, int, int]], device: torch.device
) -> list[float]:
    """Speeds of the forward pass on random images: medians over rounds in which the models take turns."""
    calls = [
        partial(model.to(device), torch.randn(BATCH_SIZE, *size, device=device))
        for model, size in zip(models, sizes, strict=True)
    ]
    return [BATCH_SIZE / statistics.median(times) for times in take_turns(calls, device, ROUNDS)]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = [
        Column('model'),
        Column('parameters_m', 'parameters (M)', 2),
        Column('gmacs', 'GMACs', 4),
        Column('attention_gmacs', 'in attention', 4),
        Column('kept_tokens', 'kept tokens'),
        Column('images_per_second', 'img/s', 0),
        Column('speed_ratio', '× first', 2),
        Column('top1', 'top-1 (%)', 2, spread='top1_std'),
        Column('top1_std', digits=2),
        Column('seeds', 'seed' if all(' ' not in row['seeds'] for row in rows) else 'seeds'),
    ]
    return Table(columns, rows)


# --- what stands below it ------------------------------------------------------------------------------------------


def _explanation(entries: Sequence[Entry], device: torch.device) -> str:
    images = ' or '.join(sorted({str(result['val_images']) for entry in entries for result in entry.results}))
    spread = ', mean ± standard deviation over seeds' if len(entries[0].results) > 1 else ''
    return (
        f'Top-1 on {images} validation images{spread}. GMACs per image; in attention: projections, products and '
        f'transforms. Kept tokens: what a query attends to. Speed: forward pass, batch {BATCH_SIZE}, float32, '
        f'{device.type}, median of {ROUNDS} rounds in which the models take turns.\n'
    )


def _comparison(entries: Sequence[Entry]) -> str:
    """Every model against the first, on the same images with the same seeds."""
    first = entries[0]
    rows, remarks = [], []
    for other in entries[1:]:
        answers = [_answers(first, other), _answers(other, first)]
        if not answers[0]:
            remarks.append(f'{other.label} and {first.label} have no seed in common.\n')
            continue
        if any(a[0] != b[0] for a, b in zip(*answers, strict=True)):
            remarks.append(f'{other.label} was measured on other validation images than {first.label}.\n')
            continue
        found = compare(*([right for _, right in each] for each in answers))
        rows.append(
            {
                'model': other.label,
                'pairs': found.pairs,
                'only_first': found.only_first,
                'only_this': found.only_other,
                'difference': found.difference,
                'interval': f'{found.low:+.2f} … {found.high:+.2f}',
                'p': f'{found.p:.2g}',
            }
        )
    text = ''
    if rows:
        columns = [
            Column('model', f'against {first.label}'),
            Column('pairs', 'images × seeds'),
            Column('only_first', 'only the first right'),
            Column('only_this', 'only this one right'),
            Column('difference', 'difference (points)', 2),
            Column('interval', '95 % interval'),
            Column('p', 'p'),
        ]
        text = Table(columns, rows).render() + (
            '\nPaired by image and seed. p: exact McNemar test, pairs of all seeds pooled. Interval: bootstrap over '
            'images, each with all its seeds.\n'
        )
    return text + ''.join(remarks)


def _answers(entry: Entry, other: Entry) -> list[tuple[list[tuple[str, str, str]], list[bool]]]:
    """For every seed that both have: the images with their labels, and whether the entry's answers are right."""
    answers = []
    seeds = {config.seed for config in other.configs}
    for config in entry.configs:
        if config.seed in seeds:
            with open(Path(config.output) / 'predictions.csv', newline='', encoding='utf-8') as file:
                rows = list(csv.DictReader(file))
            images = [(row['index'], row['file'], row['label']) for row in rows]
            answers.append((images, [row['label'] == row['predicted'] for row in rows]))
    return answers


def _environment(entries: Sequence[Entry], device: torch.device) -> str:
    here = one_line(describe_environment(device))
    trained = {one_line(result['environment']) for entry in entries for result in entry.results}
    lines = [f'Measured on {here}.', *(f'Trained on {there}.' for there in sorted(trained - {here}))]
    return ' '.join(lines) + '\n'
