"""exact: what the model writes equals the answer, to the letter or as people would compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina.data.conversation import Sample
from afina.evaluate.systems.asking import Answer, Request, Write
from afina.evaluate.tasks.kind import CUT_OFF, EMPTY, Asked, Mark, one_each
from afina.evaluate.tasks.text import normalised
from afina.recipe.schema import Task


class Exact:
    """Equality of texts, but for space around."""

    measure, reads = "accuracy", False

    def prepare(self, task: Task, samples: list[Sample], folder: Path) -> Asked:
        """Any reference will do."""
        return Asked(task, samples)

    def requests(self, asked: Asked, place: int) -> list[Request]:
        """One answer, greedily."""
        return [Write(asked.samples[place].prompt, asked.task.max_new_tokens)]

    def mark(self, asked: Asked, places: Sequence[int], answers: Sequence[Sequence[Answer]]) -> list[Mark]:
        """Whether the texts are equal; both ways are told."""

        def one(sample: Sample, answer: Answer) -> Mark:
            strict = answer.text.strip() == sample.answer.strip()
            loose = strict or normalised(answer.text) == normalised(sample.answer) != ""
            right = loose if asked.task.normalise else strict
            problem = "" if right else EMPTY if not answer.text.strip() else "" if answer.ended else CUT_OFF
            return Mark(right, float(right), answer.text, problem, {"strict": strict, "normalised": loose})

        return one_each(one, asked, places, answers)

    def figures(self, asked: Asked, places: Sequence[int], marks: Sequence[Mark]) -> dict[str, Any]:
        """How many would be right by either comparison."""
        return {key: sum(mark.more[key] for mark in marks) for key in ("strict", "normalised")}
