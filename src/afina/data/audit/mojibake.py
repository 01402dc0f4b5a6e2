"""Text that was UTF-8, was read in another encoding and written again: found, and a repair proposed with its proof.

A damaged character is a sequence of characters that are, in some old encoding, the bytes of one UTF-8 character. Such
sequences are found for each encoding by the grammar of UTF-8 alone; what they would become must be a character that
people write, and a single pair that real text holds too (a capital before a quotation mark, as in Portuguese) is no
evidence. The proof of a repair is its way back: encoded as UTF-8 and read in that encoding it is the damaged text.
Nothing is repaired here unasked.
"""

import codecs
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from ftfy.bad_codecs import search_function

codecs.register(search_function)  # the old encodings as programs really use them, with no byte left undefined

ENCODINGS = {
    "cp1252": "sloppy-windows-1252",
    "latin-1": "latin-1",
    "cp1250": "sloppy-windows-1250",
    "latin-2": "iso-8859-2",
    "cp1251": "sloppy-windows-1251",
    "cp1253": "sloppy-windows-1253",
    "cp1254": "sloppy-windows-1254",
    "mac-roman": "macroman",
    "cp437": "cp437",
}
"""The encodings text is misread in, the commonest first, and what Python with ftfy calls them."""
LAYERS = 3
CHANGE = 4
"""How much strangeness a second encoding in a chain must explain: misreading happens twice in the same program."""
WIDTH = 6
"""So many of the likeliest readings are gone on with."""
RARE = frozenset("åùßìøæđŕĺÅÊßÃÂÐÑĂÄÚÎĹÄÅËÏÎŕŻĽ×÷ůŹÞþðÙÌØÆ")
"""Letters seldom enough that another reading without them is likelier."""
SIGNS = frozenset("¡¢£¤¥¦§¨©ª«¬®¯°±²³´µ¶·¸¹º¼½¾×÷ˇ˘˙˛˜˝†‡‰ˆƒ™‚„•€")
_BEYOND = re.compile(r"[^\x00-\x7f]")
QUIET = set("“”‘’…—–»›«‹„‚\u00a0•·")
"""What may stand after a capital letter in sound text."""
WRITTEN = (
    (0x00A0, 0x017F),
    (0x0218, 0x021B),
    (0x02C6, 0x02DD),
    (0x0386, 0x03CE),
    (0x0401, 0x045F),
    (0x0490, 0x0491),
    (0x05D0, 0x05EA),
    (0x0621, 0x064A),
    (0x0660, 0x0669),
    (0x0905, 0x0939),
    (0x0E01, 0x0E5B),
    (0x1E00, 0x1EFF),
    (0x2010, 0x2027),
    (0x2030, 0x203A),
    (0x20AC, 0x20AC),
    (0x2100, 0x22FF),
    (0x2500, 0x27BF),
    (0x3000, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xFE0F, 0xFE0F),
    (0xFF01, 0xFF5E),
    (0x1F1E6, 0x1F1FF),
    (0x1F300, 0x1FAFF),
)
"""Ranges of characters that people write; between them lie those a chance pair would decode to."""


@dataclass(frozen=True, slots=True)
class Repair:
    """`text` is the repaired text; `encodings` those it was misread in, the last reading first; `begin`, `end`: the
    first damaged place; `count`: damaged sequences of the last reading."""

    text: str
    encodings: tuple[str, ...]
    begin: int
    end: int
    count: int

    @property
    def layers(self) -> int:
        """How many times the text was misread."""
        return len(self.encodings)

    def damage(self) -> str:
        """The repaired text misread again, as the proof wants it."""
        text = self.text
        for name in reversed(self.encodings):
            text = text.encode("utf-8").decode(ENCODINGS[name])
        return text


def repair(text: str) -> Repair | None:
    """What the text was before it was misread, if it was; at most LAYERS times.

    Of all chains of readings undone the one is taken whose text looks least strange, and of equals the shortest.
    """
    start = Repair(text, (), 0, 0, 0)
    layer, found = [start], []
    for _number in range(LAYERS):
        layer = [after for before in layer for name in ENCODINGS if (after := _after(before, name))]
        layer = sorted({one.text: one for one in reversed(layer)}.values(), key=_strangeness_of)[:WIDTH]
        found += layer
    best = min(found, key=_strangeness_of, default=None)
    return best if best is not None and _strangeness_of(best) < strangeness(text) else None


