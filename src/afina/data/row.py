"""A row of a file: its value, its line, its byte and its raw text, and how JSON becomes one."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from afina.data.lines import CHUNK, ROW_BYTES
from afina.garbage import uncollected
from afina.language import _

SPACE = re.compile(r"[ \t\r\n]*")
"""What JSON calls white space. Python's strip() knows more, and str.splitlines() would cut a row at U+2028."""


class BadRow(ValueError):
    """A row that cannot be used; its text is the reason. `line` where it is known and not the row's own."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def why_no_json(error: json.JSONDecodeError) -> str:
    """What Python's reader says, in the language of messages."""
    return {
        "Expecting value": _("Expecting value"),
        "Expecting property name enclosed in double quotes": _("Expecting property name enclosed in double quotes"),
        "Expecting ',' delimiter": _("Expecting ',' delimiter"),
        "Expecting ':' delimiter": _("Expecting ':' delimiter"),
        "Extra data": _("Extra data"),
        "Unterminated string starting at": _("Unterminated string"),
        "Invalid control character at": _("Invalid control character"),
        "Invalid \\escape": _("Invalid \\escape"),
    }.get(error.msg.removesuffix(": "), error.msg)


@dataclass(slots=True)
class Row:
    """One row of a file.

    `line` (from 1) and `offset` (bytes, from 0) are where it begins, of Parquet its number and 0; in a file that is not
    UTF-8, `offset` and `raw` are those of the same text in UTF-8. `keys`: what `*` matched on the way to it. `fault`:
    why it cannot be used, or "". `number`: in a JSON document, whose rows may all stand on one line, which row it is,
    from 1; else 0. `is_json`: `raw` is JSON, and not a line of a table or of plain text.
    """

    value: Any
    line: int
    offset: int = 0
    raw: bytes = b""
    fault: str = ""
    keys: tuple[str, ...] = ()
    number: int = 0
    is_json: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """How a file is read. `path`: keys joined by dots that lead to the rows of a document, `*` for any key.

    `columns`: the names of a table's columns, where its first line does not say them. `encoding`: of the text.
    """

    path: str = ""
    columns: tuple[str, ...] = ()
    encoding: str = "utf-8"

    @property
    def steps(self) -> list[str]:
        """The keys of `path`."""
        return self.path.split(".") if self.path else []


def too_long() -> str:
    """The fault of a row that is not read to its end."""
    return _("over {limit} MiB long; nothing after it was read").format(limit=ROW_BYTES >> 20)


def line_of(value: Any) -> str:
    """A value as a row of JSON Lines, without its end. What JSON does not have (a date, of Parquet) becomes its text,
    and what is no number null."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Decoder:
    """Python's JSON decoder, which also notices what is JSON to Python alone."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._json = json.JSONDecoder(
            parse_constant=self._constant, parse_float=self._float, object_pairs_hook=self._object
        )
        self._whole: Callable[[str], Any] = self._json.decode
        self.at: Callable[[str, int], tuple[Any, int]] = self._json.raw_decode

    def line(self, text: str, number: int, offset: int, raw: bytes) -> Row:
        """One line as one row."""
        try:
            value = (self._whole if len(text) < CHUNK else uncollected()(self._whole))(text)
        except json.JSONDecodeError as error:
            told = _("not valid JSON at column {column}: {reason}")
            fault = told.format(column=error.colno, reason=why_no_json(error))
        except RecursionError:
            fault = _("nested too deeply")
        except ValueError as error:
            fault = _("not valid JSON: {reason}").format(reason=error)
        else:
            return Row(value, number, offset, raw, self.fault(), is_json=True)
        self.fault()  # what was noticed before the text broke off belongs to this line alone
        return Row(None, number, offset, raw, fault, is_json=True)

    def fault(self) -> str:
        """The first fault since the last call; "" for none."""
        if not self._faults:
            return ""
        found = self._faults[0]
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
            seen: set[str] = set()
            double = next(name for name, _value in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            self._faults.append(_("the key “{key}” is given twice").format(key=double[:40]))
        return value
