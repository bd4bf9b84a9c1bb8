"""The order of samples, as a function of (seed, epoch)."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_STREAMS = ('order', 'sample', 'step', 'canvas', 'stage')


def stable_seed(stream: str, *key: int) -> np.random.SeedSequence:
    """Hashes a key to a seed that is the same on every machine and in every process.

    Args:
        stream: What the draws are for: order (of an epoch), sample (its augmentation), step (of the training loop),
            canvas (of an image that is made up) or stage (of what is new in the model).
        *key: Integers ≥ 0, always as many for one stream.
    """
    return np.random.SeedSequence((_STREAMS.index(stream), *key))


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields keys (epoch, index), so that loader processes know the epoch they draw for.

    The order of an epoch is a permutation drawn from (seed, epoch) alone. The processes take `block` samples of it in
    turn, hence the batches of all processes together are consecutive samples; with blocks of the batch size they are
    the batches that a single process has one after the other.

    Args:
        size: Samples in the data set.
        seed: Seed of the permutations, ≥ 0.
        shuffle: False keeps the data set's order.
        rank: This process.
        world_size: Number of processes.
        even: Leave out what does not fill a block of every process, so that all have as many samples (training);
            otherwise none is left out (evaluation).
        block: Samples that a process takes at once, at least 1.
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
    ):
        if block < 1:
            raise ValueError(f'{block=} must be at least 1')
        self.size = size - size % (world_size * block) if even else size
        self.total = size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.block = block
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch, and how many samples of it (of all processes together) are skipped."""
        if start % (self.world_size * self.block):
            raise ValueError(f'{start=} must be a multiple of world_size={self.world_size} × block={self.block}')
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.total)
        if self.shuffle:
            order = np.random.default_rng(stable_seed('order', self.seed, self.epoch)).permutation(order)
        for index in order[self._positions()].tolist():
            yield self.epoch, index

    def __len__(self) -> int:
        return len(self._positions())

    def _positions(self) -> np.ndarray:
        """Of the samples of this process, in the order of the epoch."""
        positions = np.arange(self.start, self.size)
        return positions[(positions - self.start) // self.block % self.world_size == self.rank]
