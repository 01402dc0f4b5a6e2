"""Message and Sample: the one shape all inputs become, with the place each came from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
DOCUMENT, PASSAGE = "document", "passage"
"""The one message of a sample of plain text, all of it learnt: a whole text, or a part that others follow."""
EFFORTS = ("low", "medium", "high")
"""How hard a model that can choose shall think (gpt-oss)."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is one of ROLES.

    `weight`: how much the loss of an assistant's message counts; 0 leaves it out of what is learnt. `more`: what the
    message holds beside its text, as `packed` writes it: tool_calls, tool_call_id, name, thinking.
    """

    role: str
    content: str
    weight: float = 1.0
    more: str = ""

    @property
    def details(self) -> dict[str, Any]:
        """`more` as plain values."""
        return json.loads(self.more) if self.more else {}


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation to learn from or to be asked about; `line` (from 1) is where it starts in `file`.

    `tools`: the functions that the assistant may call, as `packed` writes a list of them. `effort`: one of EFFORTS, or
    "" for the template's own.
    """

    messages: tuple[Message, ...]
    file: Path
    line: int
    tools: str = ""
    effort: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1].content

    @property
    def is_text(self) -> bool:
        """Whether this is plain text to be learnt whole, with nobody asking."""
        return self.messages[0].role in (DOCUMENT, PASSAGE)

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"

    @property
    def given(self) -> dict[str, Any]:
        """What the chat template is told beside the messages."""
        return {
            **({"tools": json.loads(self.tools)} if self.tools else {}),
            **({"reasoning_effort": self.effort} if self.effort else {}),
        }

    def digest(self, salt: str = "") -> bytes:
        """16 bytes that depend on the content alone (and the salt), never on file or order."""
        digest = blake2b(salt.encode(), digest_size=16)
        texts = [text for message in self.messages for text in _texts(message)]
        for text in [*texts, *([self.tools, self.effort] if self.tools or self.effort else [])]:
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.digest()


def packed(value: Mapping[str, Any] | list[Any]) -> str:
    """JSON of a value, "" for an empty one. The order of keys stays, as templates show it."""
    return json.dumps(value, ensure_ascii=False) if value else ""


def row_of(sample: Sample) -> dict[str, Any]:
    """A sample as a row of chat messages."""
    messages = [
        {
            "role": message.role,
            "content": message.content,
            **message.details,
            **({"weight": message.weight} if message.weight != 1 else {}),
        }
        for message in sample.messages
    ]
    return {"messages": messages, **sample.given}


def _texts(message: Message) -> list[str]:
    """What tells a message from others; one without extras digests as it always did."""
    weight = [] if message.weight == 1 else [repr(float(message.weight))]
    return [message.role, message.content, *weight, *([message.more] if message.more else [])]
