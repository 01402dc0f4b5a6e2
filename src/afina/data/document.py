"""JSON documents to rows through a window that moves over the file: an array, an object of columns, or rows anywhere
below it, where `data.mapping.rows` leads. Memory holds one row and the chunk around it.
"""

import codecs
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from afina.data.encoding import open_text, undecodable
from afina.data.lines import CHUNK, ROW_BYTES
from afina.data.row import SPACE, BadRow, Decoder, Row, Shape, too_long, why_no_json
from afina.language import _

_NEAR = 16
"""A parser stops so near to where its text breaks off: inside an escape, a number, a word."""


def document_rows(path: Path, shape: Shape) -> Iterator[Row]:
    """The rows of a document in order. Raises DataError when it is not of its encoding."""
    with open_text(path, shape.encoding) as file:
        document = Document(file, path)
        first = document.peek()
        if not first:
            return
        if shape.path or first == "[":
            yield from document.find(shape.steps)
            return
    yield from _columns(path, shape, first)


def _columns(path: Path, shape: Shape, first: str) -> Iterator[Row]:
    """The rows of an object of arrays, each array a column, read side by side."""
    places: dict[str, tuple[int, int]] = {}
    fault = BadRow(_("neither JSON Lines nor a JSON array; a document of another shape needs data.mapping.rows"), 1)
    with open_text(path, shape.encoding) as file:
        try:
            if first == "{":
                for name, place in Document(file, path).columns():
                    places[name] = place
                fault = fault if not places else None  # type: ignore[assignment]
        except BadRow as reason:
            fault = reason if places else fault
    if fault is not None:
        yield Row(None, fault.line or 1, fault=str(fault), is_json=True)
        return
    files = [open_text(path, shape.encoding) for _name in places]
    try:
        documents = [
            Document(_at(file, offset), path, offset, line)
            for file, (offset, line) in zip(files, places.values(), strict=True)
        ]
        yield from _side_by_side(list(places), [document.find([], whole=False) for document in documents])
    finally:
        for file in files:
            file.close()


def _side_by_side(names: list[str], columns: list[Iterator[Row]]) -> Iterator[Row]:
    line = 1
    while True:
        cells = [next(column, None) for column in columns]
        found = [cell for cell in cells if cell is not None]
        if not found:
            return
        if len(found) < len(cells):
            missing = names[cells.index(None)]
            yield Row(None, line, fault=_("the column “{name}” has fewer rows than the others").format(name=missing))
            return
        value = {name: cell.value for name, cell in zip(names, found, strict=True)}
        fault = next((cell.fault for cell in found if cell.fault), "")
        line = found[0].line
        yield Row(value, line, found[0].offset, fault=fault)


def _at(file: IO[bytes], place: int) -> IO[bytes]:
    """The file, `place` bytes further on."""
    while place and (skipped := file.read(min(place, CHUNK))):
        place -= len(skipped)
    return file


