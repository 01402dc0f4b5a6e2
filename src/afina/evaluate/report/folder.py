"""A run folder read for the report: what is there is read, what is damaged is noted, for the page to say."""

import json
from pathlib import Path

from afina.evaluate.report.facts import Facts, mapping
from afina.language import _


class Folder:
    """Reads what is there; what is damaged is noted, for the page to say, and counts as absent."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.damaged: list[tuple[str, str]] = []

    def json(self, name: str) -> Facts:
        """The object in a JSON file; empty where there is none."""
        content = self.content(name)
        try:
            return mapping(json.loads(content)) if content else {}
        except (ValueError, RecursionError) as error:
            self.damaged.append((name, str(error)))
            return {}

    def lines(self, name: str) -> list[Facts]:
        """The objects of a file of JSON lines."""
        records, broken = [], 0
        for line in self.content(name).split(b"\n"):
            try:
                record = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                broken += 1
                continue
            if isinstance(record, dict):
                records.append(record)
        if broken:
            self.damaged.append((name, _("lines that are not JSON: {count}").format(count=broken)))
        return records

    def content(self, name: str) -> bytes:
        """The bytes of a file; none where it is absent or cannot be read."""
        try:
            return (self.run / name).read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self.damaged.append((name, error.strerror or str(error)))
            return b""
