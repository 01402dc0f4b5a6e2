"""Conversation to token ids and the mask of what is learnt. Training, evaluation and chat all come through here.

The template renders each conversation once, as text. Where the answers stand in that text follows from how the same
template renders placeholders in the same roles (`_Layout`), checked to the character; for a template that looks into
the contents, from rendering again with a mark beside the answer. Marker strings are never searched for. The text is
then cut at the control tokens that the template itself wrote and where answers begin, and each piece is encoded as
plain text. So

* a control token written by a user or found in data stays text: it cannot end a turn or forge a role;
* a prompt at inference has the very ids it had in training, because nothing merges across the place where the
  model takes over.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from afina.data.audit.kinds import kinds
from afina.data.conversation import DOCUMENT, PASSAGE, Message, Sample
from afina.data.problem import BadRows, Problem
from afina.data.tokenizer import Refusal, Tokenizer
from afina.errors import DataError
from afina.language import _

MARK = "\ue0f0\ue0f1\ue0f0"
_PRIVATE = "\ue0f0-\ue0f5"
"""Characters of our own between contents and template. Where a content holds one of them, it is hidden like markup."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """`ids`: (tokens,) int32; `learnt`: (tokens,) bool, True where the token is a target of the loss."""

    ids: np.ndarray
    learnt: np.ndarray


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of the rendered text: one token of the template's markup, or plain text."""

    text: str
    learnt: bool
    markup: int | None = None


