"""The quick look at many rows: which are the plainest of their dialect? A typed parser takes out their texts.

A row that is not so plain raises one of NOT_PLAIN. One whose JSON text has more quotation marks than its strings need
has a key given twice, which no fast parser tells.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

from afina.data.audit.syntax import strings
from afina.data.conversation import DOCUMENT
from afina.data.dialects import SHAREGPT

NOT_PLAIN = (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError)
"""What a look raises; msgspec's and Unicode's errors are ValueErrors."""
WIDE = 2**63
Some = Annotated[str, msgspec.Meta(min_length=1)]


class _Turn(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


class _Messages(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    messages: Annotated[list[_Turn], msgspec.Meta(min_length=1)]


class _Said(msgspec.Struct, forbid_unknown_fields=True, gc=False, rename={"role": "from"}):
    role: Literal[*SHAREGPT]  # type: ignore[valid-type]
    value: str


class _Conversations(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    conversations: Annotated[list[_Said], msgspec.Meta(min_length=1)]


class _Text(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    text: str


class _PromptCompletion(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    prompt: str
    completion: str


class _QuestionAnswer(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    question: str
    answer: str


class _Alpaca(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    instruction: Some
    output: str
    input: str | None = msgspec.field(default=None)


class Plain(NamedTuple):
    """Rows taken apart: of each its roles, how many texts it has and how many quotation marks its JSON text must have;
    the texts of all, end to end; of each its keys, where these may differ."""

    roles: list[tuple[str, ...]]
    texts: list[str]
    counts: np.ndarray
    marks: np.ndarray
    keys: Sequence[Iterable[str]] = ()


class Look(NamedTuple):
    """`decode`: a line to what `spread` takes apart, many at once; raises one of NOT_PLAIN. `numbers`: rows may hold
    some, and a minus zero among them is to be looked for. `beside`: keys that all rows have beside the dialect's."""

    decode: Callable[[bytes], Any]
    spread: Callable[[list[Any]], Plain]
    numbers: bool = False
    beside: Sequence[str] = ()


ASKED = ("user", "assistant")


def _messages(rows: list[Any]) -> Plain:
    talks = [row.messages for row in rows]
    counts = np.fromiter(map(len, talks), np.int64, len(talks))
    roles = [  # most have two, and need no loop of their own
        (turns[0].role, turns[1].role) if len(turns) == 2 else tuple([turn.role for turn in turns]) for turns in talks
    ]
    return Plain(roles, [turn.content for turns in talks for turn in turns], counts, 8 * counts + 2)


def _conversations(rows: list[Any]) -> Plain:
    talks = [row.conversations for row in rows]
    counts = np.fromiter(map(len, talks), np.int64, len(talks))
    roles = [tuple([SHAREGPT[turn.role] for turn in turns]) for turns in talks]
    return Plain(roles, [turn.value for turns in talks for turn in turns], counts, 8 * counts + 2)


def _texts(rows: list[Any]) -> Plain:
    count = len(rows)
    return Plain([(DOCUMENT,)] * count, [row.text for row in rows], np.ones(count, np.int64), np.full(count, 4))


def _pairs(asked: str, answered: str) -> Callable[[list[Any]], Plain]:
    def spread(rows: list[Any]) -> Plain:
        texts = [text for row in rows for text in (getattr(row, asked), getattr(row, answered))]
        return Plain([ASKED] * len(rows), texts, np.full(len(rows), 2), np.full(len(rows), 8))

    return spread


def _alpaca(rows: list[Any]) -> Plain:
    texts = []
    for row in rows:
        texts += [f"{row.instruction}\n\n{row.input}" if row.input else row.instruction, row.output]
    marks = np.array([8 if row.input is None else 12 for row in rows], np.int64)
    return Plain([ASKED] * len(rows), texts, np.full(len(rows), 2), marks)