def _after(before: Repair, name: str) -> Repair | None:
    found = _undo(before.text, name)
    if found is None:
        return None
    first = before if before.encodings else found
    return Repair(found.text, (*before.encodings, name), first.begin, first.end, first.count)


def _strangeness_of(found: Repair) -> float:
    changes = sum(one != other for one, other in pairwise(found.encodings))
    rank = sum(list(ENCODINGS).index(name) for name in found.encodings)
    return strangeness(found.text) + CHANGE * changes + 1.5 * len(found.encodings) + 0.01 * rank


def strangeness(text: str) -> int:
    """How unlike written text it is: capitals and signs inside words, rare letters, control characters."""
    total = 0
    for match in _BEYOND.finditer(text):
        character, before = match.group(), text[match.start() - 1 : match.start()]
        if "\x80" <= character <= "\x9f":
            total += 8
        elif character.isupper() and character < "\u0250":
            total += 4 if before.islower() else 2 if character in RARE else 1
        elif character.isalpha():
            total += character in RARE or (character == "ß" and not before.islower())
        elif character in SIGNS:
            total += 1 if before.isspace() or not before else 3
    return total


def _undo(text: str, name: str) -> Repair | None:
    """One reading undone, where there is evidence of it."""
    pattern, codec = _grammar(name)
    places: list[tuple[int, int]] = []
    strong = 0

    def back(match: re.Match[str]) -> str:
        nonlocal strong
        damaged = match.group()
        try:
            sound = damaged.encode(codec).decode("utf-8")
        except UnicodeError:
            return damaged
        if not (_is_written(sound) or "\x80" <= sound <= "\x9f"):  # a control character is of a layer below
            return damaged
        places.append(match.span())
        strong += _is_strong(damaged, text, match.end())
        return sound

    fixed = pattern.sub(back, text)
    if not places or not strong:
        return None
    if strong == 1 and len(places) == 1 and _is_word(text, *places[0]):
        return None
    return Repair(fixed, (name,), *places[0], len(places))


def _is_strong(damaged: str, text: str, end: int) -> bool:
    """Whether the sequence is evidence by itself: sound text never holds it."""
    if len(damaged) > 2:
        return not (damaged[0].isupper() and all(character in QUIET for character in damaged[1:]))
    second = damaged[1]
    if second in QUIET:
        return damaged[0] in "ÂÃÐÑ" and second in "\u00a0•·" and text[end : end + 1] != " "
    return True


def _is_word(text: str, begin: int, end: int) -> bool:
    """Whether a lone pair is two letters of a word that may be spelt so, in capitals or small letters throughout."""
    pair = text[begin:end]
    return pair.isalpha() and (pair.isupper() or pair.islower()) and len(pair) == 2


def _is_written(text: str) -> bool:
    return all(any(low <= ord(c) <= high for low, high in WRITTEN) or c in _follow() for c in text)


@cache
def _grammar(name: str) -> tuple[re.Pattern[str], str]:
    """The grammar of UTF-8 in the characters that stand for its bytes in this encoding."""
    codec = ENCODINGS[name]
    low, two, three, four = (
        _characters(codec, *span) for span in ((0x80, 0xBF), (0xC2, 0xDF), (0xE0, 0xEF), (0xF0, 0xF4))
    )
    return re.compile(f"[{two}][{low}]|[{three}][{low}]{{2}}|[{four}][{low}]{{3}}"), codec


def _characters(codec: str, first: int, last: int) -> str:
    return re.escape("".join(bytes([byte]).decode(codec) for byte in range(first, last + 1)))


@cache
def signs() -> tuple[str, str]:
    """The characters a damaged sequence begins with, and those that follow: what a fast look is for."""
    leads: set[str] = set()
    follow: set[str] = set()
    for codec in ENCODINGS.values():
        leads |= {bytes([byte]).decode(codec) for byte in range(0xC2, 0xF5)}
        follow |= {bytes([byte]).decode(codec) for byte in range(0x80, 0xC0)}
    return "".join(sorted(leads)), "".join(sorted(follow))


@cache
def _follow() -> frozenset[str]:
    return frozenset(signs()[1])
