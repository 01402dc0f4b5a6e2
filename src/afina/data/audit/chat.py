"""What is wrong or odd about one row as a conversation: the class of what the reader refuses, and the oddities of roles
and turns that it accepts. Whether a row is refused is decided by data/dialects.py alone.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from afina.data.audit.letters import Fault
from afina.data.audit.syntax import unreadable
from afina.data.conversation import ROLES
from afina.data.dialects import PAIRS, SHAREGPT
from afina.data.messages import REFUSED
from afina.data.row import Row

CALLED = ("tool_calls", "function_call")
TOOL_ROLES = ("tool", "function", "ipython", "observation", "environment")
KEYS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    **PAIRS,
}
"""What the rows of a dialect cannot be without."""


BESIDE = {
    "messages": {"tools", "reasoning_effort", "effort"},
    "sharegpt": {"system", "tools", "reasoning_effort", "effort"},
    "alpaca": {"input", "system", "history"},
    **{name: {"system"} for name in PAIRS},
}
"""What the rows of a dialect may have besides."""


def unread(value: Any, dialect: str) -> set[str]:
    """Keys of a row that nobody reads; what data.mapping reads, only its templates know."""
    if not isinstance(value, dict) or dialect not in KEYS:
        return set()
    return value.keys() - set(KEYS[dialect]) - BESIDE.get(dialect, set())


def refused(value: Any, dialect: str) -> tuple[str, str | None]:
    """The class of a row that the reader refuses, and the text in it that is to blame, where one is."""
    if not isinstance(value, dict):
        return _no_object(value), None
    if not value:
        return "row-empty", None
    if dialect in ("messages", "sharegpt"):
        key = KEYS[dialect][0]
        if key not in value:
            return ("mixed-shapes" if _other(value, dialect) else "key-missing"), None
        return _turns(value[key], dialect)
    if dialect in KEYS:
        missing = [key for key in KEYS[dialect] if key not in value]
        if missing:
            return ("mixed-shapes" if _other(value, dialect) else "key-missing"), None
        if value.get("history"):
            return "history", None
        return _cells([value.get(key) for key in (*KEYS[dialect], "input", "system") if key in value])
    return ("mapping-misfit" if dialect == "mapping" else "unknown-shape"), None


def unread_row(row: Row) -> list[Fault]:
    """What is wrong with a row that could not be read to a value, in bytes of it."""
    wrong = unreadable(row.raw)[1] if row.raw and row.is_json else []
    return wrong or [Fault("not-json" if row.is_json else "row-refused", 0, len(row.raw), row.fault)]


def class_of(row: Row, dialects: Collection[str]) -> str:
    """The class of a row that the reader refuses, among files of these dialects."""
    if row.fault:
        return unread_row(row)[0].kind
    return refused(row.value, next(iter(dialects)) if len(dialects) == 1 else "")[0]


def _no_object(value: Any) -> str:
    return "row-null" if value is None else "row-list" if isinstance(value, list) else "row-scalar"


def _other(value: dict[str, Any], dialect: str) -> bool:
    return any(set(keys) <= value.keys() for name, keys in KEYS.items() if name != dialect)


def _cells(cells: list[Any]) -> tuple[str, str | None]:
    for cell in cells:
        if not isinstance(cell, str):
            return _no_text(cell), None
    for cell in cells[:2]:
        if not cell.strip():
            return ("content-blank" if cell else "content-empty"), cell or None
    return _half(cells)


def _no_text(content: Any) -> str:
    if content is None:
        return "content-null"
    return "content-parts" if isinstance(content, list | dict) else "content-number"


def _half(texts: Sequence[str]) -> tuple[str, str | None]:
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            return "lone-surrogate", text
    return "row-refused", None


def _turns(turns: Any, dialect: str) -> tuple[str, str | None]:
    if not isinstance(turns, list):
        return "turns-no-list", None
    if not turns:
        return "turns-none", None
    texts, roles = [], []
    for at, turn in enumerate(turns):
        if not isinstance(turn, dict):
            return "turn-no-object", None
        if any(turn.get(key) for key in CALLED) and not _answered(turns[at + 1 :]):
            return "tool-unanswered", None
        if any(turn.get(key) for key in REFUSED):
            return "unlearnt-part", None
        foreign = dialect == "sharegpt" and "role" not in turn
        key, name = ("value", "from") if foreign else ("content", "role")
        if key not in turn:
            return ("mixed-shapes" if {"content", "value"} & turn.keys() else "content-missing"), None
        if not isinstance(turn[key], str):
            return _no_text(turn[key]), None
        if name not in turn:
            return "role-missing", None
        role = turn[name]
        if not isinstance(role, str) or (role not in ROLES and not (foreign and role.lower() in SHAREGPT)):
            return _strange_role(role), role if isinstance(role, str) else None
        texts.append(turn[key])
        roles.append(SHAREGPT.get(role.lower(), role) if foreign else role)
    for text in texts:
        if not text.strip():
            return ("content-blank" if text else "content-empty"), text or None
    if roles[-1] != "assistant":
        return ("no-assistant" if "assistant" not in roles else "ends-unanswered"), texts[-1]
    if "system" in roles[1:]:
        return "late-system", texts[roles.index("system", 1)]
    return _half(texts)


def _answered(rest: list[Any]) -> bool:
    following = rest[0] if rest and isinstance(rest[0], dict) else {}
    return following.get("role", following.get("from")) in TOOL_ROLES


def _strange_role(role: Any) -> str:
    if not isinstance(role, str):
        return "role-unknown"
    if role.strip().lower() in ROLES:
        return "role-case"
    if role.lower() in SHAREGPT:
        return "role-foreign"
    return "tool-role" if role.lower() in TOOL_ROLES else "role-unknown"


@cache
def order(roles: tuple[str, ...]) -> tuple[str, ...]:
    """Classes of oddities in an order of roles that the reader accepts."""
    turns = roles[1:] if roles[:1] == ("system",) else roles
    found = []
    if turns[:1] == ("assistant",):
        found.append("assistant-first")
    if any(one == other == "user" for one, other in pairwise(turns)):
        found.append("users-in-a-row")
    if any(one == other == "assistant" for one, other in pairwise(turns)):
        found.append("answers-in-a-row")
    return tuple(found)


def oddities(roles: tuple[str, ...], texts: Sequence[str], value: Any) -> Iterator[tuple[str, str | None]]:
    """Class, and text to blame, of what an accepted row has that is odd."""
    for kind in order(roles):
        yield kind, None
    if len(texts) > 1 and texts[-1].strip() == texts[-2].strip():
        yield "echo", texts[-1]
    if isinstance(value, dict) and "chosen" in value and value["chosen"] == value.get("rejected"):
        yield "chosen-is-rejected", None
