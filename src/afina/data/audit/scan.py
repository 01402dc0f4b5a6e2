"""Many texts at once: which of them need a closer look, and the language of each, by passes over arrays of bytes.

The texts of a block are joined and every character becomes one byte of flags. A handful of vectorised passes over
these bytes (about 3 ns a character in all) then say which texts hold something that text.py should look at. A test
holds that nothing is missed which the plain functions find.
"""

import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import compress

import numpy as np

from afina.data.audit.letters import RANGES
from afina.data.audit.mojibake import signs
from afina.data.audit.text import FENCES, LETTERS, LONG_WORD, MOJIBAKE, OPENING, RUNS, WORDS

ODD, FOLLOW, LEAD, OPENS, WORD, DIGITISH, DIGIT = (1 << bit for bit in range(7))
SECONDS = {"<": "|/<sebpumcBE", "[": "/ITASg", "&": "#abcdefghijklmnopqrstuvwxyz", "`": "`"}
"""The characters that begin what is told by its spelling (control tokens, entities), and those that may follow."""
PHRASES = ("PRIVATE KEY-----", "s an AI ", "modelo de lenguaje")
KEY_RUN = 20
"""Every secret key holds a run of so many letters, digits, _ or -."""
ONES = np.uint64(0x0101010101010101)


@dataclass(slots=True)
class Joined:
    """Texts end to end, with a line end between each two: `flags` and `codes` a character each (UTF-16 units).

    `starts`: where each begins, in these units; `lengths`: its characters.
    """

    texts: list[str]
    text: str
    codes: np.ndarray
    flags: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def ends(self) -> np.ndarray:
        """The unit after the last of each text."""
        return np.append(self.starts[1:] - 1, self.codes.size) if self.texts else self.starts

    def owners(self, places: np.ndarray) -> np.ndarray:
        """The text that each place lies in."""
        return np.searchsorted(self.starts, places, side="right") - 1


@cache
def _table() -> np.ndarray:
    """Flags of every character of the basic plane; of a pair of surrogates those of its first half."""
    table = np.zeros(65536, np.uint8)
    for span in RANGES.values():
        for first, last in _ranges(span):
            table[first : last + 1] |= ODD
    table[0xD800:0xE000] = 0
    # Halves of the invisible and private characters beyond the basic plane, and of its noncharacters.
    table[0xDB40] |= ODD
    table[0xDB80:0xDC00] |= ODD
    for plane in range(1, 17):
        table[0xD800 + (((plane << 16 | 0xFFFF) - 0x10000) >> 10)] |= ODD
    leads, follow = signs()
    for characters, flag in (
        (leads, LEAD),
        (follow, FOLLOW),
        ("".join(SECONDS) + "@", OPENS),
        ("0123456789", DIGIT | DIGITISH),
        (" -", DIGITISH),
        (string.ascii_letters + string.digits + "-_+/=", WORD),
    ):
        table[[ord(character) for character in characters]] |= flag
    return table


def _ranges(span: str) -> list[tuple[int, int]]:
    """The ranges of a character class as a regular expression writes them, those of the basic plane."""
    found, place = [], 0
    while place < len(span):
        last = span[place + 2] if span[place + 1 : place + 2] == "-" else span[place]
        if ord(last) < 65536:
            found.append((ord(span[place]), ord(last)))
        place += 3 if span[place + 1 : place + 2] == "-" else 1
    return found


@cache
def _low_table() -> bytes:
    return _table()[:256].tobytes()


def joined_apart(texts: list[str]) -> Iterator[tuple[np.ndarray, Joined]]:
    """Texts of ASCII and the others, each with their numbers: most are of ASCII and take half the room and time."""
    ascii_only = np.fromiter(map(str.isascii, texts), np.bool_, len(texts))
    for some in (ascii_only, ~ascii_only):
        numbers = np.flatnonzero(some)
        if numbers.size:
            yield numbers, join(texts if numbers.size == len(texts) else list(compress(texts, some)))


def join(texts: list[str]) -> Joined:
    """Texts made ready for passes over all of them."""
    text = "\n".join(texts)
    starts = np.zeros(len(texts), np.int64)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    np.cumsum(lengths[:-1] + 1, out=starts[1:])
    if text.isascii():
        raw = text.encode("ascii")
        codes = np.frombuffer(raw, np.uint8)
        return Joined(texts, text, codes, np.frombuffer(raw.translate(_low_table()), np.uint8), starts, lengths)
    codes = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), np.uint16)
    flags = np.frombuffer(codes.astype(np.uint8).tobytes().translate(_low_table()), np.uint8).copy()
    beyond = np.flatnonzero(codes > 127)
    flags[beyond] = _table()[codes[beyond]]
    if codes.size != len(text):  # characters beyond the basic plane are two units: every later text starts one further
        halves = beyond[(codes[beyond] & 0xFC00) == 0xD800]
        starts += np.searchsorted(halves - np.arange(halves.size), starts)
    return Joined(texts, text, codes, flags, starts, lengths)


