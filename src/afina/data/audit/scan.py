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
from afina.data.audit.text import FENCE, FENCES, LETTERS, LONG_WORD, MOJIBAKE, OPENING, RUNS, WORDS

ODD, FOLLOW, LEAD, OPENS, WORD, DIGITISH, DIGIT = (1 << bit for bit in range(7))
PHRASES = {"K": "PRIVATE KEY-----", "A": "s an AI ", "j": "modelo de lenguaje"}
"""Phrases that are told, by a letter that stands in each once and is not common."""
SECONDS = {
    "<": "|/<sebpumcBE",
    "[": "/ITASg",
    "&": "#abcdefghijklmnopqrstuvwxyz",
    "`": "`",
    **{first: phrase[phrase.rindex(first) + 1] for first, phrase in PHRASES.items()},
}
"""The characters that begin what is told by its spelling (control tokens, entities, fences, the middle of a phrase),
and those that may follow."""
EIGHT = 8
"""Characters looked at in one step, a byte each."""
ONES = np.uint64(0x0101010101010101)


@dataclass(slots=True)
class Joined:
    """Texts end to end, with a line end after each and EIGHT after the last: `flags` and `codes` a character each
    (UTF-16 units).

    `starts`: where each begins, in these units; `ends`: the unit after its last; `lengths`: its characters.
    """

    texts: list[str]
    text: str
    codes: np.ndarray
    flags: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray

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
    text = "\n".join([*texts, "\n" * (EIGHT - 1)])
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    ends = np.cumsum(lengths + 1) - 1
    starts = ends - lengths
    if text.isascii():
        raw = text.encode("ascii")
        codes = np.frombuffer(raw, np.uint8)
        return Joined(texts, text, codes, np.frombuffer(raw.translate(_low_table()), np.uint8), starts, ends, lengths)
    codes = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), np.uint16)
    flags = np.frombuffer(codes.astype(np.uint8).tobytes().translate(_low_table()), np.uint8).copy()
    beyond = np.flatnonzero(codes > 127)
    flags[beyond] = _table()[codes[beyond]]
    if codes.size != len(text):  # characters beyond the basic plane are two units: every later text starts one further
        halves = beyond[(codes[beyond] & 0xFC00) == 0xD800]
        halves -= np.arange(halves.size)
        starts, ends = starts + np.searchsorted(halves, starts), ends + np.searchsorted(halves, ends)
    return Joined(texts, text, codes, flags, starts, ends, lengths)


def suspects(joined: Joined) -> dict[int, int]:
    """The numbers of the texts that text.py should look at, and for what."""
    found: dict[int, int] = {}
    for look, places in _places(joined):
        if places.size:
            for owner in np.unique(joined.owners(places)).tolist():
                if (look == FENCES and joined.texts[owner].count(FENCE) % 2 == 0) or (
                    look == WORDS and not any(phrase in joined.texts[owner] for phrase in PHRASES.values())
                ):
                    continue
                found[owner] = found.get(owner, 0) | look
    return found


def _places(joined: Joined) -> Iterator[tuple[int, np.ndarray]]:
    flags, codes = joined.flags, joined.codes
    eights = flags[: flags.size // EIGHT * EIGHT].view(np.uint64)  # at its end are line ends alone
    yield LETTERS, _having(flags, eights, ODD)
    if codes.dtype != np.uint8:
        leads = _having(flags, eights, LEAD)
        yield MOJIBAKE, leads[(flags[leads + 1] & FOLLOW) != 0]
    pairs = _having(flags, eights, OPENS)
    if pairs.size:
        second = codes[pairs + 1]
        pairs = pairs[_pairs()[codes[pairs], np.where(second < 128, second, 0)] | (second == ord("｜"))]
        first = codes[pairs]
        yield FENCES, pairs[first == ord("`")]
        phrase = np.isin(first, [ord(letter) for letter in PHRASES])
        yield WORDS, pairs[phrase]
        pairs = pairs[~phrase & (first != ord("`"))]
        double = codes[pairs + 1] == ord("<")  # << is an operator; <<SYS>> is Llama 2's
        third = codes[pairs + 2]
        yield OPENING, pairs[~double | (third == ord("S")) | (third == ord("/"))]
    for places in _runs(flags, eights):
        yield RUNS, places
    if joined.lengths.max(initial=0) >= LONG_WORD:
        yield RUNS, _unbroken(codes)


def _having(flags: np.ndarray, eights: np.ndarray, flag: int) -> np.ndarray:
    """Where characters with a flag are, few among many."""
    some = np.flatnonzero((eights & (ONES * np.uint64(flag))) != 0)  # of other than booleans it takes ten times as long
    near = (some[:, None] * EIGHT + np.arange(EIGHT)).ravel()
    return np.asarray(near[(flags[near] & flag) != 0])


@cache
def _pairs() -> np.ndarray:
    """Which two characters may begin what is told by its spelling."""
    table = np.zeros((128, 128), np.bool_)
    for first, seconds in SECONDS.items():
        table[ord(first), [ord(second) for second in seconds]] = True
    table[ord("@"), ord("0") : ord("z") + 1] = True
    return table


def _runs(flags: np.ndarray, eights: np.ndarray) -> list[np.ndarray]:
    """Where keys, blobs, cards and repeated characters may lie: by fours and eights of characters all of a kind."""
    fours = flags[: eights.size * EIGHT].view(np.uint32)
    words, digitish, digit = (np.uint32(flag * 0x01010101) for flag in (WORD, DIGITISH, DIGIT))
    long = (fours & words) == words
    long = long[:-1] & long[1:]
    long = long[:-2] & long[2:]
    digits = ((fours & digitish) == digitish) & ((fours & digit) != 0)
    same = eights[:-1] == eights[1:]
    if np.count_nonzero(same) < 16:
        same = same[:0]
    for doubling in range(4):  # 17 equal steps in a row: 136 characters, within any run of RUN
        step = 1 << doubling
        same = same[:-step] & same[step:] if same.size > step else same[:0]
    return [np.flatnonzero(long) * 4, np.flatnonzero(digits[:-1] & digits[1:]) * 4, np.flatnonzero(same) * EIGHT]


def _unbroken(codes: np.ndarray) -> np.ndarray:
    """Where some 500 characters stand with no white space between them: within any word of LONG_WORD."""
    whole = codes.size // 8 * 8
    inside = ((codes[:whole] > 32) & (codes[:whole] < 127)).view(np.uint64) == ONES
    for doubling in range(6):
        step = 1 << doubling
        inside = inside[:-step] & inside[step:] if inside.size > step else inside[:0]
    return np.flatnonzero(inside) * 8