TYPED: dict[str, tuple[type[msgspec.Struct], Callable[[list[Any]], Plain]]] = {
    "messages": (_Messages, _messages),
    "sharegpt": (_Conversations, _conversations),
    "text": (_Text, _texts),
    "alpaca": (_Alpaca, _alpaca),
    "prompt-completion": (_PromptCompletion, _pairs("prompt", "completion")),
    "question-answer": (_QuestionAnswer, _pairs("question", "answer")),
}
"""Rows that have the keys of their dialect and no other, by dialect, and how they are taken apart."""
NUMBER = Annotated[int, msgspec.Meta(ge=-WIDE, le=WIDE - 1)] | float
BESIDE = {str: str, bool: bool, int: NUMBER, float: NUMBER, type(None): None}
"""What a row may hold beside the keys of its dialect."""
MEANT = frozenset({"chosen", "rejected", "system", "history"})
"""Keys that mean something in some dialect."""


def exact(dialect: str, row: dict[str, Any]) -> Look | None:
    """The quick look at rows with the very keys of this one; None where there is none."""
    if dialect not in TYPED:
        return None
    shape, spread = TYPED[dialect]
    beside = {key: type(value) for key, value in row.items() if key not in shape.__struct_encode_fields__}
    if not beside:
        return Look(msgspec.json.Decoder(shape).decode, spread)
    if MEANT & beside.keys() or not set(beside.values()) <= BESIDE.keys():
        return None
    names = {f"beside_{number}": key for number, key in enumerate(beside)}
    wider = msgspec.defstruct(
        "_Wider",
        [(name, BESIDE[beside[key]]) for name, key in names.items()],
        bases=(shape,),
        rename=names,
        kw_only=True,
        forbid_unknown_fields=True,
        gc=False,
    )
    more = 2 * len(beside) + 2 * list(beside.values()).count(str)

    def spread_wider(rows: list[Any]) -> Plain:
        plain = spread(rows)
        return plain._replace(marks=plain.marks + more)

    numbers = bool({int, float} & set(beside.values()))
    return Look(msgspec.json.Decoder(wider).decode, spread_wider, numbers, tuple(beside))


Loose = tuple[tuple[str, ...], list[str], int, dict[str, Any]]
"""A row taken apart: its roles, texts and quotation marks, and the row."""


def loose(dialect: str) -> Look | None:
    """The quick look at rows with keys beside those of their dialect; None where there is none."""
    decode = msgspec.json.Decoder().decode

    def messages(raw: bytes) -> Loose:
        value = decode(raw)
        turns = value["messages"]
        if type(turns) is not list or not turns or sum(map(len, turns)) != 2 * len(turns) or "chosen" in value:
            raise KeyError
        _ordinary(value, raw)
        return tuple([turn["role"] for turn in turns]), [turn["content"] for turn in turns], 2 * strings(value), value

    def pair(asked: str, answered: str) -> Callable[[bytes], Loose]:
        def look(raw: bytes) -> Loose:
            value = decode(raw)
            if "system" in value or "chosen" in value:
                raise KeyError
            _ordinary(value, raw)
            return ASKED, [value[asked], value[answered]], 2 * strings(value), value

        return look

    if dialect == "messages":
        return Look(_texts_alone(messages), _spread)
    pairs = {"prompt-completion": ("prompt", "completion"), "question-answer": ("question", "answer")}
    return Look(_texts_alone(pair(*pairs[dialect])), _spread) if dialect in pairs else None


def _texts_alone(look: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A look that does not take a number, or nothing, for a text."""

    def only(raw: bytes) -> Any:
        found = look(raw)
        "".join(found[1])
        return found

    return only


def _spread(rows: list[Loose]) -> Plain:
    counts = np.array([len(texts) for _roles, texts, _marks, _row in rows], np.int64)
    marks = np.array([marks for _roles, _texts, marks, _row in rows], np.int64)
    return Plain(
        [roles for roles, _texts, _marks, _row in rows],
        [text for _roles, texts, _marks, _row in rows for text in texts],
        counts,
        marks,
        [row for _roles, _texts, _marks, row in rows],
    )


def _ordinary(value: dict[str, Any], raw: bytes) -> None:
    """Raises KeyError for a number that others read differently; a container of numbers is left to the slow way."""
    if b"-0" in raw:
        raise KeyError
    for one in value.values():
        kind = type(one)
        if kind is int and not -WIDE <= one < WIDE:
            raise KeyError
        if kind is dict or (kind is list and one and type(one[0]) in (int, list)):
            raise KeyError
