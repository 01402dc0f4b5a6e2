"""AdamW (Loshchilov & Hutter, 2017, arXiv:1711.05101) over many tensors at once; it clips gradients as it reads them.

Clipping before the step reads every gradient, writes it, and reads it again, in PyTorch's own launches of a part of the
tensors each. Here a gradient is read for the norm and read for the step, and written never: of 22 bytes that a 16-bit
weight moves, 16 are left. The plain twin defines what the kernels (adamw_kernels.py) do, in at least fp32 throughout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

CHUNK = 16384
"""Elements that one program steps."""
LARGE = 2**20
"""Elements of a tensor, on average, from which on it is the bytes that take the time, and not Python's launches."""


class Factors(NamedTuple):
    """Of one tensor's step: `decay`, what its weights are multiplied by; `size`, of the step over the first moment's
    bias; `root`, of the second moment's bias; the two moments' rates, and what keeps the quotient finite."""

    decay: float
    size: float
    root: float
    first: float
    second: float
    eps: float


class Learning(NamedTuple):
    """Tensors of one shape, each a row of what learns: weight, gradient, first and second moment."""

    weight: torch.Tensor
    gradient: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor


class Many:
    """Tensors that step together, those of one precision on one device. Raises ValueError for others."""

    def __init__(self, sizes: Sequence[int], like: torch.Tensor) -> None:
        starts = [(entry, start) for entry, size in enumerate(sizes) for start in range(0, size, CHUNK)]
        self.like, self.sizes = like, list(sizes)
        self.chunks = torch.tensor(starts, dtype=torch.int64).to(like.device)
        self._known: list[tuple[int, ...]] = []
        self._places = self.chunks

    def places(self, tensors: Sequence[Learning]) -> torch.Tensor:
        """(tensors, 5): where each lies, and its size; made anew where one lies elsewhere than the last time."""
        found: list[tuple[int, ...]] = [
            (weight.data_ptr(), gradient.data_ptr(), first.data_ptr(), second.data_ptr(), size)
            for (weight, gradient, first, second), size in zip(tensors, self.sizes, strict=True)
        ]
        if found != self._known:
            for one, size in zip(tensors, self.sizes, strict=True):
                if not all(in_a_row(part) and part.numel() == size for part in one):
                    raise ValueError("a tensor that learns does not lie in a row of its own")
            self._known = found
            self._places = torch.tensor(found, dtype=torch.int64).to(self.like.device)
        return self._places


def fits(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels take these, and gain: large, of one precision on one GPU, each in a row from 16 bytes on."""
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    large = sum(tensor.numel() for tensor in tensors) >= LARGE * len(tensors)
    taken = len(kinds) == 1 and tensors[0].is_cuda and tensors[0].dtype in (torch.bfloat16, torch.float32)
    return large and taken and all(map(in_a_row, tensors))


def in_a_row(tensor: torch.Tensor) -> bool:
    """Whether its elements lie one after the other, from 16 bytes on."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def squares(many: Many, tensors: Sequence[Learning]) -> torch.Tensor:
    """The sum of all gradients' squares, (), at least fp32, in a fixed order."""
    if many.like.is_cuda:
        from afina.train import adamw_kernels

        return adamw_kernels.squares(many, many.places(tensors))
    wide = torch.promote_types(many.like.dtype, torch.float32)
    return torch.stack([one.gradient.to(wide).square().sum() for one in tensors]).sum()


def step(many: Many, tensors: Sequence[Learning], factors: Sequence[Factors], scale: torch.Tensor) -> None:
    """Step each, its gradient times `scale` (), at least fp32."""
    if many.like.is_cuda:
        from afina.train import adamw_kernels

        adamw_kernels.step(many, many.places(tensors), factors, scale)
        return
    for one, by in zip(tensors, factors, strict=True):
        wide = torch.promote_types(one.weight.dtype, torch.float32)
        weight, gradient, first, second = (part.to(wide) for part in (one.weight, one.gradient, one.first, one.second))
        gradient = gradient * scale
        first = by.first * first + (1 - by.first) * gradient
        second = by.second * second + (1 - by.second) * gradient * gradient
        one.weight.copy_(weight * by.decay - by.size * first / (second.sqrt() / by.root + by.eps))
        one.first.copy_(first)
        one.second.copy_(second)
