"""What tensors take: every storage that is made is counted while it lives, on a GPU's behalf or the computer's.

Tensors without memory (on the device `meta`, or fake ones) are counted by what they would take: so a model can be
weighed that does not fit anywhere.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Footprint(TorchDispatchMode):
    """Inside the block, `now` is the bytes of all that was made in it and still lives, `peak` the most they were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of each operation, what it returns is looked at: views and what is changed in place are known already."""
        found = func(*args, **(kwargs or {}))
        for part in found if isinstance(found, tuple | list) else (found,):
            if isinstance(part, torch.Tensor):
                self._note(part)
        return found

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if (known := self._known.get(key)) is not None and known() is storage:
            return
        size = storage.nbytes()

        def gone(_storage: Any) -> None:
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
