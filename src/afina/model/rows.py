"""Answers being written, one a row: what each has so far, and one step of the model for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn


class Grammar(Protocol):
    """What one answer may still be."""

    def allowed(self) -> torch.Tensor:
        """(vocabulary,) bool on the CPU: tokens that may come next; the end among them where it may end."""
        ...

    def take(self, index: int) -> None:
        """This token was chosen."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: temperature 0 is greedy; above it, of the likeliest that together have `top_p`.

    What the answer holds already is made less likely by `presence`, and by `frequency` for each time. `bias`: what is
    added to the logits of tokens, by id. All before temperature and top_p, as in OpenAI's API.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)


GREEDY = Sampling()


@dataclass
class Row:
    """A prompt and its answer so far. `room`: tokens it may have; `whole`: and no more at a later time; `ended`: the
    end of turn came; `broken`: the model computed what is no number."""

    place: int
    prompt: list[int]
    seed: int
    room: int = 0
    grammar: Grammar | None = None
    ended: bool = False
    broken: bool = False
    ids: list[int] = field(default_factory=list)
    whole: bool = True
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        self.dice = torch.Generator().manual_seed(self.seed)
        for index in self.ids:  # chosen before, each by a throw
            self.throw()
            if self.grammar:
                self.grammar.take(index)

    @property
    def known(self) -> list[int]:
        """All that stands, to be read."""
        return [*self.prompt, *self.ids]

    def throw(self) -> torch.Tensor:
        """Chance, (1,), from 0 to 1."""
        return torch.rand((1,), generator=self.dice, dtype=torch.float64)

    def take(self, index: int, end_ids: frozenset[int]) -> bool:
        """Note the token; returns whether more is to come."""
        if index in end_ids:
            self.ended = True
            return False
        self.ids.append(index)
        if self.grammar:
            self.grammar.take(index)
        return len(self.ids) < self.room


@dataclass(frozen=True)
class Settings:
    """What all rows share."""

    end_ids: frozenset[int]
    pad_id: int


def padded(rows: Sequence[Row], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, width) ids and mask, padded on the left, so that the last token of each row is at its end."""
    texts = [row.known for row in rows]
    width = max(map(len, texts))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for number, text in enumerate(texts):
        ids[number, width - len(text) :] = torch.tensor(text)
        mask[number, width - len(text) :] = True
    return ids, mask


def next_logits(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: Any,
    name: str = "input_ids",
) -> torch.Tensor:
    """(rows, vocabulary) logits of the next token. `name`: what `ids` are to the model, ids or their embeddings."""
    output = model(
        **{name: ids},
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def note_broken(rows: Sequence[Row], logits: torch.Tensor) -> None:
    """Which of `rows` begin with what is no number: the largest of (rows, vocabulary) logits shows it."""
    for row, whole in zip(rows, torch.isfinite(logits.amax(-1)).tolist(), strict=True):
        row.broken = not whole


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes."""
    return next(model.parameters()).device
