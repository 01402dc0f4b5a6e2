"""The conversations of a block, as the pass takes them up: texts end to end, so that all are looked at together."""

from dataclasses import dataclass, field
from itertools import compress

import numpy as np

from afina.data.audit.quick import Plain
from afina.data.conversation import Message

NONE = np.zeros(0, np.int64)


@dataclass
class Taken:
    """The conversations of a block, some at a time: of each its place there, its roles, and how many texts it has;
    all texts, end to end, and the hash of each."""

    roles: list[tuple[str, ...]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    whole: dict[int, tuple[tuple[Message, ...], tuple[str, str]]] = field(default_factory=dict)
    """By place, the messages of those that have more than roles and texts, with their tools and effort."""
    _rows: list[np.ndarray] = field(default_factory=list)
    _counts: list[np.ndarray] = field(default_factory=list)
    _hashed: list[np.ndarray] = field(default_factory=list)

    def add(self, rows: np.ndarray, plain: Plain, hashed: np.ndarray, good: np.ndarray) -> None:
        """Take up those of some conversations that are good. rows: their places; good: (conversations,) bool."""
        if good.all():
            self.roles += plain.roles
            self.texts += plain.texts
        else:
            each = np.repeat(good, plain.counts)
            self.roles += compress(plain.roles, good.tobytes())
            self.texts += compress(plain.texts, each.tobytes())
            rows, hashed, plain = rows[good], hashed[each], plain._replace(counts=plain.counts[good])
        self._rows.append(rows)
        self._counts.append(plain.counts)
        self._hashed.append(hashed)

    def add_one(self, row: int, roles: tuple[str, ...], texts: list[str]) -> None:
        """Take up a conversation."""
        self.roles.append(roles)
        self.texts += texts
        self._rows.append(np.array([row]))
        self._counts.append(np.array([len(texts)]))
        self._hashed.append(np.array(list(map(hash, texts))))

    @property
    def rows(self) -> np.ndarray:
        """(conversations,) int64."""
        return np.concatenate([NONE, *self._rows])

    @property
    def counts(self) -> np.ndarray:
        """(conversations,) int64."""
        return np.concatenate([NONE, *self._counts])

    @property
    def hashed(self) -> np.ndarray:
        """(texts,) int64."""
        return np.concatenate([NONE, *self._hashed])
