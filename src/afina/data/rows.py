"""Files to rows, in constant memory: each with its value, its line, its byte and its raw text. Knows no dialect.

A fault inside a row that is otherwise readable (a key given twice, NaN) makes that row bad and no other. A fault that
hides where the next row begins ends the file; in JSON Lines the next line is the next row.
"""

import codecs
import gc
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from afina.data.lines import CHUNK, ROW_BYTES, lines, open_raw
from afina.errors import DataError
from afina.language import _

Result = TypeVar("Result")
SPACE = re.compile(r"[ \t\r\n]*")
"""What JSON calls white space. Python's strip() knows more, and str.splitlines() would cut a row at U+2028."""
_BLANK = b" \t\r\n"
COMPRESSED = (".gz", ".zst", ".zstd")
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
"""What the end of a name says; `format_of` looks at the first lines too."""


class BadRow(ValueError):
    """A row that cannot be used; its text is the reason. `line` where it is known and not the row's own."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


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


def ending_of(path: Path) -> str:
    """The ending of a name that says what is inside, that of the compression left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


def format_of(path: Path, shape: Shape) -> str:
    """jsonl, json, csv, parquet or text: what the name says, and of JSON and text what the first lines say."""
    named = FORMATS.get(ending_of(path), "json")
    if named in ("json", "text") and not (named == "json" and shape.path) and _begins_as_lines(path, shape):
        return "jsonl"
    return named


def rows(path: Path, shape: Shape, form: str | None = None) -> Iterator[Row]:
    """The rows of a file in order. Raises DataError where the file as a whole cannot be read."""
    form = form or format_of(path, shape)
    if form == "parquet":
        from afina.data.parquet import parquet_rows

        return parquet_rows(path)
    if form == "csv":
        from afina.data.table import table_rows

        return table_rows(path, shape)
    if form == "text":
        from afina.data.passages import passages

        return passages(path, shape)
    if form == "json":
        from afina.data.document import document_rows

        return _numbered(document_rows(path, shape))
    return line_rows(path, shape)


def _numbered(found: Iterator[Row]) -> Iterator[Row]:
    for number, row in enumerate(found, start=1):
        row.number = number if row.raw else 0  # a document of another shape has none
        yield row


def line_rows(path: Path, shape: Shape) -> Iterator[Row]:
    """The rows of JSON Lines; where `shape` has a path, those that it leads to in each line."""
    decoder = Decoder()
    with open_text(path, shape.encoding) as file:
        for number, offset, raw, whole in lines(file):
            if not raw.strip(_BLANK):
                continue
            if not whole:
                yield Row(None, number, offset, raw, too_long(), is_json=True)
                return
            row = decoder.line(decoded(path, raw, number, offset), number, offset, raw)
            if row.fault or not shape.path:
                yield row
            else:
                from afina.data.document import Document

                for found in Document(io.BytesIO(raw)).find(shape.steps):
                    yield Row(found.value, number, offset, raw, found.fault, found.keys, is_json=True)


def too_long() -> str:
    """The fault of a row that is not read to its end."""
    return _("over {limit} MiB long; nothing after it was read").format(limit=ROW_BYTES >> 20)


