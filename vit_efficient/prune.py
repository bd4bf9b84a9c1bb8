"""Which weights of a model are pruned, and which are left.

Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021, arXiv 2010.07611. Inside a
layer the smallest weights go first; the score of LAMP fixes how much each layer gives. Its rivals are here too: one
threshold for all layers (`global`), the same share of each (`uniform`; `uniform+` of Gale et al., 2019, arXiv
1902.09574), and shares by the shapes of layers (`erk`: Evci et al., ICML 2020, arXiv 1911.11134).

A weight that is 0 counts as pruned, so a pruned model is one of plain weights that goes on where it was; but a layer
that is all 0, as adapters and others begin, counts as one that has yet to learn. Zeros alone make nothing faster: dense
products take as long. `vit_efficient.sparse` has products that do not.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vit_efficient.flops.roles import role_of
from vit_efficient.sparse import SparseLinear
from vit_efficient.utils.checks import as_integer, is_real, nearest
from vit_efficient.utils.compat import own_parameters, unwrap
from vit_efficient.utils.errors import UserError

METHODS = ('lamp', 'global', 'uniform', 'uniform+', 'erk')
LAST_KEPT = 0.2  # of the last layer, by uniform+
HEADS = ('head', 'head_dist')  # what 'head' stands for

_FUSED = {'qkv': ('q', 'k', 'v'), 'kv': ('k', 'v')}  # layers that are several, with their rows one after the other
_ALONE = {**{part: part for part in 'qkv'}, **{f'{part}_proj': part for part in 'qkv'}, 'qkv': 'qkv', 'kv': 'kv'}
_OF_ATTENTION = 'attention projections'


@dataclass(frozen=True)
class Density:
    """How many weights of a layer are not 0: a count of weights, and not of multiply-accumulates saved."""

    name: str  # such as 'blocks.0.mlp.fc1'; of one of the layers that are fused in it, 'blocks.0.attn.qkv, q'
    role: str  # q, k, v, proj, mlp, patch embedding, head, rest, or another of `vit_efficient.flops.ROLES`
    left: int
    weights: int

    @property
    def density(self) -> float:
        return self.left / self.weights


class Masks:
    """Which weights are left, beside the model, whose parameters keep their names and are plain ones.

        masks = prune(model, 0.8)
        …
        optimizer.step()
        masks.apply_(model)

    `torch.nn.utils.prune` is not used: it renames `weight`, so that plain checkpoints do not load any more, and fused
    layers, sharding and copies of a model would have to know of it.

    Args:
        kept: By the name of a layer, for each of its weights whether it is left, in the shape of the weight; of a
            sharded one, of the part that the process has.
    """

    def __init__(self, kept: Mapping[str, Tensor]):
        self.kept = dict(kept)

    @torch.no_grad()
    def apply_(self, model: nn.Module, gradients: bool = False) -> None:
        """Sets the pruned weights of a model to 0, in place, after an update.

        Args:
            gradients: Set their gradients to 0 instead, before an update, so that no optimiser takes them into account.

        Raises:
            UserError: If the model has no such layer, or one of another shape; then all its weights are as they were.
        """
        for weight, kept in self.weights(model):
            tensor = weight.grad if gradients else weight
            if tensor is not None:
                _own_part(tensor).masked_fill_(~kept.to(tensor.device), 0)

    def weights(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """The weights of a model that have a mask, and the masks, with the errors of `apply_`."""
        *_, model = unwrap(model)
        return [(_weight_of(model, name, kept), kept) for name, kept in self.kept.items()]

    def state_dict(self) -> dict[str, Tensor]:
        """What `Masks` takes, on the CPU."""
        return {name: kept.cpu() for name, kept in self.kept.items()}


def _weight_of(model: nn.Module, name: str, kept: Tensor) -> Tensor:
    try:
        weight = model.get_submodule(name).weight
    except AttributeError as error:
        raise UserError(f'the model has no layer {name}, which was pruned; it was built otherwise') from error
    if (shape := _own_part(weight).shape) != kept.shape:
        raise UserError(f'{name}: its weight is {tuple(shape)}, its mask {tuple(kept.shape)}')
    return weight


def _own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, which may be sharded."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def lamp_scores(weight: Tensor, parts: int = 1) -> Tensor:
    """The score of each weight: its square over the sum of the squares of those that are at least as large.

    In float64 and summed from the largest, on the CPU: the largest weight has the score 1, exactly, so that no layer is
    emptied while another has two weights left. Weights of a layer that is all 0 have the score 0. Of equal weights the
    later one counts as the larger one.

    Args:
        weight: Of a layer, (rows, …).
        parts: How many layers of equally many rows are fused in it, such as 3 in `qkv`. They are scored apart; else the
            values' scale would decide for queries and keys.

    Returns:
        Scores of the shape of the weight, float64, from 0 to 1.

    Raises:
        UserError: If the parts do not divide the rows, or a weight is not finite.

    Source: eq. 4 of arXiv 2010.07611.
    """
    as_integer('parts', parts)
    if not weight.ndim or len(weight) % parts:
        raise UserError(f'parts must divide the rows of a weight of shape {tuple(weight.shape)}, got {parts=}')
    if not torch.isfinite(weight).all():
        raise UserError('weight: an entry is not finite')
    return torch.cat([_scores(part) for part in weight.detach().cpu().chunk(parts)])


def _scores(weight: Tensor) -> Tensor:
    weight = weight.double()
    if weight.numel():  # by a power of 2, which is exact: squares of float64 might be beyond it
        weight = weight * 2.0 ** -max(math.frexp(weight.abs().max().item())[1], -1000)
    squares, order = weight.flatten().square().sort(stable=True)
    at_least = squares.flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[order] = torch.where(at_least > 0, squares / at_least, 0)
    return scores.view(weight.shape)


@torch.no_grad()
def prune(
    model: nn.Module,
    amount: float,
    method: str = 'lamp',
    parts: bool = True,
    skip: Collection[str] = ('head',),
    masks: Masks | None = None,
) -> Masks:
    """Sets the weights of linear layers and convolutions that matter least to 0, in place; biases and norms stay.

    The number of those that are left is exact, among equal weights too. What is to stay 0 in training, the masks say.

    Args:
        model: Any, wrapped or not; its weights are whole.
        amount: The share, at least 0 and below 1, of the weights that are left: `prune(model, 0.2)` twice leaves 64 %.
        method: 'lamp', 'global', 'uniform', 'uniform+' or 'erk'. 'uniform+' keeps the first layer, and a fifth of the
            last one.
        parts: Whether a fused `qkv` is three layers.
        skip: Names of modules that stay as they are, with all that is in them; 'head' is also the second head that
            distilled models have.
        masks: What is left; by default all that is not 0, and layers that are all 0 stay as they are.

    Returns:
        The masks of the layers that were pruned, now or before.

    Raises:
        UserError: If an argument is out of range, masks are not of this model, nothing is left to prune or would be
            left, a name in `skip` is of no module, or a weight is not finite, or no parameter of its layer
            (`torch.nn.utils.prune`, a parametrisation, `sparse_linear`).
    """
    if not (is_real(amount) and 0 <= amount < 1):
        raise UserError(f'amount must be a number with 0 ≤ amount < 1, got {amount=!r}')
    if method not in METHODS:
        raise UserError(f'method must be one of {", ".join(METHODS)}, got {method=!r}{nearest(method, METHODS)}')
    if not isinstance(masks, Masks | None):
        raise UserError(f'masks must be what prune has returned, got {type(masks).__name__}')
    *_, model = unwrap(model)
    units = list_units(model, parts, skip)
    if masks:
        masks.weights(model)  # before anything is changed
    before = masks.state_dict() if masks else {}
    weights = {unit.layer: model.get_submodule(unit.layer).weight.detach() for unit in units}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise UserError(f'{name}: a weight is not finite')
    weights = {name: weight for name, weight in weights.items() if name in before or weight.any()}
    units = [unit for unit in units if unit.layer in weights]
    kept = before | {name: before[name].clone() if name in before else (w != 0).cpu() for name, w in weights.items()}
    pieces = [_Piece(unit, weights[unit.layer], kept[unit.layer]) for unit in units]
    left = sum(piece.left for piece in pieces)
    removed = round(amount * left)
    if removed == left:
        where = f', with {skip=}' if skip else ''
        raise UserError(f'{amount=}: of {left} weights of linear layers and convolutions none would be left{where}')
    if method in ('lamp', 'global'):
        cuts = smallest(torch.cat([piece.scores(method) for piece in pieces]), removed)
        cuts = cuts.split([piece.left for piece in pieces])
    else:
        counts = _budgets(pieces, left - removed, method, list_units(model, parts))
        cuts = [smallest(p.scores(method), p.left - count) for p, count in zip(pieces, counts, strict=True)]
    for piece, cut in zip(pieces, cuts, strict=True):
        piece.kept.masked_scatter_(piece.kept.clone(), ~cut)
    made = Masks({name: mask.to(weights[name].device) if name in weights else mask for name, mask in kept.items()})
    made.apply_(model)
    return made


@dataclass(frozen=True)
class Unit:
    """A layer, or one of several that are fused in it."""

    layer: str
    part: str
    role: str
    rows: slice

    @property
    def name(self) -> str:
        return f'{self.layer}, {self.part}' if self.part else self.layer


class _Piece:
    """What is left of a unit, on the CPU; `kept` is a view."""

    def __init__(self, unit: Unit, weight: Tensor, kept: Tensor):
        self.unit, self.weight, self.kept = unit, weight[unit.rows].cpu(), kept[unit.rows]
        self.left, self.shape = int(self.kept.sum()), self.weight.shape

    def scores(self, method: str) -> Tensor:
        """(left,)"""
        weight = self.weight.masked_fill(~self.kept, 0)
        scores = lamp_scores(weight) if method == 'lamp' else weight.double().abs()
        return scores[self.kept]


def smallest(scores: Tensor, count: int) -> Tensor:
    """Which of the scores (n,) are the `count` smallest: exactly so many, of equal ones the first."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count).values
    found = scores < limit
    found[(scores == limit).nonzero()[: count - int(found.sum()), 0]] = True
    return found


