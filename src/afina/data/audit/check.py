"""The pass over a data set: every file once, in blocks, in constant memory.

What decides about a row stands elsewhere: syntax.py and the reader's own dialects refuse it, chat.py and text.py find
what is odd in it, across.py what shows beside the others. Here is only the fast way through them, a block at a time: a
row that the fast parser takes, whose roles are known to be sound and whose quotation marks are as many as its strings
need, has no fault of syntax or shape; its texts are looked at by scan.py together with those of the whole block.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from afina.data.audit import chat, syntax
from afina.data.audit.across import Across, Columns, forms, hashes
from afina.data.audit.blocks import Block, line_blocks, row_blocks
from afina.data.audit.finding import Finding, Report
from afina.data.audit.kind import Severity
from afina.data.audit.kinds import kinds
from afina.data.audit.letters import Fault
from afina.data.audit.quick import KEYS, NOT_PLAIN, Look, look_of, look_through
from afina.data.audit.scan import join, suspects
from afina.data.audit.syntax import MINUS_ZERO, quotes, quotes_in, quotes_of
from afina.data.audit.taken import Taken
from afina.data.audit.text import ALL, faults
from afina.data.audit.tongue import languages
from afina.data.conversation import ROLES, Message, Sample
from afina.data.dialects import Make, beside_of, checked, dialect_of, maker, with_system
from afina.data.mapping import Mapped
from afina.data.near import Near
from afina.data.row import BadRow, Row, Shape
from afina.garbage import uncollected
from afina.recipe.schema import Data

KEYS_TOLD = 20
"""Names of keys that are told, at most."""
KEPT = 2**24
"""Bytes of freed memory, twice which are kept for the next block."""
SLOW = 20
"""A quick look is made anew for keys it did not know where these keep more than one row in so many from it."""


@dataclass
class Pass:
    """One pass. `judges` are given the samples of every block and yield what is wrong with each as a sample."""

    data: Data
    report: Report
    across: Across = field(default_factory=Across)
    judges: Sequence[Callable[[Sequence[Sample]], Iterator[tuple[int, Fault]]]] = ()
    plain: bool = False
    """Look at every row by itself and every text in full: slow, and what the tests hold the fast way against."""
    markup: bool = True
    near: Near | None = None
    """Given every conversation, where rows that are nearly the same are looked for too."""

    def file(self, path: Path, form: str, encoding: str, advance: Callable[[int], None] = lambda _size: None) -> None:
        """Read one file to its end. Raises DataError when it cannot be read at all."""
        _keep_freed_memory()
        shape = Shape(self.data.mapping.rows if self.data.mapping else "", tuple(self.data.columns or ()), encoding)
        quick_lines = form == "jsonl" and not shape.path
        reader = _Reader(self.data, form == "text", plain=self.plain)
        self.across.start(path)
        before, size = (self.report.rows, self.report.rejected), self.report.size
        lines = returns = 0
        for block in line_blocks(path, encoding) if quick_lines else row_blocks(path, shape, form):
            with uncollected():
                self._block(path, block, reader)
            self.report.size += block.size
            lines, returns = lines + len(block.raws), returns + block.returns
            advance(block.size)
        if self.report.size == size:  # Parquet has no bytes of its own for a row
            self.report.size += path.stat().st_size
            advance(path.stat().st_size)
        if 0 < returns < lines - 1:
            self.report.add(Finding("mixed-line-ends", path, 0, 0, 0, f"CR LF {returns} : {lines - returns} LF"))
        if reader.blank:
            self.report.add(Finding("blank-lines", path, 0, 0, 0, str(reader.blank)))
        if reader.unread:
            names = ", ".join(sorted(map(str, reader.unread))[:KEYS_TOLD])
            self.report.add(Finding("unread-keys", path, 0, 0, 0, names[:200]))
        self.report.files[path] = {
            "rows": self.report.rows - before[0],
            "rejected": self.report.rejected - before[1],
            "dialect": reader.dialect or "",
            "form": form,
            "encoding": encoding,
        }

    def finish(self) -> Report:
        """What shows only now that all rows are known."""
        for found in self.across.findings():
            self.report.add(found)
        if self.near is not None:
            for found in self.across.nearly(self.near.groups()):
                self.report.add(found)
        return self.report

    def _block(self, path: Path, block: Block, reader: "_Reader") -> None:
        taken = Taken()
        found = reader.read(block, taken)
        self.report.rows += reader.seen
        rows, counts = taken.rows, taken.counts
        last = np.cumsum(counts) - 1
        joined = join(taken.texts)
        looks = dict.fromkeys(range(len(taken.texts)), ALL) if self.plain else suspects(joined)
        numbers = sorted(looks)
        for number, owner in zip(numbers, np.searchsorted(last, numbers).tolist(), strict=True):
            row = int(rows[owner])
            for fault in faults(taken.texts[number], looks[number], plain_markup=self.markup):
                begin, end = syntax.place(block.raws[row], taken.texts[number], fault.begin, fault.end)
                found.setdefault(row, []).append(fault._replace(begin=begin, end=end))
        samples = self._samples(path, block, taken) if self.judges else []
        for judge in self.judges:
            for at, fault in judge(samples):
                row = int(rows[at])
                found.setdefault(row, []).append(fault._replace(begin=0, end=len(block.raws[row])))
        self._tell(path, block, found)
        if not rows.size:
            return
        order = np.argsort(rows)
        if self.near is not None:
            for at in order.tolist():
                self.near.add("\n".join(taken.texts[last[at] + 1 - counts[at] : last[at] + 1]))
        asked, whole = hashes(taken.hashed, counts)
        tongues = languages(joined)
        columns = Columns(
            whole=whole,
            asked=asked,
            line=block.lines[rows],
            number=block.numbers[rows],
            begin=block.begins[rows],
            size=block.sizes[rows],
            length=joined.lengths[last],
            form=forms(joined, last),
            answer_in=tongues[last],
            question_in=np.where(counts > 1, tongues[last - 1], 0),
        )
        self.across.add(Columns(*(column[order] for column in columns)), (taken.texts[at] for at in last))

    def _samples(self, path: Path, block: Block, taken: Taken) -> list[Sample]:
        """What training makes of the conversations of a block."""
        made, at = [], 0
        for row, roles, count in zip(taken.rows.tolist(), taken.roles, taken.counts.tolist(), strict=True):
            plain = tuple(map(Message, roles, taken.texts[at : at + count])), ("", "")
            messages, beside = taken.whole.get(row, plain) if taken.whole else plain
            if self.data.system is not None:
                messages = with_system(messages, self.data.system)
            made.append(Sample(messages, path, int(block.lines[row]), *beside))
            at += count
        return made

    def _tell(self, path: Path, block: Block, found: dict[int, list[Fault]]) -> None:
        table = kinds()
        for row in sorted(found):
            begin, line, number = (int(column[row]) for column in (block.begins, block.lines, block.numbers))
            rejected = False
            for fault in sorted(found[row], key=lambda fault: fault.begin):
                finding = Finding(fault.kind, path, line, begin + fault.begin, begin + fault.end, fault.detail, number)
                self.report.add(finding)
                if not rejected and table[fault.kind].severity is Severity.ERROR:
                    rejected = True
                    self.report.reject(finding)


def _keep_freed_memory() -> None:
    """Free a large array that was never written to: the C library (glibc) judges by it how much freed memory to keep.
    A block's arrays then lie in memory that is there; else the system clears 300 pages for each block anew."""
    np.empty(KEPT, np.uint8)


