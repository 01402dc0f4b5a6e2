"""JSON text to records, each with the line it begins at. Knows nothing of what a record means.

A fault inside a record that is otherwise readable (a key given twice, NaN) makes that record bad and no other. A
fault that hides where the next record begins ends the document; in JSON Lines the next line is the next record.
"""

import json
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from afina.language import _

_SPACE = re.compile(r"[ \t\r\n]*")
"""What JSON calls white space. Python's strip() knows more, and str.splitlines() would cut a record at U+2028."""


class BadRow(ValueError):
    """A record that cannot be used; its text is the reason. `line` where it is known and not the record's own."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


@dataclass(frozen=True, slots=True)
class Row:
    """A record: its value, what `*` matched on the way to it, its line (from 1), and its fault if it has one."""

    value: Any
    keys: tuple[str, ...]
    line: int
    fault: str = ""


def rows(text: str, *, lines: bool, path: str) -> Iterator[Row]:
    """The records of a text in order.

    lines: the text is JSON Lines; else it is so where its first lines say so, and one document otherwise. path: keys
    joined by dots that lead to the records of a document (or of each line); `*` stands for any key.
    """
    steps = path.split(".") if path else []
    if lines or (not steps and _is_lines(text)):
        yield from _of_lines(text, steps)
    elif _SPACE.fullmatch(text) is None:
        yield from _of_document(text, steps)


def _is_lines(text: str) -> bool:
    """Whether a text that begins with an object has one to itself on one of its first two lines that are not blank."""
    position = _skip_space(text, 0)
    if text[position : position + 1] != "{":
        return False
    for _attempt in range(2):
        position = _skip_space(text, position)
        end = text.find("\n", position)
        line = text[position : end if end >= 0 else len(text)]
        if line.startswith("{") and isinstance(_parse(_Decoder(), line, 1).value, dict):
            return True
        position = end if end >= 0 else len(text)
    return False


def _of_lines(text: str, steps: list[str]) -> Iterator[Row]:
    decoder = _Decoder()
    for number, line in enumerate(text.split("\n"), start=1):
        if _SPACE.fullmatch(line) is not None:
            continue
        row = _parse(decoder, line, number)
        if row.fault or not steps:
            yield row
        else:
            for found in _Document(line).find(steps):
                yield Row(found.value, found.keys, number, found.fault)


def _of_document(text: str, steps: list[str]) -> Iterator[Row]:
    document = _Document(text)
    if not steps and text[_skip_space(text, 0)] != "[":
        reason = _("neither JSON Lines nor a JSON array; a document of another shape needs data.mapping.rows")
        yield Row(None, (), 1, reason)
        return
    yield from document.find(steps)


def _parse(decoder: "_Decoder", line: str, number: int) -> Row:
    """One line as one record."""
    try:
        value = decoder.whole(line)
    except json.JSONDecodeError as error:
        fault = _("not valid JSON at column {column}: {reason}").format(column=error.colno, reason=error.msg)
    except RecursionError:
        fault = _("nested too deeply")
    except ValueError as error:
        fault = _("not valid JSON: {reason}").format(reason=error)
    else:
        return Row(value, (), number, decoder.fault())
    decoder.fault()  # what was noticed before the text broke off belongs to this line alone
    return Row(None, (), number, fault)


class _Decoder:
    """Python's JSON decoder, which also notices what is JSON to Python alone."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._json = json.JSONDecoder(
            parse_constant=self._constant, parse_float=self._float, object_pairs_hook=self._object
        )
        self.whole: Callable[[str], Any] = self._json.decode
        self.at: Callable[[str, int], tuple[Any, int]] = self._json.raw_decode

    def fault(self) -> str:
        """The first fault since the last call; "" for none."""
        found = self._faults[0] if self._faults else ""
        self._faults.clear()
        return found

    def _constant(self, name: str) -> None:
        self._faults.append(_("{name} is not JSON").format(name=name))

    def _float(self, text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            self._faults.append(_("the number {text} is too large").format(text=text[:40]))
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            names = [name for name, _value in pairs]
            double = next(name for name in names if names.count(name) > 1)
            self._faults.append(_("the key “{key}” is given twice").format(key=double[:40]))
        return value


class _Document:
    """A JSON text read from place to place, so that every record has its line and only records are decoded."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._decoder = _Decoder()
        self._line, self._counted = 1, 0

    def find(self, steps: list[str]) -> Iterator[Row]:
        """The records that `steps` lead to; where the text stops being readable, one bad row says so."""
        try:
            end = yield from self._walk(0, steps, ())
            if _skip_space(self._text, end) != len(self._text):
                self._stop(end, _("there is text after the end"))
        except BadRow as reason:
            yield Row(None, (), reason.line or 1, str(reason))

    def _walk(self, position: int, steps: list[str], keys: tuple[str, ...]) -> Generator[Row, None, int]:
        """Records below the value at `position`; returns where it ends."""
        position = _skip_space(self._text, position)
        if steps:
            return (yield from self._members(position, steps, keys))
        if self._text[position : position + 1] == "[":
            return (yield from self._elements(position, keys))
        line = self._line_of(position)
        value, position = self._value(position)
        yield Row(value, keys, line, self._decoder.fault())
        return position

    def _elements(self, position: int, keys: tuple[str, ...]) -> Generator[Row, None, int]:
        position = _skip_space(self._text, position + 1)
        while self._text[position : position + 1] != "]":
            line = self._line_of(position)
            value, position = self._value(position)
            yield Row(value, keys, line, self._decoder.fault())
            position = self._next(position, "]")
        return position + 1

    def _members(self, position: int, steps: list[str], keys: tuple[str, ...]) -> Generator[Row, None, int]:
        """Go into the members of an object that the first step names."""
        step, *rest = steps
        if self._text[position : position + 1] != "{":
            self._stop(position, _("data.mapping.rows leads nowhere at “{step}”").format(step=step))
        begin, found = position, False
        position = _skip_space(self._text, position + 1)
        while self._text[position : position + 1] != "}":
            key, position = self._value(position)
            position = _skip_space(self._text, position)
            if not isinstance(key, str) or self._text[position : position + 1] != ":":
                self._stop(position, _("a key and : are missing"))
            position = _skip_space(self._text, position + 1)
            if step in ("*", key):
                found = True
                position = yield from self._walk(position, rest, (*keys, key) if step == "*" else keys)
            else:
                _skipped, position = self._value(position)
                self._decoder.fault()
            position = self._next(position, "}")
        if not found:
            self._stop(begin, _("data.mapping.rows leads nowhere at “{step}”").format(step=step))
        return position + 1

    def _value(self, position: int) -> tuple[Any, int]:
        try:
            return self._decoder.at(self._text, position)
        except json.JSONDecodeError as error:
            raise BadRow(
                _("not valid JSON from column {column} on: {reason}").format(column=error.colno, reason=error.msg),
                error.lineno,
            ) from None
        except RecursionError:
            self._stop(position, _("nested too deeply"))
        except ValueError as error:
            self._stop(position, _("not valid JSON: {reason}").format(reason=error))

    def _next(self, position: int, closing: str) -> int:
        """Where the next member begins, or the closing bracket."""
        position = _skip_space(self._text, position)
        if self._text[position : position + 1] == ",":
            after = _skip_space(self._text, position + 1)
            if self._text[after : after + 1] != closing:
                return after
        elif self._text[position : position + 1] == closing:
            return position
        self._stop(position, _("a comma too many, or a comma or {closing} is missing").format(closing=closing))

    def _stop(self, position: int, reason: str) -> NoReturn:
        raise BadRow(reason, self._line_of(position))

    def _line_of(self, position: int) -> int:
        if position < self._counted:
            return self._text.count("\n", 0, position) + 1
        self._line, self._counted = self._line + self._text.count("\n", self._counted, position), position
        return self._line


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position
