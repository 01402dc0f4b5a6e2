"""What is wrong with which row: collected over all of the data, then raised as one error that names every place."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from afina.errors import DataError
from afina.language import _

SHOWN = 20
"""Problems printed in full; the rest is counted, and is in `problems`."""


def place(file: str, line: int, row: int = 0) -> str:
    """`file:line`; of a file as a whole (line 0) its name alone; with the number of the row where it has one."""
    said = f"{file}:{line}" if line else file
    return _("{place}, row {row}").format(place=said, row=row) if row else said


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the row at `file:line` cannot be used. `kind` is the id of its class (audit/kinds.py), where it has one;
    `row` its number where several may stand on one line, else 0."""

    file: Path
    line: int
    reason: str
    kind: str = ""
    row: int = 0

    def __str__(self) -> str:
        said = f"{place(str(self.file), self.line, self.row)}: {self.reason}"
        return f"{said} [{self.kind}]" if self.kind else said


class BadRows(DataError):
    """Rows that cannot be used: `problems` holds all of them, the message the first of them."""

    def __init__(self, problems: Sequence[Problem], rows: int, *, hint: str) -> None:
        shown = [str(problem) for problem in islice(problems, SHOWN)]
        if len(problems) > len(shown):
            shown.append(_("... and {count} more").format(count=len(problems) - len(shown)))
        summary = _("{bad} of {all} rows cannot be used:").format(bad=len(problems), all=rows)
        super().__init__("\n".join([summary, *shown]), hint=hint, file=problems[0].file, line=problems[0].line)
        self.problems = tuple(problems)
