"""The order of samples, as a function of (seed, epoch)."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

_STREAMS = ('order', 'sample', 'step', 'canvas', 'stage', 'repeat')


def stable_seed(stream: str, *key: int) -> np.random.SeedSequence:
    """Hashes a key to a seed that is the same on every machine and in every process.

    Args:
        stream: What the draws are for: order (of an epoch), sample (its augmentation), step (of the training loop),
            canvas (of an image that is made up), stage (of what is new in the model) or repeat (the augmentation of
            a sample that an epoch has had before).
        *key: Integers ≥ 0, always as many for one stream.
    """
    return np.random.SeedSequence((_STREAMS.index(stream), *key))


def sample_seed(seed: int, epoch: int, index: int, repeat: int = 0) -> np.random.SeedSequence:
    """Of the augmentation of a sample; the first time in an epoch (`repeat` 0), the same whatever else there is."""
    return stable_seed('repeat', seed, epoch, index, repeat) if repeat else stable_seed('sample', seed, epoch, index)


class EpochSampler(Sampler[tuple[int, ...]]):
    """Yields keys (epoch, index), so that loader processes know the epoch they draw for.

    The order of an epoch is a permutation drawn from (seed, epoch) alone. Process `rank` of `world_size` takes every
    `world_size`-th sample of it, hence the batches of all processes together are consecutive samples.

    With `repeats`, keys are (epoch, index, repeat): each sample of the permutation comes that many times in a row, with
    another augmentation, until there are as many as the data set holds; the rest of the permutation is left out.
    That is repeated augmentation (Hoffer et al., "Augment Your Batch", 2019, arXiv 1901.09335) as in DeiT and in
    timm's `RepeatAugSampler`: copies share a batch, with several processes each has them in another one.

    With `groups`, such as the shards of a data set, an epoch has the groups in random order, and the samples of only
    `mixed` of them at a time: so few files are read at once, where disks are slow at random access.

    Args:
        size: Samples in the data set.
        seed: Seed of the permutations, ≥ 0.
        shuffle: False keeps the data set's order.
        rank: This process.
        world_size: Number of processes.
        even: Leave out the last `size % world_size` samples, so that every process has as many (training); otherwise
            none is left out (evaluation).
        repeats: How often a sample comes in an epoch that has it.
        groups: The number of samples of each group of consecutive ones; none: all are a single one.
        mixed: Groups that are shuffled together.

    Raises:
        ValueError: If `repeats` or `mixed` is below 1, or groups do not add up to `size`.
    """

    def __init__(
        self,
        size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        even: bool = True,
        repeats: int = 1,
        groups: Sequence[int] = (),
        mixed: int = 1,
    ):
        if repeats < 1 or mixed < 1:
            raise ValueError(f'repeats and mixed must be at least 1, got {repeats=}, {mixed=}')
        if groups and sum(groups) != size:
            raise ValueError(f'groups hold {sum(groups)} samples, there are {size}')
        self.size = size - size % world_size if even else size
        self.total = size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.groups = groups
        self.mixed = mixed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch, and how many samples of it (of all processes together) are skipped."""
        if start % self.world_size:
            raise ValueError(f'{start=} must be a multiple of world_size={self.world_size}')
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        order = self._shuffled() if self.shuffle else np.arange(self.total)
        places = range(self.start + self.rank, self.size, self.world_size)
        if self.repeats == 1:
            for index in order[places.start : self.size : self.world_size].tolist():
                yield self.epoch, index
            return
        for place in places:
            which, repeat = divmod(place, self.repeats)
            yield self.epoch, int(order[which]), repeat

    def _shuffled(self) -> np.ndarray:
        draw = np.random.default_rng(stable_seed('order', self.seed, self.epoch))
        if not self.groups:
            return draw.permutation(self.total)
        groups = np.split(np.arange(self.total), np.cumsum(self.groups)[:-1])
        which = draw.permutation(len(groups))
        parts = (which[first : first + self.mixed] for first in range(0, len(which), self.mixed))
        return np.concatenate([draw.permutation(np.concatenate([groups[g] for g in part])) for part in parts])

    def __len__(self) -> int:
        return len(range(self.start + self.rank, self.size, self.world_size))
