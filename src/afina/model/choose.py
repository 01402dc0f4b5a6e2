"""From logits to the next token of each row: greedily or by chance, within a grammar, by the row's own dice alone."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from afina.model.generate import COLDEST
from afina.model.rows import Grammar, Row


def choose(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row, of (rows, vocabulary) logits; a row that is done gets any.

    What a row gets depends on its logits, its sampling and its dice, whoever is beside it.
    """
    edited = {number: edits for number, row in enumerate(rows) if (edits := _edits(row, logits.shape[-1]))}
    if edited:
        logits = logits.clone()
        for number, edits in edited.items():
            logits[number, list(edits)] += torch.tensor(list(edits.values()), device=logits.device).to(logits.dtype)
    if any(row.grammar for row in rows):
        allowed = torch.stack([_within(row.grammar, logits.shape[-1]) for row in rows]).to(logits.device)
        logits = logits.masked_fill(~allowed, -torch.inf)
    chosen: list[int] = logits.argmax(-1).tolist()
    drawing = [number for number, row in enumerate(rows) if row.sampling.temperature >= COLDEST]
    if drawing:
        for number, index in zip(drawing, _drawn(logits, rows, drawing), strict=True):
            chosen[number] = index
    return chosen


def _drawn(logits: torch.Tensor, rows: Sequence[Row], drawing: list[int]) -> list[int]:
    heat = torch.tensor([[rows[number].sampling.temperature] for number in drawing], dtype=torch.float64)
    chances = torch.softmax(logits[drawing].double() / heat.to(logits.device), -1)
    for place, number in enumerate(drawing):
        if (share := rows[number].sampling.top_p) < 1:
            chances[place] = _nucleus(chances[place], share)
    summed = chances.cumsum(-1).cpu()
    thrown = torch.stack([rows[number].throw() for number in drawing])
    drawn = torch.searchsorted(summed, thrown * summed[:, -1:], right=True)
    return [min(int(index), logits.shape[-1] - 1) for index in drawn]


def _nucleus(chances: torch.Tensor, share: float) -> torch.Tensor:
    """(vocabulary,) chances, nothing for those beyond the likeliest that together have `share` (Holtzman et al., 2020,
    arXiv:1904.09751)."""
    ordered, order = chances.sort(descending=True, stable=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= share, 0)
    return torch.zeros_like(chances).scatter(0, order, ordered)


def _edits(row: Row, width: int) -> dict[int, float]:
    """What is added to logits, by id."""
    sampling, edits = row.sampling, {index: by for index, by in row.sampling.bias.items() if index < width}
    if sampling.presence or sampling.frequency:
        for index, times in Counter(row.ids).items():
            edits[index] = edits.get(index, 0.0) - sampling.presence - sampling.frequency * times
    return edits


def _within(grammar: Grammar | None, width: int) -> torch.Tensor:
    """What a grammar allows, as wide as the logits, which may be wider than the vocabulary."""
    allowed = grammar.allowed() if grammar else torch.ones(width, dtype=torch.bool)
    return nn.functional.pad(allowed[:width], (0, max(0, width - len(allowed))))
