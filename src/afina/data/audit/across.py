"""What only shows when all rows are known: duplicates, leaks from training to validation, contradictions, imbalance,
answers unlike all others in length, form or language.

Kept of a row are some 50 bytes in arrays: 64-bit hashes of its question and of the whole (of a million rows two
different ones share a hash with probability 3e-8), its place, and a few figures about its answer.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from afina.data.audit.finding import Finding
from afina.data.audit.scan import Joined
from afina.data.audit.tongue import LANGUAGES
from afina.data.near import mix
from afina.data.problem import place

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
JSON, ENDED, LOOK = 1, 2, 255
"""Forms of an answer: looks like JSON, ends as a sentence or a block does. LOOK: its last character does not say."""
ENDS = frozenset(".!?…。！？)]}\"'`”’»>*:;|0123456789")


class Columns(NamedTuple):
    """What is kept of rows, an array each: hashes of the whole and of the question, line, number in a document, first
    byte and bytes, and of the answer its characters, its form (bits), its language and that of the question (places in
    LANGUAGES)."""

    whole: np.ndarray
    asked: np.ndarray
    line: np.ndarray
    number: np.ndarray
    begin: np.ndarray
    size: np.ndarray
    length: np.ndarray
    form: np.ndarray
    answer_in: np.ndarray
    question_in: np.ndarray


TYPES = Columns(*map(np.dtype, ("u8", "u8", "u4", "u4", "i8", "u4", "u4", "u1", "u1", "u1")))  # type: ignore[arg-type]


@dataclass
class Across:
    """What is kept of the rows of a data set, in their order. `held_out`: files that are only validated on."""

    held_out: frozenset[Path] = frozenset()
    files: list[Path] = field(default_factory=list)
    rows: int = 0
    answers: Counter[str] | None = field(default_factory=Counter)
    _firsts: list[int] = field(default_factory=list)
    _kept: list[bytearray] = field(default_factory=lambda: [bytearray() for _column in TYPES])

    def start(self, file: Path) -> None:
        """The rows that follow are of this file."""
        self.files.append(file)
        self._firsts.append(self.rows)

    def add(self, columns: Columns, answers: Iterable[str]) -> None:
        """Rows of one block, and their answers."""
        for kept, column, kind in zip(self._kept, columns, TYPES, strict=True):
            kept += column.astype(kind, copy=False).tobytes()
        self.rows += columns.whole.size
        if self.answers is not None:
            self._classes(self.answers, columns, answers)

    def _classes(self, counts: Counter[str], columns: Columns, answers: Iterable[str]) -> None:
        if columns.length.max(initial=0) <= LONGEST_CLASS:
            counts.update(answer.strip() for answer in answers)
            if len(counts) <= CLASSES:
                return
        self.answers = None

    @property
    def columns(self) -> Columns:
        """Everything that is kept."""
        return Columns(*(np.frombuffer(kept, kind) for kept, kind in zip(self._kept, TYPES, strict=True)))

    def place(self, row: int) -> tuple[Path, int, int, int]:
        """File, line, first byte and byte after the last of a row."""
        at = int(np.searchsorted(self._firsts, row, side="right")) - 1
        kept = self.columns
        begin = int(kept.begin[row])
        return self.files[at], int(kept.line[row]), begin, begin + int(kept.size[row])

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
        return Finding(kind, *self.place(row), detail, int(self.columns.number[row]))

    def named(self, row: int) -> str:
        """`file:line` of a row, and its number in a document."""
        file, line, _begin, _end = self.place(row)
        return place(file.name, line, int(self.columns.number[row]))

    def held(self) -> np.ndarray:
        """(rows,) bool: whether a row is of a file that is only validated on."""
        marks = np.zeros(self.rows, np.bool_)
        for at, (file, first) in enumerate(zip(self.files, self._firsts, strict=True)):
            last = self._firsts[at + 1] if at + 1 < len(self._firsts) else self.rows
            marks[first:last] = file in self.held_out
        return marks

    def _groups(self, values: np.ndarray) -> Iterator[np.ndarray]:
        """Rows that share a hash, each group in order, the groups by their first row."""
        ordered = np.sort(values)  # takes half the time of bringing rows in order; mostly few share one, nearly told
        shared = np.zeros(2**16, np.bool_)  # by 16 of their bits
        shared[_sixteen(ordered[1:][ordered[1:] == ordered[:-1]])] = True
        rows = np.flatnonzero(shared[_sixteen(values)])
        order = rows[np.argsort(values[rows], kind="stable")]
        ordered = values[order]
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if ordered.size else np.zeros(0, np.int64)
        sizes = np.diff(starts, append=ordered.size)
        several = np.flatnonzero(sizes > 1)
        several = several[np.argsort(order[starts[several]], kind="stable")]
        for at in several:
            yield order[starts[at] : starts[at] + sizes[at]]

    def _duplicates(self) -> Iterator[Finding]:
        held = self.held()
        for rows in self._groups(self.columns.whole):
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
        whole, held = self.columns.whole, self.held()
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
        whole = self.columns.whole
        for rows in self._groups(self.columns.asked):
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
        lengths = self.columns.length
        median = float(np.median(lengths))
        if median >= LONG:
            for row in np.flatnonzero(lengths * SHORT < median).tolist():
                yield self.finding("short-answer", row, f"{lengths[row]} / {median:.0f}")

    def _forms(self) -> Iterator[Finding]:
        if self.rows < ENOUGH:
            return
        forms, lengths = self.columns.form, self.columns.length
        for bit, kind in ((JSON, "no-json"), (ENDED, "abrupt-end")):
            having = (forms & bit) != 0
            if bit == ENDED and np.median(lengths) < LONG:
                continue  # labels and short answers end as they like
            if SHARE <= having.mean() < 1:
                for row in np.flatnonzero(~having).tolist():
                    yield self.finding(kind, row)

    def _languages(self) -> Iterator[Finding]:
        answers, questions = self.columns.answer_in, self.columns.question_in
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
        told = np.bincount(self.columns.answer_in, minlength=len(LANGUAGES))
        return {
            "lengths": self.columns.length,
            "languages": {LANGUAGES[at]: int(count) for at, count in enumerate(told) if count and at},
            "classes": dict(self.classes().most_common(30)) if self.classes() else {},  # type: ignore[union-attr]
        }


def _sixteen(values: np.ndarray) -> np.ndarray:
    """Sixteen bits of each 64-bit number."""
    return values.view(np.uint16)[::4]


def hashes(texts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) uint64 twice: hashes of each row's question (all its texts but the last; of one text, that) and of all
    its texts. texts: (texts,) int64, the hash of each; counts: (rows,) texts of each row."""
    last = np.cumsum(counts) - 1
    first = last - counts + 1
    turn = np.arange(texts.size, dtype=np.uint64) - np.repeat(first, counts).astype(np.uint64)
    each = mix(texts.view(np.uint64) + mix(turn))
    whole = np.add.reduceat(each, first)
    return np.where(counts > 1, whole - each[last], whole), whole


