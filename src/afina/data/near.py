"""Which texts are nearly the same: those that share most of their runs of eight bytes, without comparing all pairs.

Each text becomes 128 numbers by one permutation hashing (Li, Owen & Zhang, 2012, arXiv:1208.1259) with rotation for
empty bins (Shrivastava & Li, 2014, arXiv:1406.4784), 16 bits of each kept (Li & König, 2010, arXiv:0910.3349): 256
bytes a text. Texts that agree in four numbers in a row are compared by all of them. Case, punctuation and white space
do not count. What is found depends on the texts alone, not on their order.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

SIMILAR = 0.8
"""Share of runs in common (Jaccard) from which two texts count as the same."""
_NUMBERS = 128
_BAND = 4
_RUN = 8
_BLOCK = 2**22
"""Bytes of text hashed at once."""
_EMPTY = np.uint64(2**64 - 1)
_NOT_WORDS = re.compile(r"[\W_]+")


class Near:
    """Texts as they come, and in the end the groups of those that are nearly the same."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self._bytes = 0
        self._blocks: list[np.ndarray] = []

    def add(self, text: str) -> None:
        """One more text; they are numbered from 0."""
        words = _NOT_WORDS.sub(" ", text.casefold()).strip() or text
        self._waiting.append(words.encode("utf-8", "surrogatepass").ljust(_RUN))
        self._bytes += len(self._waiting[-1])
        if self._bytes > _BLOCK:
            self._hash()

    def groups(self, similar: float = SIMILAR) -> np.ndarray:
        """(texts,) int64: for each text the number of the first text of its group; its own where it is alone.

        A text belongs to a group when it is similar to one of it, so the two ends of a group may differ more.
        """
        self._hash()
        if not self._blocks:
            return np.zeros(0, np.int64)
        numbers = np.concatenate(self._blocks)
        bands = numbers.view(np.uint64)
        mixed = (mix(bands) * np.arange(1, bands.shape[1] + 1, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
        canonical = np.argsort(mixed, kind="stable")
        numbers, bands = numbers[canonical], bands[canonical]
        joined = _Joined(len(numbers))
        for band in range(bands.shape[1]):
            for left, right in _neighbours(bands[:, band]):
                same = (numbers[left] == numbers[right]).sum(axis=1) >= similar * _NUMBERS
                joined.join(left[same], right[same])
        return _by_first(joined.roots(), canonical)

    def _hash(self) -> None:
        if self._waiting:
            self._blocks.append(_numbers(self._waiting))
            self._waiting, self._bytes = [], 0


def groups(texts: Iterable[str], similar: float = SIMILAR) -> np.ndarray:
    """As `Near.groups`, of texts that are there already."""
    near = Near()
    for text in texts:
        near.add(text)
    return near.groups(similar)


def _numbers(texts: Sequence[bytes]) -> np.ndarray:
    """(texts, 128) uint16: the signature of each."""
    lengths = np.array([len(text) for text in texts])
    data = np.frombuffer(b"".join(texts), np.uint8)
    runs = np.ndarray((data.size - _RUN + 1,), np.uint64, data, strides=(1,)).copy()
    owner = np.repeat(np.arange(len(texts)), lengths)[: runs.size]
    whole = owner == np.repeat(np.arange(len(texts)), lengths)[_RUN - 1 :]
    hashes, owner = mix(runs[whole]), owner[whole]
    found = np.full(len(texts) * _NUMBERS, _EMPTY)
    np.minimum.at(found, owner * _NUMBERS + (hashes >> np.uint64(57)).astype(np.int64), hashes << np.uint64(7))
    table = found.reshape(len(texts), _NUMBERS)
    for step in range(1, _NUMBERS):
        empty = table == _EMPTY
        rows = np.flatnonzero(empty.any(axis=1))
        if rows.size == 0:
            break
        beside = np.roll(table[rows], -1, axis=1)
        moved = np.where(beside == _EMPTY, _EMPTY, mix(beside + np.uint64(step)))
        table[rows] = np.where(empty[rows], moved, table[rows])
    return np.ascontiguousarray((table >> np.uint64(40)).astype(np.uint16))


def mix(values: np.ndarray) -> np.ndarray:
    """Each 64-bit number scattered: the finaliser of SplitMix64 (Steele, Lea & Flood, 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def _neighbours(band: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Pairs of texts that share a band: each with the one before it and with the first that has it."""
    order = np.argsort(band, kind="stable")
    ordered = band[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    later = np.flatnonzero(~new)
    for start in range(0, later.size, 2**16):
        some = later[start : start + 2**16]
        yield order[some - 1], order[some]
        yield order[first[some]], order[some]


class _Joined:
    """Which texts were joined to one another, through any number of others."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Join each of `left` with the one of `right` beside it."""
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            a, b = self._root(one), self._root(other)
            self._parent[max(a, b)] = min(a, b)

    def roots(self) -> np.ndarray:
        """One text that stands for the group of each."""
        return np.array([self._root(place) for place in range(len(self._parent))], np.int64)

    def _root(self, place: int) -> int:
        while (parent := self._parent[place]) != place:
            self._parent[place] = place = self._parent[parent]
        return place


def _by_first(roots: np.ndarray, canonical: np.ndarray) -> np.ndarray:
    """The groups, each named by its first text in the order in which they came."""
    members = np.empty_like(roots)
    members[canonical] = roots
    first = np.full(len(roots), len(roots), np.int64)
    np.minimum.at(first, members, np.arange(len(roots)))
    return np.asarray(first[members])
