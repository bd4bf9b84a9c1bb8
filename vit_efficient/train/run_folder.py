"""The folder of a run: every file name in it, and how each is written and read."""

import csv
import io
import json
import logging
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from vit_efficient.data.config import IMAGES_PER_UPDATE
from vit_efficient.healing import SOLVED
from vit_efficient.models import save_model
from vit_efficient.train.checkpoint import CHECKPOINT, check_room, list_checkpoints, load_newest, save_checkpoint
from vit_efficient.train.config import Config, StageConfig
from vit_efficient.train.distributed import Processes
from vit_efficient.train.evaluation import Evaluation
from vit_efficient.train.experiment import Experiment, identity_of_data, identity_of_recipe
from vit_efficient.train.interrupts import Interrupts
from vit_efficient.train.log import METRICS, TENSORBOARD, MetricsLog, SilentLog, read_metrics
from vit_efficient.train.recipe import load_recipe, to_yaml
from vit_efficient.train.same_attention import check_same_attention, keys_of
from vit_efficient.train.state import TrainState
from vit_efficient.train.weights import Source
from vit_efficient.utils.errors import UserError, is_bug_of_plugin, one_line
from vit_efficient.utils.files import lock, read_text, remove_unfinished, write_json, write_text, writing
from vit_efficient.utils.keys import flatten

RECIPE = 'recipe.yaml'
ENVIRONMENT = 'environment.json'
RESULT = 'result.json'
PREDICTIONS = 'predictions.csv'
AREAS = 'class_areas.csv'  # of masks: for each image, the pixels of each class in truth, as predicted, and in both
_AREAS = ('labelled', 'predicted', 'both')
SKIPPED = 'skipped.txt'
MODEL = 'model'  # a model folder, as are those beside it
BEST = 'best'
MODELS = (MODEL, BEST, SOLVED)
LOCK = '.lock'

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Earlier:
    """What an earlier process has left of a run."""

    path: Path  # of the newest checkpoint that can be read
    state: dict[str, Any]  # its content
    result: dict[str, Any] | None  # of a run that is done

    def check_data(self, train_set: Dataset) -> None:
        """Raises UserError if that is another training set than the run's."""
        saved, ways = self.state['identity'], {}
        if saved.get('training files', '') is None:
            ways['training files'] = 'an older version, which may have had them in another order, did not tell them'
        _check_equal(self.path, saved, identity_of_data(train_set), ways)


