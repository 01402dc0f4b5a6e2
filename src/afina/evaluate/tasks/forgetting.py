"""forgetting: the same general questions for every model, so that what tuning cost elsewhere is seen.

The questions ship with the package: choices of three or four, in Spanish and English, by area. Asked by likelihood,
as a classification is, so that a model that cannot follow instructions is measured all the same.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina.data.conversation import Message, Sample
from afina.evaluate.metrics import wilson
from afina.evaluate.systems.asking import Answer, Choose, Request
from afina.evaluate.tasks.kind import NO_LABEL, Asked, Mark
from afina.recipe.place import BUNDLED
from afina.recipe.schema import Task

QUESTIONS = BUNDLED / "general" / "questions.jsonl"


def general_questions() -> tuple[list[Sample], list[tuple[str, ...]], list[str]]:
    """The questions as samples, their choices (the right one is the sample's answer), and their areas."""
    samples, choices, areas = [], [], []
    for number, line in enumerate(QUESTIONS.read_bytes().split(b"\n"), 1):
        if line.strip():
            row = json.loads(line)
            messages = (Message("user", row["question"]), Message("assistant", row["answer"]))
            samples.append(Sample(messages, QUESTIONS, number))
            choices.append(tuple(sorted([row["answer"], *row["others"]])))
            areas.append(f"{row['area']} ({row['language']})")
    return samples, choices, areas


class Forgetting:
    """Accuracy over fixed general questions, and by area."""

    measure, reads = "accuracy", True

    def prepare(self, task: Task, samples: list[Sample], folder: Path) -> Asked:
        """The samples given are those of `general_questions` that were chosen."""
        everything, choices, areas = general_questions()
        place = {sample: number for number, sample in enumerate(everything)}
        kept = [place[sample] for sample in samples]
        return Asked(task, samples, [choices[number] for number in kept], [areas[number] for number in kept])

    def requests(self, asked: Asked, place: int) -> list[Request]:
        """One question."""
        return [Choose(asked.samples[place].prompt, asked.choices[place])]

    def mark(self, asked: Asked, places: Sequence[int], answers: Sequence[Sequence[Answer]]) -> list[Mark]:
        """Whether the right choice was the likeliest."""
        found = []
        for place, (answer,) in zip(places, answers, strict=True):
            right = answer.text == asked.samples[place].answer
            known = answer.text in asked.choices[place]
            found.append(Mark(right, float(right), answer.text, "" if known else NO_LABEL))
        return found

    def figures(self, asked: Asked, places: Sequence[int], marks: Sequence[Mark]) -> dict[str, Any]:
        """By area."""
        found: dict[str, list[bool]] = {}
        for place, mark in zip(places, marks, strict=True):
            found.setdefault(asked.areas[place], []).append(bool(mark.right))
        return {
            "areas": {
                area: {"right": sum(right), "of": len(right), "interval": list(wilson(sum(right), len(right)))}
                for area, right in found.items()
            }
        }
