"""The classes of faults: each with an id that never changes, a severity, one sentence and one piece of advice.

The one table that the screen, the page, the JSON lines, training's refusals and docs/data-check.md speak from.
"""

from enum import StrEnum
from functools import cache
from typing import NamedTuple

from afina.language import chosen


class Severity(StrEnum):
    """What a fault means for its row."""

    ERROR = "error"
    """The row cannot be used: training stops and names it."""
    WARNING = "warning"
    """The row is learnt, and probably teaches what nobody wants."""
    NOTE = "note"
    """Worth knowing."""


class Kind(NamedTuple):
    """A class of faults."""

    id: str
    severity: Severity
    sentence: str
    advice: str


def kinds() -> dict[str, Kind]:
    """Every class by its id, in the language of messages."""
    return _kinds(chosen())


@cache
def _kinds(_language: str) -> dict[str, Kind]:
    return {kind.id: kind for group in groups().values() for kind in group}


def groups() -> dict[str, list[Kind]]:
    """The classes by group, in the order they are told."""
    from afina.data.audit import kinds_of_rows, kinds_of_texts

    return {**kinds_of_rows.groups(), **kinds_of_texts.groups()}
