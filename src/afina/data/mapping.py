"""What data.mapping makes of rows: its templates over each, for many rows at once.

Templates run where they harm nobody (worker.py). Most do nothing but copy texts out of a row, which is as well done
here: what they copy is read off them there, and any row that has something else in that place goes there too.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from afina.data.conversation import Message
from afina.data.lines import CHUNK
from afina.data.row import BadRow, Row
from afina.data.worker import AT_ONCE, WORKER, Overrun
from afina.errors import DataError
from afina.language import _
from afina.recipe.schema import Mapping

Said = tuple[tuple[str, ...], list[str]]
"""Roles and texts of a row."""
LONGEST = 2**20
"""Characters that are copied here; how much a template may write beyond is known there."""


class Mapped:
    """A data.mapping. Raises DataError for a template that is none, and for one that takes too much."""

    def __init__(self, mapping: Mapping) -> None:
        texts = {"system": mapping.system, "user": mapping.user, "assistant": mapping.assistant}
        self._templates = {role: text for role, text in texts.items() if text is not None}
        self._ahead: dict[int, Said | BadRow] = {}
        told = {role: self._asked("copies", role, [None])[0][1] for role in self._templates}
        self._copies = {role: json.loads(text) for role, text in told.items() if text}

    def over(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows in order, some read ahead: each is to be asked for before the next is taken."""
        source = iter(rows)
        while group := _group(source):
            sound = [row for row in group if not row.fault]
            try:
                said = self.said([(row.value, row.keys) for row in sound])
                self._ahead = {id(row): made for row, made in zip(sound, said, strict=True)}
            except RecursionError:  # of one row: it is told when it comes by itself
                self._ahead = {}
            yield from group

    def __call__(self, row: Row) -> tuple[Message, ...]:
        """The conversation of a row. Raises BadRow."""
        try:
            said = self._ahead.pop(id(row), None) or self.said([(row.value, row.keys)])[0]
        except RecursionError:
            raise BadRow(_("nested too deeply")) from None
        if isinstance(said, BadRow):
            raise said
        return tuple(map(Message, *said))

    def said(self, rows: Sequence[tuple[Any, tuple[str, ...]]]) -> list[Said | BadRow]:
        """What each of these values says, with the keys that lead to it; or why it does not fit."""
        columns = [self._texts(role, rows) for role in self._templates]
        return [self._joined(texts) for texts in zip(*columns, strict=True)]

    def _joined(self, texts: Sequence[str | BadRow]) -> Said | BadRow:
        roles, said = [], []
        for role, text in zip(self._templates, texts, strict=True):
            if isinstance(text, BadRow):
                return text
            if (stripped := text.strip()) or role != "system":
                roles.append(role)
                said.append(stripped)
        return tuple(roles), said

    def _texts(self, role: str, rows: Sequence[tuple[Any, tuple[str, ...]]]) -> list[str | BadRow]:
        parts = self._copies.get(role)
        made: list[Any] = [None if parts is None else copied(parts, value) for value, _keys in rows]
        rest = [at for at, text in enumerate(made) if text is None]
        for at, (status, text) in zip(rest, self._asked("mapping", role, [rows[at] for at in rest]), strict=True):
            made[at] = (
                text if status == "made" else BadRow(_("data.mapping does not fit: {reason}").format(reason=text))
            )
        return made

    def _asked(self, kind: str, role: str, items: Sequence[Any]) -> list[tuple[str, str]]:
        try:
            answers = WORKER.ask(kind, self._templates[role], items)
        except Overrun as error:
            raise DataError(
                _("data.mapping.{key} was stopped: {reason}.").format(key=role, reason=error.message),
                hint=_("Nothing else was harmed. Write a simpler template."),
            ) from error
        if answers and answers[0][0] == "invalid":
            raise DataError(
                _("data.mapping.{key} is not a valid template: {reason}.").format(key=role, reason=answers[0][1]),
                hint=_('A value of the row is written {{ row.key }} or {{ row["a key"] }}.'),
            )
        return answers


def copied(parts: Sequence[str | Sequence[str]], row: Any) -> str | None:
    """What a template that only copies makes of a row; None where the sandbox must say. parts: literal text, and the
    keys that lead to a text of the row."""
    made = []
    for part in parts:
        value = part if isinstance(part, str) else row
        for key in () if isinstance(part, str) else part:
            if type(value) is not dict or key not in value:
                return None
            value = value[key]
        if type(value) is not str:
            return None
        made.append(value)
    text = "".join(made)
    return text if len(text) <= LONGEST else None


def _group(source: Iterator[Row]) -> list[Row]:
    """The next rows, so many that they take little room."""
    group: list[Row] = []
    size = 0
    for row in source:
        group.append(row)
        size += len(row.raw)
        if len(group) == AT_ONCE or size > CHUNK:
            break
    return group
