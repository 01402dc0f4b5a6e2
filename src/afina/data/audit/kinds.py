"""The classes of faults: the one table that the screen, the page, the JSON lines, training's refusals and
docs/data-check.md speak from."""

from functools import cache

from afina.data.audit import kinds_of_rows, kinds_of_texts
from afina.data.audit.kind import Kind
from afina.language import chosen


def kinds() -> dict[str, Kind]:
    """Every class by its id, in the language of messages."""
    return _kinds(chosen())


@cache
def _kinds(_language: str) -> dict[str, Kind]:
    return {kind.id: kind for group in groups().values() for kind in group}


def groups() -> dict[str, list[Kind]]:
    """The classes by group, in the order they are told."""
    return {**kinds_of_rows.groups(), **kinds_of_texts.groups()}
