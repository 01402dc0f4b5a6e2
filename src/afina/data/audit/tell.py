"""What an audit found, for people and for machines."""

from pathlib import Path

from afina.console import Console, duration, size
from afina.data.audit.finding import Report
from afina.data.audit.fix import Change, Mend, diff
from afina.data.audit.kind import Severity
from afina.data.audit.kinds import kinds
from afina.data.problem import place
from afina.language import _

MARKS = {Severity.ERROR: "✗", Severity.WARNING: "!", Severity.NOTE: "·"}


def say(report: Report, console: Console, folder: Path) -> None:
    """Print the table of classes, the sums, and the twin for machines."""
    table = kinds()
    order = sorted(report.counts, key=lambda kind: (list(Severity).index(table[kind].severity), -report.counts[kind]))
    rows = []
    for kind in order:
        first = report.examples[kind][0]
        where = place(_near(first.file, folder), first.line, first.row)
        rows.append([MARKS[table[kind].severity], kind, table[kind].sentence, where, f"{report.counts[kind]:,}"])
    if rows:
        console.table(["", _("class"), _("what was found"), _("first at"), _("rows")], rows, left=4)
    else:
        console.line(_("Nothing to complain of."))
    for kind in order[:SHOWN]:
        first = report.examples[kind][0]
        console.line(f"{kind}: {first.detail}" if first.detail else f"{kind}", style="bold")
        console.line(f"  {table[kind].advice}")
    console.line(
        _("{rows:,} rows = {kept:,} kept + {rejected:,} rejected; {size} in {time} ({speed} each second)").format(
            rows=report.rows,
            kept=report.kept,
            rejected=report.rejected,
            size=size(report.size),
            time=duration(report.seconds),
            speed=size(report.size / max(report.seconds, 1e-9)),
        )
    )
    console.event("checked", **summary(report))


SHOWN_LETTERS = 1200
SHOWN = 12
"""Classes whose first example and advice are printed; the page has all."""


def summary(report: Report) -> dict[str, object]:
    """The figures of a report, for machines and manifests."""
    return {
        "rows": report.rows,
        "kept": report.kept,
        "rejected": report.rejected,
        "reasons": dict(report.reasons),
        "counts": dict(report.counts),
        "severities": {severity.value: report.of(severity) for severity in Severity},
        "files": {str(file): facts for file, facts in report.files.items()},
        "bytes": report.size,
        "seconds": round(report.seconds, 3),
    }


def say_changes(changes: list[Change], mend: Mend, folder: Path, console: Console) -> None:
    """Print what the repaired copy changed: the first changes, and how the rows add up."""
    for change in changes[:SHOWN]:
        console.line(diff(change).rstrip()[:SHOWN_LETTERS])
    if len(changes) > SHOWN:
        console.line(
            _("... and {count} more, in {path}").format(count=len(changes) - SHOWN, path=folder / "changes.diff")
        )
    console.line(
        _("Copy      {path}: {kept:,} rows kept, {dropped:,} duplicates and {rejected:,} bad rows set aside").format(
            path=folder, kept=mend.kept, dropped=mend.dropped, rejected=mend.rejected
        )
    )
    console.event(
        "fixed",
        folder=str(folder),
        kept=mend.kept,
        duplicates=mend.dropped,
        rejected=mend.rejected,
        changes=len(changes),
    )


def _near(file: Path, folder: Path) -> str:
    try:
        return str(file.relative_to(folder.resolve()))
    except ValueError:
        return file.name
