"""What can be wrong with one text by itself, in full: characters, encoding, markup of models, secrets, blobs.

The plain side: scan.py finds quickly which texts of many come here, and a test holds that it misses none.
"""

import re
from collections.abc import Iterator

from afina.data.audit.letters import Fault, letters
from afina.data.audit.mojibake import repair
from afina.data.audit.secret import addresses, keys, numbers, private_keys

CONTROL = re.compile(
    r"<\|[A-Za-z0-9_. -]{1,40}\|>"
    r"|<｜[^｜<>\n]{1,40}｜>"
    r"|<(?:start|end)_of_(?:turn|image|audio|utterance|role)>"
    r"|</?(?:bos|eos|pad|unk|mask|sep|cls|BOS_TOKEN|EOS_TOKEN)>"
    r"|<</?SYS>>|\[/?INST\]|\[/?(?:TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT|gMASK)\]"
    r"|<s>(?!.*</s>)|(?<!>)</s>(?<!<s>)",
)
"""What the vocabularies of the common model families hold as control tokens."""
STRUCK = re.compile(r"<s>[^<]*</s>")
ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#39|#x27|#x2F|[a-z]acute|ntilde|iexcl|iquest|ldquo|rdquo|hellip);")
BLOB_LETTERS, LONG_WORD, RUN = 256, 1000, 200
BLOB = re.compile(rf"[A-Za-z0-9+/=_-]{{{BLOB_LETTERS},}}")
WORD = re.compile(rf"[!-~]{{{LONG_WORD},}}")
REPEATED = re.compile(rf"(.)\1{{{RUN - 1},}}", re.DOTALL)
BOILERPLATE = re.compile(r"\b[Aa]s an AI (?:language )?model\b|\b[Cc]omo (?:un )?modelo de lenguaje\b")
FENCE = "```"


LETTERS, MOJIBAKE, OPENING, RUNS, WORDS, FENCES = (1 << bit for bit in range(6))
"""What to look for in a text, as bits. OPENING: control tokens, entities, addresses, told by their first characters;
RUNS: keys, cards, blobs, repetitions; WORDS: phrases; FENCES: blocks of code."""
ALL = 63


def faults(text: str, look: int = ALL, *, plain_markup: bool = True) -> Iterator[Fault]:
    """Every fault of a text, the first of each class. plain_markup: look for control tokens of unknown vocabularies."""
    found = repair(text) if look & MOJIBAKE else None
    if look & LETTERS:  # what a repair takes away is no fault beside the mojibake
        left = {fault.kind for fault in letters(found.text)} if found is not None else None
        yield from (fault for fault in letters(text) if left is None or fault.kind in left)
    if found is not None:
        kind = "mojibake" if found.layers == 1 else "mojibake-twice"
        end = found.begin + 40
        shown = f"{text[found.begin : end]!r} → {found.text[found.begin : end]!r} ({', '.join(found.encodings)})"
        yield Fault(kind, found.begin, found.end, shown)
    if look & OPENING:
        if plain_markup and ("<" in text or "[" in text):
            yield from markup(text, CONTROL)
        if "&" in text and (entity := ENTITY.search(text)) is not None:
            yield Fault("html-entity", *entity.span(), entity.group())
        yield from addresses(text)
    if look & FENCES and text.count(FENCE) % 2:
        yield Fault("open-fence", text.rfind(FENCE), text.rfind(FENCE) + len(FENCE), FENCE)
    if look & RUNS:
        yield from keys(text)
        yield from numbers(text)
        yield from _blobs(text)
    if look & WORDS:
        yield from private_keys(text)
        if (said := BOILERPLATE.search(text)) is not None:
            yield Fault("boilerplate", *said.span(), said.group())


def markup(text: str, pattern: re.Pattern[str]) -> Iterator[Fault]:
    """The first control token in a text."""
    hidden = STRUCK.sub(lambda match: " " * len(match.group()), text) if "<s>" in text else text
    if (token := pattern.search(hidden)) is not None:
        yield Fault("control-token", *token.span(), token.group())


def _blobs(text: str) -> Iterator[Fault]:
    if len(text) < RUN:
        return
    repeated = REPEATED.search(text)
    if repeated is not None:
        yield Fault("repetition", *repeated.span(), f"{repeated.group(1)!r} x {len(repeated.group())}")
        return
    for match in BLOB.finditer(text):
        if len(set(match.group())) >= 16:
            yield Fault("blob", *match.span(), f"{match.group()[:24]}… ({len(match.group())})")
            return
    if (word := WORD.search(text)) is not None:
        yield Fault("long-word", *word.span(), f"{word.group()[:24]}… ({len(word.group())})")
