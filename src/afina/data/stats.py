"""A data set in figures, as the model sees it, and what they say about context, epochs and batch."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from afina.data.audit.scan import join
from afina.data.audit.tongue import LANGUAGES, languages
from afina.data.classes import classes_of
from afina.data.conversation import Sample
from afina.data.template import Rendered
from afina.language import _
from afina.recipe.schema import Recipe

STEPS = 100
"""Optimiser steps below which little is learnt: so many are aimed at by epochs and batch."""
EPOCHS = ((300, 5.0), (20_000, 3.0), (100_000, 2.0), (math.inf, 1.0))
"""Passes over so many samples at most: the fewer there are, the more often each must be seen."""
BATCHES = (4, 8, 16, 32)
BLOCK = 4096
"""Texts whose language is looked for at once."""
SHORT = 64
"""No context smaller than this is suggested."""


@dataclass(frozen=True)
class Figures:
    """`lengths`, `learnt`, `turns`: (samples,) int64, tokens, learnt tokens and messages of each.

    `over`: samples longer than `context`; `losing`: those of them that would lose learnt tokens if they were cut.
    `classes`: how often each answer is given, where answers are classes. `languages`: answers in each language.
    """

    lengths: np.ndarray
    learnt: np.ndarray
    turns: np.ndarray
    context: int
    over: int
    losing: int
    classes: Counter[str] | None
    languages: Counter[str]

    @property
    def tokens(self) -> int:
        """All tokens of one pass."""
        return int(self.lengths.sum())

    @property
    def share(self) -> float:
        """Learnt tokens among all."""
        return float(self.learnt.sum() / max(self.tokens, 1))


@dataclass(frozen=True, slots=True)
class Advice:
    """What a key of the recipe might be, what it is, and why."""

    key: str
    now: float | int
    better: float | int
    reason: str


def figures(samples: Sequence[Sample], rendered: Sequence[Rendered], context: int) -> Figures:
    """Count what is in samples and their renderings. `context`: model.max_length."""
    lengths = np.array([row.ids.size for row in rendered], np.int64)
    return Figures(
        lengths=lengths,
        learnt=np.array([int(row.learnt[1:].sum()) for row in rendered], np.int64),
        turns=np.array([len(sample.messages) for sample in samples], np.int64),
        context=context,
        over=int((lengths > context).sum()),
        losing=sum(bool(row.learnt[context:].any()) for row in rendered),
        classes=classes_of(samples),
        languages=_languages([sample.answer for sample in samples]),
    )


def _languages(texts: list[str]) -> Counter[str]:
    """How many of the texts are in each language; those too short to tell are left out."""
    found: Counter[str] = Counter()
    for start in range(0, len(texts), BLOCK):
        found.update(LANGUAGES[number] for number in languages(join(texts[start : start + BLOCK])).tolist())
    del found[""]
    return found


def spread(values: np.ndarray) -> dict[str, float]:
    """Smallest, median, mean, 95th percentile and largest."""
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "p95": float(np.percentile(values, 95)),
        "max": float(values.max()),
    }


def advice(found: Figures, recipe: Recipe) -> list[Advice]:
    """Context, epochs and batch that suit the figures, each beside what the recipe says and with the reason."""
    longest, count = int(found.lengths.max()), len(found.lengths)
    context = max(SHORT, 1 << (longest - 1).bit_length())
    if found.over:
        reason = _("{over} of {count} samples are longer; {losing} would lose words of their answers").format(
            over=found.over, count=count, losing=found.losing
        )
    else:
        reason = _("the longest sample has {longest} tokens: all fit, with room to the next power of two").format(
            longest=longest
        )
    epochs = next(passes for most, passes in EPOCHS if count <= most)
    fitting = [size for size in BATCHES if count * epochs / size >= STEPS]
    batch = fitting[-1] if fitting else BATCHES[0]
    steps = math.ceil(count * epochs / batch)
    if count <= EPOCHS[0][0]:
        why = _(
            "with {count} samples each must be seen often; watch the validation loss, it rises when it is too often"
        )
    else:
        why = _("with {count} samples, more passes teach them by heart")
    return [
        Advice("model.max_length", recipe.model.max_length, context, reason),
        Advice("training.epochs", recipe.training.epochs, epochs, why.format(count=count)),
        Advice(
            "training.batch_size",
            recipe.training.batch_size,
            batch,
            _("{steps} optimiser steps in all; fewer than {least} teach little").format(steps=steps, least=STEPS),
        ),
    ]


def warnings(found: Figures, recipe: Recipe) -> list[str]:
    """What of the recipe would go wrong with these samples (MISSION M25)."""
    said = []
    if found.losing:
        said.append(
            _("model.max_length ({limit}) is too short: {losing} answers would be cut off.").format(
                limit=found.context, losing=found.losing
            )
        )
    steps = math.ceil(len(found.lengths) * recipe.training.epochs / recipe.training.batch_size)
    if recipe.training.steps is None and steps < STEPS // 4:
        said.append(
            _("{count} samples, {epochs:g} epochs and batches of {batch} are only {steps} optimiser steps.").format(
                count=len(found.lengths),
                epochs=recipe.training.epochs,
                batch=recipe.training.batch_size,
                steps=steps,
            )
        )
    if found.classes is not None:
        (most, many), *_middle, (least, few) = found.classes.most_common()
        if many > 10 * few:
            said.append(
                _("The classes are out of balance: “{most}” is given {many} times, “{least}” {few} times.").format(
                    most=most, many=many, least=least, few=few
                )
            )
    return said
