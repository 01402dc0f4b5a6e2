"""Rendered samples to micro-batches: which tokens are computed together, and which of them are targets.

Cut the samples of a step any way, get the same loss and gradient: a batch carries its targets explicitly, and the
loop divides by their number over the whole step. Packed, samples lie end to end in one row, positions restart, and
`lengths` tells attention where each begins; unpacked, each has a row of its own, padded on the right.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np
import torch

from afina.data.template import Rendered


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    input_ids, position_ids: (rows, width) int64, the latter 0 where padded. attention_mask: (rows, width) bool, or None
    when packed (rows = 1). lengths: tokens of each packed sample in order, or None. predicting: (targets,) int64, flat
    places in rows * width whose next token is learnt. targets: (targets,) int64, those tokens. owner: (targets,) int64,
    which of `samples` (by place in it) each target belongs to. tokens: real ones, padding left out. weights:
    (targets,) float32, how much each target counts, or None where all count 1.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    lengths: tuple[int, ...] | None
    predicting: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    samples: tuple[int, ...]
    tokens: int
    weights: torch.Tensor | None = None

    @property
    def weight(self) -> float:
        """What all targets count together: what the loop divides by."""
        return float(self.targets.numel()) if self.weights is None else float(self.weights.double().sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        mask = None if self.attention_mask is None else move(self.attention_mask)
        weights = None if self.weights is None else move(self.weights)
        return Batch(
            move(self.input_ids),
            move(self.position_ids),
            mask,
            self.lengths,
            move(self.predicting),
            move(self.targets),
            move(self.owner),
            self.samples,
            self.tokens,
            weights,
        )


def micro_batches(
    rendered: Sequence[Rendered], samples: Sequence[int], *, budget: int, packing: bool, pad_id: int, extra: int = 0
) -> list[Batch]:
    """Lay out `samples` (indices into `rendered`) in as few micro-batches of at most `budget` tokens as best fit finds.

    Packed, these are of even size where that is as few: a small rest would cost its launches with little to compute
    beside them (a step of 17,000 tokens in two of 8,500 takes 200 ms where 16,600 and 400 take 280), and the largest
    decides the memory. A sample longer than the budget gets a micro-batch of its own. Padding counts against the
    budget, and so do `extra` virtual tokens that the model puts before each sample.
    """
    lengths = {index: int(rendered[index].ids.size) + extra for index in samples}
    if packing:
        groups = _best_fit(samples, lengths, budget)
        return [_packed(rendered, group) for group in _even(samples, lengths, budget, len(groups)) or groups]
    return [_padded(rendered, group, pad_id) for group in _by_length(samples, lengths, budget)]


def _best_fit(samples: Sequence[int], lengths: dict[int, int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest bin that still has room."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted, so that the fullest that fits is found by halving
    for index in sorted(samples, key=lambda index: (-lengths[index], index)):
        found = bisect_left(rooms, (lengths[index], 0))
        if found < len(rooms):
            room, place = rooms.pop(found)
        else:
            room, place = budget, len(bins)
            bins.append([])
        bins[place].append(index)
        if room > lengths[index]:
            insort(rooms, (room - lengths[index], place))
    return bins


def _even(samples: Sequence[int], lengths: dict[int, int], budget: int, count: int) -> list[list[int]] | None:
    """So many bins, the longest sample first, each into the emptiest; None where one has no room left there."""
    bins: list[list[int]] = [[] for _bin in range(count)]
    filled = [(0, place) for place in range(count)]  # a heap as it stands
    for index in sorted(samples, key=lambda index: (-lengths[index], index)):
        tokens, place = filled[0]
        if tokens and tokens + lengths[index] > budget:
            return None
        bins[place].append(index)
        heapreplace(filled, (tokens + lengths[index], place))
    return bins


def _by_length(samples: Sequence[int], lengths: dict[int, int], budget: int) -> list[list[int]]:
    """Neighbours in length share a batch, so that little is padding."""
    groups: list[list[int]] = []
    for index in sorted(samples, key=lambda index: (lengths[index], index)):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _packed(rendered: Sequence[Rendered], group: Sequence[int]) -> Batch:
    rows = [rendered[index] for index in group]
    lengths = tuple(int(row.ids.size) for row in rows)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    places, targets, owner, weights = _targets(rows, starts)
    return Batch(
        torch.from_numpy(np.concatenate([row.ids for row in rows]).astype(np.int64))[None],
        torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        None,
        lengths,
        places,
        targets,
        owner,
        tuple(group),
        sum(lengths),
        weights,
    )


def _padded(rendered: Sequence[Rendered], group: Sequence[int], pad_id: int) -> Batch:
    rows = [rendered[index] for index in group]
    lengths = [int(row.ids.size) for row in rows]
    width = max(lengths)
    ids = np.full((len(rows), width), pad_id, np.int64)
    for place, row in enumerate(rows):
        ids[place, : row.ids.size] = row.ids
    mask = np.arange(width)[None] < np.array(lengths)[:, None]
    places, targets, owner, weights = _targets(rows, np.arange(len(rows)) * width)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(np.arange(width) * mask),
        torch.from_numpy(mask),
        None,
        places,
        targets,
        owner,
        tuple(group),
        sum(lengths),
        weights,
    )


def _targets(
    rows: Sequence[Rendered], starts: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A learnt token is predicted from the place before it, inside its own sample; a sample's first token never is."""
    places, targets, owner, weights = [], [], [], []
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        learnt = np.flatnonzero(row.learnt[1:])
        places.append(start + learnt)
        targets.append(row.ids[1:][learnt])
        owner.append(np.full(learnt.size, number))
        weights.append(np.ones(learnt.size, np.float32) if row.weights is None else row.weights[1:][learnt])
    found = [torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in (places, targets, owner)]
    weighted = any(row.weights is not None for row in rows)
    return found[0], found[1], found[2], torch.from_numpy(np.concatenate(weights)) if weighted else None
