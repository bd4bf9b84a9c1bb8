"""The folder of a run: every file name in it, and how each is written and read."""

import csv
import json
from pathlib import Path
from typing import Any

from vit_efficient.train.config import Config, load_recipe
from vit_efficient.train.log import read_metrics
from vit_efficient.utils.errors import UserError

RECIPE = 'recipe.yaml'
ENVIRONMENT = 'environment.json'
RESULT = 'result.json'
PREDICTIONS = 'predictions.csv'
MODEL = 'model'  # a model folder, as BEST is
BEST = 'best'


class RunFolder:
    """A run on disk. Reading it needs no more than its path; it is written by one process at a time.

    Args:
        path: The folder, which need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def of_model(cls, path: str | Path) -> 'RunFolder | None':
        """The run that a path belongs to: its folder, or that of one of its models; None without a run."""
        folder = Path(path).absolute()
        if folder.name in (MODEL, BEST) and not (folder / RECIPE).exists():
            folder = folder.parent
        return cls(folder) if (folder / RECIPE).exists() else None

    @property
    def config(self) -> Config:
        """The recipe, with all its keys, as the run has resolved it."""
        return load_recipe(self.path / RECIPE)

    @property
    def is_finished(self) -> bool:
        return (self.path / RESULT).exists()

    @property
    def result(self) -> dict[str, Any]:
        """What result.json holds.

        Raises:
            UserError: If it cannot be read.
        """
        path = self.path / RESULT
        try:
            result = json.loads(path.read_text(encoding='utf-8'))
            if 'environment' in result:  # the last entry
                return result
        except (TypeError, ValueError):
            pass
        raise UserError(f'{path}: not a readable result; delete it, and resume=auto writes it anew from the checkpoint')

    def predictions(self) -> list[dict[str, str]]:
        """A row for each image of the validation set, in its order."""
        with open(self.path / PREDICTIONS, newline='', encoding='utf-8') as file:
            return list(csv.DictReader(file))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, as `train.log.read_metrics` reads them."""
        return read_metrics(self.path)

    @property
    def updates_per_epoch(self) -> int | None:
        """As environment.json tells; None where it does not."""
        try:
            environment = json.loads((self.path / ENVIRONMENT).read_text(encoding='utf-8'))
            return environment['scale']['updates_per_epoch']
        except (OSError, ValueError, LookupError, TypeError):
            return None