def decoded(path: Path, raw: bytes, number: int, offset: int) -> str:
    """A line as text. Raises DataError: that is no matter of one row, the file is of another encoding."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise undecodable(path, raw[error.start], offset + error.start, number, "utf-8") from error


def undecodable(path: Path, byte: int, position: int, line: int, encoding: str) -> DataError:
    """The error of a byte that the encoding does not know."""
    with path.open("rb") as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return DataError(
        _("Byte {byte:#04x} at position {position} is not {encoding}.").format(
            byte=byte, position=position, encoding=encoding
        ),
        file=path,
        line=line,
        hint=_("The file begins as UTF-16 does: data.encoding: [utf-16].")
        if wide
        else _("Convert the file to UTF-8, or name its encoding: data.encoding: [utf-8, latin-1]."),
    )


def encoding_of(path: Path, encodings: Sequence[str]) -> str:
    """The first of the encodings that fits the whole file. Raises DataError when none does, or one is unknown.

    A single one is not tried here: reading the file will say where it does not fit.
    """
    if not encodings:
        raise DataError(_("data.encoding names no encoding."), hint=_("Write data.encoding: [utf-8]."))
    for encoding in encodings:
        _known(encoding)
    if len(encodings) == 1:
        return encodings[0]
    failure: DataError | None = None
    for encoding in encodings:
        try:
            with open_raw(path) as raw:
                file = _Transcoded(path, raw, encoding)
                while file.read(CHUNK):
                    pass
        except DataError as error:
            if not isinstance(error.__cause__, UnicodeError):
                raise
            failure = failure or error
        else:
            return encoding
    raise failure or DataError(_("data.encoding names no encoding."), hint=_("Write data.encoding: [utf-8]."))


def _known(encoding: str) -> None:
    try:
        b"a".decode(encoding)
    except UnicodeDecodeError:
        return
    except (LookupError, ValueError) as error:
        raise DataError(
            _("There is no encoding called {name}.").format(name=encoding),
            hint=_("Name one that Python knows in data.encoding, such as utf-8, latin-1 or utf-16."),
        ) from error


def open_text(path: Path, encoding: str) -> IO[bytes]:
    """The text of a file as bytes of UTF-8, without a byte order mark; undecompressed and untranscoded as needed."""
    file = open_raw(path)
    if encoding.lower() not in ("utf-8", "utf8"):
        return io.BufferedReader(_Transcoded(path, file, encoding), CHUNK)
    if not file.peek(3).startswith(codecs.BOM_UTF8):
        return file
    return io.BufferedReader(_Marked(file), CHUNK)


class _Marked(io.RawIOBase):
    """A file of UTF-8 whose byte order mark reads as three spaces: all places stay what they are."""

    def __init__(self, file: IO[bytes]) -> None:
        self._head = b" " * len(file.read(len(codecs.BOM_UTF8)))
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content, self._head = self._head or self._file.read(len(buffer)), b""
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Transcoded(io.RawIOBase):
    """A file of another encoding as UTF-8. Raises DataError at the first byte that the encoding does not know."""

    def __init__(self, path: Path, file: IO[bytes], encoding: str) -> None:
        self._path, self._file, self._encoding = path, file, encoding
        name = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
        self._decoder = codecs.getincrementaldecoder(name)()
        self._made, self._read, self._lines, self._ended = b"", 0, 1, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._made and not self._ended:
            chunk = self._file.read(CHUNK)
            self._ended = not chunk
            self._made = self._decode(chunk)
        content, self._made = self._made[: len(buffer)], self._made[len(buffer) :]
        buffer[: len(content)] = content
        return len(content)

    def _decode(self, chunk: bytes) -> bytes:
        held = self._decoder.getstate()[0]
        try:
            made = self._decoder.decode(chunk, final=self._ended)
        except UnicodeError as error:
            start = error.start if isinstance(error, UnicodeDecodeError) else 0
            before = (held + chunk)[:start]
            byte = (held + chunk)[start : start + 1] or b"\0"
            position, line = self._read - len(held) + start, self._lines + before.count(b"\n")
            raise undecodable(self._path, byte[0], position, line, self._encoding) from error
        self._read += len(chunk)
        self._lines += made.count("\n")
        return made.encode("utf-8", "surrogatepass")

    def close(self) -> None:
        self._file.close()
        super().close()


def _begins_as_lines(path: Path, shape: Shape) -> bool:
    """Whether a file that begins with an object has one to itself on one of its first two lines that are not blank."""
    decoder = Decoder()
    seen: list[Any] = []
    with open_text(path, shape.encoding) as file:
        for number, offset, raw, whole in lines(file):
            if not (raw := raw.strip(_BLANK)):
                continue
            if not whole or (not seen and not raw.startswith(b"{")):
                return False
            try:
                seen.append(decoder.line(raw.decode("utf-8"), number, offset, raw).value if raw[:1] == b"{" else None)
            except UnicodeDecodeError:  # no matter here: reading the line will say so
                seen.append(None)
            if len(seen) == 2:
                break
    found = [value for value in seen if isinstance(value, dict)]
    return bool(found) and not (len(seen) == 1 and is_columns(found[0]))


def is_columns(value: dict[str, Any]) -> bool:
    """Whether an object is a table by its columns: lists alone, and none of them a list of objects."""
    return bool(value) and all(
        isinstance(column, list) and not any(isinstance(one, dict) for one in column[:1]) for column in value.values()
    )


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


def uncollected(function: Callable[..., Result], *arguments: Any) -> Result:
    """The function's value, no garbage looked for meanwhile: millions of new objects make that take three times."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return function(*arguments)
    finally:
        if collecting:
            gc.enable()


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
            value = self._whole(text) if len(text) < CHUNK else uncollected(self._whole, text)
        except json.JSONDecodeError as error:
            fault = _("not valid JSON at column {column}: {reason}").format(column=error.colno, reason=error.msg)
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
