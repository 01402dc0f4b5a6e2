"""The quick look at a row: is it the plainest of its dialect? Then its texts come out by a typed parser, unquestioned.

A look returns (roles, texts, how many quotation marks the row's JSON text must have) or raises one of NOT_PLAIN. More
marks than that mean a key given twice, which no fast parser tells.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from afina.data.audit.syntax import strings

NOT_PLAIN = (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError)
"""What a look raises; msgspec's and Unicode's errors are ValueErrors."""
Look = Callable[[bytes], tuple[tuple[str, ...], list[str], int]]
WIDE = 2**63


class _Turn(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    role: str
    content: str


class _Messages(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    messages: list[_Turn]


class _PromptCompletion(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    prompt: str
    completion: str


class _QuestionAnswer(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    question: str
    answer: str


class _Alpaca(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    instruction: str
    output: str
    input: str | None = msgspec.field(default=None)


ASKED = ("user", "assistant")


def _messages() -> Look:
    decode = msgspec.json.Decoder(_Messages).decode

    def look(raw: bytes) -> tuple[tuple[str, ...], list[str], int]:
        messages = decode(raw).messages
        texts = [message.content for message in messages]
        return tuple([message.role for message in messages]), texts, 8 * len(texts) + 2

    return look


def _pair(shape: Any, asked: str, answered: str) -> Look:
    decode = msgspec.json.Decoder(shape).decode

    def look(raw: bytes) -> tuple[tuple[str, ...], list[str], int]:
        row = decode(raw)
        return ASKED, [getattr(row, asked), getattr(row, answered)], 8

    return look


def _alpaca() -> Look:
    decode = msgspec.json.Decoder(_Alpaca).decode

    def look(raw: bytes) -> tuple[tuple[str, ...], list[str], int]:
        row = decode(raw)
        if row.input is None:
            return ASKED, [row.instruction, row.output], 8
        if not row.instruction:
            raise KeyError
        question = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
        return ASKED, [question, row.output], 12

    return look


TYPED: dict[str, Callable[[], Look]] = {
    "messages": _messages,
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
        if type(turns) is not list or sum(map(len, turns)) != 2 * len(turns) or "chosen" in value:
            raise KeyError
        _ordinary(value, raw)
        texts = [turn["content"] for turn in turns]
        return tuple([turn["role"] for turn in turns]), texts, 2 * strings(value)

    def pair(asked: str, answered: str) -> Look:
        def look(raw: bytes) -> tuple[tuple[str, ...], list[str], int]:
            value = decode(raw)
            if "system" in value or "chosen" in value or not _ordinary(value, raw):
                raise KeyError
            return ASKED, [value[asked], value[answered]], 2 * strings(value)

        return look

    if dialect == "messages":
        return messages
    pairs = {"prompt-completion": ("prompt", "completion"), "question-answer": ("question", "answer")}
    return pair(*pairs[dialect]) if dialect in pairs else None


def _ordinary(value: dict[str, Any], raw: bytes) -> bool:
    """Whether no member is a number that others read differently; a container of numbers is left to the slow way."""
    if b"-0" in raw:
        raise KeyError
    for one in value.values():
        kind = type(one)
        if kind is int and not -WIDE <= one < WIDE:
            raise KeyError
        if kind is dict or (kind is list and one and type(one[0]) in (int, list)):
            raise KeyError
    return True
