"""What only shows when all rows are known: duplicates, leaks from training to validation, contradictions, imbalance,
answers unlike all others in length, form or language.

Kept of a row are some 50 bytes in arrays: 64-bit hashes of its question and of the whole (of a million rows two
different ones share a hash with probability 3e-8), its place, and a few figures about its answer.
"""

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from afina.data.audit.finding import Finding
from afina.data.audit.tongue import LANGUAGES

SHARE = 0.95
"""A property that so many answers have is the rule; the rest are exceptions."""
ENOUGH = 50
"""Rows, at least, to know a rule by."""
LONGEST_CLASS, CLASSES, EACH = 64, 200, 5
"""Answers of at most so many characters, so many different ones, so many times each on average, are classes."""
IMBALANCE = 10
"""The commonest class over the rarest."""
SHORT = 40
"""An answer so many times shorter than the median is too short, where the median is LONG characters or more."""
LONG = 80
JSON, ENDED, CODE = 1, 2, 4
"""Forms of an answer: looks like JSON, ends as a sentence or a block does, ends a block of code."""
ENDS = frozenset(".!?…。！？)]}\"'`”’»>*:;|0123456789")


@dataclass
class Across:
    """What is kept of the rows of a data set, in their order. `held_out`: files that are only validated on."""

    held_out: frozenset[Path] = frozenset()
    files: list[Path] = field(default_factory=list)
    _firsts: list[int] = field(default_factory=list)
    _whole: array = field(default_factory=lambda: array("q"))
    _asked: array = field(default_factory=lambda: array("q"))
    _begin: array = field(default_factory=lambda: array("q"))
    _end: array = field(default_factory=lambda: array("I"))
    _line: array = field(default_factory=lambda: array("I"))
    _length: array = field(default_factory=lambda: array("I"))
    _form: array = field(default_factory=lambda: array("B"))
    _answer_in: array = field(default_factory=lambda: array("B"))
    _question_in: array = field(default_factory=lambda: array("B"))
    answers: Counter[str] | None = field(default_factory=Counter)

    def start(self, file: Path) -> None:
        """The rows that follow are of this file."""
        self.files.append(file)
        self._firsts.append(len(self._whole))

    def add(
        self,
        places: tuple[np.ndarray, np.ndarray, np.ndarray],
        hashes: tuple[list[int], list[int]],
        answers: list[str],
        languages: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """Rows of one block. places: line, first byte, byte after the last; hashes: of questions and of the whole;
        languages: of answers and of questions, as places in LANGUAGES."""
        lines, begins, ends = places
        self._line.frombytes(lines.astype(np.uint32).tobytes())
        self._begin.frombytes(begins.astype(np.int64).tobytes())
        self._end.frombytes((ends - begins).astype(np.uint32).tobytes())
        self._asked.extend(hashes[0])
        self._whole.extend(hashes[1])
        self._length.extend(map(len, answers))
        self._form.extend(map(form, answers))
        self._answer_in.frombytes(languages[0].tobytes())
        self._question_in.frombytes(languages[1].tobytes())
        if self.answers is not None:
            self._classes(answers)

    def _classes(self, answers: list[str]) -> None:
        counts = self.answers
        if counts is None:
            return
        if max(map(len, answers), default=0) > LONGEST_CLASS:
            self.answers = None
            return
        counts.update(answer.strip() for answer in answers)
        if len(counts) > max(CLASSES, 2):
            self.answers = None

    @property
    def rows(self) -> int:
        """Rows so far."""
        return len(self._whole)

    def place(self, row: int) -> tuple[Path, int, int, int]:
        """File, line, first byte and byte after the last of a row."""
        at = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return self.files[at], self._line[row], self._begin[row], self._begin[row] + self._end[row]

    def findings(self) -> Iterator[Finding]:
        """What shows now that all rows are known, class by class, in the order of rows."""
        yield from self._duplicates()
        yield from self._contradictions()
        yield from self._lengths()
        yield from self._forms()
        yield from self._languages()
        yield from self._balance()

    def finding(self, kind: str, row: int, detail: str = "") -> Finding:
        """A finding about a whole row."""
        return Finding(kind, *self.place(row), detail)

    def named(self, row: int) -> str:
        """`file:line` of a row."""
        file, line, _begin, _end = self.place(row)
        return f"{file.name}:{line}"

    def held(self) -> np.ndarray:
        """(rows,) bool: whether a row is of a file that is only validated on."""
        marks = np.zeros(self.rows, np.bool_)
        for at, (file, first) in enumerate(zip(self.files, self._firsts, strict=True)):
            last = self._firsts[at + 1] if at + 1 < len(self._firsts) else self.rows
            marks[first:last] = file in self.held_out
        return marks

    def _groups(self, hashes: array) -> Iterator[np.ndarray]:
        """Rows that share a hash, each group in order, the groups by their first row."""
        values = np.frombuffer(hashes, np.int64) if hashes else np.zeros(0, np.int64)
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if values.size else np.zeros(0, np.int64)
        sizes = np.diff(starts, append=values.size)
        several = np.flatnonzero(sizes > 1)
        several = several[np.argsort(order[starts[several]], kind="stable")]
        for at in several:
            yield order[starts[at] : starts[at] + sizes[at]]

    def _duplicates(self) -> Iterator[Finding]:
        held = self.held()
        for rows in self._groups(self._whole):
            sides = held[rows]
            learnt = rows[~sides]
            for row in learnt[1:].tolist():
                yield self.finding("duplicate", row, self.named(int(learnt[0])))
            for row in rows[sides].tolist():
                if learnt.size:
                    yield self.finding("leak", row, self.named(int(learnt[0])))
                elif row != rows[0]:
                    yield self.finding("duplicate", row, self.named(int(rows[0])))

    def nearly(self, groups: np.ndarray) -> Iterator[Finding]:
        """Rows that are nearly, and not quite, the same as the first of their group. groups: (rows,) that first one."""
        whole, held = np.frombuffer(self._whole, np.int64), self.held()
        learnt: dict[int, int] = {}
        for row in np.flatnonzero(~held).tolist():
            learnt.setdefault(int(groups[row]), row)
        seen = set(whole[np.unique(groups)].tolist())
        for row in np.flatnonzero(groups != np.arange(groups.size)).tolist():
            if int(whole[row]) in seen:
                continue  # a duplicate of a row that was told, or the first of its group
            seen.add(int(whole[row]))
            first = learnt.get(int(groups[row]))
            kind = "near-leak" if held[row] and first is not None else "near-duplicate"
            yield self.finding(
                kind, row, self.named(first if kind == "near-leak" and first is not None else int(groups[row]))
            )

    def _contradictions(self) -> Iterator[Finding]:
        whole = np.frombuffer(self._whole, np.int64) if self._whole else np.zeros(0, np.int64)
        for rows in self._groups(self._asked):
            answers = whole[rows]
            first = int(rows[0])
            seen = {int(answers[0])}
            for row, answer in zip(rows[1:].tolist(), answers[1:].tolist(), strict=True):
                if answer not in seen:
                    seen.add(answer)
                    yield self.finding("contradiction", row, self.named(first))

    def _lengths(self) -> Iterator[Finding]:
        if self.rows < ENOUGH:
            return
        lengths = np.frombuffer(self._length, np.uint32)
        median = float(np.median(lengths))
        if median >= LONG:
            for row in np.flatnonzero(lengths * SHORT < median).tolist():
                yield self.finding("short-answer", row, f"{lengths[row]} / {median:.0f}")

    def _forms(self) -> Iterator[Finding]:
        if self.rows < ENOUGH:
            return
        forms = np.frombuffer(self._form, np.uint8)
        lengths = np.frombuffer(self._length, np.uint32)
        for bit, kind in ((JSON, "no-json"), (ENDED, "abrupt-end")):
            having = (forms & bit) != 0
            if bit == ENDED and np.median(lengths) < LONG:
                continue  # labels and short answers end as they like
            if SHARE <= having.mean() < 1:
                for row in np.flatnonzero(~having).tolist():
                    yield self.finding(kind, row)

    def _languages(self) -> Iterator[Finding]:
        answers, questions = (np.frombuffer(side, np.uint8) for side in (self._answer_in, self._question_in))
        told = np.flatnonzero(answers)
        if told.size < ENOUGH:
            return
        counts = np.bincount(answers[told])
        rule = int(counts.argmax())
        if counts[rule] >= SHARE * told.size:
            for row in told[answers[told] != rule].tolist():
                yield self.finding("other-language", row, f"{LANGUAGES[answers[row]]} ≠ {LANGUAGES[rule]}")
            return
        both = np.flatnonzero((answers != 0) & (questions != 0))
        same = answers[both] == questions[both]
        if both.size >= ENOUGH and SHARE <= same.mean() < 1:
            for row in both[~same].tolist():
                yield self.finding("other-language", row, f"{LANGUAGES[questions[row]]} → {LANGUAGES[answers[row]]}")

    def classes(self) -> Counter[str] | None:
        """How often each answer is given, where answers are classes."""
        counts = self.answers
        if not counts or len(counts) < 2 or len(counts) * EACH > self.rows:
            return None
        return counts

    def _balance(self) -> Iterator[Finding]:
        counts = self.classes()
        if counts is None or not self.files:
            if self.answers is not None and len(self.answers) == 1 and self.rows >= ENOUGH:
                yield Finding("one-answer", self.files[0], 0, 0, 0, next(iter(self.answers))[:40])
            return
        (common, most), *_rest = counts.most_common()
        rare, least = min(counts.items(), key=lambda item: item[1])
        if most > IMBALANCE * least:
            yield Finding("imbalance", self.files[0], 0, 0, 0, f"{common[:40]} {most} : {least} {rare[:40]}")

    def figures(self) -> dict[str, object]:
        """What the page draws: lengths of answers, languages, classes."""
        lengths = np.frombuffer(self._length, np.uint32) if self.rows else np.zeros(0, np.uint32)
        codes = np.frombuffer(self._answer_in, np.uint8) if self.rows else np.zeros(0, np.uint8)
        told = np.bincount(codes, minlength=len(LANGUAGES))
        return {
            "lengths": lengths,
            "languages": {LANGUAGES[at]: int(count) for at, count in enumerate(told) if count and at},
            "classes": dict(self.classes().most_common(30)) if self.classes() else {},  # type: ignore[union-attr]
        }


def form(answer: str) -> int:
    """JSON and ENDED, as bits."""
    last = answer[-1:]
    if last.isspace():
        answer = answer.rstrip()
        last = answer[-1:]
    bits = ENDED if last in ENDS or last > "\u2000" or answer.rfind("####", -40) >= 0 else 0
    return bits | JSON if last in "}]" and answer.lstrip()[:1] in ("{", "[") else bits
