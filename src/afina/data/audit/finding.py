"""A finding: which fault of which class stands where. And what a pass over a data set tells: counts, examples, sums."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from afina.data.audit.kind import Severity
from afina.data.audit.kinds import kinds

EXAMPLES = 20
"""Findings of a class that are kept whole; the rest is counted, and passed on as it comes."""


class Finding(NamedTuple):
    """A fault of class `kind` in the row at `line` (from 1) of `file`, at the bytes `byte` to `end` (from 0) of it.

    Where a format has no bytes of its own for a value (Parquet, compressed files) these are of the decompressed row, or
    0 and 0. `detail` says what was found, in the file's own words. `row`: its number (from 1) in a JSON document, whose
    rows may all stand on one line; else 0.
    """

    kind: str
    file: Path
    line: int
    byte: int
    end: int
    detail: str = ""
    row: int = 0

    @property
    def severity(self) -> Severity:
        """Of its class."""
        return kinds()[self.kind].severity

    @property
    def reason(self) -> str:
        """The sentence of its class, and what was found."""
        sentence = kinds()[self.kind].sentence
        return f"{sentence}: {self.detail}" if self.detail else sentence

    def facts(self) -> dict[str, Any]:
        """The twin for machines."""
        kind = kinds()[self.kind]
        return {
            "class": self.kind,
            "severity": kind.severity.value,
            "file": str(self.file),
            "line": self.line,
            "byte": self.byte,
            "end": self.end,
            **({"row": self.row} if self.row else {}),
            "reason": self.reason,
            "advice": kind.advice,
        }


@dataclass
class Report:
    """What was found. `counts` by class; `examples` the first of each; `rejected` rows by file with their first reason.

    `tell` is given every finding as it is made.
    """

    tell: Callable[[Finding], None] = lambda _finding: None
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)
    files: dict[Path, dict[str, Any]] = field(default_factory=dict)
    rows: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    size: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Rows that can be used."""
        return self.rows - self.rejected

    def add(self, found: Finding) -> None:
        """Take up one finding."""
        self.counts[found.kind] += 1
        kept = self.examples.setdefault(found.kind, [])
        if len(kept) < EXAMPLES:
            kept.append(found)
        self.tell(found)

    def reject(self, found: Finding) -> None:
        """Count the row of an error once, under this class."""
        self.rejected += 1
        self.reasons[found.kind] += 1

    def worst(self) -> Severity | None:
        """The gravest severity found."""
        found = {kinds()[kind].severity for kind in self.counts}
        return next((severity for severity in Severity if severity in found), None)

    def of(self, severity: Severity) -> int:
        """Findings of a severity."""
        return sum(count for kind, count in self.counts.items() if kinds()[kind].severity is severity)