def _budgets(pieces: Sequence[_Piece], total: int, method: str, of_model: Sequence[Unit]) -> list[int]:
    """How many weights of each piece a method keeps that goes by layers."""
    most = [piece.left for piece in pieces]
    if method == 'erk':
        return share_out(total, [sum(piece.shape) for piece in pieces], [0] * len(most), most)
    least = [0] * len(most)
    if method == 'uniform+':
        first = next((unit for unit in of_model if unit.role == 'patch embedding'), of_model[0]).layer
        last = {unit.layer for unit in of_model if unit.role == 'head'} or {of_model[-1].layer}
        for number, piece in enumerate(pieces):
            if piece.unit.layer == first:
                least[number] = piece.left
            elif piece.unit.layer in last:
                least[number] = min(piece.left, math.ceil(LAST_KEPT * piece.weight.numel()))
        if sum(least) > total:
            raise UserError(
                f"method='uniform+' keeps {sum(least)} weights of the first and last layer, of {total} to be left; "
                "make amount smaller, or take method='uniform'"
            )
    return share_out(total, most, least, most)


def share_out(total: int, sizes: Sequence[float], least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to sizes, but within their limits, whose sum is the total, exactly.

    Those that would pass a limit have it, and the rest is solved again.
    """

    def shares(factor: float) -> list[float]:
        return [min(max(factor * s, low), high) for s, low, high in zip(sizes, least, most, strict=True)]

    low, high = 0.0, max((high / size for size, high in zip(sizes, most, strict=True) if size), default=0.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) <= total else (low, middle)
    exact = shares(low)
    whole = [math.floor(share) for share in exact]
    by_fraction = sorted(range(len(whole)), key=lambda i: whole[i] - exact[i])
    missing = total - sum(whole)
    while missing:
        for i in by_fraction:
            if missing and whole[i] < most[i]:
                whole[i], missing = whole[i] + 1, missing - 1
    return whole


def list_units(model: nn.Module, parts: bool = True, skip: Collection[str] = ()) -> list[Unit]:
    """The linear layers and convolutions of a model in its order, fused ones apart, a shared weight once.

    Raises:
        UserError: As `prune`; or if there is none.
    """
    modules = dict(model.named_modules())
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    for name in skip:
        if name not in modules and name != 'head':  # which is by default
            raise UserError(f'skip: the model has no module {name!r}{nearest(name, modules)}')
    skip += HEADS if 'head' in skip else ()
    units, seen = [], set()
    for name, layer in modules.items():
        if isinstance(layer, SparseLinear):
            raise UserError(f'{name} is sparse already; prune, and count, what sparse_linear takes')
        if not isinstance(layer, nn.Linear | nn.Conv2d) or any(f'{name}.'.startswith(f'{each}.') for each in skip):
            continue
        weight = own_parameters(layer).get('weight')
        if weight is None:
            raise UserError(
                f'{name}: its weight is no plain parameter; merge what torch.nn.utils.prune, a parametrisation or an '
                'adapter has beside it'
            )
        if weight in seen:
            continue
        seen.add(weight)
        start = 0
        for part, role, rows in _parts(name, len(weight), modules, parts):
            units.append(Unit(name, part, role, slice(start, start + rows)))
            start += rows
    if not units:
        raise UserError(f'the model has no linear layer or convolution{f" outside of {skip=}" if skip else ""}')
    return units


def _parts(name: str, rows: int, modules: Mapping[str, nn.Module], apart: bool) -> Iterable[tuple[str, str, int]]:
    """The layers in one: part, role and rows of each."""
    parent, _, own = name.rpartition('.')
    if name.partition('.')[0] in HEADS:
        return [('', 'head', rows)]
    if apart and own == 'in_proj' and hasattr(modules[parent], 'in_split'):  # of timm's parallel blocks
        return [(part, part, count) for part, count in zip(('mlp', *'qkv'), modules[parent].in_split, strict=True)]
    fused = _FUSED.get(own, ())
    if apart and fused and rows % len(fused) == 0:
        return [(part, part, rows // len(fused)) for part in fused]
    role = _ALONE.get(own) or role_of(name, 'linear', modules)
    return [('', 'proj' if role == _OF_ATTENTION else role, rows)]


def densities(model: nn.Module, parts: bool = True, masks: Masks | None = None) -> list[Density]:
    """How many weights of each linear layer and convolution of a model are not 0, in its order.

    Args:
        parts: Whether a fused `qkv` is three layers.
        masks: Those that are left by these, instead; then only of the layers that have one.
    """
    *_, model = unwrap(model)
    found = []
    for unit in list_units(model, parts):
        if masks is None or unit.layer in masks.kept:
            tensor = masks.kept[unit.layer] if masks else model.get_submodule(unit.layer).weight
            rows = tensor[unit.rows]
            found.append(Density(unit.name, unit.role, int(rows.count_nonzero()), rows.numel()))
    return found


def by_role(found: Iterable[Density]) -> list[Density]:
    """The sums of densities by role, in the order in which roles come, and last 'all'."""
    return _sums([*found], lambda each: each.role) + _sums([*found], lambda each: 'all')


def _sums(found: Sequence[Density], key: Callable[[Density], str]) -> list[Density]:
    groups: dict[str, list[Density]] = {}
    for each in found:
        groups.setdefault(key(each), []).append(each)
    return [Density(k, k, sum(e.left for e in g), sum(e.weights for e in g)) for k, g in groups.items()]


def sparsity(model: nn.Module) -> float:
    """The share of the weights of linear layers and convolutions that is 0."""
    return 1 - by_role(densities(model, parts=False))[-1].density
