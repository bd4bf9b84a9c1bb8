"""How full the leaves of Treeformer's trees are, logged at each evaluation."""

import torch

from vit_efficient.attention.treeformer.leaves import has_trees, leaf_occupancy
from vit_efficient.train.hooks import TrainingHook, register_hook
from vit_efficient.utils.precision import autocast

IMAGES = 16  # of the validation set


@register_hook('leaves')
class LeafOccupancy(TrainingHook):
    """Logs the occupancy of leaves, on a few validation images from all over the set."""

    @classmethod
    def of(cls, experiment, options):
        return cls()

    def measure(self, trainer):
        state, experiment = trainer.state, trainer.experiment
        # What a sharded model computes takes all processes.
        if not has_trees(state.evaluated) or not (experiment.team.is_first or experiment.sharded):
            return {}
        if experiment.task.of_pixels:  # whole images, of any sizes, are no batch
            return {}
        images = experiment.feed.val_samples.spread(IMAGES).to(experiment.team.device)
        # Of compiled blocks it would see no inputs.
        eager = torch.compiler.set_stance('force_eager')
        with eager, autocast(experiment.team.device, experiment.config.amp):
            model = state.evaluated
            occupancies = leaf_occupancy(model if hasattr(model, 'blocks') else model.backbone, images)
        return {
            f'block{layer}/{name}': value
            for layer, occupancy in occupancies.items()
            for name, value in vars(occupancy).items()
        }
