"""Stages that prune: which weights are left, and that the others stay 0.

Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021, arXiv 2010.07611. They prune
20 % of what is left and train on, up to 20 times.
"""

import copy
import logging
from contextlib import suppress

from torch import nn
from torch.distributed.tensor import DTensor

from vit_efficient.prune import Masks, by_role, densities, prune, sparsity
from vit_efficient.train import sharding
from vit_efficient.train.hooks import TrainingHook, register_hook
from vit_efficient.train.stages import Stage
from vit_efficient.utils.errors import UserError

logger = logging.getLogger(__name__)

TOLD = 0.01  # of the weights that a run starts from, those that are 0


@register_hook('pruning')
class Pruning(TrainingHook):
    """The `prune` of stages. Its tensors are the masks, its memory the densities after each stage that prunes."""

    def __init__(self, stages: list[Stage]):
        super().__init__()
        self.stages = stages
        self.masks = Masks({})  # what this process has of them, on its device

    @classmethod
    def of(cls, experiment, options):
        config, model, stages = experiment.config, experiment.model, experiment.stages
        if config.model.init_from and (not stages or stages[0].config.prune is None):
            with suppress(UserError):
                if (zeros := sparsity(model)) > TOLD:
                    how = '; with prune=0, or more, in the first of the stages they stay 0'
                    logger.info(
                        'model.init_from=%s: %.0f %% of the weights there are 0, and learn again%s',
                        *(config.model.init_from, 100 * zeros, '' if config.task == 'features' else how),
                    )
        if all(stage.config.prune is None for stage in stages):
            return None
        _try(model, stages)
        return cls(stages)

    def before_stage(self, stage, model):
        number, before = self.stages.index(stage), self.memory.get('stages', [])
        if stage.config.prune is None or number in (line['stage'] for line in before):
            return
        masks = Masks(self.tensors) if self.tensors else None
        config = stage.config
        masks = prune(model, config.prune, config.prune_method, skip=config.prune_skip, masks=masks)
        self.tensors, found = masks.state_dict(), densities(model, masks=masks)
        line = {
            'stage': number,
            'method': config.prune_method,
            'roles': {each.name: each.density for each in by_role(found)},
            'layers': {each.name: each.density for each in found},
        }
        self.memory['stages'] = [*before, line]

    def begin_stage(self, trainer):
        kept = {}
        for name, mask in self.tensors.items():
            weight = trainer.state.model.get_submodule(name).weight
            sharded = isinstance(weight, DTensor)
            kept[name] = sharding.share_as(weight, mask).to_local() if sharded else mask.to(weight.device)
        self.masks = Masks(kept)

    def before_step(self, state):
        self.masks.apply_(state.model, gradients=True)

    def after_step(self, state):
        """An optimiser that mixes the entries of a gradient, such as Muon, moves pruned weights too."""
        for model in (state.model, state.average.module) if state.average else (state.model,):
            self.masks.apply_(model)

    def measure(self, trainer):
        return self.memory['stages'][-1]['roles'] if 'stages' in self.memory else {}

    def result(self):
        return {'pruning': self.memory.get('stages', [])}


def _try(model: nn.Module, stages: list[Stage]) -> None:
    """Counts on a copy what stages leave; which weights that are, does not matter.

    Raises:
        UserError: Naming the first stage that cannot prune.
    """
    model = copy.deepcopy(model)
    for number, stage in enumerate(stages):
        if stage.config.prune is not None:
            config = stage.config
            method = config.prune_method if config.prune_method == 'uniform+' else 'uniform'
            try:
                prune(model, config.prune, method, skip=config.prune_skip)
            except UserError as error:
                raise UserError(f'stages[{number}].prune: {error}') from error
