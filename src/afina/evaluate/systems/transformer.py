"""A model of transformers, asked: with its adapters, or as its base with the adapters switched off."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from afina.data.batch import micro_batches
from afina.data.template import Rendered, Renderer
from afina.data.tokenizer import Tokenizer
from afina.errors import DataError, ModelError
from afina.evaluate.systems.asking import (
    Answer,
    Choose,
    Constraint,
    Continue,
    Read,
    Request,
    Sink,
    Weigh,
    Write,
    by_kind,
    no_number,
    until_first,
)
from afina.language import _
from afina.model.decode import Continuation, write_all
from afina.model.grammar import Vocabulary
from afina.model.load import Hardware, limit_of
from afina.model.loss import judged
from afina.model.mixed import alone
from afina.model.packed import covers, packed_attention
from afina.model.rows import Grammar

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 65536}
BATCHES = 4
"""So many are filled before answers are handed on: the fuller, the more are laid out together."""


@dataclass(frozen=True)
class _Sums:
    """Rows that were read; of each the log-probability of its learnt tokens, and how many were not the likeliest."""

    rows: list[Rendered]
    sums: list[float]
    missed: list[int]


@dataclass(frozen=True)
class ModelAnswering:
    """A loaded model. `active` is entered while it answers."""

    model: nn.Module
    renderer: Renderer
    hardware: Hardware
    active: Callable[[], AbstractContextManager[object]]

    def answer(self, requests: Sequence[Request], sink: Sink) -> None:
        """See `Answering`."""
        with self.active(), torch.inference_mode(), self.hardware.autocast(), alone(self.model):
            self._read(list(by_kind(requests, Read)), sink)
            self._choose(list(by_kind(requests, Choose)), sink)
            self._weigh(list(by_kind(requests, Weigh)), sink)
            groups: dict[tuple, list[tuple[int, Write | Continue]]] = {}
            for place, request in [*by_kind(requests, Write), *by_kind(requests, Continue)]:
                constraint = request.constraint if isinstance(request, Write) else None
                alike = (type(request), request.max_new_tokens, constraint, request.temperature)
                groups.setdefault(alike, []).append((place, request))
            for group in groups.values():
                self._write(group, sink)

    def _prompt(self, request: Write | Continue) -> list[int]:
        if isinstance(request, Write):
            return self.renderer.prompt(request.messages)
        return bare_ids(self.renderer.tokenizer, request.text)

    def _write(self, asked: list[tuple[int, Write | Continue]], sink: Sink) -> None:
        tokenizer, first = self.renderer.tokenizer, asked[0][1]
        constraint = first.constraint if isinstance(first, Write) else None
        limit = limit_of(self.model)
        fit: list[tuple[int, Write | Continue, list[int]]] = []
        for place, request in asked:
            prompt = self._guarded(place, sink, partial(self._prompt, request))
            if prompt is not None and limit is not None and len(prompt) >= limit:
                sink(place, Answer(error=_too_long(len(prompt), limit)))
            elif prompt is not None:
                fit.append((place, request, prompt))

        def note(number: int, found: Continuation) -> None:
            place, request, _prompt = fit[number]
            if found.broken:
                sink(place, Answer(error=no_number()))
                return
            text = tokenizer.decode(found.ids)
            text = text.strip() if isinstance(request, Write) else until_first(text, request.until)
            sink(place, Answer(text, len(found.ids) + found.ended, found.ended, found.seconds))

        write_all(
            self.model,
            [prompt for _place, _request, prompt in fit],
            end_ids=tokenizer.end_ids,
            pad_id=tokenizer.pad_id,
            max_new_tokens=first.max_new_tokens,
            on_answer=note,
            grammar=_grammar(tokenizer, constraint) if constraint else None,
            temperature=first.temperature,
            seeds=[request.seed for _place, request, _prompt in fit],
        )

    def _choose(self, asked: list[tuple[int, Choose]], sink: Sink) -> None:
        """By the mean log-probability a token: a sum prefers labels that happen to be cut into fewer tokens."""

        def rows_of(request: Choose) -> list[Rendered]:
            return [self.renderer.answer(request.messages, label) for label in request.labels]

        def chosen(request: Choose, read: _Sums) -> Answer:
            means = [total / max(1, int(row.learnt[1:].sum())) for total, row in zip(read.sums, read.rows, strict=True)]
            best = max(range(len(means)), key=means.__getitem__)
            return Answer(request.labels[best], sum(int(row.learnt.sum()) for row in read.rows), True, scores=means)

        self._score(asked, rows_of, chosen, sink)

    def _read(self, asked: list[tuple[int, Read]], sink: Sink) -> None:
        def rows_of(request: Read) -> list[Rendered]:
            return [self.renderer.answer(request.messages, request.answer)]

        def heard(_request: Read, read: _Sums) -> Answer:
            return Answer("", int(read.rows[0].learnt[1:].sum()), True, scores=read.sums)

        self._score(asked, rows_of, heard, sink)

    def _weigh(self, asked: list[tuple[int, Weigh]], sink: Sink) -> None:
        def weighed(_request: Weigh, read: _Sums) -> Answer:
            scores = [read.sums[0], float(read.missed[0] == 0)]
            return Answer("", int(read.rows[0].learnt.sum()), True, scores=scores)

        self._score(asked, lambda request: [self._weighed(request)], weighed, sink)

    def _score(
        self,
        asked: list[tuple[int, Any]],
        rows_of: Callable[[Any], list[Rendered]],
        answer_of: Callable[[Any, "_Sums"], Answer],
        sink: Sink,
    ) -> None:
        """Answer from how likely rows are, some requests at a time, so that what was answered is not lost when this is
        ended. Numbers that are none are no answer."""
        enough = BATCHES * TOKENS_AT_ONCE.get(self.hardware.device.type, TOKENS_AT_ONCE["cpu"])
        part: list[tuple[int, Any, list[Rendered]]] = []
        tokens = 0
        for number, (place, request) in enumerate(asked, 1):
            rows = self._guarded(place, sink, partial(rows_of, request))
            if rows is not None and self._fits(place, rows, sink):
                part.append((place, request, rows))
                tokens += sum(int(row.ids.size) for row in rows)
            if tokens < enough and number < len(asked):
                continue
            began, start = time.perf_counter(), 0
            sums, missed = self._sums_and_surprises([row for _place, _request, rows in part for row in rows])
            share = (time.perf_counter() - began) / max(1, len(part))
            for place, request, rows in part:
                own = slice(start, start := start + len(rows))
                whole = all(map(math.isfinite, sums[own]))
                found = answer_of(request, _Sums(rows, sums[own], missed[own])) if whole else Answer(error=no_number())
                sink(place, replace(found, seconds=share))
            part, tokens = [], 0

    def _weighed(self, request: Weigh) -> Rendered:
        """Context and continuation as lm-eval cuts them: tokens of both together, blanks at the seam to the latter."""
        tokenizer = self.renderer.tokenizer
        text, continuation = request.text, request.continuation
        if text:
            kept = text.rstrip()
            whole, known = bare_ids(tokenizer, text + continuation), len(bare_ids(tokenizer, kept))
        else:
            whole, known = [_first_id(tokenizer), *bare_ids(tokenizer, continuation, start=False)], 1
        ids = np.array(whole, dtype=np.int32)
        return Rendered(ids, np.arange(ids.size) >= known)

    def _sums_and_surprises(self, rows: list[Rendered]) -> tuple[list[float], list[int]]:
        """Of each row the sum of log-probabilities of its learnt tokens, and how many of these were not the likeliest;
        computed in packed batches."""
        sums, surprises = [0.0] * len(rows), [0] * len(rows)
        if not rows:
            return sums, surprises
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
                losses, missed = (part.double().cpu() for part in judged(self.model, batch.to(self.hardware.device)))
                found = torch.zeros(2, len(batch.samples), dtype=torch.float64)
                found.index_add_(1, batch.owner, torch.stack([-losses, missed]))
                for place, index in enumerate(batch.samples):
                    sums[index], surprises[index] = float(found[0, place]), int(found[1, place])
        return sums, surprises

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


def _grammar(tokenizer: Tokenizer, constraint: Constraint) -> Callable[[], Grammar]:
    known = Vocabulary(tokenizer.hf, tokenizer.end_ids)
    return known.choices(constraint.choices) if constraint.choices else known.json(constraint.schema or "{}")


def bare_ids(tokenizer: Tokenizer, text: str, *, start: bool = True) -> list[int]:
    """Ids of a text that is no conversation, as the library itself makes them, control tokens in it taken as such;
    `start`: with the start token where this tokenizer puts one."""
    return [int(index) for index in tokenizer.hf.encode(text, add_special_tokens=start)]


def _first_id(tokenizer: Tokenizer) -> int:
    """What stands before a text that has nothing before it: the start token, or else an end."""
    known = (tokenizer.bos_id, tokenizer.hf.eos_token_id, tokenizer.pad_id)
    return int(next(index for index in known if index is not None))


def _too_long(length: int, limit: int) -> str:
    return _("The question needs {length} tokens; the model was made for {limit}.").format(length=length, limit=limit)


@contextmanager
def as_it_is() -> Iterator[None]:
    """A model without adapters needs nothing."""
    yield
