"""From a model folder, a GGUF file or a hub name to its tokenizer, with the chat template that a recipe wants."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina.data.gguf_tokenizer import definition_of, special_tokens, template_of
from afina.data.harmony import mended
from afina.data.patterns import check_tokenizer
from afina.data.sandbox import without_clock
from afina.data.tokenizer import ASKED, Tokenizer, backend_of, first_line
from afina.errors import AfinaError, ModelError
from afina.gguf_file import GgufFile
from afina.language import _
from afina.recipe.place import BUNDLED

_TALKS = (("system", "user", "assistant"), ("user", "assistant"), ("user", "assistant", "tool", "assistant"))
"""Roles of conversations in which a template writes all that it ever does around contents, unless it refuses them."""


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
            backend = backend_of(json.dumps(definition_of(file)))
            backend.encode_special_tokens = False
            hf: Any = PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens(file))
            hf.chat_template = template_of(file)
        else:
            hf = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except AfinaError:  # of ours, a signal among them
        raise
    except Exception as error:  # tokenizers raises plain Exception for a tokenizer.json it cannot read
        hint = _("A model folder needs tokenizer.json and tokenizer_config.json beside its weights.")
        if not Path(source).exists():
            hint = _("Check the folder or the hub name, and that this machine reaches the hub.")
        told = _("The tokenizer of {source} cannot be loaded: {reason}")
        raise ModelError(told.format(source=source, reason=first_line(error)), hint=hint) from error
    if not hf.is_fast:
        raise ModelError(
            _("The tokenizer of {source} has no tokenizer.json.").format(source=source),
            hint=_("Use a model that has one, or convert its tokenizer with transformers."),
        )
    text = _own_template(hf.chat_template) if template is None else _read_template(template, folder or Path())
    usable = None if text is None else mended(without_clock(text))
    added = _add_tokens(hf, turn_tokens, usable, source)
    tokenizer = Tokenizer(hf, usable, added)
    if tokenizer.closing_id in added:  # every program that runs the model shall stop there
        hf.eos_token = hf.convert_ids_to_tokens(tokenizer.closing_id)
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
    talks = [[{"role": role, "content": ASKED} for role in roles] for roles in _TALKS]
    for prompt in (False, True):
        rendered = Tokenizer(hf, template).render_all([(talk, {}) for talk in talks], prompt=prompt)
        if any(text in one for one in rendered if isinstance(one, str)):
            return True
    return False


def _own_template(given: Any) -> str | None:
    """The model's template; of several with names, the one called default."""
    chosen = given.get("default") if isinstance(given, dict) else given
    return chosen if isinstance(chosen, str) else None


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
