"""A repaired copy of a data set: what can be repaired without guessing is, every row that is left out is set aside with
its reason, and each change is told. The files themselves are never touched.
"""

import itertools
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from afina import durable
from afina.artifact import parent, seal, sha256
from afina.data.audit import syntax
from afina.data.audit.blocks import Block, line_blocks, row_blocks
from afina.data.audit.finding import Finding, Report
from afina.data.audit.kind import Severity
from afina.data.audit.kinds import kinds
from afina.data.audit.letters import letters
from afina.data.audit.mojibake import repair
from afina.data.problem import place
from afina.data.row import Shape, line_of
from afina.errors import OutputError, ProofError
from afina.language import _
from afina.recipe.schema import Data

REMOVED = frozenset({"nul", "control-character", "invisible", "direction", "noncharacter"})
TEXTUAL = REMOVED | {"mojibake", "mojibake-twice", "line-separator", "decomposed"}
"""Classes that are repaired inside a text."""
ASIDE = "rejected.jsonl"
DROPPED = frozenset({"duplicate"})
ROUNDS = 1000
"""Of repairing a text: each takes out the first run of every class."""
OLD = "cp1252"
"""A line that is not UTF-8 is read in this encoding, where that makes it a row."""


class Change(NamedTuple):
    """What became of a row: `after` is empty where it was left out, for the reason `kind`; `row` as a finding's."""

    file: Path
    line: int
    kind: str
    before: str
    after: str
    row: int = 0


@dataclass
class Mend:
    """Remembers which rows need a hand while the audit passes, and writes the copy afterwards."""

    rows: dict[Path, dict[int, list[tuple[int, str]]]] = field(default_factory=dict)
    """File and line to bytes and classes of what is wrong there."""
    kept: int = 0
    repaired: int = 0
    """Of those kept."""
    dropped: int = 0
    rejected: int = 0
    copies: list[dict[str, Any]] = field(default_factory=list)
    """Of each file: what it was copied to, and its rows."""

    def note(self, found: Finding) -> None:
        """Take up a finding, as the audit tells it."""
        table = kinds()
        if found.line and (found.kind in TEXTUAL | DROPPED or table[found.kind].severity is Severity.ERROR):
            self.rows.setdefault(found.file, {}).setdefault(found.line, []).append((found.byte, found.kind))

    def write(self, folder: Path, report: Report, data: Data) -> list[Change]:
        """Write copies of all files of `report` into the new `folder`, and a manifest of what became of their rows;
        returns every change. Raises OutputError, and ProofError when the rows do not add up."""
        if folder.exists():
            raise OutputError(
                _("{path} exists already.").format(path=folder), hint=_("Choose another name, or remove it first.")
            )
        changes: list[Change] = []
        with durable.new_folder(folder) as new:
            for file, facts in report.files.items():
                if facts["form"]:
                    self._copy(new, file, facts, data, changes)
            aside = [change for change in changes if not change.after]
            durable.write_text(new / ASIDE, "".join(_line(change) for change in aside))
            durable.write_text(new / "changes.diff", "".join(diff(change) for change in changes))
            self._seal(new, report, changes)
        if self.kept + self.dropped + self.rejected != report.rows:
            raise ProofError(
                _("{rows} rows came in, but {kept} were kept and {aside} set aside.").format(
                    rows=report.rows, kept=self.kept, aside=self.dropped + self.rejected
                ),
                hint=_("Report this: the copy is not to be trusted."),
            )
        return changes

    def _seal(self, new: Path, report: Report, changes: list[Change]) -> None:
        by_class: dict[str, dict[str, int]] = {"repaired": {}, "set_aside": {}}
        for change in changes:
            counts = by_class["repaired" if change.after else "set_aside"]
            counts[change.kind] = counts.get(change.kind, 0) + 1
        seal(
            new,
            "repaired data",
            parents=[parent(Path(copy["from"]), sha256(Path(copy["from"])), "data") for copy in self.copies],
            rows={
                "in": report.rows,
                "kept": self.kept,
                "of_these_repaired": self.repaired,
                "duplicates": self.dropped,
                "rejected": self.rejected,
            },
            changes=by_class,
            copies=self.copies,
        )

    def _copy(self, new: Path, file: Path, facts: dict[str, Any], data: Data, changes: list[Change]) -> None:
        path, name = data.mapping.rows if data.mapping else "", file.name.partition(".")[0]
        shape = Shape(path, tuple(data.columns or ()), facts["encoding"])
        quick = facts["form"] == "jsonl" and not path
        blocks = line_blocks(file, facts["encoding"]) if quick else row_blocks(file, shape, facts["form"])
        names = (f"{name}-{number}.jsonl" if number > 1 else f"{name}.jsonl" for number in itertools.count(1))
        made = next(one for one in names if one != ASIDE and not (new / one).exists())
        before = self.kept
        with (new / made).open("wb") as copy:
            for block in blocks:
                for line in self._mended(file, block, changes, one_by_one=facts["form"] == "json"):
                    copy.write(line + b"\n")
        self.copies.append({"from": str(file), "to": made, "rows": facts["rows"], "kept": self.kept - before})

    def _mended(self, file: Path, block: Block, changes: list[Change], *, one_by_one: bool) -> Iterator[bytes]:
        """The rows of a block that are kept, as lines; one with nothing wrong byte for byte."""
        marked = self.rows.get(file, {})
        for at, raw in enumerate(block.raws):
            row = block.rows[at] if block.rows is not None else None
            raw = raw.removesuffix(b"\r")
            if row is None and not raw.strip(b" \t"):
                continue
            line, begin, number = (int(column[at]) for column in (block.lines, block.begins, block.numbers))
            # many rows of a JSON document may stand on one line
            inside = range(begin, begin + max(len(raw), 1)) if one_by_one else None
            wrong = {kind for byte, kind in marked.get(line, ()) if inside is None or byte in inside}
            bad = wrong - TEXTUAL - DROPPED
            value, before = row.value if row is not None else None, len(changes)
            if bad == {"not-utf8"} and row is None and (value := _reread(raw)) is not None:
                changes.append(
                    Change(file, line, "not-utf8", _shown(raw), json.dumps(value, ensure_ascii=False), number)
                )
                bad = set()
            if bad:
                self.rejected += 1
                changes.append(Change(file, line, min(bad), _shown(raw), "", number))
                continue
            if wrong & DROPPED:
                self.dropped += 1
                changes.append(Change(file, line, min(wrong & DROPPED), _shown(raw), "", number))
                continue
            self.kept += 1
            if not wrong and row is None:
                yield raw
                continue
            value = json.loads(raw) if value is None else value
            repaired = mended(value) if wrong & TEXTUAL else value
            for old, text in differences(value, repaired):
                changes.append(Change(file, line, min(wrong & TEXTUAL), old, text, number))
            self.repaired += len(changes) > before
            yield line_of(repaired).encode("utf-8", "surrogatepass")


