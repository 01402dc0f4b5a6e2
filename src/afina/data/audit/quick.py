"""The quick look at many rows: which are the plainest of their dialect? A typed parser takes out their texts.

A row that is not so plain raises one of NOT_PLAIN. One whose JSON text has more quotation marks than its strings need
has a key given twice, which no fast parser tells.
"""

from collections.abc import Callable, Collection
from itertools import chain
from typing import Annotated, Any, Literal, NamedTuple, Union

import msgspec
import numpy as np

from afina.data.audit.syntax import quotes_of
from afina.data.conversation import DOCUMENT
from afina.data.dialects import SHAREGPT
from afina.data.mapping import Mapped
from afina.data.row import BadRow, Row

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
    input: str | msgspec.UnsetType | None = msgspec.UNSET


class Plain(NamedTuple):
    """Rows taken apart: of each its roles, how many texts it has and how many quotation marks its JSON text must have;
    the texts of all, end to end."""

    roles: list[tuple[str, ...]]
    texts: list[str]
    counts: np.ndarray
    marks: np.ndarray


class Look(NamedTuple):
    """`decode`, `take`: a line, or a row that has been read, to what `spread` takes apart, many at once; they raise one
    of NOT_PLAIN. `numbers`: rows may hold some, and a minus zero among them is to be looked for."""

    decode: Callable[[bytes], Any]
    take: Callable[[Row], Any]
    spread: Callable[[list[Any]], Plain]
    numbers: bool = False


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
    marks = np.array([8 if row.input is msgspec.UNSET else 10 if row.input is None else 12 for row in rows], np.int64)
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
PLAIN = Union[str, bool, None, NUMBER]  # noqa: UP007 - made anew below
DEPTH = 6
"""Lists and objects in one another that a quick look takes: the parameters of tools are so deep."""
VALUE: Any = PLAIN
"""What every program reads alike: no number beyond 64 bits."""
for _depth in range(DEPTH):
    VALUE = Union[PLAIN, list[VALUE], dict[str, VALUE]]  # noqa: UP007
MEANT = frozenset({"chosen", "rejected", "system", "history", "tools", "reasoning_effort", "effort"})
"""Keys that mean something in some dialect: such rows are looked at one by one."""
KEYS = 64
"""Keys beside those of a dialect that a look is made for, at most."""


def look_of(dialect: str, keys: Collection[str]) -> Look:
    """The quick look at rows of a dialect which may have these keys, with any value, beside the dialect's own."""
    shape, spread = TYPED[dialect]
    beside = sorted(set(keys) - MEANT - set(shape.__struct_encode_fields__))[:KEYS]
    if not beside:
        return Look(msgspec.json.Decoder(shape).decode, _taker(shape), spread)
    names = {f"beside_{number}": key for number, key in enumerate(beside)}
    wider = msgspec.defstruct(
        "_Wider",
        [(name, VALUE | msgspec.UnsetType, msgspec.UNSET) for name in names],
        bases=(shape,),
        rename=names,
        kw_only=True,
        forbid_unknown_fields=True,
        gc=False,
    )

    def spread_wider(rows: list[Any]) -> Plain:
        return spread(rows)._replace(marks=_marks(rows))

    return Look(msgspec.json.Decoder(wider).decode, _taker(wider), spread_wider, numbers=True)


def _taker(shape: Any) -> Callable[[Row], Any]:
    """What makes a value of this shape of a row that has been read. Raises one of NOT_PLAIN."""
    encode = msgspec.json.Encoder().encode

    def take(row: Row) -> Any:
        if row.fault:
            raise ValueError
        encode(row.value)  # Python's own parser takes half a character for one
        return msgspec.convert(row.value, shape)

    return take


def look_through(mapped: Mapped) -> Look:
    """The quick look at rows that a data.mapping reads."""
    decoded, taken = msgspec.json.Decoder(VALUE).decode, _taker(VALUE)

    def decode(raw: bytes) -> Any:
        return ordinary(decoded(raw)), ()

    def take(row: Row) -> Any:
        return ordinary(taken(row)), row.keys

    def ordinary(value: Any) -> Any:
        if type(value) is dict and "chosen" in value:
            raise KeyError
        return value

    def spread(rows: list[Any]) -> Plain:
        said = mapped.said(rows)
        talks = [(("",), [""]) if isinstance(talk, BadRow) else talk for talk in said]  # which no row may say
        texts = [talk[1] for talk in talks]
        counts = np.fromiter(map(len, texts), np.int64, len(texts))
        marks = _marks([value for value, _keys in rows])
        return Plain([talk[0] for talk in talks], list(chain.from_iterable(texts)), counts, marks)

    return Look(decode, take, spread, numbers=True)


def _marks(rows: list[Any]) -> np.ndarray:
    """(rows,) int64: the quotation marks that the JSON text of each must have."""
    text = msgspec.json.Encoder().encode_lines(rows)
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
    return quotes_of(text, np.append(0, ends[:-1] + 1)[: ends.size])
