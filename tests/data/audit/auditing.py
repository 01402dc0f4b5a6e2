"""The audit on a handful of lines, as the tests want it."""

from pathlib import Path

from afina.data.audit.check import Pass
from afina.data.audit.finding import Finding, Report
from afina.recipe.schema import Data


def audit_bytes(
    folder: Path, content: bytes, *, plain: bool = False, form: str = "jsonl", **keys: object
) -> tuple[list[Finding], Report]:
    """Every finding in a file of this content and form, and the report."""
    file = folder / f"rows.{form}"
    file.write_bytes(content)
    found: list[Finding] = []
    report = Report(found.append)
    work = Pass(Data(train=str(file), **keys), report, plain=plain)
    work.file(file, form, "utf-8")
    work.finish()
    return found, report


def told(found: list[Finding]) -> list[tuple[str, int]]:
    """Class and line of each finding about a row."""
    return [(finding.kind, finding.line) for finding in found if finding.line]
