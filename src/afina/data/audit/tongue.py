"""The language of many texts at once, by script and by the little words that fill every sentence.

A classifier of its own would cost more time than all the rest of the audit, and its model a licence of its own. Here
the words of a block are looked up in one table by a few vectorised passes; a text with too few of them has no language.
"""

from functools import cache

import numpy as np

from afina.data.audit.scan import Joined

LATIN = {
    "en": "the of and to is in that it for with you was are this as on be by have from or what not they can will an he "
    "she his her at we but do per come all if how die has had so up out about them then than there their been "
    "would could were when who which my me no am any more some into over",
    "es": "el la los las de que en es una un por con para del se más como está pero su al lo sus muy qué cómo hay si "
    "no son hasta desde entre sobre este esta eso todo cada sin ella ya le les me mi tu te cual donde ser era",
    "pt": "os as de não uma que da em um para com são você mais como mas ao dos das seu sua pelo se no na por ou ele "
    "ela até já muito sem tem foi ser este esta isso nos sobre entre quem me te",
    "fr": "le la les de des est et une un dans que pour pas sur qui au du ce il elle nous vous avec sont cette par en "
    "se ne tout ont aux leur même très être fait on je tu mais comme sans où entre",
    "de": "der die das und ist nicht ein eine mit den zu für auf von im dem sich auch es wie wird oder sind des in was "
    "er war einem einer nach bei nur noch wenn kann aber hat um so am als man ihr wir dass",
    "it": "il la che di un una non con del sono le gli nel alla più anche si da ma dei in per come lo ha al dal cui mi "
    "ti ci tutto molto ogni dopo senza se no su tra era lei",
    "nl": "de het een en van is dat op te niet met voor zijn er aan ook als bij wordt of maar naar deze in was die ze "
    "zich door over heeft hun kan om dan nog wel ik je we",
    "pl": "na nie się jest do że jak ale co przez od dla oraz tak jego być po są czy tylko już był ma za to ten tym te",
}
"""The commonest short words of each language, of up to SHORT letters of Latin-1. A word of several
languages stands in all of them. One of a single letter is not looked up: it may be an unknown of an equation."""
SCRIPTS = {
    "ru": ((0x0400, 0x052F),),
    "el": ((0x0370, 0x03FF),),
    "he": ((0x0590, 0x05FF),),
    "ar": ((0x0600, 0x06FF),),
    "hi": ((0x0900, 0x097F),),
    "th": ((0x0E00, 0x0E7F),),
    "ko": ((0xAC00, 0xD7A3), (0x1100, 0x11FF)),
    "ja": ((0x3040, 0x30FF),),
    "zh": ((0x4E00, 0x9FFF),),
}
"""Scripts that tell a language, or a group of languages called by its largest."""
LANGUAGES = ("", *LATIN, *SCRIPTS)
"""The code of a language is its place here; 0 is none."""
LEAST = 4
"""Little words, at least, that tell a language: twice as many as those of the next one, or nearly so many more."""
SPARSE = 60
"""A text with fewer than one such word in so many characters is code, or a list of names."""
SHORT = 5
"""Letters of the longest word that is looked up."""
LETTERS = 8
"""Bytes of a 64-bit number."""
MOST = 255
"""Little words of a text that are counted, from its beginning: each language has a byte of a 64-bit sum."""


@cache
def _lower() -> bytes:
    """Letters of Latin-1 made small, digits and the underscore as they are (`ele1` is no word), everything else 0."""
    table = bytearray(256)
    table[ord("_")] = ord("_")
    table[ord("0") : ord("9") + 1] = b"0123456789"
    for code in range(256):
        small = chr(code).lower()
        if chr(code).isalpha() and len(small) == 1 and ord(small) < 256:
            table[code] = ord(small)
    return bytes(table)


SLOT_BITS = 14
"""The table stays in the processor's second cache."""
MULTIPLIER = 0x9E3779B97F4AA73B
"""Keeps these words apart in the table; where they change, the search for another one begins here."""
ONES, HIGHS = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)


@cache
def _words() -> tuple[np.ndarray, np.ndarray, np.uint64]:
    """A table of words without collisions: (keys, a byte set to 1 for each language that has the word, multiplier)."""
    lanes: dict[int, int] = {}
    for number, words in enumerate(LATIN.values()):
        for word in words.split():
            if 1 < len(word) <= SHORT and all(ord(letter) < 256 for letter in word):
                key = int.from_bytes(word.encode("latin-1"), "little")
                lanes[key] = lanes.get(key, 0) | 1 << 8 * number
    keys = np.array(sorted(lanes), np.uint64)
    multiplier = MULTIPLIER
    while True:
        slots = _slots(keys, np.uint64(multiplier))
        if np.unique(slots).size == slots.size:
            break
        multiplier += 2
    table, languages = np.zeros(1 << SLOT_BITS, np.uint64), np.zeros(1 << SLOT_BITS, np.uint64)
    table[slots], languages[slots] = keys, [lanes[int(key)] for key in keys]
    return table, languages, np.uint64(multiplier)


