"""perplexity: how surprised the model is by the reference answers, end of turn included."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afina.data.conversation import Sample
from afina.evaluate.metrics import resamples, spread
from afina.evaluate.systems.asking import Answer, Read, Request
from afina.evaluate.tasks.kind import Asked, Mark
from afina.recipe.schema import Task


class Perplexity:
    """exp of the mean negative log-probability of an answer's tokens. Comparable between equal tokenizers only."""

    measure, reads = "perplexity", True

    def prepare(self, task: Task, samples: list[Sample], folder: Path) -> Asked:
        """Any reference will do."""
        return Asked(task, samples)

    def requests(self, asked: Asked, place: int) -> list[Request]:
        """The reference, read."""
        return [Read(asked.samples[place].prompt, asked.samples[place].answer)]

    def mark(self, asked: Asked, places: Sequence[int], answers: Sequence[Sequence[Answer]]) -> list[Mark]:
        """A sample's score is its mean log-probability a token."""
        marks = []
        for (answer,) in answers:
            total, tokens = answer.scores[0], max(1, answer.tokens)
            shown = f"{math.exp(min(700.0, -total / tokens)):.3g}"
            marks.append(Mark(None, total / tokens, shown, "", {"sum": total, "tokens": tokens}))
        return marks

    def figures(self, asked: Asked, places: Sequence[int], marks: Sequence[Mark]) -> dict[str, Any]:
        """Over all tokens, not the mean of the samples' own; the interval, of FEW samples none, resamples samples."""
        if not marks:
            return {}
        sums, tokens = (np.array([mark.more[key] for mark in marks]) for key in ("sum", "tokens"))
        means = np.concatenate([-sums[draw].sum(1) / tokens[draw].sum(1) for draw in resamples(len(marks))])
        ends = spread(means, sums / tokens)
        value = math.exp(min(700.0, -float(sums.sum() / tokens.sum())))
        return {
            "value": value,
            "interval": ends and [math.exp(min(700.0, end)) for end in ends],
            "tokens_read": int(tokens.sum()),
        }
