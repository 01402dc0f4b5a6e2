"""Rows to conversations. A dialect is known by the keys of a row; where two fit, or none, the user is asked."""

from collections.abc import Callable
from typing import Any

from afina.data.conversation import DOCUMENT, PASSAGE, Message
from afina.data.messages import effort_from, message_from, tools_from
from afina.data.row import BadRow, Row
from afina.errors import DataError
from afina.language import _
from afina.recipe.schema import Data

SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
}
"""Who speaks, in the words of the files that people have shared."""
PAIRS = {
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
}
"""Dialects of two texts: what is asked and what is answered."""

Make = Callable[[Row], tuple[Message, ...]]


def dialect_of(row: Any, data: Data) -> str:
    """The dialect of a row, which is that of its whole file. Raises BadRow where none or more than one fits."""
    if data.mapping is not None:
        return "mapping"
    if data.dialect != "auto":
        return data.dialect
    found = _fitting(row) if isinstance(row, dict) else []
    if len(found) == 1:
        return found[0]
    if found:
        raise BadRow(_("the keys fit {dialects}: choose one in data.dialect").format(dialects=", ".join(found)))
    keys = ", ".join(map(str, row))[:200] if isinstance(row, dict) else type(row).__name__
    raise BadRow(
        _("unknown shape ({keys}): rows hold messages, or instruction and output, or need data.mapping").format(
            keys=keys
        )
    )


def _fitting(row: dict[str, Any]) -> list[str]:
    found = []
    if "messages" in row:
        found.append("messages")
    if "conversations" in row:
        found.append("sharegpt")
    if {"instruction", "output"} <= row.keys():
        found.append("alpaca")
    found += [name for name, keys in PAIRS.items() if set(keys) <= row.keys()]
    if not found and "text" in row:  # beside another dialect, text is the same example rendered by somebody else
        found.append("text")
    return found


def maker(dialect: str, *, passages: bool = False) -> Make:
    """What makes conversations of rows of this dialect, where there is no data.mapping (mapping.py). passages: the rows
    are parts of one text. Raises DataError."""
    if dialect == "mapping":
        raise DataError(
            _("data.dialect is mapping, but there is no data.mapping."),
            hint=_("Add data.mapping with user and assistant."),
        )
    if dialect in PAIRS:
        return lambda row: _from_pair(row, *PAIRS[dialect])
    if dialect == "text":
        return lambda row: (Message(PASSAGE if passages else DOCUMENT, _text_of(row.value, "text")),)
    return {"messages": _from_messages, "sharegpt": _from_sharegpt, "alpaca": _from_alpaca}[dialect]


def _from_messages(row: Row) -> tuple[Message, ...]:
    messages = row.value.get("messages") if isinstance(row.value, dict) else None
    if not isinstance(messages, list):
        raise BadRow(_("no list of messages"))
    return tuple(message_from(message, number) for number, message in enumerate(messages, start=1))


def _unknown_role(number: int, role: Any, known: Any) -> str:
    return _("message {number} has the role {role}; known are {roles}").format(
        number=number, role=str(role)[:40], roles=", ".join(known)
    )


def _from_sharegpt(row: Row) -> tuple[Message, ...]:
    turns = row.value.get("conversations") if isinstance(row.value, dict) else None
    if not isinstance(turns, list):
        raise BadRow(_("no list of conversations"))
    made = []
    system = row.value.get("system")
    if isinstance(system, str) and system.strip():
        made.append(Message("system", system))
    for number, turn in enumerate(turns, start=1):
        if isinstance(turn, dict) and "role" in turn and "from" not in turn:
            made.append(message_from(turn, number))
            continue
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRow(_("message {number} has no text content").format(number=number))
        role = turn.get("from")
        if not isinstance(role, str) or role.lower() not in SHAREGPT:
            raise BadRow(_unknown_role(number, role, SHAREGPT))
        made.append(Message(SHAREGPT[role.lower()], turn["value"]))
    return tuple(made)


def _from_pair(row: Row, asked: str, answered: str) -> tuple[Message, ...]:
    value = row.value if isinstance(row.value, dict) else {}
    system = value.get("system")
    first = (Message("system", system),) if isinstance(system, str) and system.strip() else ()
    return (*first, Message("user", _text_of(value, asked)), Message("assistant", _text_of(value, answered)))


def _text_of(value: Any, key: str) -> str:
    text = value.get(key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise BadRow(_("{key} is not a text").format(key=key))
    return text


def _from_alpaca(row: Row) -> tuple[Message, ...]:
    value = row.value if isinstance(row.value, dict) else {}
    if value.get("history"):
        raise BadRow(_("history is not read: write such conversations as messages"))
    texts: dict[str, str] = {}
    for key in ("instruction", "input", "output", "system"):
        text = value.get(key)
        if text is None and key in ("input", "system"):
            text = ""
        if not isinstance(text, str):
            raise BadRow(_("{key} is not a text").format(key=key))
        texts[key] = text
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    system = (Message("system", texts["system"]),) if texts["system"].strip() else ()
    return (*system, Message("user", question), Message("assistant", texts["output"]))


def checked(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """What every sample must be: an answer at its end, nothing empty, text that can be encoded. Raises BadRow."""
    document = len(messages) == 1 and messages[0].role in (DOCUMENT, PASSAGE)
    if not messages or (messages[-1].role != "assistant" and not document):
        raise BadRow(_("the last message is not the assistant's, so there is nothing to learn"))
    for message in messages:
        if document and not message.content.strip():
            raise BadRow(_("the text is empty"))
        if not message.content.strip() and message.role != "tool" and "tool_calls" not in message.details:
            raise BadRow(_("the {role}'s message is empty").format(role=message.role))
        try:
            (message.content + message.more).encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow(
                _("half a character (a lone surrogate) in the {role}'s message").format(role=message.role)
            ) from None
    if any(message.role in ("system", "developer") for message in messages[1:]):
        raise BadRow(_("a system message stands after the first message"))
    return messages if system is None else with_system(messages, system)


def with_system(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """A conversation that begins with a system message: its own, or this one. Plain text has none."""
    if messages[0].role in ("system", "developer", DOCUMENT, PASSAGE):
        return messages
    return (Message("system", system), *messages)


def beside_of(row: Any, dialect: str) -> tuple[str, str]:
    """The tools and the reasoning effort that a row has beside its messages (`Sample`). Raises BadRow."""
    return (tools_from(row), effort_from(row)) if dialect in ("messages", "sharegpt") else ("", "")
