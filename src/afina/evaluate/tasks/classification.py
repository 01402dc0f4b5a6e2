"""classification: the label that is likeliest, or the one that writing constrained to labels ends in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina.data.conversation import Sample
from afina.errors import DataError
from afina.evaluate.metrics import per_label
from afina.evaluate.systems.asking import Answer, Choose, Constraint, Request, Write
from afina.evaluate.tasks.kind import NO_LABEL, Asked, Mark
from afina.language import _
from afina.recipe.schema import Task


class Classification:
    """Labels found without luck of the string."""

    measure, reads = "accuracy", True

    def prepare(self, task: Task, samples: list[Sample], folder: Path) -> Asked:
        """Each reference answer must be one of the labels."""
        labels = task.labels or sorted({sample.answer.strip() for sample in samples})
        for sample in samples:
            if sample.answer.strip() not in labels:
                raise DataError(
                    _("The answer “{answer}” is none of the labels of task {task}.").format(
                        answer=sample.answer.strip()[:40], task=task.name
                    ),
                    file=sample.file,
                    line=sample.line,
                    hint=_("Add it to the task's labels, or mend the row. The labels are {labels}.").format(
                        labels=", ".join(labels)
                    ),
                )
        return Asked(task, samples, [tuple(labels)] * len(samples))

    def requests(self, asked: Asked, place: int) -> list[Request]:
        """One question."""
        sample, labels = asked.samples[place], asked.choices[place]
        if asked.task.decide == "constrained":
            return [Write(sample.prompt, asked.task.max_new_tokens, Constraint(labels))]
        return [Choose(sample.prompt, labels)]

    def mark(self, asked: Asked, places: Sequence[int], answers: Sequence[Sequence[Answer]]) -> list[Mark]:
        """An answer that is no label is wrong, and counted as such."""
        found = []
        for place, (answer,) in zip(places, answers, strict=True):
            right = answer.text == asked.samples[place].answer.strip()
            known = answer.text in asked.choices[place]
            found.append(Mark(right, float(right), answer.text, "" if known else NO_LABEL))
        return found

    def figures(self, asked: Asked, places: Sequence[int], marks: Sequence[Mark]) -> dict[str, Any]:
        """Precision, recall and F1 of each label, their means, and the confusion matrix."""
        expected = [asked.samples[place].answer.strip() for place in places]
        return per_label(expected, [mark.shown for mark in marks], asked.labels)
