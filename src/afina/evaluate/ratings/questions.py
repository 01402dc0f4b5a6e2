"""What a rater is asked next: blind, in an order of their own, each answer on a side of its own, and never twice.

The order and the sides follow from the rater's name and the item alone, so that a rater who comes back goes on where
they were, and two raters see different orders.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afina.evaluate.ratings.store import Item, Mode, Store, Turn
from afina.language import _


@dataclass(frozen=True)
class Question:
    """An item as it is shown: `answers` in the order of the screen."""

    item: Item
    answers: tuple[str, ...]
    turned: bool
    number: int
    total: int

    def value_of(self, choice: str) -> int | None:
        """What a choice means: 1 to 5, or a, b and = for a pair; None for anything else."""
        if self.item.mode == "score":
            return int(choice) if choice in ("1", "2", "3", "4", "5") else None
        worth = {"a": 1, "b": -1, "=": 0}.get(choice.lower())
        return worth if worth is None or not self.turned else -worth


def items(rows: Sequence[Mapping[str, Any]], systems: Sequence[str], mode: Mode) -> list[Item]:
    """What can be rated of an evaluation's predictions. Two equal answers, and none at all, are not asked about."""
    found: dict[str, Item] = {}
    for row in rows:
        told = {name: str(row[name]) for name in systems if name in row}
        task, prompt, before = str(row.get("task", "")), str(row.get("prompt", "")), _turns(row.get("before"))
        if mode == "score":
            made = [Item("score", task, prompt, name, answer, before=before) for name, answer in told.items()]
        elif len(told) == len(systems) == 2 and told[systems[0]] != told[systems[1]]:
            answers = (systems[0], told[systems[0]], systems[1], told[systems[1]])
            made = [Item("pair", task, prompt, *answers, before=before)]
        else:
            made = []
        found |= {item.key: item for item in made}
    return list(found.values())


def role_named(role: str) -> str:
    """Who speaks, for people."""
    return {"system": _("System"), "user": _("Question"), "assistant": _("Answer")}.get(role, role)


def _turns(found: Any) -> tuple[Turn, ...]:
    """The conversation before the last question, as predictions.jsonl holds it."""
    turns = found if isinstance(found, list) else []
    return tuple((str(turn["role"]), str(turn["content"])) for turn in turns)


@dataclass(frozen=True)
class Round:
    """One rater's way through the items."""

    store: Store
    rater: str
    items: Sequence[Item]

    def next(self) -> Question | None:
        """The next question; None when all is rated."""
        done = self.store.rated(self.rater)
        left = [item for item in self._shuffled() if item.key not in done]
        return self._shown(left[0], len(self.items) - len(left) + 1) if left else None

    def find(self, key: str) -> Question | None:
        """The question about an item, as it was shown."""
        item = next((item for item in self.items if item.key == key), None)
        return None if item is None else self._shown(item, 0)

    def keep(self, question: Question, value: int, seconds: float) -> None:
        """Note the rater's word."""
        item = question.item
        first = item.other_system if question.turned else item.system
        self.store.add(self.rater, item, value, shown_first=str(first), seconds=seconds)

    def _shuffled(self) -> list[Item]:
        return sorted(self.items, key=lambda item: random.Random(f"order {self.rater} {item.key}").random())

    def _shown(self, item: Item, number: int) -> Question:
        turned = item.mode == "pair" and random.Random(f"side {self.rater} {item.key}").random() < 0.5
        answers = (item.answer,) if item.other_answer is None else (item.answer, item.other_answer)
        return Question(item, answers[::-1] if turned else answers, turned, number, len(self.items))
