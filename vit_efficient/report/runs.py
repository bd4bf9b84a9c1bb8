"""The runs of a table: recipes × seeds as folders, what of them may be used again, and training what is missing."""

import json
import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vit_efficient.data import create_dataset
from vit_efficient.report.evaluation import SavedModel
from vit_efficient.train import Config, load_recipe, train
from vit_efficient.train.config import identity
from vit_efficient.train.run_folder import RunFolder
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.keys import flatten

# Their product and the number of processes are the images of an update.
UPDATE_KEYS = ('data.batch_size', 'grad_accum')

logger = logging.getLogger(__name__)


@dataclass
class Entry:
    """A recipe and its runs, one for each seed."""

    recipe: Path
    configs: list[Config]  # for each run: the recipe as it is asked for now, with the seed, and its folder as output
    label: str = ''  # the model's name in the table

    @property
    def runs(self) -> list[RunFolder]:
        return [RunFolder(config.output) for config in self.configs]

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """What the runs, which have to be finished, have written to result.json."""
        return [run.result for run in self.runs]

    @cached_property
    def saved(self) -> SavedModel:
        """The model of the first run."""
        return SavedModel(self.runs[0].path, self.configs[0])

    @property
    def learns_truncation(self) -> bool:
        return 'truncation' in self.results[0]


def open_runs(recipes: Sequence[Path], overrides: Sequence[str], seeds: Sequence[int], runs: Path) -> list[Entry]:
    """The runs of a table, none of which need be there yet, with a UserError where one table cannot have them."""
    for key in ('seed', 'output', 'resume'):
        if any(override.startswith(f'{key}=') for override in overrides):
            raise UserError(f'{key}= is set by the table; see --seeds and --runs')
    entries = []
    for recipe in recipes:
        configs = []
        for seed in dict.fromkeys(seeds) if seeds else [load_recipe(recipe, overrides).seed]:
            own = [f'seed={seed}', f'output={folder_of_run(recipe, seed, runs)}', 'resume=auto']
            configs.append(load_recipe(recipe, [*overrides, *own]))
        entries.append(Entry(recipe, configs))
    stems = [recipe.stem for recipe in recipes]
    for entry, stem in zip(entries, stems, strict=True):
        if stems.count(stem) > 1:
            raise UserError(f'two recipes are called {stem}.yaml and would write to the same folders; rename one')
        task, first = entry.configs[0].task, entries[0].configs[0].task
        if task != first:
            raise UserError(f'{entry.recipe} has task={task}, {recipes[0]} has task={first}: a table is of one task')
    return entries


def folder_of_run(recipe: Path, seed: int, folder: Path) -> Path:
    """The folder of a run of the table, or of one that `vit-efficient train` has finished with that seed."""
    own, trained = folder / f'{recipe.stem}-s{seed}', RunFolder(folder / recipe.stem)
    return trained.path if not own.exists() and trained.is_finished and trained.config.seed == seed else own


def check_runs(entries: Sequence[Entry]) -> str:
    """A line for each finished run whose images are elsewhere now.

    Raises:
        UserError: If a run's folder holds the finished run of another recipe, or the runs of a recipe, whose mean the
            table has, differ in the images per update.
    """
    remarks = ''.join(_check_reusable(config) for entry in entries for config in entry.configs)
    for entry in entries:
        _check_same_updates(entry)
    return remarks


def train_missing(entries: Sequence[Entry]) -> None:
    """Trains the runs that have not finished."""
    for config in (config for entry in entries for config in entry.configs):
        if not RunFolder(config.output).is_finished:
            logger.info('training %s, seed %d: %s', config.recipe, config.seed, config.output)
            train(config)


def _check_reusable(config: Config) -> str:
    run = RunFolder(config.output)
    if not run.is_finished:
        return ''
    saved, asked = flatten(run.config), flatten(config)
    differing = [key for key in asked if saved[key] != asked[key]]
    moved = [key for key in ('data.train', 'data.val') if key in differing]
    # Weights depend on the keys of the identity, what is measured on the images too. How an update is divided
    # depends on the processes, and folders move.
    for key in (*identity(config), 'data.val_args', *(moved if config.data.dataset else ())):
        if key in differing:
            raise _other_run(config, saved, [key])
    total, had, asks = _images_per_update(run.result), _images_per_process(saved), _images_per_process(asked)
    if asks not in (had, total):
        of = f' ({total} images per update)' if total else ''
        why = f', {asks} images per update and process, where the run took {had}{of}'
        raise _other_run(config, saved, UPDATE_KEYS, why)
    for key in moved:
        if not _has_images_of(config, key):
            raise _other_run(config, saved, [key], ', where other images are or none')
    folders = ', '.join(f'{key}={saved[key]}' for key in moved)
    return f'{run.path} was trained with {folders}: images of the same names and number.\n' if moved else ''


def _other_run(config: Config, saved: dict[str, Any], keys: Sequence[str], why: str = '') -> UserError:
    asked = flatten(config)
    had = ', '.join(f'{key}={saved[key]!r}' for key in keys)
    asks = ', '.join(f'{key}={asked[key]!r}' for key in keys)
    same = ' '.join(shlex.quote(f'{key}={json.dumps(saved[key])}') for key in keys)
    return UserError(
        f'{config.output} holds a finished run with {had}, but {config.recipe} now asks for {asks}{why}; train another '
        f'in a folder that --runs names, or ask for what it was trained with: {same}'
    )


def _has_images_of(config: Config, key: str) -> bool:
    """Whether the folder that a recipe now names has the images of its finished run, by their names or number."""
    run, data, of_training = RunFolder(config.output), config.data, key == 'data.train'
    folder, args = (data.train, data.args) if of_training else (data.val, {**data.args, **data.val_args})
    try:
        dataset = create_dataset(folder, key=key, args=args)
    except UserError:
        return False
    if of_training:
        return len(dataset) == run.result['train_images']
    if len(dataset) != run.result['val_images'] + run.result.get('val_skipped', 0) or not hasattr(dataset, 'filename'):
        return False
    return all(dataset.filename(int(row['index'])) == row['file'] for row in run.predictions())


def _check_same_updates(entry: Entry) -> None:
    folders: dict[int, Path] = {}
    for config, run in zip(entry.configs, entry.runs, strict=True):
        images = _images_per_update(run.result) if run.is_finished else _images_per_process(flatten(config))
        if images:
            folders.setdefault(images, run.path)
    if len(folders) > 1:
        found = ', '.join(f'{folder} {images}' for images, folder in folders.items())
        raise UserError(
            f'{entry.recipe}: the table has the mean of its runs, which would be of different images per update: '
            f'{found}; train them alike, with vit-efficient train on as many processes or in a folder that --runs names'
        )


def _images_per_process(values: dict[str, Any]) -> int:
    """The images of an update that one process takes, by a recipe's keys; the table trains in one."""
    return math.prod(values[key] for key in UPDATE_KEYS)


def _images_per_update(result: dict[str, Any]) -> int | None:
    """The images that all processes together took; None for runs that do not say."""
    return result['environment'].get('scale', {}).get('images_per_update')