def _slots(keys: np.ndarray, multiplier: np.uint64) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (keys * multiplier) >> np.uint64(64 - SLOT_BITS)


def _short_words(inside: np.ndarray) -> np.ndarray:
    """Where words of 2 to SHORT letters begin, less one. inside: (bytes,) bool, whether each is of a word."""
    two = inside[:-1] & inside[1:]
    four = two[:-2] & two[2:]
    long = four[:-2] & two[4:]  # one letter more than SHORT
    begins = two[1 : 1 + long.size - 1] & ~inside[: long.size - 1]
    begins &= ~long[1:]
    return np.flatnonzero(begins)


def _first_words(eights: np.ndarray) -> np.ndarray:
    """Of eight bytes each those before the first zero, which there is (Mycroft's test for a byte of zeros)."""
    zeros = (eights - ONES) & ~eights & HIGHS
    return np.asarray(eights & (((zeros & (~zeros + np.uint64(1))) >> np.uint64(7)) - np.uint64(1)))


def languages(joined: Joined) -> np.ndarray:
    """(texts,) uint8: the language of each text, a place in LANGUAGES."""
    scores = _scores(np.frombuffer(joined.narrow.translate(_lower()), np.uint8), joined.starts)[: len(LATIN)]
    top = scores.max(0)
    best = scores == top
    second = np.where(best, 0, scores).max(0)
    top, second = top.astype(np.int64), second.astype(np.int64)
    # MOST words of prose come within a quarter of the characters that such a text may have
    dense = top * SPARSE >= np.minimum(joined.lengths[joined.order], MOST * SPARSE // 4)
    told = (best.sum(0) == 1) & (top >= LEAST) & dense & ((top >= 2 * second) | (top - second >= LEAST - 1))
    language = np.where(told, np.arange(1, len(LATIN) + 1) @ best, 0).astype(np.uint8)
    _by_script(joined, language)
    found = np.empty_like(language)
    found[joined.order] = language
    return found


def _scores(low: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """(8, texts) uint8: the little words of each text in each language. begins: (texts,) where each begins."""
    starts = _short_words(low != 0)
    keys = _first_words(np.ndarray((low.size - LETTERS,), np.uint64, low.data, 1, (1,)).take(starts))
    table, lanes, multiplier = _words()
    slots = _slots(keys, multiplier).view(np.int64)
    hits = np.flatnonzero(table[slots] == keys)
    found = np.append(lanes[slots[hits]], np.uint64(0))
    first = np.searchsorted(starts[hits], begins - 1)
    last = np.minimum(np.append(first[1:], hits.size), first + MOST)
    sums: np.ndarray = np.add.reduceat(found, np.stack([first, last], 1).ravel())[::2]
    sums[first == last] = 0  # of an empty range reduceat gives the element it begins with
    return np.ascontiguousarray(sums.astype("<u8").view(np.uint8).reshape(sums.size, 8).T)


@cache
def _script_table() -> np.ndarray:
    """(65536,) uint8: the script of each character of the basic plane, a place in SCRIPTS from 1 on, 0 for none."""
    table = np.zeros(65536, np.uint8)
    for number, spans in enumerate(SCRIPTS.values(), start=1):
        for first, last in spans:
            table[first : last + 1] = number
    return table


def _by_script(joined: Joined, language: np.ndarray) -> None:
    """Set the language of texts that are mostly of another script than the Latin one."""
    found = _script_table()[joined.wide]
    places = np.flatnonzero(found != 0)
    if places.size < LEAST:
        return
    count, kinds = len(joined.texts), len(SCRIPTS) + 1
    owners = joined.owners(places + joined.first) * kinds + found[places]
    script = np.bincount(owners, minlength=count * kinds).reshape(count, kinds)[:, 1:].copy()
    ja, zh = list(SCRIPTS).index("ja"), list(SCRIPTS).index("zh")
    script[:, ja] += np.where(script[:, ja] * 8 >= script[:, zh], script[:, zh], 0)
    best = script.argmax(1)
    top = script[np.arange(count), best]
    chosen = (top >= LEAST) & (top * 3 >= joined.ends - joined.starts)
    language[chosen] = best[chosen] + 1 + len(LATIN)
