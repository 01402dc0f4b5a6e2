"""lm-eval: tasks of the LM Evaluation Harness, asked as texts without a chat template and marked by its own rules.

Answers are remembered, limits, intervals and paired tests hold as for every other kind of task.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina.data.conversation import Message, Sample
from afina.evaluate.metrics import bootstrap, wilson
from afina.evaluate.systems.asking import Answer, Request
from afina.evaluate.tasks.kind import EMPTY, Asked, Mark
from afina.evaluate.tasks.lm_eval_tasks import documents, prepare
from afina.recipe.schema import Task


def own_samples(task: Task, folder: Path) -> list[Sample]:
    """The documents of the tasks that a task names, as samples: the question without examples, and the reference."""
    return [
        Sample(
            (Message("user", document.question), Message("assistant", document.answer)),
            Path(document.name),
            document.number + 1,
        )
        for document in documents(tuple(task.benchmarks or ()), task.fewshot, folder)
    ]


RIGHT = ("acc", "exact_match", "pass@1")
"""Metrics that say right or wrong: the first of them that a task has is its main one, else its first of all."""


class LmEval:
    """lm-eval's main metric of each document."""

    measure, reads = "accuracy", True

    def prepare(self, task: Task, samples: list[Sample], folder: Path) -> Asked:
        """The samples given are those of `own_samples` that were chosen."""
        every = documents(tuple(task.benchmarks or ()), task.fewshot, folder)
        by_place = {(document.name, document.number + 1): document for document in every}
        chosen = [by_place[str(sample.file), sample.line] for sample in samples]
        areas = [document.name for document in chosen]
        return Asked(task, samples, areas=areas, benchmark=prepare(chosen), folder=folder)

    def requests(self, asked: Asked, place: int) -> list[Request]:
        """As lm-eval makes them."""
        return list(asked.benchmark.requests(place))

    def mark(self, asked: Asked, places: Sequence[int], answers: Sequence[Sequence[Answer]]) -> list[Mark]:
        """The main metric decides: right or wrong where it is 0 or 1 everywhere, else a score."""
        found = []
        judged = asked.benchmark.judge(places, answers)
        main = {place: _main(metrics) for place, metrics in zip(places, judged, strict=True)}
        binary = all(isinstance(value, int | float) and value in (0, 1) for _name, value in main.values())
        for place, given, metrics in zip(places, answers, judged, strict=True):
            name, value = main[place]
            score = value[0] / max(1, value[1]) if isinstance(value, tuple | list) else float(value)
            if not isinstance(value, tuple | list) and not asked.benchmark.higher_is_better(place, name):
                score = -score
            shown = given[0].text if len(given) == 1 else ""
            problem = EMPTY if len(given) == 1 and not given[0].scores and not shown.strip() else ""
            found.append(
                Mark(value == 1 if binary else None, score, shown or f"{score:g}", problem, {"metrics": metrics})
            )
        return found

    def figures(self, asked: Asked, places: Sequence[int], marks: Sequence[Mark]) -> dict[str, Any]:
        """Every metric as lm-eval sums it up, task by task; right answers of each, where there is right and wrong."""
        sums = asked.benchmark.aggregate(places, [mark.more["metrics"] for mark in marks])
        found: dict[str, Any] = {"lm_eval": sums}
        if all(mark.right is not None for mark in marks):
            rights: dict[str, list[bool]] = {}
            for place, mark in zip(places, marks, strict=True):
                rights.setdefault(asked.areas[place], []).append(bool(mark.right))
            found["areas"] = {
                area: {"right": sum(right), "of": len(right), "interval": list(wilson(sum(right), len(right)))}
                for area, right in rights.items()
            }
            return found
        return {**found, "measure": "score", "interval": bootstrap([mark.score for mark in marks], None)}


def _main(metrics: dict[str, Any]) -> tuple[str, Any]:
    """Name (`metric,filter`) and value of the main metric of one document."""
    named = {name.partition(",")[0]: (name, value) for name, value in reversed(metrics.items())}
    return next((named[name] for name in RIGHT if name in named), next(iter(metrics.items()), ("", 0.0)))