@dataclass(frozen=True, slots=True)
class _Hidden:
    """A conversation as the template may see it: placeholders stand for `texts`, which must not become markup."""

    rows: list[dict[str, str]]
    texts: list[str]

    def restore(self, text: str) -> str:
        """The text with what was hidden put back."""
        return re.sub("\ue0f2([0-9]+)\ue0f3", lambda m: self.texts[int(m.group(1))], text) if self.texts else text


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the template writes around the contents of one sequence of roles.

    `order`: the messages in the order in which their contents appear. `literals[i]` stands before the i-th of these,
    the last one after all; there are none when a content is missing or written twice. `leads`: per message, how many
    characters before its content the model takes over. `control`: how many control tokens there are in all.
    """

    order: tuple[int, ...]
    literals: tuple[str, ...]
    leads: tuple[int, ...]
    control: int

    def find(self, text: str, rows: list[dict[str, str]]) -> list[Span] | None:
        """Where each content stands in `text`, as it is or stripped; None when `text` is not laid out so."""
        if not self.literals or not text.startswith(self.literals[0]):
            return None
        found: dict[int, Span] = {}
        position = len(self.literals[0])
        for place, literal in zip(self.order, self.literals[1:], strict=True):
            content = rows[place]["content"]
            for form in (content, content.strip()):
                end = position + len(form)
                if text.startswith(form, position) and text.startswith(literal, end):
                    break
            else:
                return None
            found[place] = (position, end)
            position = end + len(literal)
        return [found[place] for place in range(len(rows))] if position == len(text) else None


@dataclass(frozen=True)
class Renderer:
    """The one renderer. `learn` says which assistant turns are targets: all, or the last."""

    tokenizer: Tokenizer
    learn: str = "all"

    def sample(self, sample: Sample) -> Rendered:
        """Ids and mask of one sample; raises DataError naming its file and line."""
        return self.samples([sample])[0]

    def samples(self, samples: Sequence[Sample]) -> list[Rendered]:
        """As `sample`, for many at once (the tokenizer then uses all cores). Raises BadRows naming all that fail."""
        pieces: list[list[_Piece]] = []
        problems: list[Problem] = []
        hint = ""
        for sample in samples:
            try:
                whole = self._text(sample.messages[0]) if sample.is_text else self._pieces(sample.messages, self.learn)
                pieces.append(whole)
            except (DataError, Refusal) as error:
                problems.append(Problem(sample.file, sample.line, error.message))
                hint = hint or error.hint
        if problems:
            raise BadRows(problems, len(samples), hint=hint)
        return self._encode(pieces)

    def prompt(self, messages: Iterable[Message]) -> list[int]:
        """Ids of a conversation that the model shall continue with its answer."""
        hidden = self._hide(list(messages))
        text = self.tokenizer.render(hidden.rows, prompt=True)
        layout = self._layout(hidden.rows, prompt=True)
        self._check(text, hidden, layout, learnt=())
        pieces = self._cut(text, hidden, self._spans(text, hidden, layout, prompt=True), [])
        return [int(index) for index in self._encode([pieces])[0].ids]

    def answer(self, messages: Sequence[Message], answer: str) -> Rendered:
        """Ids of messages followed by this answer, of which only the answer and its end of turn are learnt."""
        return self._encode([self._pieces([*messages, Message("assistant", answer)], "last")])[0]

    def _text(self, message: Message) -> list[_Piece]:
        """Plain text, all of it learnt, and where the text ends its end too. No template has a part in it."""
        end = self.tokenizer.hf.eos_token_id if message.role == DOCUMENT else None
        return [_Piece(message.content, True), *([] if end is None else [_Piece("", True, int(end))])]

    def _pieces(self, messages: Sequence[Message], learn: str) -> list[_Piece]:
        """A conversation cut up. Every answer is cut out, learnt or not: ids must not depend on what is learnt."""
        hidden = self._hide(messages)
        text = self.tokenizer.render(hidden.rows)
        layout = self._layout(hidden.rows, prompt=False)
        answers = _answers(hidden.rows)
        self._check(text, hidden, layout, learnt=answers if learn == "all" else answers[-1:])
        spans = self._spans(text, hidden, layout, prompt=False)
        return self._cut(text, hidden, spans, spans if learn == "all" else spans[-1:])

    def _hide(self, messages: Sequence[Message]) -> _Hidden:
        """Put placeholders for what could become markup: control tokens anywhere, tags but in the assistant's words."""
        texts: list[str] = []

        def placeholder(match: re.Match[str]) -> str:
            texts.append(match.group())
            return f"\ue0f2{len(texts) - 1}\ue0f3"

        rows = []
        for message in messages:
            pattern = self._not_assistants if message.role == "assistant" else self._not_users
            rows.append({"role": message.role, "content": pattern.sub(placeholder, message.content)})
        return _Hidden(rows, texts)

    def _check(self, text: str, hidden: _Hidden, layout: _Layout | None, learnt: Sequence[int]) -> None:
        """Refuse a template that drops a message, or changes a user's words or an answer that shall be learnt.

        Earlier answers it may shorten: templates of thinking models leave the thoughts of earlier turns out. In system
        messages some look for switches such as /no_think.
        """
        for place, row in enumerate(hidden.rows):
            if row["role"] == "assistant" and place not in learnt:
                continue
            parts = {"user": [row["content"]], "assistant": self._tags.split(row["content"])}.get(row["role"], [])
            kept = layout is None or place in layout.order
            if kept and all(part.strip() in text for part in parts):
                continue
            raise DataError(
                _("The chat template drops or changes the {role}'s message “{start}”.").format(
                    role=row["role"], start=hidden.restore(row["content"]).strip()[:40]
                ),
                hint=_("Use a template that has this role, or write its text into the user's message."),
            )

    def _spans(self, text: str, hidden: _Hidden, layout: _Layout | None, *, prompt: bool) -> list[Span]:
        """Where each answer stands in `text`: from where the model takes over to the end of turn, included."""
        answers = _answers(hidden.rows)
        found = layout.find(text, hidden.rows) if layout is not None else None
        if layout is not None and found is not None:
            spans = [(found[place][0] - layout.leads[place], found[place][1]) for place in answers]
        else:
            self._check_forged(text, layout)
            spans = [self._searched(text, hidden.rows, place, prompt) for place in answers]
        return [(begin, self._closed(text, end)) for begin, end in spans]

    def _check_forged(self, text: str, layout: _Layout | None) -> None:
        """Refuse a control token that only the template's own editing put together, as from <|im_/thinkend|>."""
        if layout is not None and len(self.control_pattern.findall(text)) != layout.control:
            raise DataError(
                _("The chat template makes control tokens out of a message."),
                hint=_("Take the control tokens out of it, or use another template (model.chat_template)."),
            )

    def _closed(self, text: str, end: int) -> int:
        """After the token that ends the answer, if there is one; what closes a turn but ends nothing is not learnt."""
        closing = self._ends.match(text, end)
        return closing.end() if closing else end

    def _layout(self, rows: list[dict[str, str]], *, prompt: bool) -> _Layout | None:
        """The layout of these roles, found once; None when the template refuses them with placeholders."""
        key = (prompt, tuple(row["role"] for row in rows))
        if key not in self._layouts:
            try:
                self._layouts[key] = self._laid_out(key[1], prompt)
            except Refusal:
                self._layouts[key] = None
        return self._layouts[key]

    def _laid_out(self, roles: Sequence[str], prompt: bool) -> _Layout:
        rows = [{"role": role, "content": f"\ue0f4{place}\ue0f5"} for place, role in enumerate(roles)]
        text = self.tokenizer.render(rows, prompt=prompt)
        matches = list(re.finditer("\ue0f4([0-9]+)\ue0f5", text))
        order = tuple(int(match.group(1)) for match in matches)
        literals: tuple[str, ...] = ()
        leads = [0] * len(roles)
        if sorted(order) == list(range(len(roles))):
            edges = [0, *(edge for match in matches for edge in match.span()), len(text)]
            literals = tuple(text[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True))
            for place, match in zip(order, matches, strict=True):
                leads[place] = self._lead(text[: match.start()], rows, place)
        return _Layout(order, literals, tuple(leads), len(self.control_pattern.findall(text)))

    def _lead(self, text: str, rows: list[dict[str, str]], place: int) -> int:
        """How many characters the model writes between taking over and the content of answer `place`, after `text`."""
        if rows[place]["role"] != "assistant" or place == 0:
            return 0
        before = self.tokenizer.render(rows[:place], prompt=True)
        return len(text) - len(before) if text.startswith(before) else 0

    def _searched(self, text: str, rows: list[dict[str, str]], place: int, prompt: bool) -> Span:
        """Where answer `place` stands, for a template that looks into the contents."""
        before = self.tokenizer.render(rows[:place], prompt=True) if place else ""
        end = self._marked(text, rows, place, prompt, front=False)
        if before and text.startswith(before) and len(before) <= end:
            return len(before), end
        return self._marked(text, rows, place, prompt, front=True), end

    def _marked(self, text: str, rows: list[dict[str, str]], place: int, prompt: bool, *, front: bool) -> int:
        """Where an answer begins (`front`) or ends in `text`, found by rendering it with MARK beside it."""
        content = rows[place]["content"]
        marked = {"role": "assistant", "content": MARK + content if front else content + MARK}
        variant = self.tokenizer.render([*rows[:place], marked, *rows[place + 1 :]], prompt=prompt)
        found = variant.find(MARK)
        if variant.count(MARK) != 1:
            raise DataError(
                _("The chat template drops or repeats the answer “{start}”.").format(start=content.strip()[:40]),
                hint=_("Use another template (model.chat_template)."),
            )
        return found if front else len(text) - (len(variant) - found - len(MARK))

    def _cut(self, text: str, hidden: _Hidden, spans: list[Span], targets: list[Span]) -> list[_Piece]:
        """Cut at markup and where `spans` begin and end; those in `targets` are learnt. Hidden texts return."""
        edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
        pieces: list[_Piece] = []
        for begin, end in pairwise(edges):
            learnt = any(first <= begin < last for first, last in targets)
            position = begin
            for match in self._tokens.finditer(text, begin, end):
                if position < match.start():
                    pieces.append(_Piece(hidden.restore(text[position : match.start()]), learnt))
                markup = match.group().strip()
                pieces.append(_Piece(markup, learnt, self.tokenizer.markup[markup]))
                position = match.end()
            if position < end:
                pieces.append(_Piece(hidden.restore(text[position:end]), learnt))
        return pieces

    def _encode(self, conversations: list[list[_Piece]]) -> list[Rendered]:
        """Ids of pieces, all plain texts encoded in one call."""
        plain = [piece.text for pieces in conversations for piece in pieces if piece.markup is None]
        encoded = iter(self.tokenizer.encode(plain, tags=False))
        return [self._joined(pieces, encoded) for pieces in conversations]

    def _joined(self, pieces: list[_Piece], encoded: Iterator[list[int]]) -> Rendered:
        ids: list[int] = []
        learnt: list[bool] = []
        bos = self.tokenizer.bos_id
        if bos is not None and (not pieces or pieces[0].markup != bos):
            ids, learnt = [bos], [False]
        for piece in pieces:
            added = [piece.markup] if piece.markup is not None else next(encoded)
            ids += added
            learnt += [piece.learnt] * len(added)
        return Rendered(np.array(ids, np.int32), np.array(learnt, np.bool_))

    @cached_property
    def _layouts(self) -> dict[tuple[bool, tuple[str, ...]], _Layout | None]:
        return {}

    @cached_property
    def _tokens(self) -> re.Pattern[str]:
        """Markup in a rendered text."""
        return self.tokenizer.pattern(self.tokenizer.markup)

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """The control tokens of this model, wherever they stand."""
        return _any_of(self.tokenizer.control_tokens)

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        """What ends an answer, after white space at most."""
        ends = [text for text, index in self.tokenizer.markup.items() if index in self.tokenizer.end_ids]
        return re.compile(rf"\s*(?:{self.tokenizer.pattern(ends).pattern})")

    @cached_property
    def _tags(self) -> re.Pattern[str]:
        """Tags that the assistant may write."""
        return _any_of(set(self.tokenizer.markup) - set(self.tokenizer.control_tokens))

    @cached_property
    def _not_users(self) -> re.Pattern[str]:
        return _any_of(self.tokenizer.markup, f"[{_PRIVATE}]")

    @cached_property
    def _not_assistants(self) -> re.Pattern[str]:
        return _any_of(self.tokenizer.control_tokens, f"[{_PRIVATE}]")


