"""Files to rows, in constant memory: each with its value, its line, its byte and its raw text. Knows no dialect.

A fault inside a row that is otherwise readable (a key given twice, NaN) makes that row bad and no other. A fault that
hides where the next row begins ends the file; in JSON Lines the next line is the next row.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from afina.data.document import Document, document_rows
from afina.data.encoding import decoded, open_text
from afina.data.lines import ending_of, lines
from afina.data.parquet import parquet_rows
from afina.data.passages import passages
from afina.data.row import Decoder, Row, Shape, too_long
from afina.data.table import table_rows

_BLANK = b" \t\r\n"
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
        return parquet_rows(path)
    if form == "csv":
        return table_rows(path, shape)
    if form == "text":
        return passages(path, shape)
    if form == "json":
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
                for found in Document(io.BytesIO(raw)).find(shape.steps):
                    yield Row(found.value, number, offset, raw, found.fault, found.keys, is_json=True)


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
    return bool(found) and not (len(seen) == 1 and _is_columns(found[0]))


def _is_columns(value: dict[str, Any]) -> bool:
    """Whether an object is a table by its columns: lists alone, and none of them a list of objects."""
    return bool(value) and all(
        isinstance(column, list) and not any(isinstance(one, dict) for one in column[:1]) for column in value.values()
    )
