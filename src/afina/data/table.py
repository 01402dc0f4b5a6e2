"""CSV and TSV to rows: an object a line, its keys the names of the columns."""

import csv
from collections.abc import Iterator
from pathlib import Path

from afina.data.encoding import decoded, open_text
from afina.data.lines import ROW_BYTES, ending_of, lines
from afina.data.row import BadRow, Row, Shape, too_long
from afina.language import _

DELIMITERS = ",;\t|"
"""What may stand between columns: the one that the first line has most of; in a .tsv the tab."""
COLUMNS = 4096
"""No table has more columns."""
ROW_LINES = 20_000
"""No row has more lines: a quote that is never closed would take all of the file for one cell."""


class _Fed:
    """The lines of a file as csv wants them, and where the row being read began."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self._path, self._file = path, open_text(path, shape.encoding)
        self._lines = lines(self._file)
        self.line, self.offset = 1, 0
        self._raw: list[bytes] = []
        self._begins, self._ahead = True, self._decoded()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._ahead is None:
            raise StopIteration
        (line, offset, raw, text), self._ahead = self._ahead, self._decoded()
        if self._begins:
            self.line, self.offset, self._raw, self._begins = line, offset, [], False
        self._raw.append(raw)
        if len(self._raw) > ROW_LINES:
            raise BadRow(_("over {limit} lines long; nothing after it was read").format(limit=ROW_LINES))
        return text

    @property
    def raw(self) -> bytes:
        """The text of the row being read."""
        return b"\n".join(self._raw)

    def new_row(self) -> None:
        """The next line is the first of a row."""
        self._begins = True

    def first(self) -> str:
        """The first line, left to be read."""
        return self._ahead[3] if self._ahead is not None else ""

    def close(self) -> None:
        self._file.close()

    def _decoded(self) -> tuple[int, int, bytes, str] | None:
        line = next(self._lines, None)
        if line is None:
            return None
        if not line.whole:
            raise BadRow(too_long(), line.number)
        text = decoded(self._path, line.raw, line.number, line.offset)
        return line.number, line.offset, line.raw, (text.lstrip(" ") if line.number == 1 else text) + "\n"


def delimiter_of(path: Path, first: str) -> str:
    """What stands between the columns of a table whose first line is `first`."""
    return "\t" if ending_of(path) == ".tsv" else max(DELIMITERS, key=lambda mark: (first.count(mark), mark == ","))


def table_rows(path: Path, shape: Shape) -> Iterator[Row]:
    """The rows of a table, cells as texts. Its first line names the columns, unless `shape.columns` does."""
    csv.field_size_limit(ROW_BYTES)
    try:
        fed = _Fed(path, shape)
    except BadRow as reason:
        yield Row(None, 1, fault=str(reason))
        return
    try:
        yield from _rows(fed, csv.reader(fed, delimiter=delimiter_of(path, fed.first()), strict=True), shape)
    finally:
        fed.close()


def _rows(fed: _Fed, reader: Iterator[list[str]], shape: Shape) -> Iterator[Row]:
    names = list(shape.columns)
    while True:
        fed.new_row()
        try:
            cells = next(reader, None)
        except BadRow as reason:
            yield Row(None, reason.line or fed.line, fed.offset, fault=str(reason))
            return
        except csv.Error as error:
            yield Row(None, fed.line, fed.offset, fed.raw, _("not valid CSV: {reason}").format(reason=error))
            if not names:
                return
            continue
        if cells is None:
            return
        if not cells or cells == [""]:
            continue
        if not names:
            names = [cell.strip() for cell in cells]
            if len(set(names)) < len(names) or not all(names) or len(names) > COLUMNS:
                fault = _("the first line must name the columns, each differently; or name them in data.columns")
                yield Row(None, fed.line, fed.offset, fed.raw, fault)
                return
            continue
        fault = ""
        if len(cells) != len(names):
            fault = _("{found} cells where there are {count} columns").format(found=len(cells), count=len(names))
        yield Row(dict(zip(names, cells, strict=False)), fed.line, fed.offset, fed.raw, fault)
