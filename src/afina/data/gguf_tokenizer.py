"""The tokenizer that lies in a GGUF file, as the definition that tokenizers reads (tokenizer.json). Opens no file.

What llama.cpp's format leaves out is what the families have in common: how a text is normalised, how tokens become text
again. Two kinds are known, byte-level BPE ("gpt2") and SentencePiece's BPE ("llama"), whose merges follow from the
scores of its tokens.
"""

from typing import Any

import numpy as np

from afina.data.splits import DIGITS_SPLIT, GPT2_SPLIT, PRE_TOKENIZERS
from afina.errors import ModelError
from afina.gguf_file import GgufFile, Strings
from afina.language import _

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""The types of a token in a GGUF file."""
SPACE = "\u2581"
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "phi-2": "gpt-2", "qwen3": "qwen2", "gpt-oss": "gpt-4o"}
"""Other names of a pre-tokenizer that llama.cpp takes for the same."""
COMPOSED = ("qwen2",)
"""Pre-tokenizers whose families compose accents first (NFC), which a GGUF file does not say."""


def definition_of(file: GgufFile) -> dict[str, Any]:
    """The tokenizer's definition. Raises ModelError for one of another kind, and for one that is damaged."""
    kind = file.value("tokenizer.ggml.model", str)
    tokens = [*file.value("tokenizer.ggml.tokens", Strings)]
    types = _types(file, len(tokens))
    if len(set(tokens)) != len(tokens):
        raise ModelError(_("Two tokens of the GGUF file have the same text."), file=file.path)
    if kind == "gpt2":
        parts = _byte_level(file, tokens)
    elif kind == "llama":
        parts = _sentencepiece(file, tokens, types)
    else:
        raise ModelError(
            _("The GGUF file has a tokenizer of the kind {kind}; gpt2 and llama are read.").format(kind=kind),
            hint=_("Start from the model's folder in transformers' format."),
            file=file.path,
        )
    last = max((index for index, kind in enumerate(types) if kind != UNUSED), default=-1)
    parts["model"]["vocab"] = {text: index for index, text in enumerate(tokens[: last + 1])}
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[index] in (CONTROL, UNKNOWN),
        }
        for index in np.flatnonzero(np.isin(types, (CONTROL, UNKNOWN, USER_DEFINED))).tolist()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _around(file, tokens),
        **parts,
    }


def special_tokens(file: GgufFile) -> dict[str, str]:
    """What transformers calls the special tokens, by their texts."""
    tokens = file.value("tokenizer.ggml.tokens", Strings)
    found = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = _id(file, key, len(tokens))
        if index is not None:
            found[f"{name}_token"] = tokens[index]
    return found


def template_of(file: GgufFile) -> str | None:
    """The chat template, where there is one."""
    return file.value("tokenizer.chat_template", str, None)


def _types(file: GgufFile, count: int) -> np.ndarray:
    types = file.value("tokenizer.ggml.token_type", np.ndarray, np.full(count, NORMAL))
    if len(types) != count:
        raise _apart(file)
    return types


def _id(file: GgufFile, name: str, count: int) -> int | None:
    index = file.value(f"tokenizer.ggml.{name}_token_id", int, None)
    if index is not None and not 0 <= index < count:
        raise ModelError(
            _("The GGUF file names token {index}, but has {count}.").format(index=index, count=count), file=file.path
        )
    return index


def _byte_level(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    said = file.value("tokenizer.ggml.pre", str, None)
    if said in (None, "default") and file.architecture == "phi2":  # files made before llama.cpp had names for them
        said = "gpt-2"
    name = ALIASES.get(str(said), said)
    found = next((key for key, known in PRE_TOKENIZERS.items() if known == name), None)
    if found is None:
        raise ModelError(
            _("The GGUF file cuts texts in a way that is not known here: tokenizer.ggml.pre is {name}.").format(
                name=said
            ),
            hint=_("Start from the model's folder in transformers' format."),
            file=file.path,
        )
    steps, ignore_merges = found
    merges = [merge.split(" ") for merge in file.value("tokenizer.ggml.merges", Strings)]
    known = set(tokens)
    if any(len(pair) != 2 or not {*pair, "".join(pair)} <= known for pair in merges):
        raise ModelError(_("A merge of the GGUF file is of tokens that it does not have."), file=file.path)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": GPT2_SPLIT in steps}
    cut: list[dict[str, Any]] = []
    for step in steps:
        if step == DIGITS_SPLIT:
            cut.append({"type": "Digits", "individual_digits": True})
        elif step != GPT2_SPLIT:
            cut.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    return {
        "normalizer": {"type": "NFC"} if name in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cut, level]} if cut else level,
        "decoder": level,
        "model": _bpe(merges, ignore_merges=ignore_merges),
    }


def _sentencepiece(file: GgufFile, tokens: list[str], types: np.ndarray) -> dict[str, Any]:
    scores = file.value("tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(tokens):
        raise _apart(file)
    prefix = file.value("tokenizer.ggml.add_space_prefix", bool, True)
    unknown = _id(file, "unknown", len(tokens))
    if unknown is None:
        unknown = next(iter(np.flatnonzero(types == UNKNOWN).tolist()), None)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = {"type": "Prepend", "prepend": SPACE}
    after: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [before, spaces]} if prefix else spaces,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": after},
        "model": _bpe(
            _merges_of(tokens, types, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _merges_of(tokens: list[str], types: np.ndarray, scores: np.ndarray) -> list[list[str]]:
    """Every way to make a token of two others, the best scored token first: what llama.cpp does with the scores."""
    ids = {text: index for index, text in enumerate(tokens) if types[index] in (NORMAL, USER_DEFINED)}
    merges: list[tuple[float, int, int, list[str]]] = []
    for text, index in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                merges.append((-float(scores[index]), ids[left], ids[right], [left, right]))
    return [pair for _score, _left, _right, pair in sorted(merges, key=lambda merge: merge[:3])]


def _bpe(merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    plain = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    absent = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {"type": "BPE", **absent, **plain, **settings, "merges": merges}


def _around(file: GgufFile, tokens: list[str]) -> dict[str, Any] | None:
    """What is put before and after every text."""
    spm = file.value("tokenizer.ggml.model", str) == "llama"
    wanted = (
        ("bos", file.value("tokenizer.ggml.add_bos_token", bool, spm)),
        ("eos", file.value("tokenizer.ggml.add_eos_token", bool, False)),
    )
    ids = {name: _id(file, name, len(tokens)) for name, asked in wanted if asked}
    put = {name: index for name, index in ids.items() if index is not None}
    if not put:
        return None

    def laid(letter: str, kind: int) -> list[dict[str, Any]]:
        one = {name: {"SpecialToken": {"id": tokens[index], "type_id": kind}} for name, index in put.items()}
        middle = {"Sequence": {"id": letter, "type_id": kind}}
        return [*([one["bos"]] if "bos" in one else []), middle, *([one["eos"]] if "eos" in one else [])]

    return {
        "type": "TemplateProcessing",
        "single": laid("A", 0),
        "pair": [*laid("A", 0), *laid("B", 1)],
        "special_tokens": {
            tokens[index]: {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]} for index in put.values()
        },
    }


def _apart(file: GgufFile) -> ModelError:
    return ModelError(_("The GGUF file has another number of tokens than of their types or scores."), file=file.path)
