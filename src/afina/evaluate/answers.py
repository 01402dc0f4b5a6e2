"""Answers remembered by what was asked of whom, so that adding a model computes only what is new, and an evaluation
that was killed goes on where it was.

One line an answer in a log that only grows. The key names the system by content (weights, template, arithmetic), the
request, and the format; so an answer can be wrong only if one of these was changed without its name.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from afina.durable import Log
from afina.evaluate.systems.asking import Answer, Request, System

FILE = "answers.jsonl"


class Answers:
    """The answers in one file, opened for writing with the first new one; without a file, none outlives this object."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._log: Log | None = None
        self._known: dict[str, Answer] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        for line in file.read_bytes().split(b"\n") if file is not None and file.is_file() else ():
            try:
                row = json.loads(line)
                if "facts" in row:
                    self._facts[row["key"]] = dict(row["facts"])
                    continue
                self._known[row["key"]] = Answer(**row["answer"])
            except (ValueError, KeyError, TypeError):
                continue  # a line that was cut is asked again

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()

    def find(self, system: System, request: Request) -> Answer | None:
        """The answer of before, if there is one."""
        return self._known.get(system.key(request))

    def keep(self, system: System, request: Request, answer: Answer) -> None:
        """Remember an answer; failures are asked again another time."""
        if answer.error:
            return
        key = system.key(request)
        self._known[key] = answer
        self._append({"key": key, "answer": answer.dump()})

    def facts(self, system: System, now: dict[str, Any]) -> dict[str, Any]:
        """What is known of a system, from now and before; what is new is remembered."""
        before = self._facts.get(system.identity, {})
        after = {**before, **now}
        if after != before:
            self._facts[system.identity] = after
            self._append({"key": system.identity, "facts": after})
        return after

    def _append(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        if self._log is None:
            self._log = Log(self._file)
        self._log.append(row)


def gather(
    system: System,
    requests: Sequence[Request],
    answers: Answers,
    opened: ExitStack,
    on_answer: Callable[[bool], None] = lambda new: None,
) -> list[Answer]:
    """An answer for every request: remembered, or asked for now. The system is opened only if something is new.

    Equal requests are asked once. `on_answer(new)` is called for each.
    """
    found: list[Answer | None] = [answers.find(system, request) for request in requests]
    for _answer in filter(None, found):
        on_answer(False)
    missing: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        if found[place] is None:
            missing.setdefault(system.key(request), []).append(place)
    if missing:
        first = [places[0] for places in missing.values()]
        answering = opened.enter_context(system.open())

        def note(number: int, answer: Answer) -> None:
            answers.keep(system, requests[first[number]], answer)
            for place in missing[system.key(requests[first[number]])]:
                found[place] = answer
                on_answer(True)

        answering.answer([requests[place] for place in first], note)
    return [answer if answer is not None else Answer(error="no answer") for answer in found]


class Clock:
    """Whether there is time left for another round."""

    def __init__(self, minutes: float | None) -> None:
        self._until = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return self._until is not None

    def is_over(self) -> bool:
        """Time is up."""
        return self._until is not None and time.monotonic() >= self._until


def rounds(count: int, limited: bool, size: int) -> Iterable[range]:
    """The places to be asked together: all of them, or `size` after `size` where the time is limited."""
    return (range(start, min(count, start + size)) for start in range(0, count, size if limited else max(1, count)))
