"""The best weights of a run so far, by one figure: what the finished run holds.

A validation of few samples scatters: on six of them the lowest loss comes by chance as often as not. So later weights
are given up for earlier ones only where they are worse beyond that chance, judged on the same samples (the rule of one
standard error, Breiman et al., 1984). They are copied when they are measured, and written by the keeper
before the next checkpoint, so that whatever a checkpoint says is best lies on the disk already.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from afina.language import _
from afina.train.state import State

VALIDATION = "validation_loss"
GROUPS = 32
"""Into so many groups the validation samples are dealt, or one each where there are fewer."""
BEYOND = 1.0
"""Standard errors by which later weights must be worse."""


@dataclass(frozen=True)
class Measured:
    """One validation: the sum of the loss over the targets of each group of samples, and what these targets count."""

    sums: tuple[float, ...]
    counts: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean over all targets, in nats per token."""
        return sum(self.sums) / sum(self.counts)

    def chance(self, before: Sequence[float]) -> float:
        """The standard error of the difference to the mean of `before`, sums of the same groups; of one, infinite.

        That of a ratio: the groups' own differences, less what the mean difference gives each.
        """
        if len(self.sums) < 2:
            return math.inf
        differences = [now - then for now, then in zip(self.sums, before, strict=True)]
        whole, groups = sum(self.counts), len(self.counts)
        mean = sum(differences) / whole
        rest = sum((found - mean * count) ** 2 for found, count in zip(differences, self.counts, strict=True))
        return math.sqrt(rest * groups / (groups - 1)) / whole


def figure_of(task: str) -> str:
    """What the main figure of a task is called among the figures that may decide."""
    return f"tasks.{task}"


@dataclass(frozen=True)
class Criterion:
    """By which figure one state is better than another, and whether `larger` is better."""

    figure: str = VALIDATION
    larger: bool = False

    def prefers(self, value: float, before: float | None) -> bool:
        """Whether `value` is better than `before`; the first number is, and of two equal ones the earlier."""
        if not math.isfinite(value):
            return False
        return before is None or (value > before if self.larger else value < before)


@dataclass(frozen=True)
class Weights:
    """A copy of what learns, after `step` steps; `facts`: the figure and its value."""

    step: int
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def why_last(best: dict[str, Any] | None, lowest: dict[str, Any] | None, samples: int) -> str | None:
    """Where the last weights are held though others had a better figure: one sentence that says so."""
    if best is None or lowest is None or lowest["step"] == best["step"]:
        return None
    return _(
        "Kept      the last weights: {value:.4f} is not worse than {lowest:.4f} after step {step} by more than chance, "
        "on {count} validation samples"
    ).format(value=best["value"], lowest=lowest["value"], step=lowest["step"], count=samples)


def weights_of(state: State) -> dict[str, torch.Tensor]:
    """Copies, in main memory, of what learns, by name: the loop may go on at once."""
    return {name: parameter.detach().to("cpu", copy=True).contiguous() for name, parameter in state.learning.items()}


def put_back(state: State, tensors: dict[str, torch.Tensor]) -> bool:
    """Give what learns these values; False, and nothing changed, when they are of other weights."""
    shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in state.learning.items()}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} != shapes:
        return False
    with torch.no_grad():
        for name, parameter in state.learning.items():
            parameter.copy_(tensors[name])
    return True
