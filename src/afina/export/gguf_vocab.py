"""A tokenizer as the vocabulary of a GGUF file: tokens, types, merges or scores, control tokens, template.

llama.cpp does not read tokenizer.json; it has a few tokenizers of its own, chosen by name. What it cannot do exactly is
refused here with a name, or, where only rare texts differ, said in `Vocabulary.notes`. What is described is the
tokenizer as transformers loads it, the one that trained, not the file: for some classes the two differ. Knows nothing
of weights, nor of the `gguf` package.

Two kinds are known. "gpt2" is byte-level BPE: the text is cut by a regular expression, which llama.cpp knows by name
(`PRE_TOKENIZERS`), and merged by rank. "llama" is SentencePiece's BPE: spaces become U+2581, and two neighbours merge
when their union is a token, the best score first.
"""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from afina.data.load_tokenizer import load_tokenizer
from afina.data.splits import DIGITS_SPLIT, GPT2_SPLIT, PRE_TOKENIZERS
from afina.data.tokenizer import Tokenizer
from afina.errors import ModelError
from afina.language import _

MAX_JSON_BYTES = 256 * 2**20
"""The largest JSON file read; the largest real tokenizer.json known (Gemma's, 256,000 tokens) has 33 MB."""

KNOWN_ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
    ]
)
"""Tokens at which llama.cpp stops because of their text, whatever the file says."""

SEEN_ANYWHERE = frozenset(["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"])
"""Control tokens of gpt-oss that llama.cpp finds in any text, so as to show them in answers."""

SPACE = "\u2581"
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