def suspects(joined: Joined) -> dict[int, int]:
    """The numbers of the texts that text.py should look at, and for what."""
    found: dict[int, int] = {}
    if joined.flags.size > 1:
        for look, places in _places(joined):
            if places.size:
                for owner in np.unique(joined.owners(places)).tolist():
                    found[owner] = found.get(owner, 0) | look
    return found


def _places(joined: Joined) -> Iterator[tuple[int, np.ndarray]]:
    flags = joined.flags
    yield LETTERS, np.flatnonzero((flags & ODD) != 0)
    if joined.codes.dtype != np.uint8:
        yield MOJIBAKE, np.flatnonzero(((flags[:-1] & LEAD) != 0) & ((flags[1:] & FOLLOW) != 0))
    pairs = np.flatnonzero((flags[:-1] & OPENS) != 0)  # of bytes other than 0 and 1 it takes ten times as long
    if pairs.size:
        second = joined.codes[pairs + 1]
        known = _pairs()[joined.codes[pairs], np.where(second < 128, second, 0)] | (second == ord("｜"))
        pairs = pairs[known]
        fences = joined.codes[pairs] == ord("`")
        yield FENCES, pairs[fences]
        pairs = pairs[~fences]
        double = joined.codes[pairs + 1] == ord("<")  # << is an operator; <<SYS>> is Llama 2's
        third = joined.codes[np.minimum(pairs + 2, flags.size - 1)]
        yield OPENING, pairs[~double | (third == ord("S")) | (third == ord("/"))]
    for places in _runs(flags):
        yield RUNS, places
    lengths = np.diff(joined.starts, append=flags.size)
    if lengths.max() >= LONG_WORD:
        yield RUNS, _unbroken(joined.codes)
    for word in PHRASES:
        yield WORDS, _found(joined, word)


@cache
def _pairs() -> np.ndarray:
    """Which two characters may begin what is told by its spelling."""
    table = np.zeros((128, 128), np.bool_)
    for first, seconds in SECONDS.items():
        table[ord(first), [ord(second) for second in seconds]] = True
    table[ord("@"), ord("0") : ord("z") + 1] = True
    return table


def _runs(flags: np.ndarray) -> list[np.ndarray]:
    """Where keys, blobs, cards and repeated characters may lie: by blocks of four characters that are all of a kind."""
    whole = flags.size // 4 * 4
    if whole < 8:
        return []
    blocks = flags[:whole].view(np.uint32)
    words = (blocks & np.uint32(0x10101010)) == np.uint32(0x10101010)
    long = words[:-3] & words[1:-2] & words[2:-1] & words[3:] if words.size > 3 else words[:0]
    digits = ((blocks & np.uint32(0x20202020)) == np.uint32(0x20202020)) & ((blocks & np.uint32(0x40404040)) != 0)
    numbers = digits[:-1] & digits[1:]
    same = blocks[:-1] == blocks[1:]
    for _doubling in range(4):  # 32 equal blocks in a row: 128 characters, within any run of RUN
        step = 1 << _doubling
        same = same[:-step] & same[step:] if same.size > step else same[:0]
    return [np.flatnonzero(long) * 4, np.flatnonzero(numbers) * 4, np.flatnonzero(same) * 4]


def _unbroken(codes: np.ndarray) -> np.ndarray:
    """Where some 500 characters stand with no white space between them: within any word of LONG_WORD."""
    whole = codes.size // 8 * 8
    inside = ((codes[:whole] > 32) & (codes[:whole] < 127)).view(np.uint64) == ONES
    for doubling in range(6):
        step = 1 << doubling
        inside = inside[:-step] & inside[step:] if inside.size > step else inside[:0]
    return np.flatnonzero(inside) * 8


def _found(joined: Joined, word: str) -> np.ndarray:
    """Where a word stands, in units of `codes`."""
    text, found, place = joined.text, [], joined.text.find(word)
    while place >= 0:
        found.append(place)
        place = text.find(word, place + 1)
    places = np.array(found, np.int64)
    if joined.codes.size != len(text) and found:
        places = np.array([len(text[:place].encode("utf-16-le", "surrogatepass")) // 2 for place in found], np.int64)
    return places
