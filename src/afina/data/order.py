"""Which samples belong to which optimiser step: a pure function of seed and position, found in constant time.

Nothing is remembered between steps, so a run can be continued at any step, and the order does not depend on how a
step is cut into micro-batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from afina.recipe.schema import Training


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
        return [_sample(self.samples, self.seed, place) for place in places]

    def epoch(self, number: int) -> float:
        """Passes over the data finished when step `number` begins."""
        return number * self.batch_size / self.samples


@dataclass(frozen=True)
class TokenOrder:
    """As `Order`, where a step takes samples until the next would bring it over so many tokens.

    `cuts`: the place in the endless row of shuffled samples where each step begins, and where the last one ends.
    """

    samples: int
    seed: int
    cuts: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return len(self.cuts) - 1

    def step(self, number: int) -> list[int]:
        """The samples of step `number` (from 0)."""
        return [_sample(self.samples, self.seed, place) for place in range(*self.cuts[number : number + 2])]

    def epoch(self, number: int) -> float:
        """Passes over the data finished when step `number` begins."""
        return self.cuts[number] / self.samples


def order_of(lengths: Sequence[int], training: Training, seed: int) -> Order | TokenOrder:
    """The order a recipe asks for, over samples of so many tokens."""
    count = len(lengths)
    if training.batch_tokens is None:
        size = training.batch_size
        epochs = training.epochs if training.steps is None else training.steps * size / count
        return Order(count, size, epochs, seed)
    seen = max(1, round(count * training.epochs)) if training.steps is None else None
    cuts, place, filled = [0], 0, 0
    while place != seen:
        length = lengths[_sample(count, seed, place)]
        if filled and filled + length > training.batch_tokens:
            cuts.append(place)
            filled = 0
            if len(cuts) - 1 == training.steps:
                return TokenOrder(count, seed, tuple(cuts))
        filled, place = filled + length, place + 1
    return TokenOrder(count, seed, (*cuts, place))


def _sample(count: int, seed: int, place: int) -> int:
    """Which sample stands at a place of the endless row, in which every `count` places are one epoch's shuffle."""
    return int(_permutation(count, seed, place // count)[place % count])


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
