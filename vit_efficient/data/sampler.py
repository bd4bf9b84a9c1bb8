"""The order of samples, as a function of (seed, epoch)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from vit_efficient.utils.checks import as_integer
from vit_efficient.utils.errors import UserError

_STREAMS = ('order', 'sample', 'step', 'canvas', 'stage', 'repeat')


def stable_seed(stream: str, *key: int) -> np.random.SeedSequence:
    """Hashes a key (integers ≥ 0, always as many for one stream) to a seed that is the same on every machine.

    A stream is what the draws are for: order (of an epoch), sample (its augmentation), step (of the training loop),
    canvas (of an image that is made up), stage (of what is new in the model) or repeat (the augmentation of a sample
    that an epoch has had before).
    """
    return np.random.SeedSequence((_STREAMS.index(stream), *key))


def sample_seed(seed: int, epoch: int, index: int, repeat: int = 0) -> np.random.SeedSequence:
    """The seed of a sample's augmentation; the first time in an epoch (`repeat` 0), whatever else there is."""
    return stable_seed('repeat', seed, epoch, index, repeat) if repeat else stable_seed('sample', seed, epoch, index)


class EpochSampler(Sampler[tuple[int, ...]]):
    """Yields keys (epoch, index), so that loader processes know the epoch they draw for.

    The order of an epoch is a permutation drawn from (seed, epoch) alone. The processes take `block` samples of it in
    turn, hence the batches of all processes together are consecutive samples; with blocks of the batch size they are
    the batches that a single process has one after the other.

    With `repeats`, keys are (epoch, index, repeat): each sample of the permutation comes that many times in a row, with
    another augmentation, until there are as many as the data set holds; the rest of it is left out. That is repeated
    augmentation (Hoffer et al., "Augment Your Batch", 2019, arXiv 1901.09335) as in DeiT and timm's `RepeatAugSampler`,
    whose blocks are of one sample, so that processes have a copy each; with blocks of the batch size, they share it.

    With `groups` of consecutive samples, such as shards, an epoch has the groups in random order, and the samples of
    only `mixed` of them at a time: so few files are read at once, where disks are slow at random access.

    Args:
        size: Samples in the data set.
        seed: Of the permutations, ≥ 0.
        shuffle: False keeps the data set's order.
        rank, world_size: This process, of so many.
        even: Leave out what does not fill a block of every process, so that all have as many samples (training);
            otherwise none is left out (evaluation).
        groups, mixed: Numbers of samples of each group (none: all are a single one), and groups shuffled together.

    Raises:
        UserError: If `block`, `repeats` or `mixed` is no positive integer, or groups do not add up to `size`.
    """

    def __init__(
        self,
        size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        even: bool = True,
        block: int = 1,
        repeats: int = 1,
        groups: Sequence[int] = (),
        mixed: int = 1,
    ):
        if groups and sum(groups) != size:
            raise UserError(f'groups hold {sum(groups)} samples, there are {size}')
        self.block = as_integer('block', block)
        self.repeats = as_integer('repeats', repeats)
        self.mixed = as_integer('mixed', mixed)
        self.total = size
        self.size = size - size % (world_size * self.block) if even else size
        self.seed, self.shuffle, self.groups = seed, shuffle, groups
        self.rank, self.world_size = rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch, and how many samples of it (of all processes together) are skipped."""
        if start % (self.world_size * self.block):
            raise UserError(f'{start=} must be a multiple of world_size={self.world_size} × block={self.block}')
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        order = self._shuffled() if self.shuffle else np.arange(self.total)
        which, repeats = np.divmod(self._positions(), self.repeats)
        for index, repeat in zip(order[which].tolist(), repeats.tolist(), strict=True):
            yield (self.epoch, index) if self.repeats == 1 else (self.epoch, index, repeat)

    def _shuffled(self) -> np.ndarray:
        draw = np.random.default_rng(stable_seed('order', self.seed, self.epoch))
        if not self.groups:
            return draw.permutation(self.total)
        groups = np.split(np.arange(self.total), np.cumsum(self.groups)[:-1])
        which = draw.permutation(len(groups))
        parts = (which[first : first + self.mixed] for first in range(0, len(which), self.mixed))
        return np.concatenate([draw.permutation(np.concatenate([groups[g] for g in part])) for part in parts])

    def __len__(self) -> int:
        return len(self._positions())

    def _positions(self) -> np.ndarray:
        """The positions of the samples of this process in the order of the epoch."""
        positions = np.arange(self.start, self.size)
        return positions[(positions - self.start) // self.block % self.world_size == self.rank]


def shard_order(dataset: Dataset, mixed: int | None) -> dict[str, Any]:
    """The arguments of `EpochSampler` by which only `mixed` shards (None: all) at a time are shuffled together."""
    if mixed is None:
        return {}
    if (groups := getattr(dataset, 'groups', None)) is None:
        raise UserError(f'data.mixed_shards={mixed} is for shards, {type(dataset).__name__} has none; leave it out')
    return {'groups': groups, 'mixed': mixed}