class TokenType(IntEnum):
    """The types of a token in a GGUF file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class Vocabulary:
    """What a GGUF file says of its tokenizer.

    `model` and `pre` are llama.cpp's names; `tokens` and `types` are by id; `merges` belong to "gpt2", `scores` to
    "llama". `eot` and `eom` are further tokens that end an answer. `notes` are sentences for the user.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    pad: int | None = None
    eot: int | None = None
    eom: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool | None = None
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)

    def pad_to(self, rows: int) -> None:
        """Name the rows of the embedding that no token uses, as llama.cpp wants as many tokens as rows."""
        for index in range(len(self.tokens), rows):
            self.tokens.append(f"[PAD{index}]")
            self.types.append(TokenType.UNUSED)
            if self.scores:
                self.scores.append(-1000.0)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size. Raises ModelError when it is missing, too large or not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(_("The file is larger than any real one of its kind."), file=path)
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(
            _("{name} cannot be read.").format(name=path.name),
            hint=_("Name a model folder that holds it, as save_pretrained writes it."),
            file=path,
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(_("The file is not valid JSON: {reason}.").format(reason=error), file=path) from error
    if not isinstance(value, dict):
        raise ModelError(_("The file is not a JSON object."), file=path)
    return value


def read_vocabulary(model_folder: Path) -> Vocabulary:
    """The tokenizer of a model folder, as llama.cpp will understand it.

    Raises ModelError when llama.cpp has no tokenizer that gives the same tokens.
    """
    tokenizer = load_tokenizer(str(model_folder))
    path = model_folder / "tokenizer.json"
    definition = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    model = definition["model"]
    if model["type"] != "BPE":
        raise ModelError(
            _("The tokenizer is of the kind {kind}; only BPE can be written to GGUF.").format(kind=model["type"]),
            hint=_("Export an adapter or a merged model instead."),
            file=path,
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ModelError(_("llama.cpp has no tokenizer that marks the parts of words."), file=path)
    read = _read_sentencepiece if model.get("byte_fallback") else _read_byte_level
    vocabulary = read(definition, path)
    vocabulary.chat_template = tokenizer.template
    vocabulary.notes += _added_token_notes(definition)
    _set_special_tokens(vocabulary, tokenizer, model_folder)
    return vocabulary


def _read_byte_level(definition: dict[str, Any], path: Path) -> Vocabulary:
    model = definition["model"]
    steps = _pre_tokenizer_steps(definition.get("pre_tokenizer"))
    pre = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges")))) if steps else None
    if pre is None:
        raise ModelError(
            _("This pre-tokenizer has no known name in llama.cpp: {definition}.").format(
                definition=json.dumps(
                    {"pre_tokenizer": definition.get("pre_tokenizer"), "ignore_merges": model.get("ignore_merges")},
                    ensure_ascii=False,
                )
            ),
            hint=_(
                "Text would be cut into other tokens than in training. Export an adapter or a merged model instead."
            ),
            file=path,
        )
    notes = []
    normalizers = [step.get("type") for step in _flatten(definition.get("normalizer"), "normalizers")]
    if normalizers == ["NFC"]:
        notes.append(
            _("llama.cpp does not compose accents (NFC): decomposed text gives other tokens than in training.")
        )
    elif normalizers:
        raise ModelError(
            _("llama.cpp has no normalizer like this one: {definition}.").format(
                definition=", ".join(map(str, normalizers))
            ),
            file=path,
        )
    if pre == "gpt-4o":
        notes.append(
            _("llama.cpp cuts words with combining marks (as in Hindi or Thai) in other places than in training.")
        )
    tokens, types = _tokens_and_types(definition, path)
    merges = [" ".join(pair) for pair in _merges(model, path)]
    return Vocabulary("gpt2", pre, tokens, types, merges=merges, notes=notes)


def _pre_tokenizer_steps(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """The key of `PRE_TOKENIZERS`, or None when a step is of a kind that is in none."""
    steps: list[str] = []
    for step in _flatten(pre_tokenizer, "pretokenizers"):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                steps += [GPT2_SPLIT] if step.get("use_regex", True) else []
            case {"type": "Digits", "individual_digits": True}:
                steps.append(DIGITS_SPLIT)
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
                steps.append(regex)
            case _:
                return None
    return tuple(steps)


def _read_sentencepiece(definition: dict[str, Any], path: Path) -> Vocabulary:
    model = definition["model"]
    tokens, types = _tokens_and_types(definition, path)
    ids = {token: index for index, token in enumerate(tokens)}
    for byte in range(256):
        index = ids.get(f"<0x{byte:02X}>")
        if index is None:
            raise ModelError(_("The tokenizer lacks the token of byte {byte}.").format(byte=byte), file=path)
        types[index] = TokenType.BYTE
    unknown = ids.get(str(model.get("unk_token") or "<unk>"))
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    merges = _merges(model, path)
    ranks = _token_ranks(merges, path)
    _refuse_missing_merges(merges, ranks, path)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    vocabulary = Vocabulary("llama", "default", tokens, types, scores=scores, unk=unknown)
    _set_space_prefix(vocabulary, definition, path)
    return vocabulary


def _token_ranks(merges: list[tuple[str, str]], path: Path) -> dict[str, int]:
    """The rank of each merged token. llama.cpp ranks tokens, tokenizer.json ranks pairs: all pairs of a token must be
    neighbours in the list, else no score says the same. Runs of one character may be the exception, as in Llama 2."""
    ranks: dict[str, int] = {}
    apart = set()
    previous = ""
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token in ranks and token != previous:
            apart.add(token)
        ranks.setdefault(token, rank)
        previous = token
    for token in sorted(apart):
        if set(token) != {token[0]} or not _runs_merge_alike(token[0], merges, ranks):
            raise ModelError(
                _("The merges that give {token} are not next to each other, which llama.cpp cannot express.").format(
                    token=repr(token)
                ),
                file=path,
            )
    return ranks


def _runs_merge_alike(character: str, merges: list[tuple[str, str]], ranks: dict[str, int]) -> bool:
    """Whether runs of a character, to four times the longest token of it, merge the same by pair and by token."""
    by_pair = {pair: rank for rank, pair in enumerate(merges) if set("".join(pair)) == {character}}
    by_token = {(left, right): ranks[left + right] for left, right in by_pair}
    longest = max(len(left + right) for left, right in by_pair)
    return all(
        _merge([character] * length, by_pair) == _merge([character] * length, by_token)
        for length in range(2, 4 * longest + 1)
    )


def _merge(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte pair encoding as defined: the best pair first, the leftmost of equals, until none is left."""
    while found := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]:
        i = min(found)[1]
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
    return parts


def _refuse_missing_merges(merges: list[tuple[str, str]], ranks: dict[str, int], path: Path) -> None:
    """llama.cpp merges any two neighbours whose union is a token; each such pair must be among the merges."""
    pairs = set(merges)
    for token in ranks:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if (len(left) == 1 or left in ranks) and (len(right) == 1 or right in ranks) and (left, right) not in pairs:
                raise ModelError(
                    _("llama.cpp would merge {left} and {right}, which this tokenizer does not.").format(
                        left=repr(left), right=repr(right)
                    ),
                    hint=_("Use a byte-level tokenizer, or export an adapter or a merged model instead."),
                    file=path,
                )


def _set_space_prefix(vocabulary: Vocabulary, definition: dict[str, Any], path: Path) -> None:
    """Whether a space is put before a text, and where that differs from what llama.cpp does."""
    normalizers = _flatten(definition.get("normalizer"), "normalizers")
    match normalizers, definition.get("pre_tokenizer"):
        case [n1, n2], None if n1 == PREPEND and n2 == REPLACE:
            vocabulary.add_space_prefix = True
        case [n1], None if n1 == REPLACE:
            vocabulary.add_space_prefix = False
        case [], {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}:
            vocabulary.add_space_prefix = scheme != "never"
            if scheme == "always":
                vocabulary.notes.append(
                    _("llama.cpp puts a space before every text, also before one that begins with a space already.")
                )
            if scheme == "first":  # llama.cpp has no "first": right for rendered conversations, wrong for bare texts
                vocabulary.add_space_prefix = False
                vocabulary.notes.append(
                    _("llama.cpp does not put a space before a text outside a conversation, as this tokenizer does.")
                )
        case _:
            raise ModelError(
                _("This treatment of spaces has no counterpart in llama.cpp: {definition}.").format(
                    definition=json.dumps(
                        {key: definition.get(key) for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False
                    )
                ),
                hint=_(
                    "Text would be cut into other tokens than in training. Export an adapter or a merged model instead."
                ),
                file=path,
            )


def _tokens_and_types(definition: dict[str, Any], path: Path) -> tuple[list[str], list[int]]:
    """Token texts and types by id. Added tokens: special ones are control, others are found in any text."""
    texts = {int(index): str(text) for text, index in definition["model"]["vocab"].items()}
    types: dict[int, TokenType] = {}
    for added in definition["added_tokens"]:
        texts[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    size = max(texts, default=-1) + 1
    if len(set(texts.values())) != len(texts) or size > 4 * len(texts) + 1024:
        raise ModelError(_("The list of tokens is damaged: two share a text, or most numbers have none."), file=path)
    tokens = [texts.get(index) or f"[PAD{index}]" for index in range(size)]
    kinds = [types.get(index, TokenType.NORMAL) if texts.get(index) else TokenType.UNUSED for index in range(size)]
    return tokens, [int(kind) for kind in kinds]


def _merges(model: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    """The merges in order of rank; they are written as "a b" or as ["a", "b"]."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if not pairs:
        raise ModelError(_("The tokenizer has no merges, without which llama.cpp does not load it."), file=path)
    return [(left, right) for left, right in pairs]


def _added_token_notes(definition: dict[str, Any]) -> list[str]:
    """Where llama.cpp treats added tokens in another way than the tokenizer."""
    added = definition["added_tokens"]
    greedy = [token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]
    known = [token["content"] for token in added if not token["special"] and token["content"] in KNOWN_ENDS]
    anywhere = [token["content"] for token in added if token["special"] and token["content"] in SEEN_ANYWHERE]
    notes = []
    if anywhere:
        notes.append(
            _("llama.cpp takes these for control tokens in any text, also where a user writes them: {tokens}.").format(
                tokens=", ".join(anywhere)
            )
        )
    if greedy:
        notes.append(
            _("llama.cpp leaves the spaces around these tokens, which this tokenizer takes away: {tokens}.").format(
                tokens=", ".join(greedy)
            )
        )
    if known:
        notes.append(
            _("llama.cpp takes these tokens for control tokens, which they are not here: {tokens}.").format(
                tokens=", ".join(known)
            )
        )
    return notes


def _set_special_tokens(vocabulary: Vocabulary, tokenizer: Tokenizer, model_folder: Path) -> None:
    """Which tokens begin and end a text and an answer, from what the tokenizer does before what the files say."""
    size = len(vocabulary.tokens)
    hf = tokenizer.hf
    config = read_json(model_folder / "config.json")
    before, after = _added_around_a_text(tokenizer, model_folder / "tokenizer.json")
    ends = _unique([*after, hf.eos_token_id, *_generation_ends(model_folder, config)], size)
    if not ends:
        raise ModelError(
            _("No token ends an answer, so llama.cpp would never stop."),
            hint=_("Set eos_token in tokenizer_config.json."),
            file=model_folder / "tokenizer_config.json",
        )
    vocabulary.eos = ends[0]
    vocabulary.add_bos, vocabulary.add_eos = bool(before), bool(after)
    begin = [*before, hf.bos_token_id, *_as_ids(config.get("bos_token_id")), vocabulary.eos]
    vocabulary.bos = _unique(begin, size)[0]  # where the file says nothing llama.cpp takes token 11
    vocabulary.pad = hf.pad_token_id
    if vocabulary.unk is None:
        vocabulary.unk = hf.unk_token_id
    _set_further_ends(vocabulary, ends[1:])
    if hf.bos_token_id is None and "bos_token" in (vocabulary.chat_template or ""):
        vocabulary.notes.append(
            _(
                "The chat template writes bos_token, which the tokenizer does not have; llama.cpp writes {token}."
            ).format(token=vocabulary.tokens[vocabulary.bos])
        )


def _set_further_ends(vocabulary: Vocabulary, ends: list[int]) -> None:
    """A GGUF file has room for two ends of answer besides EOS; those known by their text need none."""
    unknown = [end for end in ends if vocabulary.tokens[end] not in KNOWN_ENDS]
    vocabulary.eot, vocabulary.eom = (*unknown, None, None)[:2]
    if unknown[2:]:
        vocabulary.notes.append(
            _("llama.cpp will not stop at these tokens: {tokens}.").format(
                tokens=", ".join(vocabulary.tokens[end] for end in unknown[2:])
            )
        )


def _added_around_a_text(tokenizer: Tokenizer, path: Path) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text. Raises ModelError for what llama.cpp cannot do."""
    bare = tokenizer.encode(["a"])[0]
    whole = [int(index) for index in tokenizer.hf("a")["input_ids"]]
    for start in range(len(whole) - len(bare) + 1):
        before, after = whole[:start], whole[start + len(bare) :]
        if whole[start : start + len(bare)] == bare and len(before) <= 1 and len(after) <= 1:
            return before, after
    raise ModelError(
        _("The tokenizer puts more than one token before or after a text, which llama.cpp cannot do."), file=path
    )


def _generation_ends(model_folder: Path, model_config: dict[str, Any]) -> list[int]:
    path = model_folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    return _as_ids(generation.get("eos_token_id")) or _as_ids(model_config.get("eos_token_id"))


def _as_ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and not isinstance(index, bool)]


def _unique(ids: Iterable[int | None], size: int) -> list[int]:
    return list(dict.fromkeys(index for index in ids if index is not None and 0 <= index < size))


def _flatten(step: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be none, one, or a Sequence."""
    if step is None:
        return []
    if isinstance(step, dict) and step.get("type") == "Sequence":
        return [inner for part in step.get(key) or () for inner in _flatten(part, key)]
    return [step if isinstance(step, dict) else {}]