class Document:
    """A JSON text read from place to place, so that every row has its line and its byte, and only rows are decoded."""

    def __init__(self, file: IO[bytes], path: Path = Path(), offset: int = 0, line: int = 1) -> None:
        self._file, self._path = file, path
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decoder = Decoder()
        self._text, self._ended = "", False
        self._at = 0
        self._line, self._column, self._offset, self._counted = line, 1, offset, 0

    def find(self, steps: list[str], *, whole: bool = True) -> Iterator[Row]:
        """The rows that `steps` lead to; where the text stops being readable, one bad row says so.

        whole: nothing may follow the value.
        """
        try:
            yield from self._walk(steps, ())
            if whole and self.peek():
                self._stop(_("there is text after the end"))
        except BadRow as reason:
            yield Row(None, reason.line or 1, fault=str(reason), is_json=True)

    def columns(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """The members of the object that comes next: key, and byte and line at which its array begins.

        Raises BadRow when a member is no array or one of objects.
        """
        keys: set[str] = set()
        for key in self._members():
            self.peek()
            line, offset = self._place()
            if self.peek() == "[":
                self._at += 1
            if self._text[self._at - 1 : self._at] != "[" or self.peek() == "{":
                self._stop(
                    _("“{name}” is no column of values; a document of another shape needs data.mapping.rows").format(
                        name=key[:40]
                    )
                )
            if key in keys:
                self._stop(_("the key “{key}” is given twice").format(key=key[:40]))
            keys.add(key)
            self._skip_rest("]")
            yield key, (offset, line)

    def peek(self) -> str:
        """The next character that is not white space, not taken; "" at the end."""
        while True:
            match = SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            self._forget()
            if not self._fill():
                return ""

    def _walk(self, steps: list[str], keys: tuple[str, ...]) -> Generator[Row, None, None]:
        """Rows below the value that comes next."""
        first = self.peek()
        if steps:
            step, *rest = steps
            if first != "{":
                self._stop(_("data.mapping.rows leads nowhere at “{step}”").format(step=step))
            line, found = self._place()[0], False
            for key in self._members():
                if step in ("*", key):
                    found = True
                    yield from self._walk(rest, (*keys, key) if step == "*" else keys)
                else:
                    self._skip()
            if not found:
                raise BadRow(_("data.mapping.rows leads nowhere at “{step}”").format(step=step), line)
        elif first == "[":
            self._at += 1
            while self.peek() != "]":
                yield self._row(keys)
                self._next("]")
            self._at += 1
        else:
            yield self._row(keys)

    def _row(self, keys: tuple[str, ...]) -> Row:
        self.peek()
        line, offset = self._place()
        value, raw = self._value()
        text = raw.encode("utf-8", "surrogatepass")
        return Row(value, line, offset, text, self._decoder.fault(), keys, is_json=True)

    def _members(self) -> Iterator[str]:
        """The keys of the object that comes next; each time its value is next, and must be taken."""
        self.peek()
        self._at += 1
        while self.peek() != "}":
            key, _raw = self._value()
            if not isinstance(key, str) or self.peek() != ":":
                self._stop(_("a key and : are missing"))
            self._at += 1
            yield key
            self._next("}")
        self._at += 1

    def _skip(self) -> None:
        """Pass over a value; over one that is too large for a row, member by member."""
        first = self.peek()
        try:
            self._value()
        except _TooLong:
            self._at += 1
            if first == "{":
                self._at -= 1
                for _key in self._members():
                    self._skip()
            elif first == "[":
                self._skip_rest("]")
            else:
                raise
        self._decoder.fault()

    def _skip_rest(self, closing: str) -> None:
        while self.peek() != closing:
            self._skip()
            self._next(closing)
        self._at += 1

    def _value(self) -> tuple[Any, str]:
        """The value that comes next and its text."""
        self.peek()
        self._forget()
        while True:
            try:
                value, end = self._decoder.at(self._text, self._at)
            except json.JSONDecodeError as error:
                broken = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR
                self._decoder.fault()
                if broken and self._grow():
                    continue
                line, column = self._line_and_column(error.pos)
                told = _("not valid JSON from column {column} on: {reason}")
                raise BadRow(told.format(column=column, reason=why_no_json(error)), line) from None
            except RecursionError:
                self._stop(_("nested too deeply"))
            except ValueError as error:
                self._stop(_("not valid JSON: {reason}").format(reason=error))
            # A number that the window cuts at its point or exponent, as 12.|5, would end before it.
            if end + _NEAR < len(self._text) or self._ended or not self._grow():
                raw, self._at = self._text[self._at : end], end
                return value, raw

    def _next(self, closing: str) -> None:
        """On to the next member, or to the closing bracket."""
        first = self.peek()
        if first == ",":
            self._at += 1
            if self.peek() != closing:
                return
            self._at -= 1
        elif first == closing:
            return
        self._stop(_("a comma too many, or a comma or {closing} is missing").format(closing=closing))

    def _grow(self) -> bool:
        """Twice as much text of the value that comes next, if there is more and a row may be so long."""
        if len(self._text) - self._at > ROW_BYTES:
            raise _TooLong(too_long(), self._place()[0])
        wanted = 2 * max(len(self._text), CHUNK)
        grown = False
        while len(self._text) < wanted and self._fill():
            grown = True
        return grown

    def _fill(self) -> bool:
        """One more chunk of text; False at the end."""
        if self._ended:
            return False
        chunk = self._file.read(CHUNK)
        self._ended = not chunk
        held = self._utf8.getstate()[0]
        try:
            more = self._utf8.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            line, position = self._place_of(len(self._text))
            before = (held + chunk)[: error.start]
            byte = (held + chunk)[error.start]
            line, position = line + before.count(b"\n"), position + error.start
            raise undecodable(self._path, byte, position, line, "utf-8") from error
        self._text += more
        return bool(more) or not self._ended

    def _forget(self) -> None:
        """Let go of the text that lies behind, when it is much."""
        if self._at > CHUNK:
            self._place()
            behind = self._text[: self._at]
            newline = behind.rfind("\n")
            self._column = self._at - newline if newline >= 0 else self._column + self._at
            self._text, self._at, self._counted = self._text[self._at :], 0, 0

    def _place(self) -> tuple[int, int]:
        """Line and byte of what comes next."""
        self._line, self._offset = self._place_of(self._at)
        self._counted = self._at
        return self._line, self._offset

    def _place_of(self, position: int) -> tuple[int, int]:
        between = self._text[self._counted : position]
        size = len(between) if between.isascii() else len(between.encode("utf-8", "surrogatepass"))
        return self._line + between.count("\n"), self._offset + size

    def _line_and_column(self, position: int) -> tuple[int, int]:
        newline = self._text.rfind("\n", 0, position)
        column = position - newline if newline >= 0 else self._column + position
        return self._line + self._text.count("\n", self._counted, position), column

    def _stop(self, reason: str) -> NoReturn:
        raise BadRow(reason, self._place()[0])


class _TooLong(BadRow):
    """A value that is larger than a row may be."""
