"""A conversation as a template may see it: what could become markup is hidden behind placeholders, and restored later.

Holds for contents, thoughts, tool calls and tools alike, keys and values, however deep.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from afina.data.conversation import Message
from afina.data.tokenizer import Tokenizer

PRIVATE = "\ue0f0-\ue0f5"
"""Characters of our own between contents and template. Where a content holds one of them, it is hidden like markup."""
_PLACE = re.compile("\ue0f2([0-9]+)\ue0f3")


@dataclass(frozen=True, slots=True)
class Hidden:
    """`rows` and `given`: messages and further values for the template; placeholders stand in them for `texts`."""

    rows: list[dict[str, Any]]
    given: dict[str, Any]
    texts: list[str] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether the messages are nothing but roles and contents."""
        return all(row.keys() == {"role", "content"} for row in self.rows)

    @property
    def kind(self) -> tuple[str, ...]:
        """What the template's markup depends on, the contents aside."""
        beside = [json.dumps(self.given)] if self.given else []
        return (*beside, *(str(row["role"]) for row in self.rows))

    def restore(self, text: str) -> str:
        """The text with what was hidden put back."""
        return _PLACE.sub(lambda m: self.texts[int(m.group(1))], text) if self.texts else text


class Hider:
    """Hides what could become markup: control tokens anywhere, tags but in the assistant's own words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._users = any_of(tokenizer.markup, f"[{PRIVATE}]")
        self._assistants = any_of(tokenizer.control_tokens, f"[{PRIVATE}]")

    def __call__(self, messages: Sequence[Message], given: Mapping[str, Any]) -> Hidden:
        hidden = Hidden([], {}, [])
        hidden.given.update({key: self._in(value, self._users, hidden.texts) for key, value in given.items()})
        for message in messages:
            pattern = self._assistants if message.role == "assistant" else self._users
            row = {"role": message.role, "content": self._in(message.content, pattern, hidden.texts)}
            for key, value in message.details.items():
                row[key] = self._in(value, pattern, hidden.texts)
            if "thinking" in row:  # gpt-oss's name of it, and everybody else's
                row["reasoning_content"] = row["thinking"]
            hidden.rows.append(row)
        return hidden

    def _in(self, value: Any, pattern: re.Pattern[str], texts: list[str]) -> Any:
        if isinstance(value, str):

            def placeholder(match: re.Match[str]) -> str:
                texts.append(match.group())
                return f"\ue0f2{len(texts) - 1}\ue0f3"

            return pattern.sub(placeholder, value)
        if isinstance(value, list):
            return [self._in(one, pattern, texts) for one in value]
        if isinstance(value, dict):
            return {self._in(key, pattern, texts): self._in(one, pattern, texts) for key, one in value.items()}
        return value


def harmless(value: Any) -> Any:
    """The same shape with every text of data made of one letter: what markup a template writes by itself.

    Texts keep their length, as a template may ask for it (Mistral's for ids of 9 characters).
    """
    if isinstance(value, str):
        return "x" * len(value) if value.strip() else value
    if isinstance(value, list):
        return [harmless(one) for one in value]
    if isinstance(value, dict):
        return {key: one if key in ("role", "type") else harmless(one) for key, one in value.items()}
    return value


def leaves(value: Any) -> Iterator[str]:
    """The texts inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (leaf for pair in value.items() for one in pair for leaf in leaves(one))
    elif isinstance(value, list):
        yield from (leaf for one in value for leaf in leaves(one))


def stands(part: str, text: str) -> bool:
    """Whether a text of the data stands in the rendered one, as it is or as JSON writes it."""
    part = part.strip()
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def any_of(texts: Iterable[str], *patterns: str) -> re.Pattern[str]:
    """Any of these texts, the longest first, so that none hides in another."""
    escaped = [re.escape(text) for text in sorted(texts, key=len, reverse=True)]
    return re.compile("|".join([*patterns, *escaped]) or r"(?!)")
