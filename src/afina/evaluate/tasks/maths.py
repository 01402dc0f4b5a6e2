"""maths: the final number is the reference's, whatever is written around it; steps are checked as they stand.

Where the reference is a number, numbers are compared exactly. Anything else (fractions in LaTeX, roots, sets,
equations) goes to math-verify in a process of its own, which may hang or die without harm.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from afina.data.conversation import Sample
from afina.errors import DataError, ResourceError
from afina.evaluate.metrics import wilson
from afina.evaluate.systems.asking import Answer, Request, Write
from afina.evaluate.tasks.kind import CUT_OFF, EMPTY, NO_NUMBER, TIMEOUT, Asked, Mark
from afina.evaluate.tasks.numbers import NUMBER, Convention, preferred, readings, steps
from afina.evaluate.worker import Worker
from afina.language import _
from afina.recipe.schema import Task

VERIFY_S = 20.0
"""How long math-verify may think about one answer; importing sympy is part of the first."""
_CUES = re.compile(
    r"(?:final answer|the answer is|answer:|answer is|respuesta final|la respuesta es|respuesta:|respuesta es|"
    r"el resultado es|resultado:|solución:|solution:)",
    re.IGNORECASE,
)


def final_answer(text: str) -> str:
    """Where a solution states its result: after ####, in the last \\boxed{}, after words such as "the answer is", or
    else its last number; "" without any."""
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0].strip()
    if (boxed := _boxed(text)) is not None:
        return boxed
    cues = list(_CUES.finditer(text))
    for cue in reversed(cues):
        rest = text[cue.end() :].strip(" :*_$\n\t")
        if rest:
            return rest.split("\n")[0].strip()
    numbers = list(NUMBER.finditer(text.replace("{,}", ",")))
    return numbers[-1].group() if numbers else ""


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place].strip()
    return text[start + len("\\boxed{") :].strip()


def same_number(gold: Fraction, text: str, convention: Convention) -> bool | None:
    """Whether the first number of a final answer is `gold`; None where it has none, or is more than a number."""
    plain = text.replace("{,}", ",")
    if re.search(r"\\(?:d?frac|sqrt|pi)|\^", plain):
        return None
    found = NUMBER.search(plain)
    return gold in readings(found, convention) if found else None


class Maths:
    """Numbers compared as numbers."""

    measure, reads = "accuracy", False

    def prepare(self, task: Task, samples: list[Sample], folder: Path) -> Asked:
        """Each reference must state a result."""
        for sample in samples:
            if not final_answer(sample.answer) and not sample.answer.strip():
                raise DataError(
                    _("The reference answer of task {task} states no result.").format(task=task.name),
                    file=sample.file,
                    line=sample.line,
                )
        return Asked(task, samples)

    def requests(self, asked: Asked, place: int) -> list[Request]:
        """One solution, greedily."""
        return [Write(asked.samples[place].prompt, asked.task.max_new_tokens)]

    def mark(self, asked: Asked, places: Sequence[int], answers: Sequence[Sequence[Answer]]) -> list[Mark]:
        """Each answer against its reference."""
        with Worker("maths_process.py", VERIFY_S) as worker:
            return [
                self._one(asked.samples[place].answer, given[0], asked.task.numbers, worker)
                for place, given in zip(places, answers, strict=True)
            ]

    def _one(self, reference: str, answer: Answer, convention: Convention, worker: Worker) -> Mark:
        gold_text, said = final_answer(reference) or reference.strip(), final_answer(answer.text)
        gold = preferred(gold_text, convention)
        right = same_number(gold, said, convention) if gold is not None and said else None
        problem = ""
        if right is None:
            if not said and (gold is not None or not answer.text.strip()):
                right, problem = False, NO_NUMBER if answer.text.strip() else EMPTY
            else:
                verdict = verify(worker, gold_text, said or answer.text)
                right, problem = verdict is True, TIMEOUT if verdict is None else ""
        if not right and not problem and not answer.ended:
            problem = CUT_OFF
        shown = steps(answer.text, convention)
        return Mark(right, float(right), answer.text, problem, {"steps": len(shown), "right_steps": sum(shown)})

    def figures(self, asked: Asked, places: Sequence[int], marks: Sequence[Mark]) -> dict[str, Any]:
        """How many of the calculations shown are right."""
        total, right = (sum(mark.more[key] for mark in marks) for key in ("steps", "right_steps"))
        return {"steps": total, "right_steps": right, "steps_interval": list(wilson(right, total))}


def verify(worker: Worker, gold: str, answer: str) -> bool | None:
    """math-verify's word on an answer; None when it did not come to one in time. Raises ResourceError without it."""
    reply = worker.ask({"gold": gold, "answer": answer})
    if reply is None:
        return None
    if reply.get("missing"):
        raise ResourceError(
            _("Mathematics beyond numbers needs the package math-verify, which is not installed."),
            hint=_('Run: pip install "afina[eval]"'),
        )
    return bool(reply.get("equal"))