class RunFolder:
    """A run on disk. Reading it needs no more than its path; it is written by one run at a time.

    Args:
        path: The folder, which need not exist.
        team: The processes of the run, of which the first one writes; by default this one alone.
    """

    def __init__(self, path: str | Path, team: Processes | None = None):
        self.path = Path(path)
        self.team = team or Processes()

    @classmethod
    def of_model(cls, path: str | Path) -> 'RunFolder | None':
        """The run that a path belongs to: its folder, or that of one of its models; None without a run."""
        folder = Path(path).absolute()
        if folder.name in MODELS and not (folder / RECIPE).exists():
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

    @property
    def environment(self) -> dict[str, Any]:
        """What environment.json holds; nothing where it cannot be read."""
        try:
            return dict(json.loads((self.path / ENVIRONMENT).read_text(encoding='utf-8')))
        except (OSError, TypeError, ValueError):
            return {}

    def predictions(self) -> list[dict[str, str]]:
        """A row for each image of the validation set, in its order."""
        return list(csv.DictReader(io.StringIO(read_text(self.path / PREDICTIONS), newline='')))

    @property
    def has_areas(self) -> bool:
        """Whether it has been evaluated on masks."""
        return (self.path / AREAS).exists()

    def areas(self, classes: int) -> np.ndarray:
        """`Evaluation.areas` of so many classes, in the order of `predictions`."""
        order = {row['index']: place for place, row in enumerate(self.predictions())}
        found = np.zeros((len(order), 3, classes), np.int64)
        for row in csv.DictReader(io.StringIO(read_text(self.path / AREAS))):
            found[order[row['index']], :, int(row['class'])] = [int(row[name]) for name in _AREAS]
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, as `train.log.read_metrics` reads them."""
        return read_metrics(self.path)

    def earlier(self, config: Config) -> Earlier | None:
        """What an earlier process has left of this run. Nothing is built, or opened but the folder, to tell.

        Raises:
            UserError: If the folder holds a run that `resume` does not allow to touch, or one of another recipe.
        """
        checkpoints, resume = list_checkpoints(self.path), config.resume
        if len(set(self.team.gather((bool(checkpoints), self.is_finished)))) > 1:
            reason = 'some processes find a run there and some do not; all nodes must have one file system'
            raise UserError(f'output={self.path}: {reason}')
        metrics = self.path / METRICS
        begun = checkpoints or self.is_finished or (metrics.exists() and metrics.stat().st_size)
        if resume == 'never' and begun:
            raise UserError(
                f'{self.path} holds a run already; resume=auto goes on with it, resume=restart replaces it, output=… '
                'starts another'
            )
        if resume == 'restart' or not (checkpoints or self.is_finished):
            return None
        if not checkpoints:
            raise UserError(
                f'{self.path} holds a result and no checkpoint; resume=restart replaces it, output=… starts another'
            )
        path, state = _load_newest(self.path, self.team)
        with reading(path):
            saved = _identity(state['identity'])
            longer = saved['sched.epochs'] < config.sched.epochs
        ours = identity_of_recipe(config, self.team)
        if longer:
            del ours['sched.epochs']
            if saved['stages']:  # their epochs add up to those of the run
                del ours['stages']
        steps, rest = divmod(saved[IMAGES_PER_UPDATE], config.data.batch_size * self.team.world_size)
        ways = {} if rest else {IMAGES_PER_UPDATE: f'set grad_accum={steps}'}
        _check_equal(path, saved, ours, ways)
        # Without a schedule and stages, the updates so far are the same.
        if longer and (config.sched.sched != 'none' or config.stages or saved['stages']):
            raise UserError(self._how_to_lengthen(path, saved, config))
        return Earlier(path, state, self.result if self.is_finished and not longer else None)

    def _how_to_lengthen(self, checkpoint: Path, saved: dict[str, Any], config: Config) -> str:
        epochs, longer, staged = saved['sched.epochs'], config.sched.epochs, bool(config.stages or saved['stages'])
        reason = (
            f'{checkpoint} was written with sched.epochs={epochs}, this run has sched.epochs={longer}: its '
            'learning rates would have been others from the start (but for sched.sched=none, without stages); set '
            f'{"both sched.epochs and stages" if staged else "it"} back'
        )
        if not self.is_finished:
            return f'{reason}, and let the run finish; then this command says how to train on from its weights'
        keys = self._to_train_on(config, longer - epochs, staged)
        command = shlex.join(['vit-efficient', 'train', str(self.path / RECIPE), *keys])  # with all overrides
        return f'{reason}, or train on from its weights, with a schedule of its own for the epochs added: {command}'

    def _to_train_on(self, config: Config, epochs: int, staged: bool) -> list[str]:
        """The keys of a run that trains the model of this one, which is finished, as it has become."""
        keys = [f'model.init_from={self.path}', f'output={self.path}-longer', f'sched.epochs={epochs}']
        if config.sched.warmup_epochs > epochs:
            keys.append('sched.warmup_epochs=0')
        if config.data.schedule:
            keys.append(f'data.schedule=[{{epoch: 0, img_size: {config.data.schedule[-1].img_size}}}]')
        if config.truncation.penalty:  # what was learned has become hard at the end
            keys += ['truncation.penalty=0', 'truncation.budget=0']
        if config.task == 'features':
            teacher = config.heal.teacher or config.model.init_from
            keys += [f'heal.teacher={teacher}'] if teacher else []
            keys.append('heal.solve=0')  # it is done
        source, changed = Source.open(str(self.path)), staged
        if staged:
            pruned = any(stage.prune is not None for stage in config.stages)
            keys.append(f'stages=[{{epochs: {epochs}, prune: 0}}]' if pruned else 'stages=[]')
        try:
            check_same_attention(source.path, source.model, config.model, epochs)
        except UserError:
            changed = True
        return keys + keys_of(source.model, config.model) if changed else keys

    @contextmanager
    def open(self, experiment: Experiment, state: TrainState, stop: Interrupts) -> Iterator[SilentLog]:
        """Makes the folder ready, the first thing that is written, and gives the log of the run.

        Of a run that ends without an update, nothing is left but what was there before.

        Raises:
            UserError: If another process trains there, there is too little room, or nothing can be written.
        """
        if not self.team.is_first:
            yield SilentLog()
            return
        made, taken = not self.path.exists(), None
        try:
            with stop.held(and_after=True):
                try:
                    self.path.mkdir(parents=True, exist_ok=True)  # unless it is a file
                    taken = lock(self.path / LOCK)
                    if not taken:
                        made = False
                        reason = 'another process trains there; wait for its end, or set another output'
                        raise UserError(f'output={self.path}: {reason}')
                    _begin(self.path, experiment, state)
                except OSError as error:
                    raise UserError(f'output={self.path}: cannot write there: {error.strerror}') from error
                with writing(self.path):
                    log = MetricsLog(self.path, state.progress.epoch, state.progress.updates)
            with closing(log):
                yield log
        except BaseException:
            if made and not state.progress.updates and not list_checkpoints(self.path):
                shutil.rmtree(self.path, ignore_errors=True)
            raise
        finally:
            if taken:
                taken.close()

    def save_checkpoint(self, state: dict[str, Any], keep: int) -> None:
        save_checkpoint(self.path / CHECKPOINT, state, keep)

    def save_model(self, model: nn.Module, experiment: Experiment, name: str = MODEL) -> None:
        """Saves a model with its preprocessing and the names of its classes."""
        own, classes = {'num_classes': model.num_classes}, experiment.classes
        model.pretrained_cfg = {**model.pretrained_cfg, **experiment.preprocessing.as_dict(), **own}
        about = {key: value for hook in experiment.hooks for key, value in hook.about_model().items()}
        save_model(model, self.path / name, classes if classes and len(classes) == model.num_classes else None, **about)

    def write_result(
        self,
        result: dict[str, Any],
        evaluation: Evaluation,
        filename: Callable[[int], str],
        skipped: Sequence[str],
        classes: Sequence[str] | None,
    ) -> dict[str, Any]:
        """Writes predictions, what was skipped and, last, the result with the environment, which is returned.

        The result tells that the run is complete. `filename` names images of the validation set.
        """
        write_text(self.path / PREDICTIONS, predictions_table(evaluation, filename, classes))
        if evaluation.areas is not None:
            write_text(self.path / AREAS, areas_table(evaluation))
        reasons = [('training', each) for each in skipped] + [
            ('validation', each) for each in evaluation.skipped.values()
        ]
        if reasons:
            lines = (f'{split}: {" ".join(reason.splitlines())}' for split, reason in reasons)
            write_text(self.path / SKIPPED, ''.join(f'{line}\n' for line in lines))
        result = {**result, 'environment': self.environment}
        write_json(self.path / RESULT, result)
        return result


def predictions_table(
    evaluation: Evaluation, filename: Callable[[int], str], classes: Sequence[str] | None = None
) -> str:
    """A line of CSV for each image; beside each class its name, where they have names."""
    named = ('label', 'predicted') if classes else ()
    rows = []
    for index, *values in evaluation.predictions:
        row: dict[str, Any] = {'index': index, 'file': filename(index)}
        for column, value in zip(evaluation.columns[1:], values, strict=True):
            row[column] = round(value, 6) if column.endswith('probability') else value
            if column in named:
                row[f'{column}_name'] = classes[value] if value < len(classes) else ''
        rows.append(row)
    lines: list[str] = []
    # What ends a line is quoted: with this end, both characters.
    writer = csv.DictWriter(SimpleNamespace(write=lines.append), list(rows[0]), lineterminator='\r\n')
    writer.writeheader()
    writer.writerows(rows)
    return ''.join(f'{line[:-2]}\n' for line in lines)


def areas_table(evaluation: Evaluation) -> str:
    """A line of CSV for each image and class that occurs in it, in truth or as predicted."""
    lines = [','.join(['index', 'class', *_AREAS])]
    for (index, *_), of_image in zip(evaluation.predictions, evaluation.areas, strict=True):
        for number in of_image.any(0).nonzero()[:, 0].tolist():
            lines.append(','.join(map(str, [index, number, *of_image[:, number].tolist()])))
    return ''.join(f'{line}\n' for line in lines)


def _load_newest(folder: Path, team: Processes) -> tuple[Path, dict[str, Any]]:
    path, state, unreadable = load_newest(folder)
    if len(set(team.gather(path.name))) > 1:
        raise UserError(f'output={folder}: {path.name} is the newest that this process can read')
    if unreadable and team.is_first:
        updates = state['progress']['updates']
        logger.warning('%s; going on from %s, update %d', '; '.join(unreadable), path, updates)
    return path, state


def _begin(folder: Path, experiment: Experiment, state: TrainState) -> None:
    """Checks the room, clears what is not to stay, and writes what the run is."""
    config = experiment.config
    check_room(folder, state.model, state.average is not None, config.checkpoint_keep, config.checkpoint_best)
    for name in ('', *MODELS):
        remove_unfinished(folder / name)
    if config.resume == 'restart':
        for path in list_checkpoints(folder):
            path.unlink()
        for name in (SKIPPED, METRICS, PREDICTIONS, AREAS):
            (folder / name).unlink(missing_ok=True)
        for name in (*MODELS, TENSORBOARD):
            shutil.rmtree(folder / name, ignore_errors=True)
    (folder / RESULT).unlink(missing_ok=True)  # of a run that goes on beyond its end
    write_text(folder / RECIPE, to_yaml(config))
    write_json(folder / ENVIRONMENT, experiment.environment())


def _check_equal(
    checkpoint: Path, saved: dict[str, Any], ours: dict[str, Any], ways: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raises UserError for the first of our values that is another one in a checkpoint; older ones do not tell all.

    `ways` are ways out, by key, other than to set it back.
    """
    for key, value in ours.items():
        value = json.loads(json.dumps(value))  # as the checkpoint has it
        theirs = saved.get(key, value)
        if theirs != value:
            raise UserError(
                f'{checkpoint} was written with {key}={theirs!r}, this run has {key}={value!r}; '
                f'{ways.get(key, "set it back")}, or start another run with output=… (resume=restart replaces this one)'
            )


def _identity(saved: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run's recipe, with what checkpoints of older versions do not say."""
    saved = {**flatten(Config()), **saved}
    saved.setdefault(IMAGES_PER_UPDATE, saved['data.batch_size'] * saved['grad_accum'] * saved.get('processes', 1))
    defaults = vars(StageConfig())
    saved['stages'] = [{**defaults, **stage} for stage in saved['stages']]
    return saved


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Names the file whose content does not fit; it may be anything."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_bug_of_plugin(error):
            raise
        reason = f'{type(error).__name__}: {one_line(error)}'
        raise UserError(f'{checkpoint}: not a state of this run ({reason})') from error
