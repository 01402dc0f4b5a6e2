"""Saved tensors that wait in the computer's memory: sent while the next layers compute, fetched before their turn.

The copies of two layers are under way at once at most. The forward waits for one to end before it lets the next begin:
a tensor on its way still takes room on the GPU, and a forward that ran ahead would keep them all there.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

LAYERS_AT_ONCE = 2


class Offload:
    """Streams and pinned buffers; buffers are kept from step to step."""

    def __init__(self) -> None:
        self._out, self.incoming = torch.cuda.Stream(), torch.cuda.Stream()
        self._leaving: deque[list[tuple[torch.Tensor, torch.cuda.Event]]] = deque()
        self.free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def begin(self) -> None:
        """What is sent from here on is another layer's."""
        self.settle(LAYERS_AT_ONCE - 1)
        self._leaving.append([])

    def send(self, tensor: torch.Tensor) -> "Parked":
        """Begin to copy a tensor away. It stays on the GPU until the copy has ended."""
        free = self.free.setdefault((tensor.shape, tensor.dtype), [])
        host = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        done = torch.cuda.Event()
        self._out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._out):
            host.copy_(tensor, non_blocking=True)
            done.record()
        self._leaving[-1].append((tensor, done))
        return Parked(self, host, done)

    def settle(self, left: int = 0) -> None:
        """Wait until the tensors of no more than so many layers are still on their way."""
        while len(self._leaving) > left:
            for _tensor, done in self._leaving.popleft():
                done.synchronize()


@dataclass
class Parked:
    """A tensor in pinned memory; `done` says when it has arrived there, `back` is its copy on the GPU, on its way."""

    by: Offload
    host: torch.Tensor
    done: torch.cuda.Event
    back: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def begin(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Begin to copy it back."""
        if self.back is None:
            tensor = torch.empty(self.host.shape, dtype=self.host.dtype, device="cuda")
            arrived = torch.cuda.Event()
            self.by.incoming.wait_event(self.done)
            self.by.incoming.wait_stream(torch.cuda.current_stream())  # the room may have been another's until now
            with torch.cuda.stream(self.by.incoming):
                tensor.copy_(self.host, non_blocking=True)
                arrived.record()
            self.back = tensor, arrived
        return self.back

    def fetch(self) -> torch.Tensor:
        """The tensor, usable on the current stream; its pinned buffer is free again."""
        tensor, arrived = self.begin()
        torch.cuda.current_stream().wait_event(arrived)
        self.by.free[self.host.shape, self.host.dtype].append(self.host)
        return tensor


def brought(parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Tensors out of pinned memory on the GPU, one after another in two places: the next comes while one is used."""
    compute, copying = torch.cuda.current_stream(), torch.cuda.Stream()
    places = [torch.empty_like(part, device="cuda") for part in parts[:2]]

    def begin(number: int) -> torch.Tensor:
        copying.wait_stream(compute)  # what was asked of this place before has been computed then
        with torch.cuda.stream(copying):
            return places[number % 2][: parts[number].shape[0]].copy_(parts[number], non_blocking=True)

    coming = begin(0)
    for number in range(1, len(parts) + 1):
        here = coming
        compute.wait_stream(copying)
        if number < len(parts):
            coming = begin(number)
        yield here
