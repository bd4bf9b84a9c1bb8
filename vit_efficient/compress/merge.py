"""Token merging: the patches of an image that are most alike become one token, whose way up is a copy to each of them.

Sources: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461 (ToMe): bipartite soft matching
(section 3), means weighed by sizes, and sizes as a bias of the scores (eq. 1). Norouzi et al., "ALGM: Adaptive
Local-then-Global Token Merging for Efficient Semantic Segmentation with Plain Vision Transformers", CVPR 2024, arXiv
2406.09936: whole cells of 2 × 2 patches first.

A round takes every second token (A) and finds for each the most similar of the others (B), by the cosine of their
means. The most similar pairs are merged, by which at most a third of all tokens go, so that it takes several rounds
until m are left: four for a quarter. Tokens are taken along a path that goes through the rows to and fro, so that A and
B are a checkerboard at first and neighbours later. Of pairs that are equally similar, those that come first on it are
merged.

ToMe lets all of A merge, half of the tokens, in a layer; with more and smaller rounds each has better pairs to take.

Letters: B batch, H heads, N patches, m kept, n tokens left before a round, D channels.
"""

import math
from typing import Any, NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.compress import budget as budgets
from vit_efficient.compress.base import Compressor, State, register_compressor
from vit_efficient.dct.bases import is_eager
from vit_efficient.grid import PatchGrid, larger, plain_sizes, smaller
from vit_efficient.utils.checks import check_flag
from vit_efficient.utils.compat import are_numbers, is_transformed
from vit_efficient.utils.device import on_gpu
from vit_efficient.utils.errors import UserError
from vit_efficient.utils.precision import real_dtype, without_autocast

# Similarities of an image at once: those of a CPU stay in its cache.
CHUNK_OF_HOST, CHUNK_OF_GPU = 2**18, 2**26


class Groups(NamedTuple):
    """Which patches of each image are one token.

    Args:
        owner: The token of each patch: (B, N), from 0 to m - 1.
        order: The patches in the order of their tokens: (B, N).
        sizes: How many patches each token stands for: (B, m).
    """

    owner: Tensor
    order: Tensor
    sizes: Tensor


# Leaves for FX, since what they do depends on sizes; called in this module, where FX finds them.


@torch.fx.wrap
@register_notrace_function
def match(x: Tensor, height, width, budget: budgets.Budget, local_first: bool) -> Groups:
    """Which patches are merged, by their tokens (B, N, D), or by the mean over heads of (B, H, N, D).

    Tokens that are left are in the order of the patches that others were merged into. In float32 at least, without a
    gradient.
    """
    height, width = plain_sizes((height, width))
    with torch.no_grad(), without_autocast(x):
        along = path(height, width, x.device)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = (x.mean(dim=1) if x.ndim == 4 else x).index_select(1, along)
        # Of each place on the path the one that it was merged into, and those that are left.
        root = left = torch.arange(height * width, device=x.device).expand(x.shape[:2])
        for i, n in enumerate(rounds(height, width, budget, local_first)):
            tokens = F.normalize(means(x, groups_of(root, left)) if i else x, dim=-1)
            if local_first and i == 0:
                pairs = alike_cells(tokens, cells(height, width, along), n)
            else:
                pairs = alike_pairs(tokens, left, n)
            root, left = join(root, *pairs, n)
        return groups_of(along[root.index_select(1, along)], along[left].sort(dim=1).values)


def path(height, width, device: torch.device) -> Tensor:
    """The patches in the order of a path through the rows, to and fro; and the places on it of the patches: (N,)"""
    patch = torch.arange(height * width, device=device)
    row, column = patch // width, patch % width
    return torch.where(row % 2 == 1, row * width + (width - 1 - column), patch)


