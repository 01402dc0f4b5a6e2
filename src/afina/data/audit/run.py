"""The audit of what a recipe names, or of files alone: looks at each file as a whole, then passes over all rows."""

import codecs
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from afina.console import Console, size
from afina.data.audit.check import Pass
from afina.data.audit.finding import Finding, Report
from afina.data.audit.labels import Labels
from afina.data.encoding import encoding_of
from afina.data.files import find
from afina.data.lines import GZIP, ZSTD
from afina.data.near import Near
from afina.data.row import Shape
from afina.data.rows import format_of
from afina.data.targets import Targets
from afina.errors import DataError
from afina.language import _
from afina.recipe.schema import Data, Recipe

WIDE = {
    codecs.BOM_UTF32_LE: "utf32",
    codecs.BOM_UTF32_BE: "utf32",
    codecs.BOM_UTF16_LE: "utf16",
    codecs.BOM_UTF16_BE: "utf16",
}
HEAD = 256


@dataclass
class Audit:
    """One audit. `held_out`: sources that are only measured on; `tell` is given every finding as it comes."""

    data: Data
    folder: Path
    held_out: Sequence[str] = ()
    labels: Labels | None = None
    targets: Targets | None = None
    tell: Callable[[Finding], None] = lambda _finding: None
    near: bool = False

    def run(self, console: Console) -> Report:
        """Read everything once; returns what was found. Raises DataError when a source does not exist."""
        started = time.perf_counter()
        learnt = _files([self.data.train], self.data, self.folder)
        held = [file for file in _files(self.held_out, self.data, self.folder) if file not in learnt]
        report = Report(self.tell)
        judges = [judge for judge in (self.targets, self.labels) if judge is not None]
        work = Pass(self.data, report, judges=judges, markup=self.labels is None)
        work.near = Near() if self.near else None
        work.across.held_out = frozenset(held)
        total = sum(file.stat().st_size for file in learnt + held)
        with console.progress(_("Checking"), total) as progress:
            for file in learnt + held:
                self._file(file, work, lambda done: progress.advance(done, size(report.size)))
        work.finish()
        report.seconds = time.perf_counter() - started
        report.facts = work.across.figures()
        if self.labels is not None:
            report.facts["tokens"] = self.labels.tokens
            report.facts["learnt_tokens"] = self.labels.learnt
            report.facts["longest"] = self.labels.longest
        return report

    def _file(self, file: Path, work: Pass, advance: Callable[[int], None]) -> None:
        report = work.report
        encoding = self._encoding(file, report)
        if encoding is None:
            report.files[file] = {"rows": 0, "rejected": 0, "dialect": "", "form": "", "encoding": ""}
            return
        before = report.rows, report.reasons.total()
        shape = Shape(self.data.mapping.rows if self.data.mapping else "", tuple(self.data.columns or ()), encoding)
        try:
            work.file(file, format_of(file, shape), encoding, advance)
        except DataError as error:
            line = error.line or 1
            report.add(Finding("unreadable", file, line, 0, 0, error.message))
            return
        if (report.rows, report.reasons.total()) == before:
            report.add(Finding("no-rows", file, 1, 0, file.stat().st_size))

    def _encoding(self, file: Path, report: Report) -> str | None:
        """The encoding a file is read in; None where it cannot be. Tells what its first bytes say."""
        with file.open("rb") as opened:
            head = opened.read(HEAD)
        if head.startswith((GZIP, ZSTD)):
            if file.suffix.lower() not in (".gz", ".zst", ".zstd"):
                report.add(Finding("compressed", file, 1, 0, 4))
            head = b""
        if head.startswith(codecs.BOM_UTF8):
            report.add(Finding("utf8-bom", file, 1, 0, 3))
        wide = next((kind for mark, kind in WIDE.items() if head.startswith(mark)), "")
        if not wide and head.count(0) * 10 > len(head) * 4:
            wide = "utf32" if head.count(0) * 10 > len(head) * 6 else "utf16"
        try:
            chosen = encoding_of(file, self.data.encoding)
        except DataError as error:
            if not isinstance(error.__cause__, UnicodeError):
                raise
            chosen = self.data.encoding[0]
        narrow = chosen.lower() in ("utf-8", "utf8")
        if wide and narrow and file.suffix.lower() != ".parquet":
            report.add(Finding(wide, file, 1, 0, min(len(head), 4), head[:4].hex(" ")))
            return None
        if not narrow:
            report.add(Finding("old-encoding", file, 1, 0, 0, chosen))
        return chosen


def of_recipe(recipe: Recipe) -> tuple[Data, list[str]]:
    """The data of a recipe, and the sources that it only measures on."""
    held: list[str] = []
    for sources in (recipe.data.validation, *(task.data for task in recipe.tasks)):
        if isinstance(sources, str):
            held.append(sources)
        elif isinstance(sources, list):
            held += sources
    return recipe.data, held


def _files(sources: Sequence[str | list[str]], data: Data, folder: Path) -> list[Path]:
    named = [name for source in sources for name in ([source] if isinstance(source, str) else source)]
    return list(dict.fromkeys(file for name in named for file in find(name, folder)))
