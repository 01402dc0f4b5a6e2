"""The best weights of a run so far, by one figure: what the finished run holds.

They are copied when they are measured, and written by the keeper before the next checkpoint, so that whatever a
checkpoint says is best lies on the disk already. Knows nothing of where the figure comes from.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from afina.train.state import State

VALIDATION = "validation_loss"


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
