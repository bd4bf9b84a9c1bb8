"""What the features of a student were before it has learned, and after each stage: entries of result.json."""

import copy
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torch import Tensor
from tqdm import tqdm

from vit_efficient.fidelity import NOTHING
from vit_efficient.healing import SOLVED, converted_layers
from vit_efficient.least_squares import check_images, check_solvable, solve
from vit_efficient.train import sharding
from vit_efficient.train.evaluation import Evaluation, describe
from vit_efficient.train.hooks import TrainingHook, register_hook
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.files import writing

SWAPPED = 'swapped'
_DONE = {'align': 'aligned', 'recover': 'recovered', 'refine': 'refined'}


@register_hook('healing')
class Healing(TrainingHook):
    """Measures a student before its first update, and keeps what is measured where a stage ends."""

    def __init__(self, experiment):
        super().__init__()
        self.task, self.config, self.images = experiment.task, experiment.config.heal, experiment.images_per_update
        self.trains = experiment.config.sched.epochs > 0
        model = experiment.config.model
        self.teacher = self.config.teacher or f'{model.name} of {model.init_from or "its pretrained weights"}'
        self.final: dict[str, Any] = {}
        if self.config.solve:
            check_images(self.config.solve, len(experiment.feed.train_samples))
            check_solvable(experiment.model.backbone, self.task.teacher.model)

    @classmethod
    def of(cls, experiment, options):
        return cls(experiment) if experiment.config.task == 'features' else None

    def begin_stage(self, trainer):
        digest = self.task.teacher.digest
        if self.memory.setdefault('teacher_digest', digest) != digest:
            raise UserError(
                f'heal.teacher: {self.teacher} has other weights, or attentions, than when the run began; put back '
                'what they were, or start another run with output=…'
            )
        lines = self.memory.setdefault('stages', [])
        if trainer.state.progress.updates:
            return
        # Each step is noted as soon as it is done: who is stopped goes on with the next one.
        if not lines:
            lines.append(self._measured(SWAPPED, trainer))
        if self.config.solve and len(lines) == 1:
            if 'solved' not in self.memory:
                self._solve(trainer)
                trainer.save()
            if self.trains:  # else it is what the run ends with
                line = self._measured(SOLVED, trainer)
                self._save_solved(trainer)
                lines.append(line)  # once it is saved: who is stopped before saves it again
                trainer.save()

    def _measured(self, name: str, trainer) -> dict[str, Any]:
        evaluation = trainer.measure(trainer.state.evaluated)
        trainer.log.say(f'{name}: {describe(evaluation.accuracies)}')
        return self._line(name, trainer, evaluation)

    def _solve(self, trainer) -> None:
        """In all processes alike, on a copy, so that a stop changes nothing."""
        state, start, count, photographs = trainer.state, time.perf_counter(), self.config.solve, []
        trainer.log.say(f'least squares over {count} images')
        student = copy.deepcopy(state.whole(state.model, everywhere=True))
        images = self._images(trainer, count, photographs)
        disable = None if trainer.experiment.team.is_first else True
        with tqdm(desc='least squares', total=len(student.backbone.blocks), unit=' blocks', disable=disable) as bar:

            def after_block() -> None:
                bar.update()
                trainer.stop.check()

            solved = solve(
                student.backbone, self.task.teacher.model, images, self.config.ridge, after_block, photographs
            )
        with trainer.stop.held():
            for model in (state.model, state.average.module) if state.average else (state.model,):
                sharding.load_model_state(model, student.state_dict())
            state.progress.train_seconds += time.perf_counter() - start
            self.memory['solved'], self.memory['images'] = [each._asdict() for each in solved], count

    def _save_solved(self, trainer) -> None:
        """For who finds that training has made it worse."""
        state, experiment = trainer.state, trainer.experiment
        model = state.whole(state.evaluated)
        if experiment.team.is_first:
            with writing(trainer.folder.path / SOLVED, '; resume=auto saves it, and goes on with the first update'):
                trainer.folder.save_model(experiment.task.product(model), experiment, SOLVED)

    def _images(self, trainer, count: int, photographs: list[int]) -> Iterator[Tensor]:
        """Of the training set, evenly spread, and drawn as training would draw them, at data.img_size; more than there
        are, drawn again. The numbers of their photographs are added to `photographs`."""
        samples, skipped = trainer.experiment.feed.samples_of_full_size(trainer.state.model), {}
        for epoch in itertools.count():
            for image, *_, photograph in samples.readable(len(samples) if epoch else count, epoch, skipped):
                photographs.append(photograph)
                yield image
                if len(photographs) == count:
                    trainer.log.name_skipped('training', skipped)
                    trainer.state.progress.skipped.update(skipped)
                    return

    def end_stage(self, trainer, following, evaluation):
        self.memory['stages'] = [*self._before(trainer), self._of_stage(trainer, evaluation)]

    def end(self, trainer, model, evaluation):
        self.final = self._of_stage(trainer, evaluation)
        if not self.trains:
            trainer.log.say(f'{SOLVED}: {describe(evaluation.accuracies)}')
        self.memory['stages'] = self._before(trainer)
        self._tell_if_worse(trainer)
        if self.task.teacher.current_digest() != self.task.teacher.digest:
            raise RuntimeError('the teacher has changed')
        return model, evaluation

    def _tell_if_worse(self, trainer) -> None:
        """Tells of what was nearer to the teacher before the end, with as many layers converted."""
        found = self.final['centred_cosine']
        alike = [line for line in self.memory['stages'] if line.get('converted') == self.final['converted']]
        best = max(alike, key=lambda line: line['centred_cosine'], default=self.final)
        if best['centred_cosine'] - NOTHING > found or math.isnan(found):
            if best['features'] == SOLVED:
                way_out = f'it is in {trainer.folder.path / SOLVED}'
            elif self.trains:
                way_out = 'a lower optim.lr or fewer epochs may help'
            else:
                way_out = 'more images (heal.solve) or a larger heal.ridge may help'
            trainer.log.say(
                f'{best["features"]} after {best["images"]:,} images was nearer to the teacher than '
                f'{self.final["features"]} after {self.final["images"]:,}: centred cosine '
                f'{best["centred_cosine"]:.4f}, now {found:.4f}; {way_out}'
            )

    def about_model(self):
        losses = {key: value for key, value in asdict(self.config).items() if key != 'teacher'}
        return {'healed': {'teacher': self.teacher, 'teacher_digest': self.task.teacher.digest, 'losses': losses}}

    def result(self):
        return {
            **self.about_model()['healed'],
            'healing': [*self.memory['stages'], self.final],
            **({'solved': self.memory['solved']} if 'solved' in self.memory else {}),
        }

    def _before(self, trainer) -> list[dict[str, Any]]:
        """Lines of what is done before the stage that ends: a run that went on may have come to its end before."""
        return self.memory['stages'][: trainer.state.stage + 1 + bool(self.config.solve)]

    def _of_stage(self, trainer, evaluation: Evaluation) -> dict[str, Any]:
        return self._line(_DONE[trainer.state.model.kind] if self.trains else SOLVED, trainer, evaluation)

    def _line(self, name: str, trainer, evaluation: Evaluation) -> dict[str, Any]:
        progress = trainer.state.progress
        return {
            'features': name,
            'images': progress.updates * self.images + self.memory.get('images', 0),
            'hours': progress.train_seconds / 3600,
            'converted': converted_layers(trainer.state.model.backbone, self.task.teacher.model),
            'loss': evaluation.loss,
            **evaluation.accuracies,
            'after_blocks': evaluation.after_blocks,
        }
