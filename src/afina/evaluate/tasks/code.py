"""code: the program that the model wrote passes the tests that stand as the reference answer; pass@k.

HumanEval, MBPP and a user's own tests are one thing here: a question, and Python that raises when the answer is
wrong. Where the question ends in a function that is to be completed, the answer may be its body alone.
"""

import ast
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina.data.conversation import Sample
from afina.errors import DataError
from afina.evaluate.metrics import bootstrap
from afina.evaluate.systems.asking import Answer, Request, Write
from afina.evaluate.tasks.kind import EMPTY, FAILED, FORBIDDEN, MEMORY, NO_CODE, TIMEOUT, Asked, Mark
from afina.evaluate.tasks.text import fenced
from afina.evaluate.worker import Worker
from afina.language import _
from afina.recipe.schema import Task

MEMORY_BYTES = 2**30
"""Address space of a program, the interpreter included."""
PROBLEMS = {"timeout": TIMEOUT, "memory": MEMORY, "forbidden": FORBIDDEN, "no code": NO_CODE, "failed": FAILED}
_DEFINITION = re.compile(r"^(?:def|class|from|import|@)\b", re.MULTILINE)


class Sandbox:
    """Runs programs, each in a process that can do nothing but compute."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._worker = Worker("code_process.py", seconds + 30, isolated=True)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.close()

    def run(self, program: str) -> dict[str, Any]:
        """`outcome` (passed, failed, timeout, memory, forbidden, no code), `reason`, `enforced` (by the kernel)."""
        asked = {"program": program, "seconds": self._seconds, "memory": MEMORY_BYTES}
        return self._worker.ask(asked) or {"outcome": "failed", "reason": "the sandbox ended"}


class Code:
    """Programs that run."""

    measure, reads = "pass@1", False

    def prepare(self, task: Task, samples: list[Sample], folder: Path) -> Asked:
        """The tests must be Python."""
        for sample in samples:
            try:
                ast.parse(sample.answer.replace("\r\n", "\n"))
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise DataError(
                    _("The reference answer of task {task} should be Python that tests a program: {reason}.").format(
                        task=task.name, reason=error
                    ),
                    file=sample.file,
                    line=sample.line,
                    hint=_("Name the column with the tests in the task's mapping.assistant."),
                ) from error
        return Asked(task, samples)

    def requests(self, asked: Asked, place: int) -> list[Request]:
        """So many attempts, each with a seed of its own."""
        task, prompt = asked.task, asked.samples[place].prompt
        return [
            Write(prompt, task.max_new_tokens, temperature=task.temperature, seed=number)
            for number in range(task.attempts)
        ]

    def mark(self, asked: Asked, places: Sequence[int], answers: Sequence[Sequence[Answer]]) -> list[Mark]:
        """A sample's score is the share of its attempts that pass."""
        marks = []
        with Sandbox(asked.task.seconds) as sandbox:
            for place, given in zip(places, answers, strict=True):
                sample = asked.samples[place]
                prompt = sample.prompt[-1].content if sample.prompt else ""
                tried = [self._outcome(sandbox, prompt, answer.text, sample.answer) for answer in given]
                passed = sum(one == "passed" for one in tried)
                right = tried[0] == "passed"
                problem = "" if right else PROBLEMS.get(tried[0], tried[0])
                more = {"attempts": len(tried), "passed": passed}
                marks.append(Mark(right, passed / len(tried), given[0].text, problem, more))
        return marks

    def _outcome(self, sandbox: Sandbox, prompt: str, answer: str, tests: str) -> str:
        if not answer.strip():
            return EMPTY
        found: str = sandbox.run(program_of(prompt, answer) + "\n\n" + tests.replace("\r\n", "\n"))["outcome"]
        return found

    def figures(self, asked: Asked, places: Sequence[int], marks: Sequence[Mark]) -> dict[str, Any]:
        """pass@k for 1 and for all attempts, unbiased, with intervals over the questions."""
        counts = [(mark.more["attempts"], mark.more["passed"]) for mark in marks]
        found: dict[str, Any] = {}
        for k in sorted({1, asked.task.attempts}):
            each = [pass_at(k, attempts, passed) for attempts, passed in counts]
            found[f"pass@{k}"] = sum(each) / len(each) if each else 0.0
            found[f"pass@{k}_interval"] = bootstrap(each)
        if asked.task.attempts > 1:
            found |= {"value": found["pass@1"], "interval": found["pass@1_interval"]}
        return found


def pass_at(k: int, attempts: int, passed: int) -> float:
    """The chance that one of k attempts passes, estimated without bias (Chen et al., 2021, arXiv:2107.03374)."""
    if attempts - passed < k:
        return 1.0
    return 1.0 - math.comb(attempts - passed, k) / math.comb(attempts, k)


def program_of(prompt: str, answer: str) -> str:
    """The program that an answer means: its fenced block where it has one; the beginning of a function that the
    question asks to complete goes before an answer that is only its body."""
    code = fenced(answer)
    code = (answer if code is None else code).replace("\r\n", "\n")
    asked = fenced(prompt)
    asked = (prompt if asked is None else asked).replace("\r\n", "\n")
    if not _DEFINITION.search(asked) or not _parses(asked.rstrip() + "\n    pass\n"):
        return code
    if _DEFINITION.search(code) and _parses(code):
        return _imports(asked) + code
    first = next((line for line in code.split("\n") if line.strip()), "")
    body = code if first.startswith((" ", "\t")) else textwrap.indent(code, "    ")
    return asked.rstrip("\n") + "\n" + body


def _imports(code: str) -> str:
    return "".join(f"{line}\n" for line in code.split("\n") if re.match(r"(?:from|import)\s", line))


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
