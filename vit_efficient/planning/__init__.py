"""Where in a model a budget is best spent: `plan(model, images, budget=0.4)`.

Layers differ much in what a cheaper attention costs there. Each is measured in each layer alone, without training; what
they cost together is taken to be the sum, and the least sum within the budget is found exactly. Since sums can be
wrong, the least sums of several losses, their neighbours, and one attention in all layers are measured with all layers
at once.
"""

import os
from collections.abc import Sequence

from torch import Tensor, nn

from vit_efficient.models.blocks import LayerSpec
from vit_efficient.models.plans import Plan
from vit_efficient.planning.planner import LOSSES, OPTIONS, UNITS, Loss, Planner

__all__ = ['LOSSES', 'OPTIONS', 'UNITS', 'Plan', 'Planner', 'plan']


def plan(
    model: nn.Module,
    images: Sequence[Tensor],
    budget: float,
    options: Sequence[LayerSpec] | None = None,
    *,
    unit: str = 'gmacs',
    loss: Loss = 'centred',
    refine: int = 8,
    measured: str | os.PathLike | None = None,
    progress: bool = True,
) -> Plan:
    """The attention of each layer with which a model changes least within a budget. Nothing is trained.

        plan = vit_efficient.plan(model, images, budget=0.4)
        vit_efficient.convert(model, plan)

    Args:
        model: As `convert` takes it, on any device. It stays as it is.
        images: (C, H, W) each, all of one size, preprocessed for the model. A few are enough.
        budget: What the model may cost, as a share of what it costs as it is, 0 < budget ≤ 1.
        options: Attentions that a layer may have, each a name or (name, options); beside them it may always stay as it
            is. By default `planning.OPTIONS`, without those that the model refuses. Of what begins at random, such as
            trees, one draw is measured.
        unit: Of the cost: 'gmacs', the multiply-accumulates of the whole model, embedding, MLPs and head included;
            'ms', the measured time of the same for one image; or 'keys', the sum over layers of the keys of a query.
        loss: How far the features after the last block and the final norm are from what they were, a mean over images:
            'centred', 'patch' or 'prefix', 1 less the cosine of that name in `vit_efficient.fidelity`; 'error', the
            squared error of patch tokens over their variance; or a function (reference, tokens) → number, of tokens
            (N, C), prefix tokens first.
        refine: How many plans that differ in one or two layers from the best so far are tried at most.
        measured: A JSON file that keeps what has been measured; stopped at any moment, the same call goes on from
            there. It knows a function by its name alone: another file is for one that has changed.
        progress: Whether bars are shown, in a terminal.

    Returns:
        The plan of least measured loss. No option alone, in all layers, has less within the budget.

    Raises:
        UserError: If an argument is out of range, the model refuses the images or an option that is asked for, the
            cheapest plan is above the budget, or the file is of another model, other images or another loss.
    """
    planner = Planner(model, images, options, unit, loss, measured, progress)
    return planner.plan(budget, refine)
