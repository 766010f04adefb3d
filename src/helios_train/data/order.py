"""The order of samples: a pure function of (seed, epoch, global batch), the same for any number of ranks and workers.

An epoch: within each (height, width) shards are shuffled, then samples inside groups of `GROUP` neighbouring shards (so that
reading stays local), cut into global batches; then the list of batches is shuffled. A last batch that is not full is filled
from the head of the same epoch's order: no sample is missing, repeats are fill only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from helios_train import rng
from helios_train.errors import InputError

GROUP = 8


@dataclass(frozen=True)
class Ref:
    """One sample's place in the run: enough to draw everything that belongs to it. Plain integers, cheap to hand to a worker."""

    iteration: int
    position: int  # in the global batch
    epoch: int
    sample: int  # id: ordinal over the shards


class Order:
    """Sample ids of every iteration. `shapes` gives, for each (height, width), the arrays of sample ids shard by shard."""

    def __init__(self, seed: int, global_batch: int, shapes: Sequence[Sequence[np.ndarray]]):
        self.seed, self.global_batch = seed, global_batch
        self.shapes = [[shard for shard in shards if len(shard)] for shards in shapes]
        self.shapes = [shards for shards in self.shapes if shards]
        if not self.shapes:
            raise InputError(
                "no clip is left to train on: every clip of the dataset is held out, or there is none; lower data.held_out"
            )
        self.sizes = [sum(len(shard) for shard in shards) for shards in self.shapes]

    @property
    def batches(self) -> int:
        """Global batches, and so iterations, an epoch."""
        return sum(-(-size // self.global_batch) for size in self.sizes)

    @property
    def fill(self) -> int:
        """Samples seen twice an epoch because the last batch of their shape was not full."""
        return self.batches * self.global_batch - sum(self.sizes)

    def epoch(self, epoch: int) -> np.ndarray:
        """Sample ids `[batches, global_batch]` of an epoch."""
        parts = []
        for number, shards in enumerate(self.shapes):
            draw = rng.generator(self.seed, "order", epoch, number)
            turn = draw.permutation(len(shards))
            groups = [np.concatenate([shards[i] for i in turn[at : at + GROUP]]) for at in range(0, len(turn), GROUP)]
            order = np.concatenate([draw.permutation(group) for group in groups])
            wanted = -(-len(order) // self.global_batch) * self.global_batch
            parts.append(np.resize(order, wanted).reshape(-1, self.global_batch))
        batches = np.concatenate(parts)
        return batches[rng.generator(self.seed, "order of batches", epoch).permutation(len(batches))]

    def batch(self, iteration: int) -> list[Ref]:
        """The global batch of an iteration, all positions."""
        epoch, index = divmod(iteration, self.batches)
        return [Ref(iteration, position, epoch, int(sample)) for position, sample in enumerate(self._cached(epoch)[index])]

    @lru_cache(maxsize=2)  # noqa: B019  (an Order lives as long as its run)
    def _cached(self, epoch: int) -> np.ndarray:
        return self.epoch(epoch)


class Cursor:
    """Endless batches of this rank's slice of each global batch, from an iteration on: a batch sampler for DataLoader.

    Has no length on purpose: the loop, not the loader, decides when a run ends.
    """

    def __init__(self, order: Order, start: int, rank: int, ranks: int):
        if order.global_batch % ranks:
            raise InputError(f"data.global_batch={order.global_batch} cannot be divided among {ranks} devices; choose a multiple")
        self.order, self.start, self.rank, self.ranks = order, start, rank, ranks

    def __iter__(self) -> Iterator[list[Ref]]:
        share = self.order.global_batch // self.ranks
        iteration = self.start
        while True:
            yield self.order.batch(iteration)[self.rank * share : (self.rank + 1) * share]
            iteration += 1
