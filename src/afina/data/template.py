"""Conversation to token ids and the mask of what is learnt. Training, evaluation and chat all come through here.

The template renders each conversation once, as text. Where the answers stand in that text follows from how the same
template renders placeholders in the same roles (layout.py), checked to the character; for a template that looks into
the contents, and for answers that think or call tools, from rendering again: up to the answer, or with a mark beside
it. Marker strings are never searched for. The text is then cut at the control tokens that the template itself wrote
and where answers begin, and each piece is encoded as plain text. So

* a control token written by a user or found in data stays text: it cannot end a turn or forge a role;
* a prompt at inference has the very ids it had in training, because nothing merges across the place where the
  model takes over.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from afina.data.conversation import DOCUMENT, Message, Sample
from afina.data.hiding import Hidden, Hider, any_of, harmless, leaves, stands
from afina.data.layout import Layout, Rows, Span, laid_out
from afina.data.problem import BadRows, Problem
from afina.data.tokenizer import Refusal, Tokenizer
from afina.errors import DataError
from afina.language import _

MARK = "\ue0f0\ue0f1\ue0f0"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A sample as the model sees it.

    `ids`: (tokens,) int32; `learnt`: (tokens,) bool, True where the token is a target of the loss. `weights`: (tokens,)
    float32, how much each target counts, or None where all count 1.
    """

    ids: np.ndarray
    learnt: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of the rendered text: one token of the template's markup, or plain text. What weighs 0 is not learnt."""

    text: str
    weight: float
    markup: int | None = None