def rounds(height, width, budget: budgets.Budget, local_first: bool) -> list:
    """How many tokens each round leaves. That of cells merges at most half of what is to be merged.

    Raises:
        UserError: If sizes are open and the budget is a number, which leaves the number of rounds open.
    """
    n, kept = height * width, budgets.kept_count(height, width, budget)
    left = []
    if local_first:
        n = n - 3 * smaller((height // 2) * (width // 2), (n - kept) // 6)
        left.append(n)
    if type(n) is int and type(kept) is int:
        while n > kept:
            n = max(2 * n // 3, kept)
            left.append(n)
        return left
    if budget.keep_ratio is None:
        raise UserError(f'num_tokens={budget.num_tokens} needs a fixed image size; give keep_ratio where there is none')
    for _ in range(math.ceil(math.log(budget.keep_ratio) / math.log(2 / 3))):
        n = larger(2 * n // 3, kept)
        left.append(n)
    return left


def alike_pairs(tokens: Tensor, left: Tensor, n) -> tuple[Tensor, Tensor]:
    """The tokens of A, and what each is merged into so that n are left, a token of B or itself: (B, …) each.

    There is none that is empty: of open sizes torch.export would fix that it is not.

    Args:
        tokens: Of length 1, (B, tokens, D).
        left: Their places: (B, tokens).
    """
    a, b = left[:, ::2], left[:, 1::2]
    similarity, best = most_similar(tokens[:, ::2], tokens[:, 1::2])
    order = best_first(similarity)
    a, b = a.gather(1, order), b.gather(1, best.gather(1, order))
    rank = torch.arange(a.shape[1], device=a.device)
    return a, torch.where(rank < left.shape[1] - n, b, a)


def most_similar(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The largest product of each token with one of B, and with which: (B, a, D), (B, b, D) → (B, a) twice"""
    number, size = plain_sizes((b.shape[0], b.shape[1]))
    chunks = [a]
    if are_numbers(size):
        images = number if are_numbers(number) else 1
        at_once = CHUNK_OF_HOST if is_eager(a) and not on_gpu(a) else CHUNK_OF_GPU // images
        chunks = a.split(max(1, at_once // size), dim=1)
    found = [torch.bmm(chunk, b.mT).max(dim=2) for chunk in chunks]
    if len(found) == 1:
        return found[0].values, found[0].indices
    return torch.cat([each.values for each in found], dim=1), torch.cat([each.indices for each in found], dim=1)


def cells(height, width, along: Tensor) -> Tensor:
    """The places on the path of the patches in each whole cell of 2 × 2: (cells, 4)"""
    row = 2 * torch.arange(height // 2, device=along.device)
    column = 2 * torch.arange(width // 2, device=along.device)
    first = (row[:, None] * width + column).flatten()
    return along[torch.stack([first, first + 1, first + width, first + width + 1], dim=1)]


def alike_cells(tokens: Tensor, places: Tensor, n) -> tuple[Tensor, Tensor]:
    """As `alike_pairs`, of cells whose four patches have the largest mean cosine: all go to the first.

    Args:
        tokens: Of length 1, of all patches, (B, N, D).
        places: Of the patches of cells, (cells, 4).
    """
    similarity = tokens[:, places].sum(dim=2).square().sum(dim=2)
    first, others = places[best_first(similarity)].split([1, 3], dim=2)
    rank = torch.arange(places.shape[0], device=places.device)[:, None]
    into = torch.where(rank < (tokens.shape[1] - n) // 3, first, others)
    return others.flatten(1), into.flatten(1)


def best_first(similarity: Tensor) -> Tensor:
    """The order of the largest values, of equal ones the first: (B, n)"""
    if torch.compiler.is_exporting():  # ONNX has one sort, which is stable; so is PyTorch's on a CPU, said or not
        return similarity.sort(dim=1, descending=True).indices
    return similarity.sort(dim=1, descending=True, stable=True).indices


def join(root: Tensor, tokens: Tensor, into: Tensor, n) -> tuple[Tensor, Tensor]:
    """The roots after tokens were merged into others, and the n that are left, in their order: (B, N), (B, n)"""
    place = torch.arange(root.shape[1], device=root.device).expand_as(root)
    root = place.scatter(1, tokens, into).gather(1, root)
    return root, torch.where(root == place, place, root.shape[1]).sort(dim=1).values[:, :n]


def groups_of(root: Tensor, left: Tensor) -> Groups:
    """The groups of all that have one root, in the order of the roots that are left: (B, N), (B, m)"""
    number = torch.arange(left.shape[1], device=left.device).expand_as(left)
    owner = torch.zeros_like(root).scatter(1, left, number).gather(1, root)
    sizes = torch.zeros_like(left).scatter_add(1, owner, torch.ones_like(owner))  # integers, in whatever order
    patches = owner.shape[1]
    order = (owner * patches + torch.arange(patches, device=owner.device)).sort(dim=1).values % patches
    return Groups(owner, order, sizes)


def means(x: Tensor, groups: Groups) -> Tensor:
    """(B, N, D) → (B, m, D), as bags of rows: on a GPU too these and their gradients are summed in one order."""
    image = torch.arange(x.shape[0], device=x.device)[:, None]
    if not torch.compiler.is_compiling() and is_transformed(x):  # torch.func has no forward mode of bags
        into = (groups.owner + image * groups.sizes.shape[1]).flatten()
        sums = x.new_zeros(groups.sizes.numel(), x.shape[2]).index_add(0, into, x.flatten(0, 1))
        return sums.unflatten(0, groups.sizes.shape) / groups.sizes[..., None]
    patch = (groups.order + image * x.shape[1]).flatten()
    sizes = groups.sizes.flatten()
    y = F.embedding_bag(patch, x.flatten(0, 1), sizes.cumsum(0) - sizes, mode='mean')
    return y.unflatten(0, groups.sizes.shape)


@torch.fx.wrap
@register_notrace_function
def merge(x: Tensor, groups: Groups) -> Tensor:
    """The mean of each group: (B, N, D) → (B, m, D), or (B, H, N, D) → (B, H, m, D)"""
    if _is_whole(groups):
        return x
    return means(x, groups) if x.ndim == 3 else _of_heads(means(_rows(x), groups), x)


@torch.fx.wrap
@register_notrace_function
def unmerge(y: Tensor, groups: Groups) -> Tensor:
    """To each patch what its group has: (B, m, D) → (B, N, D), or (B, H, m, D) → (B, H, N, D)"""
    if _is_whole(groups):
        return y
    image = torch.arange(y.shape[0], device=y.device)[:, None]
    rows = _rows(y)
    # Not picked by an index: the gradient of that would be summed in any order on a GPU.
    x = F.embedding(groups.owner + image * rows.shape[1], rows.flatten(0, 1))
    return x if y.ndim == 3 else _of_heads(x, y)


@torch.fx.wrap
@register_notrace_function
def log_sizes(groups: Groups, prefix, like: Tensor) -> Tensor | None:
    """(B, 1, 1, prefix + m); None if nothing is merged."""
    if _is_whole(groups):
        return None
    counts = groups.sizes.to(torch.promote_types(like.dtype, torch.float32)).log().to(like.dtype)
    return F.pad(counts, (prefix, 0))[:, None, None]


@torch.fx.wrap
@register_notrace_function
def centres(groups: Groups, height, width) -> tuple[Tensor, Tensor]:
    """The mean row and column of each group: (B, m) each."""
    patch = torch.arange(height * width, device=groups.owner.device)
    places = torch.stack([patch // width, patch % width], dim=1).to(real_dtype(patch.device))
    row, column = means(places.expand(groups.owner.shape[0], -1, -1), groups).unbind(2)
    return row, column


def _is_whole(groups: Groups) -> bool:
    patches, kept = plain_sizes((groups.owner.shape[1], groups.sizes.shape[1]))
    return are_numbers(patches, kept) and patches == kept


def _rows(x: Tensor) -> Tensor:
    """All heads side by side: (B, H, N, D) → (B, N, H · D)"""
    return x if x.ndim == 3 else x.transpose(1, 2).flatten(2)


def _of_heads(x: Tensor, like: Tensor) -> Tensor:
    return x.unflatten(2, (like.shape[1], -1)).transpose(1, 2)


class Down(nn.Module):
    """The mean of each group; of the groups given, or of those of tokens that are alike."""

    flop_role = 'transform'

    def __init__(self, budget: budgets.Budget, local_first: bool):
        super().__init__()
        self.budget = budget
        self.local_first = local_first

    def forward(self, x: Tensor, grid: PatchGrid, state: State = None) -> tuple[Tensor, State]:
        if state is None:
            state = match(x, grid.height, grid.width, self.budget, self.local_first)
        return merge(x, state), state


class Up(nn.Module):
    """To each patch the token of its group."""

    def forward(self, y: Tensor, grid: PatchGrid, state: State) -> Tensor:
        return unmerge(y, state)


@register_compressor('merge')
class MergeCompressor(Compressor):
    """Merges the patches of each image that are most alike, and copies tokens to all their patches on the way up.

    At the places `kv` and `qkv` keys say which (before qk-norm and rotation, their mean over heads), at `x` and `block`
    the tokens.

    Args:
        keep_ratio: The fraction of patches kept. 1/4 if neither this nor `num_tokens` is given.
        num_tokens: How many are kept.
        count_bias: Whether a kept key weighs as many as the patches that it stands for.
        local_first: Whether a first round merges whole cells of 2 × 2 patches, at most half of what is to be merged.
    """

    commutes = True
    keeps_constants = True
    matches = True
    coordinates = 'groups'

    def __init__(
        self,
        keep_ratio: float | None = None,
        num_tokens: int | None = None,
        count_bias: bool = True,
        local_first: bool = False,
    ):
        super().__init__()
        if keep_ratio is None and num_tokens is None:
            keep_ratio = 0.25
        check_flag('count_bias', count_bias)
        check_flag('local_first', local_first)
        self.budget = budgets.Budget(keep_ratio, num_tokens)
        if isinstance(self.budget.num_tokens, tuple):
            raise UserError(f'num_tokens must be an integer, since merged patches are no grid, got {num_tokens=}')
        self.count_bias = count_bias
        self.down = Down(self.budget, local_first)
        self.up = Up()

    @property
    def options(self) -> dict[str, Any]:
        return dict(**self.budget.options, count_bias=self.count_bias, local_first=self.down.local_first)

    def num_kept(self, grid: PatchGrid) -> int:
        return budgets.kept_count(grid.height, grid.width, self.budget)

    def centres(self, grid: PatchGrid, state: State) -> tuple[Tensor, Tensor]:
        return centres(state, grid.height, grid.width)

    def log_counts(self, grid: PatchGrid, like: Tensor, state: State = None) -> Tensor | None:
        return log_sizes(state, grid.prefix, like) if self.count_bias else None
