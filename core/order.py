"""Which rows make which batch: a pure function of seed and step, so that any position is found at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rlx.core.streams import generator


@dataclass(frozen=True)
class Order:
    """Batches of row numbers.

    Epochs follow one another without a gap: a batch may hold the end of one and the start of the next, no row
    is dropped, and the last batch is as short as it comes.

    Attributes:
        length: rows of the data set.
        batch_size: rows of a batch, over all processes.
        seed: the run's seed.
        shuffle: a new permutation each epoch, or the order of the data.
        epochs: passes over the data, when max_steps does not decide.
        max_steps: batches, or None.
    """

    length: int
    batch_size: int
    seed: int
    shuffle: bool = True
    epochs: float = 1.0
    max_steps: int | None = None

    @property
    def total_rows(self) -> int:
        """Rows of the whole run, repeated ones counted again."""
        if self.max_steps is not None:
            return self.max_steps * self.batch_size
        return max(1, round(self.epochs * self.length))

    @property
    def total_steps(self) -> int:
        """Batches of the whole run."""
        return math.ceil(self.total_rows / self.batch_size)

    def rows(self, step: int) -> list[int]:
        """Row numbers of batch ``step``, counted from 0."""
        first, end = step * self.batch_size, min((step + 1) * self.batch_size, self.total_rows)
        return [self._row(*divmod(position, self.length)) for position in range(first, end)]

    def _row(self, epoch: int, place: int) -> int:
        return int(_permutation(self.length, self.seed, epoch)[place]) if self.shuffle else place


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> Tensor:
    """The rows of one epoch, shuffled; kept while the epoch lasts."""
    return torch.randperm(length, generator=generator(seed, "data", epoch))


def share(count: int, rank: int, world: int) -> range:
    """The contiguous part of ``count`` rows of process ``rank`` among ``world``; sizes differ by ≤ 1."""
    return range(count * rank // world, count * (rank + 1) // world)
