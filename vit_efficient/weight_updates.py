"""What is learned of the weights of linear layers, beside them: of a low rank, or for whitened inputs. It starts at 0,
and is added to the weight when it has learned.

Dimensions: F inputs of a linear layer, O outputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.modes import evaluating

ORIGINAL = 'parametrizations.weight.original'  # a weight beside which something is learned
DAMPING = 0.1


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


class Whitened(nn.Module):
    """What is added to a weight (O, F): update · root; the update starts at 0.

    The root, (F, F), is the inverse square root of the second moments of the inputs of the layer, which are divided by
    their mean and damped. A few directions of the inputs are a hundred times as large as the mean, where a step that is
    small for the others overshoots; the update sees them all about equally large.

    Sources: Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015,
    arXiv 1503.05671, of whose two factors this is one; Benzing, "Gradient descent on neurons", ICML 2022, arXiv
    2201.12250. That any optimiser may learn the update, and the moments are taken once, is ours.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.update = nn.Parameter(torch.zeros_like(weight))
        self.register_buffer('root', torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.update @ self.root


def add_low_rank(model: nn.Module, rank: int) -> None:
    """Puts a `LowRank` on the weight of each linear layer in the blocks of a model, in place.

    Raises:
        UserError: If the rank is not at least 1, or a layer is not wide enough for it.
    """
    as_integer('heal.lora', rank)
    for name, layer in linear_layers(model):
        if rank > min(layer.weight.shape):
            raise UserError(f'heal.lora={rank} is above the width of {name}, {min(layer.weight.shape)}')
        parametrize.register_parametrization(layer, 'weight', LowRank(layer.weight, rank))


def add_whitened(model: nn.Module) -> None:
    """Puts a `Whitened` on the weight of each linear layer in the blocks of a model, in place, if that learns.

    Roots are the identity until `whiten` gives them theirs.
    """
    for _, layer in linear_layers(model):
        if layer.weight.requires_grad:
            parametrize.register_parametrization(layer, 'weight', Whitened(layer.weight))


@torch.no_grad()
def whiten(model: nn.Module, images: Sequence[Tensor], after_image: Callable[[], None] | None = None) -> None:
    """Gives each `Whitened` of a model, which `add_whitened` has put there, its root, for the inputs that its layers
    have of some images.

    Args:
        images: (channels, height, width) each, preprocessed, of sizes that the model takes.
        after_image: Called after each image.

    Raises:
        UserError: If there is no image, or the inputs of a layer are not finite.
    """
    if not images:
        raise UserError('heal.whiten: there is no image to take the inputs of layers from')
    whitened = {name: layer for name, layer in linear_layers(model) if _root_of(layer) is not None}
    moments = _moments(model, whitened, images, after_image)
    # Attentions with biases of their own take the weight of their layer without calling it.
    unseen = {name: model.get_submodule(name.rpartition('.')[0]) for name in whitened.keys() - moments.keys()}
    if unseen:
        moments |= _moments(model, unseen, images, after_image)
    for name, layer in whitened.items():
        root = _root_of(layer)
        if name in moments and len(moments[name]) == len(root):
            root.copy_(_inverse_root(moments[name], name, root))


def _root_of(layer: nn.Linear) -> Tensor | None:
    updates = layer.parametrizations.weight if parametrize.is_parametrized(layer, 'weight') else ()
    return next((each.root for each in updates if isinstance(each, Whitened)), None)


def _moments(
    model: nn.Module,
    watched: Mapping[str, nn.Module],
    images: Sequence[Tensor],
    after_image: Callable[[], None] | None,
) -> dict[str, Tensor]:
    """Of modules that are called, the sums (F, F) over tokens of products of their inputs."""
    weight, moments, handles = next(model.parameters()), {}, []
    for name, module in watched.items():

        def add(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            inputs = args[0].flatten(0, -2).double()
            moments[name] = moments.get(name, 0) + inputs.T @ inputs

        handles.append(module.register_forward_pre_hook(add))
    try:
        with evaluating(model):
            for image in images:
                model.forward_features(image[None].to(weight.device, weight.dtype))
                if after_image:
                    after_image()
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _inverse_root(moments: Tensor, name: str, root: Tensor) -> Tensor:
    size = moments.diagonal().mean()
    if not torch.isfinite(moments).all():
        raise UserError(f'heal.whiten: the inputs of {name} are not finite, of these images; set heal.whiten=0')
    if not size:  # nothing to tell large from small by
        return root
    values, vectors = torch.linalg.eigh(moments / size)
    return (vectors * (values.clamp(min=0) + DAMPING).rsqrt()) @ vectors.T


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers in the blocks of a model, with their names."""
    for name, module in model.blocks.named_modules():
        if isinstance(module, nn.Linear):
            yield f'blocks.{name}', module


def merge_updates(model: nn.Module) -> None:
    """Adds what each weight has beside it to the weight, in place."""
    for module in model.modules():
        if parametrize.is_parametrized(module, 'weight'):
            # PyTorch's way takes the property from the class, which a copy shares with what goes on learning.
            weight, (_, module.__class__, *_) = module.weight.detach(), type(module).__mro__
            del module.parametrizations
            module.weight = nn.Parameter(weight)
