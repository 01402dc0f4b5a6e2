"""Ratings in a SQLite file: who, when, which prompt, the hashes of both answers, and what was said. Knows no screen."""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from afina.errors import OutputError
from afina.language import _

FILE = "ratings.sqlite"
Mode = Literal["score", "pair"]
LEAST, MOST = 1, 5
SCHEMA = """
CREATE TABLE IF NOT EXISTS ratings (
    id INTEGER PRIMARY KEY,
    rater TEXT NOT NULL,
    at TEXT NOT NULL,
    mode TEXT NOT NULL CHECK (mode IN ('score', 'pair')),
    item TEXT NOT NULL,
    task TEXT NOT NULL,
    prompt TEXT NOT NULL,
    system TEXT NOT NULL,
    answer TEXT NOT NULL,
    answer_sha256 TEXT NOT NULL,
    other_system TEXT,
    other_answer TEXT,
    other_sha256 TEXT,
    shown_first TEXT NOT NULL,
    value INTEGER NOT NULL
        CHECK ((mode = 'score' AND value BETWEEN 1 AND 5) OR (mode = 'pair' AND value IN (-1, 0, 1))),
    seconds REAL NOT NULL,
    before TEXT NOT NULL DEFAULT '[]',
    UNIQUE (rater, mode, item)
)
"""
BEFORE = "ALTER TABLE ratings ADD COLUMN before TEXT NOT NULL DEFAULT '[]'"
"""For a file from when only the last question was kept."""
Turn = tuple[str, str]
"""Role and content of a message."""


@dataclass(frozen=True)
class Item:
    """What is rated: one answer, or two to the same prompt; `before` it, the rest of the conversation. Which system
    wrote which is not shown to the rater."""

    mode: Mode
    task: str
    prompt: str
    system: str
    answer: str
    other_system: str | None = None
    other_answer: str | None = None
    before: tuple[Turn, ...] = ()

    @property
    def key(self) -> str:
        """Names the item by content, so that a new evaluation with the same answers keeps its ratings."""
        parts = [self.mode, self.prompt, self.system, self.answer, self.other_system or "", self.other_answer or ""]
        parts += [text for turn in self.before for text in turn]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:24]


@dataclass(frozen=True)
class Rating:
    """One judgement. `value`: 1 to 5; of a pair 1 where `answer` is better, -1 where `other_answer` is, 0 for a tie."""

    rater: str
    at: str
    item: Item
    value: int
    shown_first: str
    seconds: float


class Store:
    """The ratings of one run. Each is on the disk before the next question is shown."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with self._open() as connection:
            connection.execute(SCHEMA)
            if "before" not in {column[1] for column in connection.execute("PRAGMA table_info(ratings)")}:
                connection.execute(BEFORE)

    def add(self, rater: str, item: Item, value: int, *, shown_first: str, seconds: float) -> None:
        """Keep a rating; a second one of the same rater for the same item replaces the first."""
        row = (
            *(rater, datetime.now(UTC).isoformat(timespec="seconds"), item.mode, item.key, item.task, item.prompt),
            *(item.system, item.answer, _sha(item.answer), item.other_system, item.other_answer),
            *(None if item.other_answer is None else _sha(item.other_answer), shown_first, value, seconds),
            json.dumps(item.before, ensure_ascii=False),
        )
        marks = ", ".join("?" * len(row))
        with self._open() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO ratings (rater, at, mode, item, task, prompt, system, answer, answer_sha256, "
                f"other_system, other_answer, other_sha256, shown_first, value, seconds, before) VALUES ({marks})",
                row,
            )

    def all(self) -> list[Rating]:
        """Every rating, oldest first."""
        columns = "rater, at, mode, task, prompt, system, answer, other_system, other_answer, value, shown_first"
        with self._open() as connection:
            rows = connection.execute(f"SELECT {columns}, seconds, before FROM ratings ORDER BY id").fetchall()
        return [
            Rating(
                rater, at, Item(mode, task, prompt, system, answer, other, text, turns(before)), value, first, seconds
            )
            for rater, at, mode, task, prompt, system, answer, other, text, value, first, seconds, before in rows
        ]

    def rated(self, rater: str) -> set[str]:
        """Keys of the items that a rater is done with."""
        with self._open() as connection:
            return {row[0] for row in connection.execute("SELECT item FROM ratings WHERE rater = ?", (rater,))}

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for one piece of work: the page's threads share none."""
        try:
            with closing(sqlite3.connect(self._file, timeout=30)) as connection, connection:
                yield connection
        except sqlite3.Error as error:
            raise OutputError(
                _("The ratings in {path} cannot be read or written: {reason}.").format(path=self._file, reason=error),
                hint=_("Check the disk and the file's permissions; move a damaged file away to begin anew."),
            ) from error


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def turns(text: str) -> tuple[Turn, ...]:
    """The messages that a rating keeps as JSON."""
    return tuple((str(role), str(content)) for role, content in json.loads(text))
