"""Truncations whose size a run learns: their price in the loss, and what it costs to make them hard."""

import copy
from collections.abc import Sequence

from torch import nn

from vit_efficient.models.truncation import copy_sizes, count_windows, freeze_truncation, has_windows, soft_cost
from vit_efficient.train.config import TruncationConfig
from vit_efficient.train.evaluation import Evaluation, describe
from vit_efficient.train.hooks import TrainingHook, register_hook
from vit_efficient.train.stages import Stage, model_at_stages
from vit_efficient.utils.errors import UserError


@register_hook('truncation')
class LearnedTruncation(TrainingHook):
    """The `truncation` of a recipe. Its memory, once sizes are frozen, is what result.json has under that name.

    The feed gives the images, of which a truncated patch embedding takes fewer coefficients.
    """

    def __init__(self, config: TruncationConfig, feed) -> None:
        super().__init__()
        self.config, self.feed = config, feed

    @classmethod
    def of(cls, experiment, options):
        config, model, size = experiment.config, experiment.model, experiment.preprocessing.input_size[1:]
        if not learns_truncation(model, experiment.stages):
            if config.truncation.penalty:
                raise UserError(
                    f'truncation.penalty={config.truncation.penalty:g}: the model learns no truncation; set '
                    'model.args.patch_window=true (with patch_embed=dct) or attention_kwargs.learned=true (attention '
                    'dct)'
                )
            return None
        if experiment.sharded:
            raise UserError('parallel must be ddp for a model that learns truncations, got fsdp')
        built = model.patch_embed.img_size
        if config.data.schedule or built is None or tuple(built) != tuple(size):
            raise UserError(
                'a model that learns truncations is trained at the size it is built for: model.args.img_size makes '
                f'it {built}, data.img_size {size}; set both to one, and no data.schedule'
            )
        return cls(config.truncation, experiment.feed)

    def before_stage(self, stage, model):
        if stage.config.freeze:
            if 'kept' not in self.memory:
                self.memory['cost'] = soft_cost(model, hard=True).item()
            self.memory['kept'] = freeze_truncation(model, self.memory.get('kept'))
            self.feed.follow(model)

    def penalty(self, state, images, logits, loss):
        if not self.config.penalty or not has_windows(state.model):
            return loss
        excess = (soft_cost(state.model) - self.config.budget).clamp(min=0)
        return loss + self.config.penalty * excess

    def after_step(self, state):
        if state.average and has_windows(state.model):
            copy_sizes(state.model, state.average.module)

    def values(self, state):
        return {'truncation_cost': soft_cost(state.model).item()} if has_windows(state.model) else {}

    def end_stage(self, trainer, following, evaluation):
        if following.config.freeze:  # the weights themselves, not their average
            learned = trainer.measure(trainer.state.model) if trainer.state.average else evaluation
            self.memory['learned'] = learned.accuracies

    def begin_stage(self, trainer):
        """Measures what it costs that sizes have been frozen, before the stage trains on."""
        if 'kept' in self.memory and 'frozen' not in self.memory:
            progress = trainer.state.progress
            self._log(trainer, self.memory, trainer.measure(trainer.state.model), progress.epoch - 1)

    def end(self, trainer, model, evaluation):
        """Freezes what is learned to the end of the run, and measures what that costs."""
        if not has_windows(model):
            return model, evaluation
        frozen = copy.deepcopy(model)
        memory = {'learned': evaluation.accuracies, 'cost': soft_cost(frozen, hard=True).item()}
        memory['kept'] = freeze_truncation(frozen)
        self.feed.follow(frozen)
        evaluation = trainer.measure(frozen)
        self._log(trainer, memory, evaluation, trainer.state.progress.epoch)
        self.memory = memory
        return frozen, evaluation

    def _log(self, trainer, memory, evaluation: Evaluation, epoch: int) -> None:
        with trainer.stop.held():
            memory['frozen'] = evaluation.accuracies
            trainer.log.write('frozen', epoch, trainer.state.progress.updates, evaluation.accuracies)
        trainer.log.say(
            f'truncations frozen: {describe(memory["learned"])} before, {describe(evaluation.accuracies)}; '
            f'{memory["cost"]:.3f} of the multiply-accumulates, budget {self.config.budget:g}'
        )

    def result(self):
        return {'truncation': self.memory} if self.memory else {}


def learns_truncation(model: nn.Module, stages: Sequence[Stage]) -> bool:
    """Whether a stage learns a truncation; tried on a copy of the model that has no data.

    Raises:
        UserError: Naming the first stage that has none to freeze, or that would lose what an earlier one has learned.
    """
    learns, frozen, before = has_windows(model), False, count_windows(model)
    for number, (stage, staged) in enumerate(model_at_stages(model, stages)):
        count = count_windows(staged)
        learns, frozen = learns or count > 0, frozen or stage.config.freeze
        if frozen and count:
            raise UserError(f'stages[{number}] learns truncations again, after a stage that has frozen some')
        if count < before and not stage.config.freeze:
            raise UserError(
                f'stages[{number}] takes away truncations that are learned; let a stage with freeze=true go before'
            )
        before = count
    return learns
