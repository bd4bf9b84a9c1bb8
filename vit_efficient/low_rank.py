"""Learning a change of low rank to the weight of each linear layer, beside it: it starts at 0, and is added to the
weight when it has learned.

Dimensions: F inputs of a linear layer, O outputs.
"""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.errors import UserError

ORIGINAL = 'parametrizations.weight.original'  # a weight beside which a change is learned


class LowRank(nn.Module):
    """What is added to a weight (O, F): up · down, of a rank; it starts at 0.

    Source: Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685, with their scale 1.
    """

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add_low_rank(model: nn.Module, rank: int) -> None:
    """Puts a `LowRank` on the weight of each linear layer in the blocks of a model, in place; of one that is narrower
    than the rank, such as those of a relative bias, its whole width learns.

    Raises:
        UserError: If the rank is not at least 1, or no layer is wide enough for it.
    """
    as_integer('heal.lora', rank)
    layers = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    if rank > (widest := max(min(layer.weight.shape) for layer in layers)):
        raise UserError(f'heal.lora={rank} is above the width of all layers, {widest} at most')
    for layer in layers:
        parametrize.register_parametrization(layer, 'weight', LowRank(layer.weight, min(rank, *layer.weight.shape)))


def merge_low_rank(model: nn.Module) -> None:
    """Adds what each weight has beside it to the weight, in place."""
    for module in model.modules():
        if parametrize.is_parametrized(module, 'weight'):
            # PyTorch's way takes the property from the class, which a copy shares with what goes on learning.
            weight, (_, module.__class__, *_) = module.weight.detach(), type(module).__mro__
            del module.parametrizations
            module.weight = nn.Parameter(weight)
