"""Files to samples: finds the files, recognises how each is written and its dialect, makes conversations of the rows.

Every row is accounted for. All bad rows of all files are reported in one error, each with its file, line and reason.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from afina.data.audit.chat import class_of
from afina.data.conversation import Sample
from afina.data.dialects import Make, beside_of, checked, dialect_of, maker
from afina.data.encoding import encoding_of
from afina.data.files import find
from afina.data.mapping import Mapped
from afina.data.problem import BadRows, Problem
from afina.data.row import BadRow, Row, Shape
from afina.data.rows import format_of, rows
from afina.errors import DataError
from afina.language import _
from afina.recipe.schema import Data, Sources

MOST_PROBLEMS = 10_000
"""Bad rows after which reading stops: such data is of another shape, and to list it would take memory without end."""


@dataclass
class Reading:
    """What was read and how. `spoken`: the dialect of each file; `forms`: of all; `encodings`: the files of each.

    `rows`: what the samples were made of, where it was asked for.
    """

    samples: list[Sample] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    spoken: dict[Path, str] = field(default_factory=dict)
    forms: set[str] = field(default_factory=set)
    encodings: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def dialects(self) -> set[str]:
        """Of every file."""
        return set(self.spoken.values())


def read(sources: Sources, data: Data, folder: Path, *, with_rows: bool = False) -> Reading:
    """Read every sample of `sources`; relative paths start at `folder`, else at the working directory.

    Raises DataError: a source is missing or empty, a file is named twice, or rows are bad (BadRows names all of them).
    """
    reading = Reading()
    problems: list[Problem] = []
    strange: Row | None = None
    for file, row, found in samples(sources, data, folder, reading):
        if isinstance(found, Sample):
            reading.samples.append(found)
            if with_rows:
                reading.rows.append(row)
        else:
            problems.append(Problem(file, row.line, found, class_of(row, reading.dialects), row.number))
            if problems[-1].kind == "unknown-shape":
                strange = strange or row
        if len(problems) == MOST_PROBLEMS:
            break
    if problems:
        raise BadRows(
            problems,
            len(problems) + len(reading.samples),
            hint=_("Nothing was read after these; afina data check goes through all of it.")
            if len(problems) == MOST_PROBLEMS
            else _mapping_for(strange) or _("Mend or remove these rows; nothing was changed or dropped."),
        )
    if not reading.samples:
        raise DataError(_("No data file is named."), hint=_("Name at least one file, folder or bundled set."))
    return reading


def _mapping_for(row: Row | None) -> str:
    """A mapping that reads a row of a shape of its own, made of its first two texts; "" where it has not two."""
    known = row.value if row is not None and isinstance(row.value, dict) else {}
    texts = [key for key, value in known.items() if isinstance(value, str)]
    if len(texts) < 2:
        return ""
    user, assistant = (f"{{{{ row.{key} }}}}" if key.isidentifier() else f"{{{{ row[{key!r}] }}}}" for key in texts[:2])
    made = f"{{user: {json.dumps(user, ensure_ascii=False)}, assistant: {json.dumps(assistant, ensure_ascii=False)}}}"
    return _("Say how to read them, for instance, under data in the recipe, mapping: {mapping}").format(mapping=made)


def samples(
    sources: Sources, data: Data, folder: Path, reading: Reading | None = None
) -> Iterator[tuple[Path, Row, Sample | str]]:
    """Every row of `sources` in order, with the sample it is or the reason why it is none, in constant memory.

    `reading` is told of files, forms, dialects and encodings. Raises DataError where a whole file cannot be read.
    """
    told = Reading() if reading is None else reading
    for source in [sources] if isinstance(sources, str) else sources:
        for file in find(source, folder):
            if file in told.files:
                raise DataError(
                    _("The data file {path} is named twice.").format(path=file),
                    hint=_("Two of the sources lead to it. Name it once, or its samples would count double."),
                )
            told.files.append(file)
            yield from _of_file(file, data, told)


def _of_file(file: Path, data: Data, told: Reading) -> Iterator[tuple[Path, Row, Sample | str]]:
    encoding = encoding_of(file, data.encoding)
    shape = Shape(data.mapping.rows if data.mapping else "", tuple(data.columns or ()), encoding)
    form = format_of(file, shape)
    told.encodings.setdefault(encoding, []).append(file)
    told.forms.add(form)
    mapped = Mapped(data.mapping) if data.mapping is not None else None
    make: Make | None = None
    empty = True
    for row in mapped.over(rows(file, shape, form)) if mapped else rows(file, shape, form):
        empty = False
        try:
            if row.fault:
                raise BadRow(row.fault)
            if make is None:
                dialect = dialect_of(row.value, data)
                make = mapped or maker(dialect, passages=form == "text")
                told.spoken[file] = dialect
            messages = checked(make(row), data.system)
            beside = beside_of(row.value, dialect)
        except BadRow as reason:
            yield file, row, str(reason)
        else:
            yield file, row, Sample(messages, file, row.line, *beside)
    if empty:
        raise DataError(_("The data file holds no rows."), file=file, hint=_("Each line should be one JSON object."))