@dataclass
class _Reader:
    """Rows of one file to conversations, as data/read.py makes them; the quick way where a row allows it."""

    data: Data
    passages: bool = False
    plain: bool = False
    dialect: str = ""
    blank: int = 0
    unread: set[str] = field(default_factory=set)
    seen: int = 0
    """Rows of the last block."""
    _make: Make | None = None
    _look: Look | None = None
    _keys: set[str] = field(default_factory=set)
    """Of rows that came by themselves."""
    _known: int = 0
    """How many of them the quick look was made for."""
    _decode: Callable[[bytes], Any] = field(default_factory=lambda: msgspec.json.Decoder().decode)

    def __post_init__(self) -> None:
        if self.data.mapping is not None:
            self.dialect, self._make = "mapping", (mapped := Mapped(self.data.mapping))
            self._look = None if self.plain else look_through(mapped)

    def read(self, block: Block, taken: Taken) -> dict[int, list[Fault]]:
        """Take up the conversations of a block; returns what is wrong with its rows, in bytes of each."""
        found: dict[int, list[Fault]] = {}
        if block.cut:
            found[len(block.raws) - 1] = [Fault("huge-row", 0, len(block.raws[-1]))]
            self.seen = 1
            return found
        blank, at, count = self.blank, 0, len(block.raws)
        while self._look is None and at < count:  # until a row says what they are
            end = count if isinstance(self._make, Mapped) else at + 1
            self._slowly(range(at, end), block, taken, found)
            at = end
        if at < count and self._look is not None:
            rest = self._plain(block, at, self._look, taken)
            self._slowly(rest, block, taken, found)
            if len(self._keys) > self._known and len(rest) * SLOW > count:
                self._look, self._known = look_of(self.dialect, self._keys), len(self._keys)
        self.seen = count - (self.blank - blank)
        return found

    def _plain(self, block: Block, start: int, look: Look, taken: Taken) -> list[int]:
        """Take up the plain rows of a block from `start` on; returns the places of the others."""
        decoded: list[Any] = []
        rest: list[int] = []
        decoding = map(look.take, block.rows[start:]) if block.rows else map(look.decode, block.raws[start:])
        for _stop in repeat(None):
            try:
                decoded.extend(decoding)  # what came before a row that is not plain is kept
                break
            except NOT_PLAIN:
                rest.append(start + len(decoded) + len(rest))
        plain = look.spread(decoded)
        places = np.delete(np.arange(len(block.raws)), [*range(start), *rest])
        good = np.ones(places.size, np.bool_)
        if block.text:
            others = sum(quotes(block.raws[at]) for at in [*range(start), *rest])
            if quotes_in(block.text) != plain.marks.sum() + others:  # no row has too few, as it has been parsed
                good &= quotes_of(block.text, block.edges)[places] == plain.marks
            if look.numbers:  # a minus zero is looked for where it may be one, in a row by itself
                zeros = [found.start() for found in MINUS_ZERO.finditer(block.text)]
                good &= ~np.isin(places, np.searchsorted(block.edges, zeros, side="right") - 1)
        sound = {roles: self.dialect == "text" or _is_sound(roles) for roles in set(plain.roles)}
        if not all(sound.values()):
            good &= [sound[roles] for roles in plain.roles]
        hashed = np.fromiter(map(hash, plain.texts), np.int64, len(plain.texts))
        if good.size:
            good &= _spoken(plain.texts, hashed, plain.counts)
        taken.add(places, plain, hashed, good)
        return sorted([*rest, *places[~good].tolist()])

    def _slowly(self, places: Iterable[int], block: Block, taken: Taken, found: dict[int, list[Fault]]) -> None:
        """The rows at these places, each by itself."""
        rows = {at: row for at in places if (row := self._row(at, block, found)) is not None}
        for at, row in zip(rows, self._ahead(rows.values()), strict=True):
            self._careful(at, row, taken, found)

    def _row(self, at: int, block: Block, found: dict[int, list[Fault]]) -> Row | None:
        """A row read; None where that cannot be, or nothing stands there."""
        if block.rows is not None:
            row = block.rows[at]
            if row.fault:
                found[at] = chat.unread_row(row)
            return None if row.fault else row
        raw = block.raws[at]
        try:
            value = self._decode(raw)
        except NOT_PLAIN:
            if not raw.strip(b" \t\r\n"):
                self.blank += 1
                return None
            value, wrong = syntax.unreadable(raw)
            if wrong:
                found[at] = wrong
                return None
        return Row(value, int(block.lines[at]), int(block.begins[at]), raw, is_json=True)

    def _ahead(self, rows: Iterable[Row]) -> Iterable[Row]:
        return self._make.over(rows) if isinstance(self._make, Mapped) else rows

    def _careful(self, at: int, row: Row, taken: Taken, found: dict[int, list[Fault]]) -> None:
        """The slow way of one row: as the reader reads it, and everything that is odd about it."""
        notes: list[Fault] = []
        if row.is_json:
            if row.raw.lstrip()[:1] == b"{" and syntax.quotes(row.raw) != 2 * syntax.strings(row.value):
                _value, notes = syntax.unreadable(row.raw)
            notes += syntax.minus_zero(row.raw)
        notes += [_about(row.raw, kind, shown) for kind, shown in syntax.strange_numbers(row.value)]
        try:
            if self._make is None:
                self.dialect = dialect_of(row.value, self.data)
                self._make = maker(self.dialect, passages=self.passages)
            messages = checked(self._make(row), None)
            beside = beside_of(row.value, self.dialect)
        except BadRow as reason:
            kind, text = chat.refused(row.value, self.dialect)
            found[at] = [*notes, _blame(row.raw, kind, text, str(reason))]
            return
        if any(kinds()[note.kind].severity is Severity.ERROR for note in notes):
            found[at] = notes
            return
        if len(self.unread) < KEYS_TOLD:
            self.unread |= chat.unread(row.value, self.dialect)
        if self.dialect != "mapping" and len(self._keys) < KEYS:
            self._keys |= row.value.keys()
            if self._look is None and not (self.plain or self.passages):
                self._look, self._known = look_of(self.dialect, self._keys), len(self._keys)
        roles, texts = tuple(message.role for message in messages), [message.content for message in messages]
        odd = [_blame(row.raw, kind, text, "") for kind, text in chat.oddities(roles, texts, row.value)]
        if notes or odd:
            found[at] = notes + odd
        taken.add_one(at, roles, texts)
        if any(beside) or any(message.more or message.weight != 1 for message in messages):
            taken.whole[at] = messages, beside


