"""What the features of a student were before it has learned, and after each stage: entries of result.json."""

from dataclasses import asdict
from typing import Any

from vit_efficient.train.evaluation import Evaluation, describe
from vit_efficient.train.hooks import TrainingHook, register_hook

SWAPPED = 'swapped'
_DONE = {'align': 'aligned', 'recover': 'recovered', 'refine': 'refined'}


@register_hook('healing')
class Healing(TrainingHook):
    """Measures a student before its first update, and keeps what is measured where a stage ends."""

    def __init__(self, experiment):
        super().__init__()
        self.task, self.config, self.images = experiment.task, experiment.config.heal, experiment.images_per_update
        self.final: dict[str, Any] = {}

    @classmethod
    def of(cls, experiment, options):
        return cls(experiment) if experiment.config.task == 'features' else None

    def begin_stage(self, trainer):
        if not trainer.state.progress.updates:
            evaluation = trainer.measure(trainer.state.evaluated)
            self.memory['stages'] = [self._line(SWAPPED, trainer, evaluation)]
            trainer.log.say(f'{SWAPPED}: {describe(evaluation.accuracies)}')

    def end_stage(self, trainer, following, evaluation):
        self.memory['stages'] = [*self._before(trainer), self._of_stage(trainer, evaluation)]

    def end(self, trainer, model, evaluation):
        self.final = self._of_stage(trainer, evaluation)
        self.memory['stages'] = self._before(trainer)
        if self.task.teacher.current_digest() != self.task.teacher.digest:
            raise RuntimeError('the teacher has changed')
        return model, evaluation

    def result(self):
        weights = {key: value for key, value in asdict(self.config).items() if key != 'teacher'}
        return {
            'teacher': self.config.teacher or 'the model as it was',
            'teacher_digest': self.task.teacher.digest,
            'losses': weights,
            'healing': [*self.memory['stages'], self.final],
        }

    def _before(self, trainer) -> list[dict[str, Any]]:
        """Lines of what is done before the stage that ends: a run that went on may have come to its end before."""
        return self.memory['stages'][: trainer.state.stage + 1]

    def _of_stage(self, trainer, evaluation: Evaluation) -> dict[str, Any]:
        return self._line(_DONE[trainer.state.model.kind], trainer, evaluation)

    def _line(self, name: str, trainer, evaluation: Evaluation) -> dict[str, Any]:
        progress = trainer.state.progress
        return {
            'features': name,
            'images': progress.updates * self.images,
            'hours': progress.train_seconds / 3600,
            'loss': evaluation.loss,
            **evaluation.accuracies,
            'after_blocks': evaluation.after_blocks,
        }
