"""The smallest of many scores, exactly so many of them: which weights go. Knows no model.

Scores are fp32 and not negative, so their bits, read as integers, stand in the same order. The score of the last that
goes is found by halving the range of these bits: 31 counts over the scores and no sorted copy, which for a matrix of
8,192 x 2,048 would take 134 MB of places.
"""

from collections.abc import Sequence

import torch

LARGEST = 0x7F800000
"""The bits of infinity: no finite score lies above."""


def smallest(parts: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Of each group, a row over all `parts` (groups, columns) fp32, mark the `count` smallest; of equal scores those
    that stand first. Returns bool tensors of the same shapes.
    """
    bits = [part.contiguous().view(torch.int32) for part in parts]
    low = torch.zeros(parts[0].shape[0], dtype=torch.int32, device=parts[0].device)
    high = torch.full_like(low, LARGEST)
    while bool((low < high).any()):
        middle = low + (high - low) // 2
        enough = _counted([part <= middle[:, None] for part in bits]) >= count
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle + 1)
    edge = low[:, None]
    rest = count - _counted([part < edge for part in bits])
    marks = []
    for part in bits:
        equal = part == edge
        marks.append((part < edge) | (equal & (equal.cumsum(1) <= rest[:, None])))
        rest = rest - equal.sum(1)
    return marks


def _counted(marks: Sequence[torch.Tensor]) -> torch.Tensor:
    """(groups,) how many are marked."""
    return torch.stack([mark.sum(1) for mark in marks]).sum(0)


def all_but(scores: torch.Tensor, kept: int, of: int) -> torch.Tensor:
    """Mark in every `of` neighbours of a row of scores (rows, columns) all but the `kept` largest (N:M sparsity,
    Mishra et al., 2021, arXiv:2104.08378). columns: a multiple of `of`."""
    return smallest([scores.reshape(-1, of)], of - kept)[0].reshape(scores.shape)