@cache
def _is_sound(roles: tuple[str, ...]) -> bool:
    """Whether rows of these roles are accepted, and nothing is odd about their order."""
    try:
        checked(tuple(Message(role, "said") for role in roles), None)
    except BadRow:
        return False
    return set(roles) <= set(ROLES) and not chat.order(roles)


def _spoken(texts: list[str], hashed: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(rows,) bool: whether each row has no blank text, and its last one is not the one before it again.

    hashed: (texts,) their hashes; counts: (rows,) texts of each row.
    """
    stripped = list(map(str.strip, texts))
    if stripped != texts:  # mostly each of them is the very text
        hashed = np.fromiter(map(hash, stripped), np.int64, len(stripped))
    last = np.cumsum(counts) - 1
    blank = np.logical_or.reduceat(hashed == hash(""), last - counts + 1)
    return np.asarray(~blank & ((counts == 1) | (hashed[last] != hashed[last - 1])))


def _about(raw: bytes, kind: str, shown: str) -> Fault:
    begin = max(raw.find(shown.encode()), 0)
    return Fault(kind, begin, begin + len(shown), shown)


def _blame(raw: bytes, kind: str, text: str | None, reason: str) -> Fault:
    begin, end = syntax.place(raw, text, 0, len(text)) if text else (0, len(raw))
    return Fault(kind, begin, end, reason)