def _any_of(texts: Iterable[str], *patterns: str) -> re.Pattern[str]:
    """Any of these texts, the longest first, so that none hides in another."""
    escaped = [re.escape(text) for text in sorted(texts, key=len, reverse=True)]
    return re.compile("|".join([*patterns, *escaped]) or r"(?!)")


def _answers(rows: list[dict[str, str]]) -> list[int]:
    return [place for place, row in enumerate(rows) if row["role"] == "assistant"]


def audit(
    samples: Sequence[Sample], rendered: Sequence[Rendered], tokenizer: Tokenizer, max_length: int
) -> list[tuple[Sample, str]]:
    """What is wrong with the labels, sample by sample, before the first step; empty when all is well.

    Checked: something is learnt; the end of turn is learnt; the sequence fits, so no answer is cut off; one BOS.
    """
    problems: list[tuple[Sample, str]] = []
    for sample, row in zip(samples, rendered, strict=True):
        ends = sample.messages[0].role != PASSAGE
        for kind, detail in faults(row, tokenizer, max_length, ends=ends):
            sentence = kinds()[kind].sentence
            problems.append((sample, f"{sentence}: {detail}" if detail else sentence))
    return problems


def faults(row: Rendered, tokenizer: Tokenizer, max_length: int, *, ends: bool = True) -> Iterator[tuple[str, str]]:
    """Class (audit/kinds.py) and detail of what is wrong with the labels of a sample. ends: it has an end to learn."""
    learnt = np.flatnonzero(row.learnt[1:]) + 1  # the first token is never predicted
    bos = tokenizer.hf.bos_token_id
    if learnt.size == 0:
        yield "nothing-learnt", ""
    elif ends and int(row.ids[learnt[-1]]) not in tokenizer.end_ids:
        yield "end-not-learnt", ""
    if row.ids.size > max_length:
        yield "over-context", f"{row.ids.size} > {max_length}"
    if bos is not None and row.ids[:2].tolist() == [bos, bos]:
        yield "double-bos", ""
