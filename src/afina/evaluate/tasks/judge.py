"""judge: a third model prefers one of two answers, asked in both orders, so that its liking for the first place shows.

A pair counts as won only where both orders agree; a preference that turns with the order is a tie, and is counted as
such. What the judge says that is no verdict, and what it does not say at all, leaves the pair without a mark, and is
counted too. Knows no systems: who puts the requests to the judge is measure.py.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina.data.conversation import Message, Sample
from afina.errors import RecipeError
from afina.evaluate.systems.asking import Answer, Request, Write
from afina.evaluate.tasks.kind import EMPTY, Asked, Mark, one_each
from afina.language import _
from afina.recipe.schema import Task

VERDICT_TOKENS = 512
QUESTION = """\
You compare two answers to the same question. {criteria}

[Question]
{question}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better? End your reply with a line that holds nothing but [[A]], [[B]], or [[C]] where neither is."""
CRITERIA = "Judge correctness first, then helpfulness and clarity; length and order do not matter."
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_BARE = re.compile(r"(?:^|\n)\W*(?:answer|respuesta)?\W*([ABC])\W*$", re.IGNORECASE)
ALONE = 0.5
"""The score of the system that others are compared with: as good as itself."""


class Judging:
    """Preference over the first system, from 0 to 1; 0.5 is as good."""

    measure, reads = "preference", False

    def prepare(self, task: Task, samples: list[Sample], folder: Path) -> Asked:
        """The task must name its judge."""
        if not task.judge:
            raise RecipeError(_("The task {task} needs a judge.").format(task=task.name), hint=_("Set tasks.judge."))
        return Asked(task, samples, folder=folder)

    def requests(self, asked: Asked, place: int) -> list[Request]:
        """One answer, greedily."""
        return [Write(asked.samples[place].prompt, asked.task.max_new_tokens)]

    def mark(self, asked: Asked, places: Sequence[int], answers: Sequence[Sequence[Answer]]) -> list[Mark]:
        """Before the judge has spoken every answer is as good as any."""

        def one(_sample: Sample, answer: Answer) -> Mark:
            return Mark(None, ALONE, answer.text, "" if answer.text.strip() else EMPTY)

        return one_each(one, asked, places, answers)

    def figures(self, asked: Asked, places: Sequence[int], marks: Sequence[Mark]) -> dict[str, Any]:
        """Wins, ties and losses against the first system, and how often the order decided."""
        judged = [mark for mark in marks if "order" in mark.more]
        return {
            "wins": sum(mark.score > ALONE for mark in judged),
            "ties": sum(mark.score == ALONE for mark in judged),
            "losses": sum(mark.score < ALONE for mark in judged),
            "order_decided": sum(mark.more["order"] for mark in judged),
        }


def both_orders(asked: Asked, place: int, first: str, second: str) -> list[Write]:
    """The same two answers to one sample, shown to the judge as A and B, and as B and A."""
    return [_question(asked, place, first, second), _question(asked, place, second, first)]


def _question(asked: Asked, place: int, first: str, second: str) -> Write:
    question = "\n\n".join(message.content for message in asked.samples[place].prompt)
    text = QUESTION.format(
        criteria=asked.task.criteria or CRITERIA, question=question, first=first or "-", second=second or "-"
    )
    return Write((Message("user", text),), VERDICT_TOKENS)


def judged(mark: Mark, there: Answer, back: Answer) -> Mark | str:
    """The mark of the second answer, which `there` saw as B and `back` as A; or why there is none."""
    if there.error or back.error:
        return there.error or back.error
    verdicts = [verdict(there.text), verdict(back.text)]
    if None in verdicts:
        return _("the judge gave no verdict")
    worth = {"A": -1, "B": 1, "C": 0}
    forward, backward = worth[str(verdicts[0])], -worth[str(verdicts[1])]
    turned = forward * backward < 0
    score = ALONE if turned else ALONE + (forward + backward) / 4
    return Mark(None, score, mark.shown, mark.problem, {"order": turned})


def verdict(text: str) -> str | None:
    """A, B, or C for neither; None for what is no verdict."""
    found = _VERDICT.findall(text)
    if found:
        return str(found[-1])
    bare = _BARE.search(text.strip())
    return bare.group(1).upper() if bare else None
