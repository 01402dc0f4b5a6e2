"""Who answers: a model in memory, its base beside it, or a GGUF file in llama.cpp. A conversation in, text out.

Prompts are the renderer's, so they have the very ids of training; a GGUF file has only its own template, cut here at
the same places. What a user writes never becomes a control token. Knows nothing of history, commands or terminals.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, cast

from afina.data.conversation import Message
from afina.errors import DataError
from afina.language import _
from afina.recipe.schema import Chat

if TYPE_CHECKING:  # a GGUF file is spoken to without loading torch
    from torch import nn

    from afina.data.template import Renderer
    from afina.data.tokenizer import Tokenizer
    from afina.model.llamacpp import LlamaCpp

OnText = Callable[[str], bool | None]
"""Sees each piece of an answer as it comes; a true answer stops it."""

UNFINISHED = "\ufffd"
"""What bytes that are not yet, or never, a whole character are decoded to."""
LLAMA_CPP_SEEDS = 2**32 - 1
"""llama.cpp's seeds are smaller than this; this one means a random seed."""


class Speaker(Protocol):
    """Anything that answers a conversation."""

    @property
    def name(self) -> str:
        """How the user calls it."""
        ...

    def length(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt that these messages make."""
        ...

    def answer(self, messages: Sequence[Message], settings: Chat, seed: int, on_text: OnText) -> str:
        """The answer, of which `on_text` has seen every piece; together the pieces are the answer."""
        ...


@dataclass(frozen=True)
class ModelSpeaker:
    """A model of transformers. `adapted=False` answers as its base does: the adapters stay in memory, switched off.

    `answering` gives the model to be asked, where several share its memory.
    """

    name: str
    model: "nn.Module"
    renderer: "Renderer"
    adapted: bool = True
    answering: "Callable[[], AbstractContextManager[nn.Module]] | None" = None

    def length(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt."""
        return len(self.renderer.prompt(messages))

    def answer(self, messages: Sequence[Message], settings: Chat, seed: int, on_text: OnText) -> str:
        """Continue the prompt up to the end of turn. Raises DataError when the template refuses the messages."""
        from afina.model.generate import generate

        tokenizer = self.renderer.tokenizer
        prompt = self.renderer.prompt(messages, given_of(settings, tokenizer.template))
        text = Unfolding(tokenizer)
        stopped = False

        def on_token(index: int) -> bool:
            nonlocal stopped
            if index in tokenizer.end_ids:
                return True
            piece = text.add(index)
            stopped = bool(piece and on_text(piece))
            return stopped

        with self._adapters() as model:
            generate(
                model,
                [prompt],
                end_ids=tokenizer.end_ids,
                pad_id=tokenizer.pad_id,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=seed,
                on_token=on_token,
            )
        if not stopped and (rest := text.finish()):
            on_text(rest)
        return text.text

    @contextmanager
    def _adapters(self) -> "Iterator[nn.Module]":
        """The model, its adapters as wanted; a model without any is its own base."""
        from afina.model.virtual import without

        if self.answering is not None:
            with self.answering() as model:
                yield model
            return
        disabled = not self.adapted and hasattr(self.model, "disable_adapter")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that will change
            with without(self.model) if disabled else nullcontext():
                yield self.model


@dataclass
class Unfolding:
    """Tokens to text as they come. A character spread over several tokens is held back until it is whole.

    Each piece is the difference between decoding the tokens since the piece before last with and without the new
    ones: so spaces that depend on a neighbour (SentencePiece) are right, and the work per token does not grow.
    """

    tokenizer: "Tokenizer"
    text: str = ""
    _ids: list[int] = field(default_factory=list)
    _shown: int = 0

    def add(self, index: int) -> str:
        """What the new token adds to the text; empty while a character is unfinished."""
        self._ids.append(index)
        before, now = self._decoded()
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return self._gain(now[len(before) :])

    def finish(self) -> str:
        """What was held back, now that nothing more comes."""
        before, now = self._decoded()
        self._shown = len(self._ids)
        return self._gain(now[len(before) :])

    def _decoded(self) -> tuple[str, str]:
        return self.tokenizer.decode(self._ids[: self._shown]), self.tokenizer.decode(self._ids)

    def _gain(self, piece: str) -> str:
        self.text += piece
        return piece


@dataclass(frozen=True)
class GgufSpeaker:
    """A GGUF file in llama.cpp, with the chat template and the tokenizer that lie in the file."""

    name: str
    llama: "LlamaCpp"

    def length(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt."""
        return len(self.prompt(messages))

    def answer(self, messages: Sequence[Message], settings: Chat, seed: int, on_text: OnText) -> str:
        """Continue the prompt up to the end of turn. Raises DataError when the template drops a message."""
        pieces = self.llama.stream(
            self.prompt(messages, given_of(settings, self.llama.template)),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=seed % LLAMA_CPP_SEEDS,
        )
        text = ""
        with closing(cast(Any, pieces)):
            for piece in pieces:
                text += piece
                if on_text(piece):
                    break
        return text

    def prompt(self, messages: Sequence[Message], given: Mapping[str, Any] | None = None) -> list[int]:
        """Ids of a conversation, cut where answers begin, as in training; control tokens in contents stay text."""
        ids: list[int] = []
        for place, (text, control) in enumerate(self._pieces(messages, given or {})):
            ids += self.llama.tokenize(text, control, inside=place > 0)
        return ids if ids[: len(self._begin)] == self._begin else [*self._begin, *ids]

    def text(self, text: str) -> list[int]:
        """Ids of a bare text that the model shall go on with; control tokens in it stay text."""
        return [*self._begin, *self.llama.tokenize(text, False)]

    def _pieces(self, messages: Sequence[Message], given: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
        """Parts of the prompt, and whether control tokens in them are such."""
        hidden = {f"\ue0f2{place}\ue0f3": m.content for place, m in enumerate(messages) if self._forged(m.content)}
        names = {content: name for name, content in hidden.items()}
        rows = [{"role": m.role, "content": names.get(m.content, m.content)} for m in messages]
        prompt = self.llama.apply_template(rows, given)
        for row, message in zip(rows, messages, strict=True):
            if row["content"].strip() not in prompt:
                raise DataError(
                    _("The chat template drops or changes the {role}'s message “{start}”.").format(
                        role=message.role, start=message.content.strip()[:40]
                    ),
                    hint=_("Use a template that has this role, or write its text into the user's message."),
                )
        for part in _cut(prompt, self._starts(rows, prompt, given)):
            yield from _uncover(part, hidden)

    def _starts(self, rows: list[dict[str, str]], prompt: str, given: Mapping[str, Any]) -> list[int]:
        """Where in the prompt earlier answers begin."""
        answers = [place for place, row in enumerate(rows) if place and row["role"] == "assistant"]
        before = [self.llama.apply_template(rows[:place], given) for place in answers]
        return [len(text) for text in before if prompt.startswith(text)]

    def _forged(self, content: str) -> bool:
        """Whether a content spells a control token."""
        return self.llama.tokenize(content, True) != self.llama.tokenize(content, False)

    @cached_property
    def _begin(self) -> list[int]:
        """The token llama.cpp begins every text with, where the file says so."""
        first = self.llama.tokenize("a", False, add_special=True)[:1]
        return [] if first == self.llama.tokenize("a", False)[:1] else first


def given_of(settings: Chat, template: str | None) -> dict[str, Any]:
    """What the template is told beside the messages. Raises DataError for an effort that it would not hear of."""
    if settings.effort is None:
        return {}
    if "reasoning_effort" not in (template or ""):
        raise DataError(
            _("The chat template knows no reasoning effort."),
            hint=_("Leave the effort out: this model was not made to think for longer or shorter."),
        )
    return {"reasoning_effort": settings.effort}


def _cut(text: str, places: Sequence[int]) -> list[str]:
    edges = sorted({0, len(text), *places})
    return [text[start:end] for start, end in pairwise(edges)]


def _uncover(text: str, hidden: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """Put hidden contents back, as plain text, between parts in which control tokens are such."""
    for name, content in hidden.items():
        before, found, text = text.partition(name) if name in text else ("", "", text)
        if before:
            yield before, True
        if found:
            yield content, False
    if text:
        yield text, True
