"""Which samples belong to which optimiser step: a pure function of seed and position, found in constant time.

Nothing is remembered between steps, so a run can be continued at any step, and the order does not depend on how a
step is cut into micro-batches.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np


@dataclass(frozen=True)
class Order:
    """`samples` indices shuffled anew each epoch and dealt out `batch_size` at a time.

    A step may span two epochs; the last one may be short, so that exactly `epochs` passes are made.
    """

    samples: int
    batch_size: int
    epochs: float
    seed: int

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return math.ceil(self._seen / self.batch_size)

    @property
    def _seen(self) -> int:
        return max(1, round(self.samples * self.epochs))

    def step(self, number: int) -> list[int]:
        """The samples of step `number` (from 0)."""
        first = number * self.batch_size
        places = range(first, min(first + self.batch_size, self._seen))
        return [
            int(_permutation(self.samples, self.seed, place // self.samples)[place % self.samples]) for place in places
        ]

    def epoch(self, number: int) -> float:
        """Passes over the data finished when step `number` begins."""
        return number * self.batch_size / self.samples


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    order.flags.writeable = False  # it is shared with whoever asks next
    return order


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed for one purpose, such as the dropout of one micro-step, from the run's seed and where it is.

    Different parts give different seeds: (1, 0) is neither (1,) nor (10,), as it would be in numpy's SeedSequence.
    """
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
