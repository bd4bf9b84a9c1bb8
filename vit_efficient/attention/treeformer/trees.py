"""The trees of Treeformer: which leaf a token falls into, and how a hard decision is learned.

A head has one complete binary tree of height h, for its queries and its keys. Node j holds a linear predicate,
s_j(z) = ⟨w_j, z⟩ + b_j, and sends z right where s_j(z) ≥ 0, left otherwise (a tie goes right, NaN left).

Decisions are hard forward and dense backward, as in the trees of Karthikeyan et al., "Learning Accurate Decision Trees
with Bandit Feedback via Quantized Gradient Descent", TMLR 2022. The straight-through surrogate is the product of
sigmoids along the path: whether z is in a leaf, 0 or 1, has the gradient of

    m_leaf(z) = Π σ(± s_j(z)) over the nodes j on the way to the leaf, + where the way goes right

which is positive for all leaves, so that every predicate hears of every token, on its path or off it.

Nodes are numbered level by level: the children of node j are 2j + 1 (left) and 2j + 2 (right). A leaf's number is that
of its decisions in binary, right being 1.

On a GPU, sums over leaves are products with the matrix of who is in which: they are few operators, and the same every
time. Such a matrix, and the scores of all nodes, are made for as many tokens at a time as `CHUNK_BYTES` has room for.

Letters: B batch, H heads, N tokens, D channels of a head, h height, J = 2^h − 1 nodes, L = 2^h leaves.
"""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.grid import plain_sizes
from vit_efficient.utils.device import on_gpu
from vit_efficient.utils.precision import without_autocast

# Tokens that a CPU routes at a time: what the nodes say about them stays in the cache.
CHUNK = 1024
# What a GPU holds at a time of one number for each token and leaf. A backward pass has several such tensors.
CHUNK_BYTES = 2**29


