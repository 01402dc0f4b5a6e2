"""The one door to tokenizers: loads one, encodes text that can never become a control token, decodes ids.

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
from afina.data.gguf_tokenizer import definition_of, special_tokens, template_of
from afina.data.harmony import mended
from afina.data.patterns import check_tokenizer
from afina.data.sandbox import without_clock
from afina.data.worker import WORKER, Overrun
from afina.errors import ModelError
from afina.gguf_file import GgufFile
from afina.language import _
from afina.recipe.place import BUNDLED

_TAG = re.compile(r"<\S+>|\[\S+\]")
_ASKED, _ANSWERED = "\ue0f4", "\ue0f5"
"""What the template is probed with: private-use characters, which no template writes."""
_TALKS = (("system", "user", "assistant"), ("user", "assistant"), ("user", "assistant", "tool", "assistant"))
"""Roles of conversations in which a template writes all that it ever does around contents, unless it refuses them."""


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
        return tuple(sorted({index for index in (self.hf.eos_token_id, self._closing_id) if index is not None}))

    @cached_property
    def _closing_id(self) -> int | None:
        """The control token that the template writes after the last answer, white space between them at most."""
        try:
            rendered = self.render([{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}])
        except ModelError:
            return None
        after = rendered.rpartition(_ANSWERED)[2].lstrip()
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
                self._backends(tags=tags, inside=False) if same else _backend(json.dumps(definition))
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
        probe = self._rendered([[[{"role": "user", "content": _ASKED}], True, given]])[0]
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


def load_tokenizer(
    source: str,
    *,
    template: str | None = None,
    folder: Path | None = None,
    revision: str | None = None,
    turn_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Load the tokenizer of a model folder, a GGUF file or a hub name. Raises ModelError.

    `template` is a bundled template (afina/NAME) or a Jinja file (relative to `folder`) that replaces the model's own.
    Where it asks for today's date, it gets a fixed one: see sandbox.py. `turn_tokens` become control tokens where the
    vocabulary lacks them.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if definition := _definition(source, revision):
        check_tokenizer(definition, source)
    try:
        if source.endswith(".gguf"):
            file = GgufFile(source)
            backend = _backend(json.dumps(definition_of(file)))
            backend.encode_special_tokens = False
            hf: Any = PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens(file))
            hf.chat_template = template_of(file)
        else:
            hf = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for a tokenizer.json it cannot read
        hint = _("A model folder needs tokenizer.json and tokenizer_config.json beside its weights.")
        if not Path(source).exists():
            hint = _("Check the folder or the hub name, and that this machine reaches the hub.")
        told = _("The tokenizer of {source} cannot be loaded: {reason}")
        raise ModelError(told.format(source=source, reason=_first_line(error)), hint=hint) from error
    if not hf.is_fast:
        raise ModelError(
            _("The tokenizer of {source} has no tokenizer.json.").format(source=source),
            hint=_("Use a model that has one, or convert its tokenizer with transformers."),
        )
    text = _own_template(hf.chat_template) if template is None else _read_template(template, folder or Path())
    usable = None if text is None else mended(without_clock(text))
    added = _add_tokens(hf, turn_tokens, usable, source)
    tokenizer = Tokenizer(hf, usable, added)
    if tokenizer._closing_id in added:  # every program that runs the model shall stop there
        hf.eos_token = hf.convert_ids_to_tokens(tokenizer._closing_id)
    return Tokenizer(hf, tokenizer.template, added)


def _definition(source: str, revision: str | None) -> Path | None:
    """Where the tokenizer.json lies, of a folder or in the hub's cache; None where there is none."""
    from transformers.utils import cached_file

    if source.endswith(".gguf"):
        return None
    if Path(source).is_dir():
        file = Path(source) / "tokenizer.json"
        return file if file.exists() else None
    try:
        found = cached_file(source, "tokenizer.json", revision=revision or "main")
    except OSError:
        return None  # loading it will say why
    return Path(found) if found else None


def _add_tokens(hf: Any, turn_tokens: Sequence[str], template: str | None, source: str) -> dict[int, list[int]]:
    """Make control tokens of the declared texts. Raises ModelError for one that the template never writes."""
    from tokenizers import AddedToken

    known = {token.content: token for token in hf.added_tokens_decoder.values()}
    for text in turn_tokens:
        if template is None or (text not in template and not _comes_to_write(hf, template, text)):
            raise ModelError(
                _("model.turn_tokens names {token}, which the chat template never writes.").format(token=text),
                hint=_("Write it in your template (model.chat_template), or take it off the list."),
            )
        if text in known and not known[text].special:
            raise ModelError(
                _("model.turn_tokens names {token}, which {source} knows as a word.").format(token=text, source=source),
                hint=_("Choose a text that is no word, such as <|turn|>."),
            )
    plain = Tokenizer(hf, None)
    pieces = {text: [] if text in known else plain.encode([text])[0] for text in turn_tokens}
    fresh = [AddedToken(text, special=True, normalized=False) for text in turn_tokens if text not in known]
    if fresh:
        hf.add_tokens(fresh, special_tokens=True)
    return {int(hf.convert_tokens_to_ids(text)): ids for text, ids in pieces.items()}


def _comes_to_write(hf: Any, template: str, text: str) -> bool:
    """Whether a template puts `text` together by itself, as <|{{ message.role }}|> does."""
    talks = [[{"role": role, "content": _ASKED} for role in roles] for roles in _TALKS]
    for prompt in (False, True):
        rendered = Tokenizer(hf, template).render_all([(talk, {}) for talk in talks], prompt=prompt)
        if any(text in one for one in rendered if isinstance(one, str)):
            return True
    return False


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


def _own_template(given: Any) -> str | None:
    """The model's template; of several with names, the one called default."""
    chosen = given.get("default") if isinstance(given, dict) else given
    return chosen if isinstance(chosen, str) else None


def _ids(backend: Any, texts: list[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    except BaseException as error:  # the Rust panic derives from BaseException
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelError(
                _("The tokenizer failed on a text: {reason}.").format(reason=_first_line(error)),
                hint=_("The text may hold half a character, or the tokenizer.json a pattern that never ends."),
            ) from error
        raise


def _backend(definition: str) -> Any:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(definition)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def _read_template(name: str, folder: Path) -> str:
    file = (
        BUNDLED / "templates" / f"{name.removeprefix('afina/')}.jinja" if name.startswith("afina/") else folder / name
    )
    if not file.is_file() and not name.startswith("afina/"):
        file = Path(name)
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(f"afina/{path.stem}" for path in (BUNDLED / "templates").glob("*.jinja")))
        raise ModelError(
            _("The chat template {name} cannot be read.").format(name=name),
            hint=_("Name a Jinja file, or one of {known}.").format(known=known),
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