@dataclass(frozen=True)
class Renderer:
    """The one renderer. `learn` says what is a target: all assistant turns, the last one, or the whole text."""

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
        hidden = [self._hider(sample.messages, sample.given) for sample in samples if not sample.is_text]
        talks = iter(zip(hidden, self.tokenizer.render_all([(one.rows, one.given) for one in hidden]), strict=True))
        for sample in samples:
            try:
                if sample.is_text:
                    pieces.append(self._plain_text(sample.messages[0]))
                    continue
                one, text = next(talks)
                if isinstance(text, Refusal):
                    raise text
                pieces.append(self._pieces(one, text, self._weights(sample.messages), whole=self.learn == "text"))
            except (DataError, Refusal) as error:
                problems.append(Problem(sample.file, sample.line, error.message))
                hint = hint or error.hint
        if problems:
            raise BadRows(problems, len(samples), hint=hint)
        return self._encode(pieces)

    def apart(self, samples: Sequence[Sample]) -> list[Sample]:
        """Conversations whose earlier answers the template writes otherwise than it does the last, one per answer.

        Templates of thinking models leave thoughts of earlier turns out, and gpt-oss ends them with another token: the
        model would learn what it must never write. Each of the samples made learns one answer, where it stands last.
        """
        made: list[Sample] = []
        for sample in samples:
            weights = self._weights(sample.messages)
            if self.learn == "all" and len(weights) > 1 and self._rewrites(sample, sorted(weights)):
                made += [_up_to(sample, place) for place in sorted(weights)]
            else:
                made.append(sample)
        return made

    def prompt(self, messages: Iterable[Message], given: Mapping[str, Any] | None = None) -> list[int]:
        """Ids of a conversation that the model shall continue with its answer; `given` as in Sample."""
        hidden = self._hider(list(messages), given or {})
        text = self.tokenizer.render(hidden.rows, prompt=True, given=hidden.given)
        layout = self._layout(hidden, prompt=True)
        self._check(text, hidden, layout, learnt=())
        spans = self._spans(text, hidden, layout, (), prompt=True)
        return [int(index) for index in self._encode([self._cut(text, hidden, spans.values(), [])])[0].ids]

    def text(self, text: str) -> list[int]:
        """Ids of a bare text that the model shall go on with, as plain text is learnt."""
        return [int(index) for index in self._encode([[_Piece(text, 0.0)]])[0].ids]

    def answer(self, messages: Sequence[Message], answer: str, given: Mapping[str, Any] | None = None) -> Rendered:
        """Ids of messages followed by this answer, of which only the answer and its end of turn are learnt."""
        hidden = self._hider([*messages, Message("assistant", answer)], given or {})
        text = self.tokenizer.render(hidden.rows, given=hidden.given)
        return self._encode([self._pieces(hidden, text, {len(messages): 1.0})])[0]

    def _plain_text(self, message: Message) -> list[_Piece]:
        """Plain text, all of it learnt, and where the text ends its end too. No template has a part in it."""
        end = self.tokenizer.hf.eos_token_id if message.role == DOCUMENT else None
        return [_Piece(message.content, 1.0), *([] if end is None else [_Piece("", 1.0, int(end))])]

    def _weights(self, messages: Sequence[Message]) -> dict[int, float]:
        """The answers that are learnt, by their place, and how much each counts."""
        answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
        chosen = answers[-1:] if self.learn == "last" else answers
        return {place: messages[place].weight for place in chosen if messages[place].weight > 0}

    def _pieces(self, hidden: Hidden, text: str, weights: Mapping[int, float], *, whole: bool = False) -> list[_Piece]:
        """A conversation cut up. Every answer is cut out, learnt or not: ids must not depend on what is learnt."""
        layout = self._layout(hidden, prompt=False)
        self._check(text, hidden, layout, learnt=weights)
        spans = self._spans(text, hidden, layout, weights, prompt=False)
        targets = [(spans[place], weight) for place, weight in weights.items()]
        if whole:
            muted = [(span, 0.0) for place, span in spans.items() if place not in weights]
            last = spans.get(len(hidden.rows) - 1)  # after the end of the last answer nothing is ever written
            targets = [*targets, *muted, ((0, last[1] if last else len(text)), 1.0)]
        return self._cut(text, hidden, spans.values(), targets)

    def _rewrites(self, sample: Sample, places: Sequence[int]) -> bool:
        """Whether up to the end of some learnt answer the text is another once the conversation goes on."""
        hidden = self._hider(sample.messages, sample.given)
        fixed = hidden.plain and self._layout(hidden, prompt=False) is not None
        key = (hidden.kind, tuple(places))
        if fixed and key in self._rewritten:
            return self._rewritten[key]
        try:
            text = self.tokenizer.render(hidden.rows, given=hidden.given)
            layout = self._layout(hidden, prompt=False)
            fixed = fixed and layout is not None and layout.find(text, hidden.rows) is not None
            found = any(not text.startswith(self._through(hidden, place)) for place in places[:-1])
        except (Refusal, DataError):
            return False  # rendering the sample will say what is wrong
        if fixed:
            self._rewritten[key] = found
        return found

    def _through(self, hidden: Hidden, place: int) -> str:
        """The text up to the end of answer `place`, where the conversation ends with it."""
        part = Hidden(hidden.rows[: place + 1], hidden.given, hidden.texts)
        text = self.tokenizer.render(part.rows, given=part.given)
        return text[: self._spans(text, part, self._layout(part, prompt=False), (place,), prompt=False)[place][1]]

    def _check(self, text: str, hidden: Hidden, layout: Layout | None, learnt: Collection[int]) -> None:
        """Refuse a template that drops a message or a tool, or changes a user's words or an answer that is learnt.

        Earlier answers it may shorten: templates of thinking models leave the thoughts of earlier turns out. In system
        messages some look for switches such as /no_think.
        """
        for place, row in enumerate(hidden.rows):
            if row["role"] == "assistant" and place not in learnt:
                continue
            parts = [row["content"]] if row["role"] in ("user", "tool") else []
            if row["role"] == "assistant":
                parts = [*self._tags.split(row["content"]), *self._tags.split(row.get("thinking", ""))]
                for call in row.get("tool_calls", ()):
                    parts += [call["function"]["name"], *leaves(call["function"]["arguments"])]
            kept = layout is None or place in layout.order
            if kept and all(stands(part, text) for part in parts):
                continue
            raise DataError(
                _("The chat template drops or changes the {role}'s message “{start}”.").format(
                    role=row["role"], start=hidden.restore(row["content"] or "".join(parts)).strip()[:40]
                ),
                hint=_("Use a template that has this role, or write its text into the user's message."),
            )
        for tool in hidden.given.get("tools") or ():
            if not stands(tool["function"]["name"], text):
                raise DataError(
                    _("The chat template leaves out the tool {name}.").format(name=tool["function"]["name"][:40]),
                    hint=_("Use a template that has room for tools (model.chat_template)."),
                )

    def _spans(
        self, text: str, hidden: Hidden, layout: Layout | None, learnt: Collection[int], *, prompt: bool
    ) -> dict[int, Span]:
        """Where each answer stands in `text`: from where the model takes over to the end of turn, included.

        One that cannot be found, as the template shortens it, is left out unless it is to be learnt.
        """
        answers = [place for place, row in enumerate(hidden.rows) if row["role"] == "assistant"]
        found = layout.find(text, hidden.rows) if layout is not None else None
        if layout is not None and found is not None:
            spans = {place: (found[place][0] - layout.leads[place], found[place][1]) for place in answers}
            return {place: (begin, self._closed(text, end)) for place, (begin, end) in spans.items()}
        self._check_forged(text, hidden, layout, prompt=prompt)
        spans = {}
        for place in answers:
            try:
                begin, end = self._searched(text, hidden, place, prompt)
            except (DataError, Refusal):
                if place in learnt or hidden.plain:
                    raise
                continue
            spans[place] = (begin, self._closed(text, end))
        return spans

    def _check_forged(self, text: str, hidden: Hidden, layout: Layout | None, *, prompt: bool) -> None:
        """Refuse a control token that only the template's own editing put together, as from <|im_/thinkend|>."""
        count = layout.control if layout is not None else None
        if not hidden.plain:
            rows = [harmless(row) for row in hidden.rows]
            count = len(self.control_pattern.findall(self._render(rows, prompt=prompt, given=hidden.given)))
        if count is not None and len(self.control_pattern.findall(text)) != count:
            raise DataError(
                _("The chat template makes control tokens out of a message."),
                hint=_("Take the control tokens out of it, or use another template (model.chat_template)."),
            )

    def _closed(self, text: str, end: int) -> int:
        """After the token that ends the answer, if there is one; what closes a turn but ends nothing is not learnt."""
        closing = self._ends.match(text, end)
        return closing.end() if closing else end

    def _layout(self, hidden: Hidden, *, prompt: bool) -> Layout | None:
        """The layout of these roles, found once; None when there is more than contents, or the template refuses."""
        if not hidden.plain:
            return None
        key = (prompt, hidden.kind)
        if key not in self._layouts:
            roles = [str(row["role"]) for row in hidden.rows]

            def render(rows: Rows, *, prompt: bool) -> str:
                return self._render(rows, prompt=prompt, given=hidden.given)

            try:
                self._layouts[key] = laid_out(roles, render, self.control_pattern, prompt=prompt)
            except Refusal:
                self._layouts[key] = None
        return self._layouts[key]

    def _render(self, rows: Rows, *, prompt: bool, given: dict[str, Any]) -> str:
        return self.tokenizer.render(rows, prompt=prompt, given=given)

    def _searched(self, text: str, hidden: Hidden, place: int, prompt: bool) -> Span:
        """Where answer `place` stands, for a template that looks into the contents, or an answer that calls tools."""
        rows = hidden.rows
        before = self._render(rows[:place], prompt=True, given=hidden.given) if place else ""
        if "tool_calls" in rows[place]:
            through = self._render(rows[: place + 1], prompt=False, given=hidden.given)
            end = max((match.end() for match in self.control_pattern.finditer(through)), default=0)
            end = end if end > len(before) and not through[end:].strip() else len(through.rstrip())
            if before and text.startswith(before) and text.startswith(through[:end]):
                return len(before), end
            raise _unclear(rows[place])
        end = self._marked(text, hidden, place, prompt, front=False)
        if before and text.startswith(before) and len(before) <= end:
            return len(before), end
        return self._marked(text, hidden, place, prompt, front=True), end

    def _marked(self, text: str, hidden: Hidden, place: int, prompt: bool, *, front: bool) -> int:
        """Where an answer begins (`front`) or ends in `text`, found by rendering it with MARK beside it."""
        rows = hidden.rows
        content = rows[place]["content"]
        marked = {**rows[place], "content": MARK + content if front else content + MARK}
        variant = self._render([*rows[:place], marked, *rows[place + 1 :]], prompt=prompt, given=hidden.given)
        found = variant.find(MARK)
        if variant.count(MARK) != 1:
            raise _unclear(rows[place])
        return found if front else len(text) - (len(variant) - found - len(MARK))

    def _cut(
        self, text: str, hidden: Hidden, spans: Iterable[Span], targets: Sequence[tuple[Span, float]]
    ) -> list[_Piece]:
        """Cut at markup and where `spans` begin and end; the first of `targets` to hold a piece gives its weight."""
        edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
        pieces: list[_Piece] = []
        for begin, end in pairwise(edges):
            weight = next((weight for (first, last), weight in targets if first <= begin < last), 0.0)
            position = begin
            for match in self._tokens.finditer(text, begin, end):
                if position < match.start():
                    pieces.append(_Piece(hidden.restore(text[position : match.start()]), weight))
                markup = match.group().strip()
                pieces.append(_Piece(markup, weight, self.tokenizer.markup[markup]))
                position = match.end()
            if position < end:
                pieces.append(_Piece(hidden.restore(text[position:end]), weight))
        return pieces

    def _encode(self, conversations: list[list[_Piece]]) -> list[Rendered]:
        """Ids of pieces, all plain texts encoded in one call."""
        plain = [
            (piece.text, before is not None and (before.markup is None or self.tokenizer.begins_once))
            for pieces in conversations
            for before, piece in zip([None, *pieces[:-1]], pieces, strict=True)
            if piece.markup is None
        ]
        texts, inside = [text for text, _inside in plain], [goes_on for _text, goes_on in plain]
        encoded = iter(self.tokenizer.encode(texts, tags=False, inside=inside))
        return [self._joined(pieces, encoded) for pieces in conversations]

    def _joined(self, pieces: list[_Piece], encoded: Iterator[list[int]]) -> Rendered:
        ids: list[int] = []
        weights: list[float] = []
        bos = self.tokenizer.bos_id
        if bos is not None and (not pieces or pieces[0].markup != bos):
            ids, weights = [bos], [0.0]
        for piece in pieces:
            added = [piece.markup] if piece.markup is not None else next(encoded)
            ids += added
            weights += [piece.weight] * len(added)
        found = np.array(weights, np.float32)
        learnt = found > 0
        return Rendered(np.array(ids, np.int32), learnt, None if (found[learnt] == 1).all() else found)

    @cached_property
    def _layouts(self) -> dict[tuple[bool, tuple[str, ...]], Layout | None]:
        return {}

    @cached_property
    def _rewritten(self) -> dict[tuple[tuple[str, ...], tuple[int, ...]], bool]:
        return {}

    @cached_property
    def _hider(self) -> Hider:
        return Hider(self.tokenizer)

    @cached_property
    def _tokens(self) -> re.Pattern[str]:
        """Markup in a rendered text."""
        return self.tokenizer.pattern(self.tokenizer.markup)

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """The control tokens of this model, wherever they stand."""
        return any_of(self.tokenizer.control_tokens)

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        """What ends an answer, after white space at most."""
        ends = [text for text, index in self.tokenizer.markup.items() if index in self.tokenizer.end_ids]
        return re.compile(rf"\s*(?:{self.tokenizer.pattern(ends).pattern})")

    @cached_property
    def _tags(self) -> re.Pattern[str]:
        """Tags that the assistant may write."""
        return any_of(set(self.tokenizer.markup) - set(self.tokenizer.control_tokens))


def _up_to(sample: Sample, place: int) -> Sample:
    """The conversation up to answer `place`, the only one that is learnt."""
    earlier = [replace(one, weight=0.0) if one.role == "assistant" else one for one in sample.messages[:place]]
    return replace(sample, messages=(*earlier, sample.messages[place]))


def _unclear(row: Mapping[str, Any]) -> DataError:
    return DataError(
        _("The chat template drops or repeats the answer “{start}”.").format(start=row["content"].strip()[:40]),
        hint=_("Use another template (model.chat_template)."),
    )
