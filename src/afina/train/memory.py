"""How many tokens are computed at once, and what to do when that is more than the memory holds.

Less at once changes memory and speed, never the experiment: the same samples, order, schedule and dropout seeds.
"""

import heapq
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from afina.data.batch import Batch
from afina.data.order import order_of
from afina.data.template import Rendered
from afina.errors import ResourceError
from afina.language import _
from afina.model.load import Hardware
from afina.recipe.schema import Recipe, Training
from afina.train.optimizer import moments

T = TypeVar("T")
MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384, "mps": 4096}
"""Computed at once where the recipe says nothing: enough to fill the device, little enough to fit by the weights."""
USABLE = 0.92
"""Of the memory that is free on a GPU; the rest is for what fragments and for other programs' sudden needs."""
STEPS_LOOKED_AT = 20_000
SIGNS = ("out of memory", "can't allocate memory", "not enough memory")
"""What CUDA, MPS and the CPU's allocator say, in lower case."""


@dataclass
class Room:
    """`tokens`: the most that is computed at once, padding included. `history`: each time it had to shrink."""

    tokens: int
    history: list[dict[str, Any]] = field(default_factory=list)

    def shrink(self, step: int, batches: Sequence[Batch]) -> dict[str, Any]:
        """Halve it, counted from the largest of the micro-batches that did not fit; returns what the log shall say.

        Raises ResourceError when each of them is a single sample already.
        """
        largest = max(batches, key=lambda batch: batch.input_ids.numel())
        if all(len(batch.samples) == 1 for batch in batches):
            raise ResourceError(
                _("A single sample of {tokens} tokens does not fit into the memory.").format(tokens=largest.tokens),
                hint=_("Lower model.max_length, take a smaller base model, or a machine with more memory."),
            )
        before, self.tokens = self.tokens, max(1, min(self.tokens, largest.input_ids.numel()) // 2)
        self.history.append({"step": step, "before": before, "after": self.tokens})
        return {"kind": "memory", **self.history[-1]}


def at_once(recipe: Recipe, device: str, extra: int) -> int:
    """The most tokens that are computed at once on a kind of device, before memory is looked at.

    extra: virtual tokens before each sample.
    """
    most = max(recipe.model.max_length + extra, MICRO_BATCH_TOKENS[device])
    return recipe.training.micro_batch_tokens or most


def left_for_a_pass(free: int, learning: Sequence[torch.nn.Parameter], training: Training) -> int:
    """Bytes of a GPU's free memory that a forward and backward pass may take: beside the optimiser's moments, which are
    still to come, and the gradients of the micro-batches before."""
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in learning)
    return int(free * USABLE) - gradients - moments(learning, training)


def fullest(
    rows: Sequence[Rendered], training: Training, seed: int, budget: int, extra: int = 0
) -> tuple[list[int], list[int]]:
    """The samples of the step whose largest micro-batch is the largest, and the longest samples, as many as a step may
    hold: what has the largest micro-batch there can be is among these.

    Cut evenly, a step just below the budget has larger ones than one far above it. extra: virtual tokens of a sample.
    """
    lengths = [int(row.ids.size) + extra for row in rows]
    order = order_of(lengths, training, seed)
    steps = training.steps or order.steps
    looked = range(0, steps, -(-steps // STEPS_LOOKED_AT))

    def largest(step: int) -> float:
        total = sum(lengths[index] for index in order.step(step))
        return total / -(-total // budget)

    count = training.batch_size if training.batch_tokens is None else 1 + training.batch_tokens // min(lengths)
    return order.step(max(looked, key=largest)), heapq.nlargest(count, range(len(rows)), lengths.__getitem__)


def within_memory(compute: Callable[[], T]) -> T | None:
    """What `compute` returns, or None when the memory ran out; nothing it held is held any longer."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(
            sign in str(error).lower() for sign in SIGNS
        ):
            raise
    # Only here, outside the handler, has the traceback let go of the tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def probe(room: Room, make: Callable[[], Sequence[Batch]], compute: Callable[[Batch], object]) -> list[dict[str, Any]]:
    """Try the largest micro-batch there will be, so that memory fails now or not at all; returns lines for the log.

    `make` cuts the longest samples as `room` says; `compute` runs one forward and backward. Random numbers are put
    back; gradients are the caller's to clear. Raises ResourceError.
    """
    lines: list[dict[str, Any]] = []
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        while True:
            batches = make()
            largest = max(batches, key=lambda batch: batch.input_ids.numel())
            if within_memory(lambda largest=largest: compute(largest) is None) is not None:  # type: ignore[misc]
                return lines
            lines.append(room.shrink(0, batches))


def peak_memory(hardware: Hardware) -> int:
    """Most bytes held so far: on the GPU by tensors, else by this whole process."""
    if hardware.device.type == "cuda":
        return torch.cuda.max_memory_allocated(hardware.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
