"""The quick look at many rows: which are the plainest of their dialect? A typed parser takes out their texts.

A row that is not so plain raises one of NOT_PLAIN. One whose JSON text has more quotation marks than its strings need
has a key given twice, which no fast parser tells.
"""

from collections.abc import Callable
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
    the texts of all, end to end."""

    roles: list[tuple[str, ...]]
    texts: list[str]
    counts: np.ndarray
    marks: np.ndarray


class Look(NamedTuple):
    """`decode`: a line to what `spread` takes apart, many at once; raises one of NOT_PLAIN."""

    decode: Callable[[bytes], Any]
    spread: Callable[[list[Any]], Plain]


ASKED = ("user", "assistant")


def _messages() -> Look:
    def spread(rows: list[Any]) -> Plain:
        talks = [row.messages for row in rows]
        counts = np.fromiter(map(len, talks), np.int64, len(talks))
        roles = [  # most have two, and need no loop of their own
            (turns[0].role, turns[1].role) if len(turns) == 2 else tuple([turn.role for turn in turns])
            for turns in talks
        ]
        return Plain(roles, [turn.content for turns in talks for turn in turns], counts, 8 * counts + 2)

    return Look(msgspec.json.Decoder(_Messages).decode, spread)


def _conversations() -> Look:
    def spread(rows: list[Any]) -> Plain:
        talks = [row.conversations for row in rows]
        counts = np.fromiter(map(len, talks), np.int64, len(talks))
        roles = [tuple([SHAREGPT[turn.role] for turn in turns]) for turns in talks]
        return Plain(roles, [turn.value for turns in talks for turn in turns], counts, 8 * counts + 2)

    return Look(msgspec.json.Decoder(_Conversations).decode, spread)


def _texts() -> Look:
    def spread(rows: list[Any]) -> Plain:
        count = len(rows)
        return Plain([(DOCUMENT,)] * count, [row.text for row in rows], np.ones(count, np.int64), np.full(count, 4))

    return Look(msgspec.json.Decoder(_Text).decode, spread)


def _pair(shape: Any, asked: str, answered: str) -> Look:
    def spread(rows: list[Any]) -> Plain:
        texts = [text for row in rows for text in (getattr(row, asked), getattr(row, answered))]
        return Plain([ASKED] * len(rows), texts, np.full(len(rows), 2), np.full(len(rows), 8))

    return Look(msgspec.json.Decoder(shape).decode, spread)


def _alpaca() -> Look:
    def spread(rows: list[Any]) -> Plain:
        texts = []
        for row in rows:
            texts += [f"{row.instruction}\n\n{row.input}" if row.input else row.instruction, row.output]
        marks = np.array([8 if row.input is None else 12 for row in rows], np.int64)
        return Plain([ASKED] * len(rows), texts, np.full(len(rows), 2), marks)

    return Look(msgspec.json.Decoder(_Alpaca).decode, spread)


TYPED: dict[str, Callable[[], Look]] = {
    "messages": _messages,
    "sharegpt": _conversations,
    "text": _texts,
    "alpaca": _alpaca,
    "prompt-completion": lambda: _pair(_PromptCompletion, "prompt", "completion"),
    "question-answer": lambda: _pair(_QuestionAnswer, "question", "answer"),
}
"""The quick look at rows that have the keys of their dialect and no other, by dialect."""


def loose(dialect: str) -> Look | None:
    """The quick look at rows with keys beside those of their dialect; None where there is none."""
    decode = msgspec.json.Decoder().decode

    def messages(raw: bytes) -> tuple[tuple[str, ...], list[str], int]:
        value = decode(raw)
        turns = value["messages"]
        if type(turns) is not list or not turns or sum(map(len, turns)) != 2 * len(turns) or "chosen" in value:
            raise KeyError
        _ordinary(value, raw)
        return tuple([turn["role"] for turn in turns]), [turn["content"] for turn in turns], 2 * strings(value)

    def pair(asked: str, answered: str) -> Callable[[bytes], tuple[tuple[str, ...], list[str], int]]:
        def look(raw: bytes) -> tuple[tuple[str, ...], list[str], int]:
            value = decode(raw)
            if "system" in value or "chosen" in value:
                raise KeyError
            _ordinary(value, raw)
            return ASKED, [value[asked], value[answered]], 2 * strings(value)

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


def _spread(rows: list[tuple[tuple[str, ...], list[str], int]]) -> Plain:
    counts = np.array([len(texts) for _roles, texts, _marks in rows], np.int64)
    marks = np.array([marks for _roles, _texts, marks in rows], np.int64)
    return Plain(
        [roles for roles, _texts, _marks in rows],
        [text for _roles, texts, _marks in rows for text in texts],
        counts,
        marks,
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
