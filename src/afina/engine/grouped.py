"""Products of rows sorted by expert with their expert's matrix, all experts at once.

The plain twins are loops. On a GPU the large products are PyTorch's grouped one, once it has shown on the very weights
that it is right, and the low-rank ones Triton kernels (expert_kernels.py). `ends`: (experts,) int32, where each
expert's rows end; an expert may have none.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from afina.engine.elementwise import twin_of


def grouped(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(pairs, out): rows of x (pairs, in) times their expert's matrix of `weights` (experts, in, out)."""
    if _fast(x, weights):
        return F.grouped_mm(x, weights, offs=ends)
    return _grouped_by_loops(x, weights, ends.tolist())


def _grouped_by_loops(x: torch.Tensor, weights: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    out, start = x.new_empty(x.shape[0], weights.shape[2]), 0
    for weight, end in zip(weights, ends, strict=True):
        torch.mm(x[start:end], weight, out=out[start:end])
        start = end
    return out


@twin_of("expert_kernels")
def grouped_add(y: torch.Tensor, low: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """y (pairs, width) += rows of low (pairs, r) times their expert's matrix of `weights` (experts, r, width)."""
    start = 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        y[start:end].addmm_(low[start:end], weight)
        start = end
    return y


@twin_of("expert_kernels")
def grouped_outer(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(experts, r, width), at least fp32: a^T b over each expert's rows of a (pairs, r) and b (pairs, width)."""
    wide, start = torch.promote_types(a.dtype, torch.float32), 0
    out = a.new_empty(ends.numel(), a.shape[1], b.shape[1], dtype=wide)
    for place, end in zip(out, ends.tolist(), strict=True):
        torch.mm(a[start:end].t().to(wide), b[start:end].to(wide), out=place)
        start = end
    return out


_PROVEN: dict[tuple[object, ...], bool] = {}


def _fast(x: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether PyTorch's grouped product takes these, and gave what loops give for weights of the same layout."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    layout = (x.device.index, *weights.shape, *weights.stride())
    if layout not in _PROVEN:
        _PROVEN[layout] = _proves(weights)
    return _PROVEN[layout]


@torch.no_grad()
def _proves(weights: torch.Tensor) -> bool:
    """Some builds multiply by another view than was given (pytorch issue 186365), and some cards have no kernel."""
    count = weights.shape[0]
    sizes = [(7 * number) % 5 * 33 for number in range(count)]  # also experts without a row
    ends = torch.tensor(sizes, device=weights.device).cumsum(0, dtype=torch.int32)
    generator = torch.Generator(weights.device).manual_seed(0)
    x = torch.randn(sum(sizes), weights.shape[1], dtype=weights.dtype, device=weights.device, generator=generator)
    try:
        found = F.grouped_mm(x, weights, offs=ends).float()
    except RuntimeError:
        return False
    truth = _grouped_by_loops(x, weights, ends.tolist()).float()
    return bool((found - truth).norm() <= 1e-2 * truth.norm())
