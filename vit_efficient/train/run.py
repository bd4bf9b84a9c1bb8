"""From a recipe to a trained model: the parts of a run, one after the other."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Dataset

from vit_efficient.train.config import Config
from vit_efficient.train.distributed import Processes, processes
from vit_efficient.train.experiment import Experiment
from vit_efficient.train.interrupts import Interrupts
from vit_efficient.train.preflight import preflight
from vit_efficient.train.rules import validate
from vit_efficient.train.run_folder import RunFolder, reading
from vit_efficient.train.state import TrainState
from vit_efficient.train.trainer import Trainer
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.packages import import_plugins


def train(config: Config, train_set: Dataset | None = None, val_set: Dataset | None = None) -> dict[str, Any]:
    """Trains the model of a recipe and measures it on the validation set.

    The run's folder (`output`) gets recipe.yaml (resolved), environment.json, metrics.jsonl, tensorboard/,
    checkpoint.pt, and, once the run is done, model/ (timm's local-dir layout), predictions.csv, result.json and, if
    files were skipped (`data.on_error`), skipped.txt, which names them; the last checkpoints (`checkpoint_keep`) and
    best/, the best model so far (`checkpoint_best`), if it is to keep them. Under torchrun the processes divide the
    work (DDP), or the weights too (FSDP2, `parallel`), and the first one writes. The last images of an epoch that do
    not fill an update are left out; evaluation leaves nothing out that can be read.

    Args:
        config: The recipe, from `load_recipe`.
        train_set: Instead of `data.train`: any map-style data set of (PIL image or array, label), for tasks of patches
            of (PIL image or array, label, target).
        val_set: Instead of `data.val`.

    Returns:
        What result.json holds: accuracies in percent, seconds of training without evaluation, images per second.

    Raises:
        UserError: For a recipe, data set, image or checkpoint that does not fit, before anything is written where that
            can be known; for a loss or gradient that is not finite, before it reaches the weights (`on_nonfinite`); and
            for a file that cannot be written, which leaves the checkpoints as they were.
        Interrupted: After SIGINT or SIGTERM, with a checkpoint of the last update saved; before there is one to lose,
            with nothing written.
    """
    validate(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    import_plugins(config.plugins)
    with Interrupts() as stop, processes(config.device) as team:
        experiment = Experiment.build(config, team, train_set, val_set)
        folder = RunFolder(config.output, team)
        state = TrainState(experiment)
        with _naming_rank(team):
            result, saved = folder.earlier(experiment)
            if result is not None:
                return result
            if saved:
                path, content = saved
                with reading(path):
                    state.load_state_dict(content)
        preflight(experiment, state)
        try:
            state.wrap()
            stop.join(team)
            with _naming_rank(team), folder.open(experiment, state, stop) as log:
                return Trainer(experiment, state, folder, log, stop).fit()
        finally:
            # DDP must not outlive its process group: its end would wait, holding the interpreter's lock, for a thread
            # of gloo that waits for that lock (PyTorch 2.10).
            state.unwrap()


@contextmanager
def _naming_rank(team: Processes) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if team.world_size == 1:
            raise
        raise UserError(f'rank {team.rank}: {error}') from error
