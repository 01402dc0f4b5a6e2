"""The one door to tokenizers: loads one, encodes text that can never become a control token, decodes ids.

Knows the special ids (end of turn, padding, beginning) but nothing of conversations: that is template.py.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from afina import durable
from afina.errors import ModelError
from afina.language import _
from afina.recipe.place import BUNDLED


@dataclass(frozen=True)
class Tokenizer:
    """A transformers tokenizer and the chat template that goes with it.

    `end_ids` are the tokens that end an answer; generation stops at any of them.
    """

    hf: Any
    template: str | None

    @cached_property
    def _plain(self) -> Any:
        """The fast tokenizer with control tokens taken as ordinary text."""
        from tokenizers import Tokenizer as Backend

        plain = Backend.from_str(self.hf.backend_tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Text to id of every token that is markup, not text."""
        return {
            token.content: index for index, token in self.hf.added_tokens_decoder.items() if token.special
        }

    @property
    def bos_id(self) -> int | None:
        """The token every sequence begins with, where the tokenizer itself puts one; else None."""
        ids = self.hf("a")["input_ids"]
        return int(ids[0]) if ids and ids[0] == self.hf.bos_token_id else None

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids at which an answer is over."""
        ends = {self.hf.eos_token_id}
        for text in ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|return|>"):
            if text in self.control_tokens:
                ends.add(self.control_tokens[text])
        return tuple(sorted(index for index in ends if index is not None))

    @property
    def pad_id(self) -> int:
        """What fills the room beside short rows; never attended to, never learnt."""
        pad = self.hf.pad_token_id
        return int(pad if pad is not None else self.hf.eos_token_id or 0)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, with nothing added and nothing taken as markup. Raises ModelError."""
        try:
            return [encoding.ids for encoding in self._plain.encode_batch(texts, add_special_tokens=False)]
        except BaseException as error:  # noqa: BLE001 - the Rust panic derives from BaseException
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise ModelError(_("The tokenizer failed on a text: {reason}.").format(reason=error)) from error
            raise

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens left out."""
        return str(self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def render(self, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        """The chat template applied, in its sandbox. Raises ModelError with the template's own complaint."""
        from jinja2 import TemplateError

        if self.template is None:
            raise ModelError(
                _("The model has no chat template."),
                hint=_("Set model.chat_template in the recipe, for instance to afina/alpaca, or to a Jinja file."),
            )
        try:
            return str(
                self.hf.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
                )
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ModelError(_("The chat template refuses these messages: {reason}.").format(reason=error)) from error

    def save(self, folder: Path) -> None:
        """Write the tokenizer and its template as transformers reads them back."""
        self.hf.chat_template = self.template
        self.hf.save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_bytes())
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # other classes rebuild tokenizer.json, and not equally
        durable.write_json(file, settings)


def load_tokenizer(source: str, *, template: str | None = None, folder: Path | None = None, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model folder or hub name. Raises ModelError.

    `template` is a bundled template (afina/NAME) or a Jinja file (relative to `folder`) that replaces the model's own.
    """
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(
            _("The tokenizer of {source} cannot be loaded: {reason}").format(source=source, reason=_first_line(error)),
            hint=_("A model folder needs tokenizer.json and tokenizer_config.json beside its weights."),
        ) from error
    if not hf.is_fast:
        raise ModelError(_("The tokenizer of {source} has no tokenizer.json.").format(source=source))
    own = hf.chat_template if isinstance(hf.chat_template, str) else None
    return Tokenizer(hf, own if template is None else _read_template(template, folder or Path()))


def _read_template(name: str, folder: Path) -> str:
    file = BUNDLED / "templates" / f"{name.removeprefix('afina/')}.jinja" if name.startswith("afina/") else folder / name
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
