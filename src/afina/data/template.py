"""Conversation to token ids and the mask of what is learnt. Training, evaluation and chat all come through here.

The template is rendered once as text. Where an answer stands in that text is found by rendering again with a mark
beside the answer, not by searching for marker strings. The text is then cut at the control tokens that the template
itself wrote and where answers begin, and each piece is encoded as plain text. So

* a control token written by a user or found in data stays text: it cannot end a turn or forge a role;
* a prompt at inference has the very ids it had in training, because nothing merges across the place where the
  model takes over.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from afina.data.conversation import Message, Sample
from afina.data.tokenizer import Tokenizer
from afina.errors import DataError
from afina.language import _

MARK = "\ue0f0\ue0f1\ue0f0"
"""Private-use characters: no template treats them as space, no text of a data set holds them in this order."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """`ids`: (tokens,) int32; `learnt`: (tokens,) bool, True where the token is a target of the loss."""

    ids: np.ndarray
    learnt: np.ndarray


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of the rendered text: one control token (`control`), or plain text."""

    text: str
    learnt: bool
    control: int | None


@dataclass(frozen=True)
class Renderer:
    """The one renderer. `learn` says which assistant turns are targets: all, or the last."""

    tokenizer: Tokenizer
    learn: str = "all"

    def sample(self, sample: Sample) -> Rendered:
        """Ids and mask of one sample; raises DataError naming its file and line."""
        return self.samples([sample])[0]

    def samples(self, samples: Sequence[Sample]) -> list[Rendered]:
        """As `sample`, for many at once (the tokenizer then uses all cores)."""
        return self._encode([self._explain(sample) for sample in samples])

    def prompt(self, messages: Iterable[Message]) -> list[int]:
        """Ids of a conversation that the model shall continue with its answer."""
        messages = list(messages)
        text, texts = self._render(messages, prompt=True)
        told = self._render(messages)[0] if any(message.role == "assistant" for message in messages) else ""
        spans = self._spans(told, messages) if told and text.startswith(told) else []
        return [int(index) for index in self._encode([self._cut(text, texts, spans, [])])[0].ids]

    def answer(self, messages: Sequence[Message], answer: str) -> Rendered:
        """Ids of messages followed by this answer, of which only the answer and its end of turn are learnt."""
        whole = [*messages, Message("assistant", answer)]
        return self._encode([self._pieces(whole, learn="last")])[0]

    def _explain(self, sample: Sample) -> list[_Piece]:
        try:
            return self._pieces(list(sample.messages), self.learn)
        except DataError as error:
            raise DataError(error.message, hint=error.hint, file=sample.file, line=sample.line) from error

    def _pieces(self, messages: list[Message], learn: str) -> list[_Piece]:
        text, texts = self._render(messages)
        spans = self._spans(text, messages)
        return self._cut(text, texts, spans, spans if learn == "all" else spans[-1:])

    def _spans(self, text: str, messages: list[Message]) -> list[tuple[int, int]]:
        """Where each answer stands in `text`, whether it is learnt or not: ids must not depend on what is learnt."""
        answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
        return [self._span(text, messages, place) for place in answers]

    def _render(self, messages: list[Message], *, prompt: bool = False) -> tuple[str, list[str]]:
        """The rendered text, control tokens in contents replaced by placeholders, and what these stand for."""
        texts: list[str] = []

        def hide(match: re.Match[str]) -> str:
            texts.append(match.group())
            return f"\ue0f2{len(texts) - 1}\ue0f3"

        rows = [{"role": m.role, "content": self._control.sub(hide, m.content)} for m in messages]
        rendered = self.tokenizer.render(rows, prompt=prompt)
        for message, row in zip(messages, rows, strict=True):
            if row["content"].strip() not in rendered:
                raise DataError(
                    _("The chat template drops or changes the {role}'s message “{start}”.").format(
                        role=message.role, start=message.content.strip()[:40]
                    ),
                    hint=_("Use a template that has this role, or write its text into the user's message."),
                )
        return rendered, texts

    def _span(self, text: str, messages: list[Message], place: int) -> tuple[int, int]:
        """Where answer `place` is learnt: from where the model takes over to the end-of-turn token, included."""
        before = self._render(messages[:place], prompt=True)[0] if place else ""
        start = len(before) if before and text.startswith(before) else self._marked(text, messages, place, front=True)
        end = self._marked(text, messages, place, front=False)
        close = self._closing.match(text, end)
        return start, close.end() if close else end

    def _marked(self, text: str, messages: list[Message], place: int, *, front: bool) -> int:
        """Where an answer begins (`front`) or ends in `text`, found by rendering it with MARK beside it."""
        content = messages[place].content
        marked = Message("assistant", MARK + content if front else content + MARK)
        variant = self._render([*messages[:place], marked, *messages[place + 1 :]])[0]
        found = variant.find(MARK)
        if found < 0:
            raise DataError(
                _("The chat template drops the answer “{start}”.").format(start=content.strip()[:40]),
                hint=_("Use another template (model.chat_template)."),
            )
        return found if front else len(text) - (len(variant) - found - len(MARK))

    def _cut(
        self, text: str, texts: list[str], spans: list[tuple[int, int]], targets: list[tuple[int, int]]
    ) -> list[_Piece]:
        """Cut at control tokens and where `spans` begin and end; those in `targets` are learnt. Hidden texts return."""
        edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
        pieces: list[_Piece] = []
        for begin, end in zip(edges, edges[1:], strict=False):
            learnt = any(first <= begin < last for first, last in targets)
            position = begin
            for match in self._control.finditer(text, begin, end):
                pieces.append(_Piece(_restore(text[position : match.start()], texts), learnt, None))
                pieces.append(_Piece(match.group(), learnt, self.tokenizer.control_tokens[match.group()]))
                position = match.end()
            pieces.append(_Piece(_restore(text[position:end], texts), learnt, None))
        return [piece for piece in pieces if piece.text]

    def _encode(self, conversations: list[list[_Piece]]) -> list[Rendered]:
        """Ids of pieces, all plain texts encoded in one call."""
        plain = [piece.text for pieces in conversations for piece in pieces if piece.control is None]
        encoded = iter(self.tokenizer.encode(plain))
        rendered = []
        for pieces in conversations:
            ids: list[int] = []
            learnt: list[bool] = []
            for piece in pieces:
                added = next(encoded) if piece.control is None else [piece.control]
                ids += added
                learnt += [piece.learnt] * len(added)
            bos = self._bos
            if bos is not None and ids[:1] != [bos]:
                ids, learnt = [bos, *ids], [False, *learnt]
            rendered.append(Rendered(np.array(ids, np.int32), np.array(learnt, np.bool_)))
        return rendered

    @cached_property
    def _bos(self) -> int | None:
        return self.tokenizer.bos_id

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Any control token; the longest first, so that none hides in another."""
        names = sorted(self.tokenizer.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")

    @cached_property
    def _closing(self) -> re.Pattern[str]:
        """The control token that closes an answer, after white space at most."""
        return re.compile(rf"\s*(?:{self._control.pattern})")


def _restore(text: str, texts: list[str]) -> str:
    return re.sub("\ue0f2([0-9]+)\ue0f3", lambda match: texts[int(match.group(1))], text) if texts else text


def audit(samples: Sequence[Sample], rendered: Sequence[Rendered], tokenizer: Tokenizer, max_length: int) -> list[tuple[Sample, str]]:
    """What is wrong with the labels, sample by sample, before the first step; empty when all is well.

    Checked: something is learnt; the end of turn is learnt; the sequence fits, so no answer is cut off; one BOS.
    """
    problems: list[tuple[Sample, str]] = []
    ends = np.array(tokenizer.end_ids, np.int32)
    for sample, row in zip(samples, rendered, strict=True):
        targets = row.ids[1:][row.learnt[1:]]
        if targets.size == 0:
            problems.append((sample, _("nothing is learnt")))
        elif not np.isin(targets[-1], ends):
            problems.append((sample, _("the end of turn is not learnt, so the model would never stop")))
        if row.ids.size > max_length:
            problems.append((sample, _("{count} tokens exceed model.max_length ({limit})").format(count=row.ids.size, limit=max_length)))
        if tokenizer.bos_id is not None and int((row.ids == tokenizer.bos_id).sum()) > 1 and tokenizer.bos_id not in ends:
            problems.append((sample, _("more than one beginning-of-sequence token")))
    return problems
