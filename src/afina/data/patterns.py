"""What a foreign tokenizer.json asks for, looked at before anything opens it: its size, its shape, its patterns.

A pattern is code: one with nested repetitions takes years for a line of text. Those of the tokenizers that the world
uses are known here; any other is tried in a process of its own (worker.py), on texts made to be hard for it.
"""

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from afina.data.worker import WORKER, Act, Overrun
from afina.errors import ModelError, reason_of
from afina.language import _

MAX_BYTES = 256 * 2**20
"""The largest real one has 33 MB (a vocabulary of 262,144)."""
MAX_TOKENS = 2**22
MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_CONTRACTIONS = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:[sdmt]|ll|ve|re)", "'(?i:[sdmt]|ll|ve|re)")
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CASED = f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|"
_CASED_CONTRACTED = _CASED.replace("|", f"{_CONTRACTIONS[0]}?|")
_CASED_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN = frozenset(
    [
        *(f"{words}|{_LETTERS}|{digits}|{_REST}" for words in _CONTRACTIONS for digits in (r"\p{N}{1,3}", r"\p{N}")),
        _CASED_CONTRACTED + _CASED_REST,
        _CASED + _CASED_REST,
        _CASED + _CASED_REST.replace("{1,3}", ""),
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"\p{N}{1,3}",
        r"\d",
        r"\s",
        r" {2,}",
    ]
)
"""Of GPT-2, Llama 3, Qwen 2 and 3, gpt-oss, Mistral's Tekken and their kin: they take time in proportion to a text."""
_HARD = 25_000
"""Characters of a text that is hard for a pattern: a real row may well be as long."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_ALWAYS = " a1\n.'é漢_"


def check_tokenizer(file: Path, where: str) -> None:
    """Look at the tokenizer.json of the model `where`. Raises ModelError for one that should not be opened."""
    try:
        found = file.stat()  # a hub's file is a link into its cache
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            raise _refused(where, _("it is no file of at most {size} MiB").format(size=MAX_BYTES >> 20))
        definition = json.loads(file.read_bytes())
    except OSError as error:
        raise _refused(where, reason_of(error)) from error
    except (ValueError, RecursionError) as error:
        raise _refused(where, _("it is not valid JSON")) from error
    if reason := _misshapen(definition):
        raise _refused(where, reason)
    parts = {key: definition.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    patterns = set(_patterns(parts))
    if patterns <= KNOWN:
        return
    parts.pop("decoder")
    try:
        answers = WORKER.ask("pattern", json.dumps(parts), list(_hard(patterns - KNOWN)))
    except Overrun as error:
        raise _refused(where, _("a pattern in it never ends: {reason}").format(reason=error.message)) from error
    for status, reason in answers:
        if status != "made":
            raise _refused(where, _("a pattern in it fails: {reason}").format(reason=reason.split("\n")[0]))


def cutter(definition: str) -> Act:
    """The normalizer and pre-tokenizer of a definition, on texts; what they make of them is thrown away."""
    from tokenizers import Tokenizer as Backend

    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"},
        **json.loads(definition),
    }
    try:
        backend = Backend.from_str(json.dumps(whole))
    except Exception as error:  # the only class that tokenizers raises
        raise ValueError(str(error)) from error

    def cut(text: Any) -> str:
        try:
            backend.encode(str(text))
        except BaseException as error:  # the Rust panic derives from BaseException
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise ValueError(str(error).strip() or type(error).__name__) from error
            raise
        return ""

    return cut


def _misshapen(definition: Any) -> str:
    """What is wrong with the shape of a tokenizer.json; "" when nothing is."""
    model = definition.get("model") if isinstance(definition, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") not in MODELS:
        return _("its model is none of {names}").format(names=", ".join(MODELS))
    added = definition.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        return _("its added_tokens are not a list of tokens")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):
        tokens = [entry[0] if isinstance(entry, list) and entry else None for entry in vocabulary]
        ids: list[Any] = []
    elif isinstance(vocabulary, dict):
        tokens, ids = list(vocabulary), list(vocabulary.values())
    else:
        return _("it has no vocabulary")
    tokens, ids = tokens + [token.get("content") for token in added], ids + [token.get("id") for token in added]
    if len(tokens) > MAX_TOKENS:
        return _("it has {count} tokens").format(count=len(tokens))
    if bad := [index for index in ids if type(index) is not int or not 0 <= index < MAX_TOKENS]:
        return _("one of its ids is {value}").format(value=str(bad[0])[:40])
    texts = [token for token in tokens if isinstance(token, str)]
    if len(texts) < len(tokens):
        return _("one of its tokens is no text")
    if model.get("byte_fallback") and any(
        token.startswith("<0x") and token.endswith(">") and not _BYTE.fullmatch(token) for token in texts
    ):
        return _("one of its byte tokens is no byte")
    return ""


def _patterns(value: Any, depth: int = 0) -> Iterator[str]:
    """Every regular expression in a part of tokenizer.json."""
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        for one in value.values():
            yield from _patterns(one, depth + 1)
    elif isinstance(value, list):
        for one in value:
            yield from _patterns(one, depth + 1)


def _hard(patterns: set[str]) -> Iterator[str]:
    """Texts on which a bad pattern shows itself: long runs of what it speaks of, closed by what it does not expect."""
    yield "x"
    said = "".join(sorted(patterns))
    letters = dict.fromkeys([*_ALWAYS, *re.findall(r"[^\\\[\](){}?*+|^$]", said)])
    pairs = dict.fromkeys([said[at : at + 2] for at in range(len(said) - 1) if said[at : at + 2].isalnum()])
    for unit in [*list(letters)[:24], *list(pairs)[:8]]:
        yield unit * (_HARD // len(unit)) + "!"
        yield (unit * 40 + "!") * 100


def _refused(where: str, reason: str) -> ModelError:
    return ModelError(
        _("The tokenizer.json of {source} is refused: {reason}.").format(source=where, reason=reason),
        hint=_("Nothing of it was opened. Use a model from someone you trust."),
    )
