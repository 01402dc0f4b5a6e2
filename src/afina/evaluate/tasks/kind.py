"""What every kind of task is: it checks its references, makes requests, marks answers, and adds figures of its own."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from afina.data.conversation import Sample
from afina.evaluate.systems.asking import Answer, Request
from afina.language import _
from afina.recipe.schema import Task

EMPTY, CUT_OFF, NO_NUMBER, NOT_JSON, NOT_OBJECT, NOT_SCHEMA, NO_LABEL = (
    *("empty", "cut off", "no number", "not JSON", "not an object", "not of the schema", "no label"),
)
TIMEOUT, MEMORY, FORBIDDEN, NO_CODE, FAILED = (*("timeout", "memory", "forbidden", "no code", "failed"),)


def problem_names() -> dict[str, str]:
    """What may be wrong with an answer beside being the wrong one, for people."""
    return {
        EMPTY: _("empty"),
        CUT_OFF: _("cut off"),
        NO_NUMBER: _("without a number"),
        NOT_JSON: _("not JSON"),
        NOT_OBJECT: _("JSON, but no object"),
        NOT_SCHEMA: _("not of the schema"),
        NO_LABEL: _("none of the labels"),
        TIMEOUT: _("out of time"),
        MEMORY: _("out of memory"),
        FORBIDDEN: _("did what a program may not"),
        NO_CODE: _("not a program"),
        FAILED: _("fails with an error"),
    }


@dataclass(frozen=True)
class Asked:
    """A task, the samples chosen for it, and what each may be answered where that is a choice."""

    task: Task
    samples: list[Sample]
    choices: list[tuple[str, ...]] = field(default_factory=list)
    areas: list[str] = field(default_factory=list)
    schema: str | None = None
    folder: Path = Path()
    benchmark: Any = None

    @property
    def labels(self) -> list[str]:
        """All labels, in the order they are shown."""
        if self.task.labels:
            return self.task.labels
        return sorted({label for labels in self.choices for label in labels})


@dataclass(frozen=True)
class Mark:
    """One answer judged. `right`: None where there is no right or wrong; `score`: the more, the better, paired with
    other systems' scores of the same sample; `problem`: what is wrong with it beside being wrong."""

    right: bool | None
    score: float
    shown: str
    problem: str = ""
    more: dict[str, Any] = field(default_factory=dict)


class Kind(Protocol):
    """One kind of task. `measure` names its main figure; `reads`: it needs likelihoods."""

    measure: str
    reads: bool

    def prepare(self, task: Task, samples: list[Sample], folder: Path) -> Asked:
        """Check the references. Raises DataError for one that cannot be marked."""
        ...

    def requests(self, asked: Asked, place: int) -> list[Request]:
        """What is asked about one sample."""
        ...

    def mark(self, asked: Asked, places: Sequence[int], answers: Sequence[Sequence[Answer]]) -> list[Mark]:
        """Judge the answers to the samples at `places`, of which each may have several."""
        ...

    def figures(self, asked: Asked, places: Sequence[int], marks: Sequence[Mark]) -> dict[str, Any]:
        """What is told beside the main figure; `value` and `interval` replace the main ones."""
        ...


def problems(marks: Sequence[Mark]) -> dict[str, int]:
    """How often each problem came, the most frequent first."""
    return dict(Counter(mark.problem for mark in marks if mark.problem).most_common())


def one_each(mark: Callable[[Sample, Answer], Mark], asked: Asked, places: Sequence[int], answers: Any) -> list[Mark]:
    """Marks of a kind that asks once a sample."""
    return [mark(asked.samples[place], given[0]) for place, given in zip(places, answers, strict=True)]