class Trees(nn.Module):
    """The predicates of one tree per head.

    Args:
        num_heads: H
        head_dim: D
        height: h; 0 for a single leaf.
    """

    def __init__(self, num_heads: int, head_dim: int, height: int, device=None, dtype=None):
        super().__init__()
        nodes = 2**height - 1
        self.height = height
        self.weight = nn.Parameter(torch.empty(num_heads, nodes, head_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_heads, nodes, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random directions through the origin: a score has the spread of a channel."""
        nn.init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)
        nn.init.zeros_(self.bias)

    def start_in_trained(self) -> str:
        """Nothing is known that is nearer to exact attention."""
        return 'trees, which start at random'

    def extra_repr(self) -> str:
        return f'num_heads={self.weight.shape[0]}, head_dim={self.weight.shape[2]}, height={self.height}'


def leaves_of(weight: Tensor) -> int:
    """L, from the predicates (H, J, D)."""
    return plain_sizes(weight.shape)[1] + 1


def height_of(weight: Tensor) -> int:
    """h, from the predicates (H, J, D)."""
    return leaves_of(weight).bit_length() - 1


def chunks(z: Tensor, num_leaves: int) -> list[slice]:
    """Slices of the N tokens of z (B, H, N, …); a single one where a graph is made, and where N is a symbol."""
    batch, heads, num_tokens = z.shape[:3]
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(num_tokens) is not int:
        return [slice(None)]
    size = CHUNK
    if on_gpu(z):
        size = max(1, CHUNK_BYTES // (4 * max(1, batch * heads) * num_leaves))  # in float32
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def products(z: Tensor, weight: Tensor) -> Tensor:
    """⟨w_j, z⟩ of all tokens and nodes, as one product: (B, H, N, D), (H, J, D) → (B, H, N, J)

    In float32 at least: of bfloat16 (not on a CPU) products are exact there, and nothing has to be converted.
    """
    z_HMD = z.transpose(0, 1).flatten(1, 2)
    if z.dtype == torch.bfloat16:
        whole = F.pad(weight, (0, 0, 0, -weight.shape[1] % 8))  # other kernels take ten times as long
        s_HMJ = torch.bmm(z_HMD, whole.mT, out_dtype=torch.float32)[..., : weight.shape[1]]
    else:
        s_HMJ = torch.bmm(z_HMD, weight.mT)
    return s_HMJ.unflatten(1, (z.shape[0], z.shape[2])).transpose(0, 1)


def scores(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """s_j(z): (B, H, N, D), (H, J, D), (H, J) → (B, H, N, J)"""
    return products(z, weight) + bias[:, None]


def route(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The leaf of each token: (B, H, N, D), (H, J, D), (H, J) → (B, H, N), int64. No gradient."""
    height, slices = height_of(weight), chunks(z, leaves_of(weight))
    return _join([_descend(products(z[:, :, chunk], weight), -bias, height) for chunk in slices]).squeeze(-1)


def route_both(q: Tensor, k: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The leaves of queries and of keys, by scores in float32 at least, whatever the dtypes are; on a GPU at once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    bias = bias.to(dtype)
    if not (q.dtype == weight.dtype == torch.bfloat16 and q.device.type in ('cuda', 'meta') and on_gpu(q)):
        q, k, weight = q.to(dtype), k.to(dtype), weight.to(dtype)
    if not on_gpu(q):
        return route(q, weight, bias), route(k, weight, bias)
    height, slices = height_of(weight), chunks(q, 2 * leaves_of(weight))
    scores_of_both = (torch.cat([products(z[:, :, chunk], weight) for z in (q, k)]) for chunk in slices)
    leaf = _join([_descend(s, -bias, height) for s in scores_of_both]).squeeze(-1)
    return leaf[: q.shape[0]], leaf[q.shape[0] :]


def _join(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)


def _descend(s: Tensor, threshold: Tensor, height: int) -> Tensor:
    """The leaves (B, H, N, 1) that tokens get to: right where s (B, H, N, J) is at least the threshold (H, J).

    On a CPU thresholds are gathered like the scores: to compare them all would take longer than the products. On a GPU
    it takes one operator, and then two per level.
    """
    if height and on_gpu(s):
        goes_right = s >= threshold[:, None]
        number = goes_right[..., :1].to(torch.int64)
        for level in range(1, height):
            of_level = goes_right[..., 2**level - 1 : 2 ** (level + 1) - 1]
            number = torch.add(of_level.gather(-1, number), number, alpha=2)
        return number
    node = s.new_zeros(*s.shape[:-1], 1, dtype=torch.int64)
    threshold = threshold[:, None].expand(s.shape)
    for _ in range(height):
        node = torch.add(s.gather(-1, node) >= threshold.gather(-1, node), node, alpha=2) + 1
    return node - (2**height - 1)


def best_leaves(z: Tensor, weight: Tensor, bias: Tensor, num_leaves: int) -> Tensor:
    """Each token's own leaf and the others of largest m, in ascending order: → (B, H, N, num_leaves), int64.

    The own leaf need not be the one of largest m, but is always among them.
    """
    if num_leaves == 1:
        return route(z, weight, bias).unsqueeze(-1)
    best = []
    for chunk in chunks(z, leaves_of(weight)):
        s = scores(z[:, :, chunk], weight, bias)
        own = _descend(s, torch.zeros_like(bias), height_of(weight))
        log_m = torch.zeros_like(s[..., :1])
        for level in range(height_of(weight)):
            s_level = s[..., 2**level - 1 : 2 ** (level + 1) - 1]
            log_m = torch.stack([log_m + F.logsigmoid(-s_level), log_m + F.logsigmoid(s_level)], dim=-1).flatten(-2)
        best.append(log_m.scatter(-1, own, torch.inf).topk(num_leaves, dim=-1).indices)
    return _join(best).sort(dim=-1).values


def membership(z: Tensor, weight: Tensor, bias: Tensor, leaves: Tensor) -> Tensor:
    """What is zero and has the gradient of m: (B, H, N, D), …, leaves (B, H, N, n) → (B, H, N, n)"""
    height = height_of(weight)
    level = torch.arange(height, device=z.device)
    node = 2**level - 1 + (leaves[..., None] >> (height - level))
    right = (leaves[..., None] >> (height - 1 - level)) & 1
    s = scores(z, weight, bias).gather(-1, node.flatten(-2)).unflatten(-1, node.shape[-2:])
    m = F.logsigmoid(torch.where(right == 1, s, -s)).sum(dim=-1).exp()
    return m - m.detach()


def in_leaves(leaf: Tensor, num_leaves: int) -> Tensor:
    """Whether each leaf has each token: (B, H, N) → (B, H, L, N)"""
    return leaf[:, :, None] == torch.arange(num_leaves, device=leaf.device)[:, None]


def in_leaf(leaf: Tensor, num_leaves: int, dtype: torch.dtype) -> Tensor:
    """Whether each token is in each leaf, 1 or 0: (…) → (…, L)"""
    return (leaf[..., None] == torch.arange(num_leaves, device=leaf.device)).to(dtype)


def sum_by_leaf(leaf: Tensor, v: Tensor, num_leaves: int) -> Tensor:
    """The sum of the values in each leaf: (B, H, N), (B, H, N, D) → (B, H, L, D)"""
    if on_gpu(v):
        slices = chunks(v, num_leaves)
        which = (in_leaves(leaf[:, :, chunk], num_leaves).to(v.dtype) for chunk in slices)
        return reduce(torch.add, (w @ v[:, :, chunk] for w, chunk in zip(which, slices, strict=True)))
    sums = v.new_zeros(*v.shape[:2], num_leaves, v.shape[3])
    for chunk in chunks(v, num_leaves):
        v_chunk = v[:, :, chunk].contiguous()
        # Compiled by PyTorch 2.11, `LeafSums` would have gradients of zero if it added in place.
        add = sums.scatter_add if torch.compiler.is_compiling() else sums.scatter_add_
        sums = add(2, leaf[:, :, chunk, None].expand_as(v_chunk), v_chunk)
    return sums


def count_tokens(leaf: Tensor, num_leaves: int, dtype: torch.dtype) -> Tensor:
    """The number of tokens in each leaf: (B, H, N) → (B, H, L, 1)"""
    if on_gpu(leaf):
        which = (in_leaves(leaf[:, :, chunk], num_leaves) for chunk in chunks(leaf, num_leaves))
        return reduce(torch.add, (w.sum(dim=-1, keepdim=True, dtype=dtype) for w in which))
    return sum_by_leaf(leaf, torch.ones_like(leaf[..., None], dtype=dtype), num_leaves)


def sum_tokens_by_leaf(leaf: Tensor, counts: Tensor, x: Tensor, first: int) -> Tensor:
    """The sum of the tokens in each leaf of each head: (B, H, n), (B, H, L, 1), (B, N, C) → (B, H, L, C)

    Tokens in order of their leaves, as bags: several times faster than to scatter them, once for each head. Those
    before number `first` are in no leaf.
    """
    heads, n = leaf.shape[1:]
    if on_gpu(x):
        x, num_leaves = x[:, first:], counts.shape[2]
        slices = chunks(leaf, num_leaves)
        which = (in_leaves(leaf[:, :, chunk], num_leaves).to(x.dtype).flatten(1, 2) for chunk in slices)
        sums = reduce(torch.add, (w @ x[:, chunk] for w, chunk in zip(which, slices, strict=True)))
        return sums.unflatten(1, (heads, num_leaves))
    order = rows_of(leaf, counts.shape[2]).transpose(1, 2).flatten().argsort(stable=True)
    token = order // (heads * n) * x.shape[1] + first + order % n
    ends = counts.flatten().to(torch.int64).cumsum(dim=0)
    offsets = F.pad(ends[:-1], (1, 0))
    return F.embedding_bag(token, x.flatten(0, 1), offsets, mode='sum').view(*counts.shape[:3], x.shape[2])


def rows_of(leaf: Tensor, num_leaves: int) -> Tensor:
    """Where each token's leaf is in a table of all leaves, (B · H · L, …): (B, H, N) → (B, N, H)"""
    tree = torch.arange(leaf.shape[0] * leaf.shape[1], device=leaf.device).view(-1, 1, leaf.shape[1])
    return leaf.transpose(1, 2) + num_leaves * tree


def read_leaves(leaf: Tensor, table: Tensor) -> Tensor:
    """The row of each token's leaf: (B, H, N), (B, H, L, D) → (B, N, H, D)"""
    row = rows_of(leaf, table.shape[2])
    return table.flatten(0, 2).index_select(0, row.flatten()).view(*row.shape, table.shape[3])


def read_and_sum(leaf: Tensor, table: Tensor) -> Tensor:
    """The sum over heads of the rows of a token's leaves: (B, H, N), (B, H, L, C) → (B, N, C). No gradient."""
    if on_gpu(table):
        num_leaves, leaf, slices = table.shape[2], leaf.transpose(1, 2), chunks(leaf, table.shape[2])
        which = (in_leaf(leaf[:, chunk], num_leaves, table.dtype).flatten(2) for chunk in slices)
        y = [w @ table.flatten(1, 2) for w in which]
        return y[0] if len(y) == 1 else torch.cat(y, dim=1)
    row = rows_of(leaf, table.shape[2])
    return F.embedding_bag(row.flatten(0, 1), table.flatten(0, 2), mode='sum').unflatten(0, row.shape[:2])


class LeafSums(torch.autograd.Function):
    """Sums of values, and numbers of keys, by the leaves of the keys.

        sums, counts = LeafSums.apply(k, v, weight, bias)

    (B, H, N, D), (B, H, N, D), (H, J, D), (H, J) → (B, H, L, D), (B, H, L, 1). The gradient is that of Σ m_leaf(k) v
    and Σ m_leaf(k). Backward, scores are computed again rather than kept: they are J / D times the keys.
    """

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        leaf = route(k, weight, bias)
        ctx.save_for_backward(k, v, weight, bias, leaf)
        num_leaves = leaves_of(weight)
        return sum_by_leaf(leaf, v, num_leaves), count_tokens(leaf, num_leaves, v.dtype)

    @staticmethod
    def backward(ctx, d_sums: Tensor, d_counts: Tensor) -> tuple[Tensor, ...]:
        k, v, weight, bias, leaf = ctx.saved_tensors

        def d_membership(chunk: slice) -> Tensor:
            return v[:, :, chunk] @ d_sums.mT + d_counts.mT

        with without_autocast(k):  # what surrounds the forward pass
            d_k, d_weight, d_bias = _straight_through(k, weight, bias, d_membership)
        return d_k, read_leaves(leaf, d_sums).transpose(1, 2), d_weight, d_bias


class LeafReads(torch.autograd.Function):
    """What queries read in their leaves.

        y = LeafReads.apply(q, table, weight, bias)

    (B, H, N, D), (B, H, L, D), (H, J, D), (H, J) → (B, N, H, D). The gradient is that of Σ_leaf m_leaf(q) table_leaf.
    """

    @staticmethod
    def forward(ctx, q: Tensor, table: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        leaf = route(q, weight, bias)
        ctx.save_for_backward(q, table, weight, bias, leaf)
        return read_leaves(leaf, table)

    @staticmethod
    def backward(ctx, d_y: Tensor) -> tuple[Tensor, ...]:
        q, table, weight, bias, leaf = ctx.saved_tensors
        d_y = d_y.transpose(1, 2)

        def d_membership(chunk: slice) -> Tensor:
            return d_y[:, :, chunk] @ table.mT

        with without_autocast(q):
            d_q, d_weight, d_bias = _straight_through(q, weight, bias, d_membership)
            return d_q, sum_by_leaf(leaf, d_y, table.shape[2]), d_weight, d_bias


def _straight_through(
    z: Tensor, weight: Tensor, bias: Tensor, d_membership: Callable[[slice], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of tokens and predicates, from those of the memberships, (B, H, N, L), a chunk of tokens each."""
    d_z, d_weight, d_bias = [], torch.zeros_like(weight), torch.zeros_like(bias)
    for chunk in chunks(z, leaves_of(weight)):
        z_chunk = z[:, :, chunk]
        d_scores = _through_paths(scores(z_chunk, weight, bias), d_membership(chunk))
        d_z.append(d_scores @ weight)
        d_weight = d_weight + (d_scores.mT @ z_chunk).sum(dim=0)
        d_bias = d_bias + d_scores.sum(dim=(0, 2))
    return _join(d_z), d_weight, d_bias


def _through_paths(s: Tensor, d_m: Tensor) -> Tensor:
    """The gradient of scores (…, J) from that of m (…, L), in O(J): d_j = reach_j σ'(s_j) (right_j − left_j).

    reach_j is the product of sigmoids on the way to node j; right_j and left_j are what m below its children would be
    worth if they were reached for sure.
    """
    height = d_m.shape[-1].bit_length() - 1
    if not height:
        return s
    levels = [s[..., 2**level - 1 : 2 ** (level + 1) - 1] for level in range(height)]
    levels = [((-s_level).sigmoid(), s_level.sigmoid()) for s_level in levels]  # 1 − σ(s) would be 0 for large s
    worth, gains = d_m, []
    for _, p in reversed(levels):
        left, right = worth.unflatten(-1, (-1, 2)).unbind(-1)
        gains.append(right - left)
        worth = left + p * gains[-1]
    reach, d_s = torch.ones_like(s[..., :1]), []
    for (not_p, p), gain in zip(levels, reversed(gains), strict=True):
        d_s.append(reach * p * not_p * gain)
        reach = torch.stack([reach * not_p, reach * p], dim=-1).flatten(-2)
    return torch.cat(d_s, dim=-1)