def _shown(raw: bytes) -> str:
    return raw[:2000].decode("utf-8", "replace")


def _reread(raw: bytes) -> Any:
    value, wrong = syntax.unreadable(raw.decode(OLD, "replace").encode("utf-8"))
    return value if isinstance(value, dict) and not wrong else None


def mended(value: Any) -> Any:
    """A value with every text in it repaired."""
    if isinstance(value, str):
        return text_mended(value)
    if isinstance(value, list):
        return [mended(one) for one in value]
    if isinstance(value, dict):
        return {key: mended(one) for key, one in value.items()}
    return value


def text_mended(text: str) -> str:
    """A text without mojibake, odd line ends, letters apart from their accents, and characters that nobody sees."""
    for _round in range(ROUNDS):  # what is taken out may bring together what belongs together
        before = text
        found = repair(text)
        text = found.text if found is not None else text
        text = text.replace("\u2028", "\n").replace("\u2029", "\n\n").replace("\x85", "\n")
        text = unicodedata.normalize("NFC", text)
        for fault in sorted(letters(text), key=lambda fault: -fault.begin):
            if fault.kind in REMOVED:
                text = text[: fault.begin] + text[fault.end :]
        if text == before:
            break
    return text


def differences(before: Any, after: Any) -> Iterator[tuple[str, str]]:
    """Texts that differ, side by side."""
    if isinstance(before, str):
        if before != after:
            yield before, after
    elif isinstance(before, list):
        for one, other in zip(before, after, strict=True):
            yield from differences(one, other)
    elif isinstance(before, dict):
        for key in before:
            yield from differences(before[key], after[key])


def diff(change: Change) -> str:
    """A change as two lines, what is not seen written as escapes."""
    where = place(change.file.name, change.line, change.row)
    head = f"@@ {where} {change.kind}\n- {_escaped(change.before)}\n"
    return head + (f"+ {_escaped(change.after)}\n" if change.after else "")


def _escaped(text: str) -> str:
    """A text on one line, invisible characters as their escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _line(change: Change) -> str:
    facts = {
        "file": change.file.name,
        "line": change.line,
        "class": change.kind,
        "reason": kinds()[change.kind].sentence,
        "row": change.before,
    }
    return json.dumps(facts, ensure_ascii=False) + "\n"