@cache
def _endings() -> np.ndarray:
    """What the last unit of an answer says of its form; LOOK where `form` must say."""
    table = np.zeros(65536, np.uint8)
    table[0x2001:] = ENDED
    table[[ord(character) for character in ENDS]] = ENDED
    spaces = [code for code in range(65536) if chr(code).isspace()]
    table[[*spaces, ord("}"), ord("]")]] = LOOK
    table[table == 0] = LOOK
    return table


def forms(joined: Joined, numbers: np.ndarray) -> np.ndarray:
    """(numbers,) uint8: `form` of each of these texts."""
    ends = np.empty_like(joined.ends)
    ends[joined.order] = joined.ends
    found: np.ndarray = _endings()[joined.units(ends[numbers] - 1)]
    for at in np.flatnonzero((found == LOOK) | (joined.lengths[numbers] == 0)).tolist():
        found[at] = form(joined.texts[numbers[at]])
    return found


def form(answer: str) -> int:
    """JSON and ENDED, as bits."""
    last = answer[-1:]
    if last.isspace():
        answer = answer.rstrip()
        last = answer[-1:]
    bits = ENDED if last in ENDS or last > "\u2000" or answer.rfind("####", -40) >= 0 else 0
    return bits | JSON if last in "}]" and answer.lstrip()[:1] in ("{", "[") else bits
