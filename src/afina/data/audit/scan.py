"""Many texts at once: which of them need a closer look, by passes over arrays of bytes.

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
    """Texts end to end, those of ASCII first, a line end before the first, one after each, and EIGHT after the last.

    `lengths`: characters of each of `texts`; `order`: of each that stands here its number. `starts`, `ends`: where
    it begins, and the place after its last character. A place is a UTF-16 unit: in `narrow` what it is in Latin-1, 0
    where that has no such character; in `flags` what is to be known of it; from `first` on, where texts are no more of
    ASCII, in `wide` itself.
    """

    texts: list[str]
    lengths: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    narrow: bytes
    flags: np.ndarray
    first: int
    wide: np.ndarray

    def owners(self, places: np.ndarray) -> np.ndarray:
        """Which of those that stand here each place lies in."""
        return np.asarray(np.searchsorted(self.starts, places, side="right") - 1)

    def units(self, places: np.ndarray) -> np.ndarray:
        """(places,) uint16: what stands at these places."""
        found: np.ndarray = np.frombuffer(self.narrow, np.uint8)[places].astype(np.uint16)
        beyond = np.flatnonzero((found == 0) & (places >= self.first))
        found[beyond] = self.wide[places[beyond] - self.first]
        return found


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


def join(texts: list[str]) -> Joined:
    """Texts made ready for passes over all of them."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    is_narrow = bytearray(map(str.isascii, texts))
    others = np.flatnonzero(np.frombuffer(is_narrow, np.bool_) == np.False_)
    order, plain, rest = np.arange(len(texts)), texts, list[str]()
    if others.size:
        order = np.concatenate([np.delete(order, others), others])
        plain, rest = list(compress(texts, is_narrow)), [texts[at] for at in others.tolist()]
    raw = "\n".join(["", *plain, ""]).encode("ascii")
    wide = np.frombuffer("\n".join([*rest, "\n" * (EIGHT - 1)]).encode("utf-16-le", "surrogatepass"), np.uint16)
    narrow = raw + np.where(wide < 256, wide, 0).astype(np.uint8).tobytes()
    flags = np.frombuffer(narrow.translate(_low_table()), np.uint8)
    ends = np.cumsum(lengths[order] + 1)
    starts = ends - lengths[order]
    if others.size:
        flags = flags.copy()
        beyond = np.flatnonzero(wide > 127)
        flags[beyond + len(raw)] = _table()[wide[beyond]]
        halves = beyond[(wide[beyond] & 0xFC00) == 0xD800]
        if halves.size:  # characters beyond the basic plane are two units: every later text starts one further
            halves += len(raw) - np.arange(halves.size)
            starts, ends = starts + np.searchsorted(halves, starts), ends + np.searchsorted(halves, ends)
    return Joined(texts, lengths, order, starts, ends, narrow, flags, len(raw), wide)


def suspects(joined: Joined) -> dict[int, int]:
    """The numbers of the texts that text.py should look at, and for what."""
    found: dict[int, int] = {}
    for look, places in _places(joined):
        if places.size:
            for number in joined.order[np.unique(joined.owners(places))].tolist():
                if (look == FENCES and joined.texts[number].count(FENCE) % 2 == 0) or (
                    look == WORDS and not any(phrase in joined.texts[number] for phrase in PHRASES.values())
                ):
                    continue
                found[number] = found.get(number, 0) | look
    return found


def _places(joined: Joined) -> Iterator[tuple[int, np.ndarray]]:
    flags = joined.flags
    eights = flags[: flags.size // EIGHT * EIGHT].view(np.uint64)  # at its end are line ends alone
    yield LETTERS, _having(flags, eights, ODD)
    if joined.wide.size > EIGHT:
        leads = _having(flags, eights, LEAD)
        yield MOJIBAKE, leads[(flags[leads + 1] & FOLLOW) != 0]
    pairs = _having(flags, eights, OPENS)
    if pairs.size:
        first, second = joined.units(pairs), joined.units(pairs + 1)
        known = _pairs()[first, np.where(second < 128, second, 0)] | (second == ord("｜"))
        pairs, first, second = pairs[known], first[known], second[known]
        yield FENCES, pairs[first == ord("`")]
        phrase = np.isin(first, [ord(letter) for letter in PHRASES])
        yield WORDS, pairs[phrase]
        third = joined.units(pairs + 2)  # << is an operator; <<SYS>> is Llama 2's
        markup = (second != ord("<")) | (third == ord("S")) | (third == ord("/"))
        yield OPENING, pairs[~phrase & (first != ord("`")) & markup]
    for places in _runs(flags, eights):
        yield RUNS, places
    if (joined.ends - joined.starts).max(initial=0) >= LONG_WORD:
        yield RUNS, _unbroken(np.frombuffer(joined.narrow, np.uint8))


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
