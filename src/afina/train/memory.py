"""How many tokens are computed at once, and what to do when that is more than the memory holds.

Less at once changes memory and speed, never the experiment: the same samples, order, schedule and dropout seeds.
"""

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from afina.data.batch import Batch
from afina.errors import ResourceError
from afina.language import _
from afina.model.load import Hardware

T = TypeVar("T")
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
