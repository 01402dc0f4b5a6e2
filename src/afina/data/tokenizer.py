"""The one door to tokenizers: encodes text that can never become a control token, decodes ids.

Knows the special ids (end of turn, padding, beginning) and renders the chat template, but nothing of what is learnt:
that is template.py.

Added tokens are of three kinds. Control tokens (`special` in tokenizer.json) come from the template alone. Tags that
are not special, such as <think> or <tool_call>, come from the template or from the assistant, who writes them as
tokens. The rest (runs of spaces, words added to the vocabulary) are text like any other.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from afina import durable
from afina.data.worker import WORKER, Overrun
from afina.errors import AfinaError, ModelError
from afina.language import _

_TAG = re.compile(r"<\S+>|\[\S+\]")
ASKED, ANSWERED = "\ue0f4", "\ue0f5"
"""What the template is probed with: private-use characters, which no template writes."""


class Refusal(ModelError):
    """The chat template refuses a conversation, such as one with a system message."""


@dataclass(frozen=True)
class Tokenizer:
    """A transformers tokenizer and the chat template that goes with it.

    `end_ids` are the tokens that end an answer; generation stops at any of them. `turn_tokens`: ids of the control
    tokens that a recipe declares, and what the text of one was cut into before it became a token (nothing for a token
    that there was).
    """

    hf: Any
    template: str | None
    turn_tokens: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Text to id of every token that is markup, not text."""
        return {token.content: index for index, token in self.hf.added_tokens_decoder.items() if token.special}

    @cached_property
    def markup(self) -> dict[str, int]:
        """Text to id of control tokens and tags: what a user's text can never become."""
        tokens = self.hf.added_tokens_decoder.items()
        return {token.content: index for index, token in tokens if token.special or _TAG.fullmatch(token.content)}

    @cached_property
    def bos_id(self) -> int | None:
        """The token every sequence begins with, where the tokenizer itself puts one; else None."""
        ids = self.hf("a")["input_ids"]
        return int(ids[0]) if ids and ids[0] == self.hf.bos_token_id else None

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids at which an answer is over: what the template closes one with, and the tokenizer's end of sequence."""
        return tuple(sorted({index for index in (self.hf.eos_token_id, self.closing_id) if index is not None}))

    @cached_property
    def closing_id(self) -> int | None:
        """The control token that the template writes after the last answer, white space between them at most."""
        try:
            rendered = self.render([{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}])
        except ModelError:
            return None
        after = rendered.rpartition(ANSWERED)[2].lstrip()
        found = [text for text in self.control_tokens if after.startswith(text)]
        return self.control_tokens[max(found, key=len)] if found else None

    @cached_property
    def pad_id(self) -> int:
        """What fills the room beside short rows; never attended to, never learnt.

        Never a token that ends an answer either, though some tokenizers (Phi-2's, Llama 3's) say so or say nothing:
        who masks padding by its id would then never learn to stop. A token meant for padding, or else any other.
        """
        meant = [index for text, index in self.control_tokens.items() if "pad" in text.lower()]
        spare = [index for text, index in self.control_tokens.items() if "reserved" in text.lower()]
        choices = [self.hf.pad_token_id, *meant, self.hf.unk_token_id, *spare, *range(len(self.end_ids) + 1)]
        return next(int(index) for index in choices if index is not None and index not in self.end_ids)

    def pattern(self, texts: Iterable[str]) -> re.Pattern[str]:
        """Where one of these added tokens stands in a text, with the white space that it swallows around it.

        The longest comes first, so that none hides in another.
        """
        tokens = {token.content: token for token in self.hf.added_tokens_decoder.values()}
        choices = []
        for text in sorted(texts, key=len, reverse=True):
            left, right = r"\s*" if tokens[text].lstrip else "", r"\s*" if tokens[text].rstrip else ""
            one = rf"(?<!\w){re.escape(text)}(?!\w)" if tokens[text].single_word else re.escape(text)
            choices.append(left + one + right)
        return re.compile("|".join(choices) if choices else r"(?!)")

    def encode(
        self, texts: Sequence[str], *, tags: bool = True, inside: Sequence[bool] | None = None
    ) -> list[list[int]]:
        """Ids of each text, with nothing added and no control token taken as such. Raises ModelError.

        tags: those that are not special become tokens, as in every other program. inside: which of the texts go on
        with one before them, so that SentencePiece's mark of a beginning is not put before them. A text whose ids would
        hold a token that it must not become (a vocabulary may have it as a word too) is spelled out, character by
        character.
        """
        forbidden = self._control_ids if tags else self._markup_ids
        going_on = [False] * len(texts) if inside is None else inside
        found: dict[tuple[str, bool], list[int]] = {}
        for goes_on in (False, True):
            backend, continued = self._backends(tags=tags, inside=goes_on), self._backends(tags=tags, inside=True)
            # a template writes the same few texts around all contents
            different = list(dict.fromkeys(text for text, on in zip(texts, going_on, strict=True) if on == goes_on))
            for text, ids in zip(different, _ids(backend, different), strict=True):
                if not forbidden.isdisjoint(ids):
                    letters = [*_ids(backend, [text[:1]]), *_ids(continued, list(text[1:]))]
                    ids = [index for one in letters for index in one]
                found[text, goes_on] = ids
        return [found[key] for key in zip(texts, going_on, strict=True)]

    @cached_property
    def begins_once(self) -> bool:
        """Whether SentencePiece's mark of a beginning stands before the first text alone, and not after each token."""
        return any(part.get("prepend_scheme") == "first" for part in _parts(self._definition))

    @cached_property
    def _definition(self) -> dict[str, Any]:
        return dict(json.loads(self.hf.backend_tokenizer.to_str()))

    @cached_property
    def _known_backends(self) -> dict[tuple[bool, bool], Any]:
        return {}

    def _backends(self, *, tags: bool, inside: bool) -> Any:
        """The tokenizer with control tokens, and all other markup unless `tags`, taken as ordinary text."""
        if (tags, inside) not in self._known_backends:
            around = {key: part for key, part in self._definition.items() if key != "model"}
            definition = copy.deepcopy(around) | {"model": self._definition["model"]}  # all of the vocabulary
            for token in definition["added_tokens"]:
                token["special"] = token["special"] or (not tags and token["content"] in self.markup)
            if inside:
                _begin_nothing(definition)
            same = inside and definition == self._definition
            self._known_backends[tags, inside] = (
                self._backends(tags=tags, inside=False) if same else backend_of(json.dumps(definition))
            )
        return self._known_backends[tags, inside]

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.control_tokens.values()) - {self.hf.unk_token_id}

    @cached_property
    def _markup_ids(self) -> frozenset[int]:
        return frozenset(self.markup.values()) - {self.hf.unk_token_id}

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens left out."""
        return str(self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def written(self, index: int) -> str:
        """The text of one token, a control token's too."""
        return str(self.hf.decode([index], clean_up_tokenization_spaces=False))

    def render(
        self, messages: list[dict[str, Any]], *, prompt: bool = False, given: Mapping[str, Any] | None = None
    ) -> str:
        """The chat template applied, in its sandbox; `given` is what it is told beside the messages: tools, an effort.

        Raises ModelError with the template's own complaint.
        """
        text = self.render_all([(messages, given or {})], prompt=prompt)[0]
        if isinstance(text, Refusal):
            raise text
        return text

    def render_all(
        self, conversations: Iterable[tuple[list[dict[str, Any]], Mapping[str, Any]]], *, prompt: bool = False
    ) -> list["str | Refusal"]:
        """As `render`, for many conversations; what the template refuses is in the place of its text."""
        wanted = list(conversations)
        if not wanted:
            return []
        if self.template is None:
            raise ModelError(
                _("The model has no chat template."),
                hint=_("Set model.chat_template in the recipe, for instance to afina/alpaca, or to a Jinja file."),
            )
        asked = [[messages, prompt, {**self._given, **given}] for messages, given in wanted]
        return self._rendered(asked)

    def _rendered(self, asked: list[Any]) -> list["str | Refusal"]:
        try:
            answers = WORKER.ask("template", self.template or "", asked)
        except Overrun as error:
            raise ModelError(
                _("The chat template was stopped: {reason}.").format(reason=error.message),
                hint=_("It was run apart, so nothing else was harmed. Use another one (model.chat_template)."),
            ) from error
        texts: list[str | Refusal] = []
        for status, text in answers:
            if status == "invalid":
                raise ModelError(
                    _("The chat template is not valid Jinja: {reason}.").format(reason=text),
                    hint=_("Mend it, or use another one (model.chat_template)."),
                )
            texts.append(text if status == "made" else _refusal(text))
        return texts

    @cached_property
    def _given(self) -> dict[str, Any]:
        """What the template sees beside the messages, as transformers has it.

        A few templates (Hermes' for tools) go through `tools` without asking whether there are any: they get none.
        """
        given = {**self.hf.special_tokens_map, "tools": None, "documents": None}
        probe = self._rendered([[[{"role": "user", "content": ASKED}], True, given]])[0]
        if isinstance(probe, Refusal) and "NoneType" in probe.message:
            given["tools"] = []
        return given

    def save(self, folder: Path) -> None:
        """Write the tokenizer and its template as transformers reads them back."""
        self.hf.chat_template = self.template
        self.hf.save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_bytes())
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # other classes rebuild tokenizer.json, and not equally
        durable.write_json(file, settings)


def _parts(definition: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The normalizers and pre-tokenizers of a tokenizer.json, those in sequences too."""
    for key, below in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        part = definition.get(key)
        yield from (part.get(below) or [part]) if part else ()


def _begin_nothing(definition: dict[str, Any]) -> None:
    """Take out what marks the beginning of a text: SentencePiece's sign for a space, or a space."""
    for part in _parts(definition):
        if part["type"] == "Prepend":
            part["prepend"] = ""
        elif part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False


def _refusal(reason: str) -> Refusal:
    return Refusal(
        _("The chat template refuses these messages: {reason}.").format(reason=reason.rstrip(".")),
        hint=_("Write them as the template wants them, or use another one (model.chat_template)."),
    )


def _ids(backend: Any, texts: list[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    except AfinaError:  # a signal
        raise
    except BaseException as error:  # the Rust panic derives from BaseException
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelError(
                _("The tokenizer failed on a text: {reason}.").format(reason=first_line(error)),
                hint=_("The text may hold half a character, or the tokenizer.json a pattern that never ends."),
            ) from error
        raise


def backend_of(definition: str) -> Any:
    """A tokenizer.json as the library holds it: nothing filled up or cut off, control tokens read as text."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(definition)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
