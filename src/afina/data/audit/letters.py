"""Characters that do not belong in a text, one text at a time: control, invisible, bidirectional, half, private ones.

The plain side of the audit of texts: exact places, no haste. scan.py decides quickly which texts come here.
"""

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple


class Fault(NamedTuple):
    """A fault of a text at its characters `begin` to `end`; `kind` is the id of its class, `detail` what was found."""

    kind: str
    begin: int
    end: int
    detail: str = ""


RANGES = {
    "nul": "\x00",
    "control-character": "\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f",
    "line-separator": "\x85\u2028\u2029",
    "invisible": "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200d\u2060-\u2064\u206a-\u206f\u3164\ufeff"
    "\uffa0"
    "\U000e0000-\U000e007f\U000e0100-\U000e01ef",
    "direction": "\u200e\u200f\u202a-\u202e\u2066-\u2069",
    "replacement": "\ufffc\ufffd",
    "private-use": "\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd",
    "noncharacter": "\ufdd0-\ufdef\ufffe\uffff"
    + "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(1, 17)),
    "lone-surrogate": "\ud800-\udfff",
    "accent": "\u0300-\u034e\u0350-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff",
}
"""Ranges of characters, as a regular expression writes them; `accent` needs a second look."""
ODD = re.compile("|".join(f"(?P<{name.replace('-', '_')}>[{span}]+)" for name, span in RANGES.items()))
_ANY = re.compile("[" + "".join(RANGES.values()) + "]")
"""Any of them: found first, as it takes a tenth of the time."""
JOINERS = frozenset("\u200c\u200d")
MARKS = frozenset("\u200e\u200f\u061c")
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
_TAGGED = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")
"""A flag of a region is written with tag characters, such as that of Scotland."""


def letters(text: str) -> Iterator[Fault]:
    """The first run of each kind of character that does not belong."""
    seen: set[str] = set()
    end = 0
    while (first := _ANY.search(text, end)) and (match := ODD.match(text, first.start())):
        end = match.end()
        kind = (match.lastgroup or "").replace("_", "-")
        if kind == "accent":
            kind = _accent(text, *match.span())
        if kind in seen or _belongs(kind, match.group(), text, *match.span()):
            continue
        seen.add(kind)
        yield Fault(kind, *match.span(), _named(match.group()))


def _accent(text: str, begin: int, end: int) -> str:
    """An accent with nothing below it is alone; one that its letter could have been written with is decomposed."""
    before = text[begin - 1 : begin]
    if not before or before.isspace() or unicodedata.category(before) in ("Cc", "Cf"):
        return "lone-accent"
    if unicodedata.normalize("NFC", text[begin - 1 : end]) != text[begin - 1 : end]:
        return "decomposed"
    return ""


def _belongs(kind: str, run: str, text: str, begin: int, end: int) -> bool:
    """Whether the run is as people write: joiners between letters of scripts that have them or inside emoji, marks in
    right-to-left text, tags in a flag."""
    if not kind:
        return True
    if kind == "invisible" and set(run) <= JOINERS:
        around = text[begin - 1 : begin], text[end : end + 1]
        return all(one >= "\u0590" for one in around if one) and any(around)
    if kind == "invisible" and run[0] >= "\U000e0020":
        return any(flag.start() < begin < flag.end() for flag in _TAGGED.finditer(text))
    if set(run) <= MARKS:
        return _RIGHT_TO_LEFT.search(text) is not None
    return False


def _named(run: str) -> str:
    first = f"U+{ord(run[0]):04X}"
    name = unicodedata.name(run[0], "")
    return f"{first} {name}".strip() + (f" x {len(run)}" if len(run) > 1 else "")
