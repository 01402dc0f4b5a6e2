"""A model of transformers, asked: with its adapters, or as its base with the adapters switched off."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from afina.data.batch import micro_batches
from afina.data.template import Rendered, Renderer
from afina.errors import DataError, ModelError
from afina.evaluate.systems.asking import Answer, Choose, Read, Request, Sink, Write, by_kind
from afina.evaluate.systems.grammar import grammars
from afina.language import _
from afina.model.decode import Continuation, write_all
from afina.model.load import Hardware, limit_of
from afina.model.loss import token_losses
from afina.model.packed import covers, packed_attention

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 65536}


@dataclass(frozen=True)
class ModelAnswering:
    """A loaded model. `active` is entered while it answers."""

    model: nn.Module
    renderer: Renderer
    hardware: Hardware
    active: Callable[[], AbstractContextManager[object]]

    def answer(self, requests: Sequence[Request], sink: Sink) -> None:
        """See `Answering`."""
        with self.active(), torch.inference_mode(), self.hardware.autocast():
            self._read(list(by_kind(requests, Read)), sink)
            self._choose(list(by_kind(requests, Choose)), sink)
            groups: dict[tuple, list[tuple[int, Write]]] = {}
            for place, request in by_kind(requests, Write):
                alike = (request.max_new_tokens, request.constraint, request.temperature)
                groups.setdefault(alike, []).append((place, request))
            for group in groups.values():
                self._write(group, sink)

    def _write(self, asked: list[tuple[int, Write]], sink: Sink) -> None:
        tokenizer, first = self.renderer.tokenizer, asked[0][1]
        limit = limit_of(self.model)
        fit: list[tuple[int, Write, list[int]]] = []
        for place, request in asked:
            prompt = self._guarded(place, sink, partial(self.renderer.prompt, request.messages))
            if prompt is not None and limit is not None and len(prompt) >= limit:
                sink(place, Answer(error=_too_long(len(prompt), limit)))
            elif prompt is not None:
                fit.append((place, request, prompt))

        def note(number: int, found: Continuation) -> None:
            text = tokenizer.decode(found.ids).strip()
            sink(fit[number][0], Answer(text, len(found.ids) + found.ended, found.ended, found.seconds))

        write_all(
            self.model,
            [prompt for _place, _request, prompt in fit],
            end_ids=tokenizer.end_ids,
            pad_id=tokenizer.pad_id,
            max_new_tokens=first.max_new_tokens,
            on_answer=note,
            grammar=grammars(tokenizer, first.constraint) if first.constraint else None,
            temperature=first.temperature,
            seeds=[request.seed for _place, request, _prompt in fit],
        )

    def _choose(self, asked: list[tuple[int, Choose]], sink: Sink) -> None:
        rows: list[Rendered] = []
        owners: list[tuple[int, Choose, int]] = []
        for place, request in asked:
            found = self._guarded(place, sink, partial(self._labelled, request))
            if found is not None and self._fits(place, found, sink):
                owners.append((place, request, len(rows)))
                rows += found
        for (place, request, start), (means, seconds) in zip(owners, self._likelihoods(rows, owners), strict=True):
            best = max(range(len(means)), key=means.__getitem__)
            tokens = sum(int(row.learnt.sum()) for row in rows[start : start + len(request.labels)])
            sink(place, Answer(request.labels[best], tokens, True, seconds, means))

    def _likelihoods(
        self, rows: list[Rendered], owners: list[tuple[int, Choose, int]]
    ) -> Iterator[tuple[list[float], float]]:
        """For each request the mean log-probability of its labels, and its share of the time.

        On average, because a sum prefers labels that the tokenizer happens to cut into fewer tokens.
        """
        began = time.perf_counter()
        sums = self._sums(rows)
        share = (time.perf_counter() - began) / max(1, len(owners))
        means = [total / max(1, int(row.learnt[1:].sum())) for total, row in zip(sums, rows, strict=True)]
        for _place, request, start in owners:
            yield means[start : start + len(request.labels)], share

    def _read(self, asked: list[tuple[int, Read]], sink: Sink) -> None:
        rows: list[Rendered] = []
        places: list[int] = []
        for place, request in asked:
            row = self._guarded(place, sink, partial(self.renderer.answer, request.messages, request.answer))
            if row is not None and self._fits(place, [row], sink):
                rows.append(row)
                places.append(place)
        began = time.perf_counter()
        sums = self._sums(rows)
        share = (time.perf_counter() - began) / max(1, len(rows))
        for place, row, total in zip(places, rows, sums, strict=True):
            sink(place, Answer("", int(row.learnt[1:].sum()), True, share, [total]))

    def _sums(self, rows: list[Rendered]) -> list[float]:
        """Sum of log-probabilities of the learnt tokens of each row, computed in packed batches."""
        sums = [0.0] * len(rows)
        if not rows:
            return sums
        packing = covers(self.model)
        batches = micro_batches(
            rows,
            range(len(rows)),
            budget=TOKENS_AT_ONCE.get(self.hardware.device.type, 2048),
            packing=packing,
            pad_id=self.renderer.tokenizer.pad_id,
        )
        with packed_attention(self.model, packing):
            for batch in batches:
                losses = token_losses(self.model, batch.to(self.hardware.device)).double().cpu()
                found = torch.zeros(len(batch.samples), dtype=torch.float64).index_add_(0, batch.owner, -losses)
                for place, index in enumerate(batch.samples):
                    sums[index] = float(found[place])
        return sums

    def _labelled(self, request: Choose) -> list[Rendered]:
        return [self.renderer.answer(request.messages, label) for label in request.labels]

    def _fits(self, place: int, rows: Sequence[Rendered], sink: Sink) -> bool:
        limit, longest = limit_of(self.model), max(int(row.ids.size) for row in rows)
        if limit is None or longest <= limit:
            return True
        sink(place, Answer(error=_too_long(longest, limit)))
        return False

    def _guarded(self, place: int, sink: Sink, make: Callable[[], Any]) -> Any:
        """What `make` gives; a conversation that the template or the tokenizer refuses is answered with that."""
        try:
            return make()
        except (DataError, ModelError) as error:
            sink(place, Answer(error=error.message))
            return None


def _too_long(length: int, limit: int) -> str:
    return _("The question needs {length} tokens; the model was made for {limit}.").format(length=length, limit=limit)


@contextmanager
def as_it_is() -> Iterator[None]:
    """A model without adapters needs nothing."""
    yield
