"""Who reads what in TF-Attention: queries of one head that read the same leaves are a group, and attend together.

Nothing here waits for a GPU but one copy of numbers, the sizes of batches. Ranges are found by binary search in what is
sorted, and how many of them there are is bounded from above; some are empty.

Letters: B batch, N patches of an image, P prefix tokens, H heads, L leaves of a tree, n leaves that a query reads, G
groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Kernels number groups by a dimension of their grid, which has no more than these on NVIDIA's GPUs.
MOST_GROUPS = 65535


class Part(NamedTuple):
    """A batch of groups: their queries, one group after the other, and the keys that each group reads."""

    q: Tensor  # (Σ num_queries, D)
    k: Tensor  # (Σ num_keys, D)
    v: Tensor
    counts: Tensor  # of the queries and keys of each group, (2, G)
    most_queries: int  # of a group
    most_keys: int


@dataclass(frozen=True)
class Reads:
    """Groups, in batches.

    Attributes:
        queries: Rows of (B · N · H) queries, group by group.
        keys: Rows of (B · N · H) patches and, after them, (B · H · `copies` · P) prefix tokens, that each group reads.
        ranges: Of each key, which of the ranges that groups read it is in; a group has as many, one for the prefix too.
        level: How far above the leaves are the nodes that a group reads, (G, 1); None if they are leaves.
        copies: How often the prefix tokens of a head are there: on a GPU, if possible, once for each group, so that
            none is read twice and their gradients are sums.
        counts: How many queries and keys each group has, (2, G).
        batches: How many groups each batch has.
        sizes: Of each batch, how many queries and keys it has, and at most in a group: Σ, Σ, max, max, Σ, …
    """

    queries: Tensor
    keys: Tensor
    ranges: Tensor
    level: Tensor | None
    copies: int
    counts: Tensor
    batches: list[int]
    sizes: list[int]

    @classmethod
    def of(cls, leaves_q: Tensor, leaf_k: Tensor, num_leaves: int, prefix: int, by_size: bool) -> 'Reads':
        """From the leaves that queries read, (B, H, N, n), ascending, and those that keys are in, (B, H, N).

        A query that finds no key reads the nodes above its leaves, up to the first level where there is one.

        Args:
            num_leaves: L
            prefix: P
            by_size: Whether groups are in the order of the powers of two up to which they can be padded, a batch for
                each, and none is empty. This takes more than one synchronisation.
        """
        n, num_tokens, device = leaves_q.shape[-1], leaf_k.numel(), leaf_k.device
        trees = leaf_k[..., 0].numel()
        # In a table of the leaves of all trees.
        first = torch.arange(0, trees * num_leaves, num_leaves, device=device).view(leaf_k.shape[:2])
        leaves_q, leaf_k = leaves_q + first[..., None, None], leaf_k + first[..., None]
        edges = torch.arange(max(num_tokens * (n > 1), num_leaves * trees) + 1, device=device)
        group = leaves_q.squeeze(-1) if n == 1 else _ranks(leaves_q.flatten(0, 2)).view(leaf_k.shape)
        rows = torch.stack([group, leaf_k]).transpose(2, 3).flatten(1)
        numbers, order = rows.sort(dim=1, stable=True)
        ends_q, ends_k = torch.searchsorted(numbers[0], edges), torch.searchsorted(numbers[1], edges)
        num_queries = ends_q.diff()

        # A group reads n ranges of the sorted patches, of the leaves `low` or of nodes above.
        low = edges[:-1, None]
        if n > 1:  # those of its first query; a group without any is not to be read
            leaves_q = leaves_q.transpose(1, 2).flatten(0, 2)
            low = leaves_q[order[0][ends_q[:-1].clamp(max=num_tokens - 1)]]
        nodes, beyond, level = low, low + 1, None
        if not prefix:
            # A key next to a leaf, on one of its sides, has the most of a leaf's number in common with it.
            at = ends_k[low]
            near = numbers[1][torch.stack([at - 1, at]).clamp(0, num_tokens - 1)]
            level = (near ^ low).to(torch.float32).frexp().exponent.amin(dim=(0, 2)).unsqueeze(1)
            nodes = low >> level << level
            beyond = nodes + (1 << level)
        start = ends_k[nodes]
        size = ends_k[beyond] - start
        if n > 1 and not prefix:  # siblings have one node above them
            size = size.masked_fill(F.pad(nodes[:, 1:] == nodes[:, :-1], (1, 0)), 0)
        patches, copies = order[1], num_leaves if n == 1 and not by_size else 1
        if prefix:
            prefixes = edges[:-1, None] if copies > 1 else low[:, :1] // num_leaves
            start = torch.cat([num_tokens + prefix * prefixes, start], dim=1)
            size = F.pad(size, (1, 0), value=prefix)
            last = num_tokens + trees * copies * prefix
            patches = torch.cat([patches, torch.arange(num_tokens, last, device=device)])
        size = size * (num_queries > 0).unsqueeze(1)

        queries, counts = order[0], torch.stack([num_queries, size.sum(dim=1)])
        batches = [min(MOST_GROUPS, len(size) - first) for first in range(0, len(size), MOST_GROUPS)]
        if by_size:
            occupied = num_queries.nonzero()[:, 0]
            powers = torch.log2(counts[:, occupied].double()).ceil().long()
            powers, in_order = (powers[0] + 64 * powers[1]).sort(stable=True)
            batches = powers.unique_consecutive(return_counts=True)[1].tolist()
            in_order = occupied[in_order]
            counts, start, size = counts[:, in_order], start[in_order], size[in_order]
            level = level if level is None else level[in_order]
            queries = queries[_in_ranges(ends_q[in_order], counts[0], num_tokens)[0]]
        sizes = [f(dim=1) for of_batch in counts.split(batches, dim=1) for f in (of_batch.sum, of_batch.amax)]
        sizes = torch.cat(sizes).tolist()  # the one wait
        places, ranges = _in_ranges(start.flatten(), size.flatten(), sum(sizes[1::4]))
        return cls(queries, patches[places], ranges, level, copies, counts, batches, sizes)

    def pieces(self, num_leaves: int) -> Tensor:
        """Of each key, in which of the n leaves of its group it is, from 0; −1 if it is in none."""
        if self.level is None:  # with prefix tokens
            return self.ranges % (num_leaves + 1) - 1
        is_leaf = self.level[self.ranges // num_leaves, 0] == 0
        return torch.where(is_leaf, self.ranges % num_leaves, -1)

    def split(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Part]:
        """The batches, of queries, keys and values in the order of `queries` and `keys`; none without queries."""
        of_q, of_k, *most = (self.sizes[i::4] for i in range(4))
        parts = map(Part, q.split(of_q), k.split(of_k), v.split(of_k), self.counts.split(self.batches, dim=1), *most)
        return (part for part in parts if part.most_queries)


def _ranks(rows: Tensor) -> Tensor:
    """Which number each row has among the different ones, in lexicographic order: (M, n > 1), not negative → (M,)"""
    rank, beyond = rows[:, 0], rows.amax() + 1
    for column in rows.unbind(1)[1:]:
        values, order = (rank * beyond + column).sort()
        rank = torch.empty_like(order).scatter_(0, order, F.pad(values[1:] != values[:-1], (1, 0)).cumsum(0))
    return rank


def _in_ranges(starts: Tensor, sizes: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """start, start + 1, … of each range, one after the other, `total` in all; and of each, in which range it is."""
    which = torch.repeat_interleave(sizes, output_size=total)
    shift = starts - (sizes.cumsum(0) - sizes)
    return shift[which] + torch.arange(total, device=starts.device), which
