"""Tasks asked of a model while it trains: the same questions as after it, fewer samples, nothing remembered."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.data.template import Renderer
from afina.evaluate.answers import Answers
from afina.evaluate.measure import Sitting, work
from afina.evaluate.run import Wanted, questions
from afina.evaluate.systems.asking import System
from afina.evaluate.systems.transformer import ModelAnswering, as_it_is
from afina.evaluate.tasks.kind import Asked
from afina.model.load import Hardware
from afina.recipe.schema import Recipe

TOLD = ("value", "interval", "answered", "unanswered", "reasons", "problems", "seconds")
SAMPLE_TOKENS = 256
"""About as long as a question with its answer takes, for the progress alone."""


@dataclass(frozen=True)
class WhileTraining:
    """An `OnEvaluate` of the training: asks the tasks of `training.evaluate`."""

    tasks: list[Asked]

    @property
    def tokens(self) -> int:
        """See `OnEvaluate`."""
        return SAMPLE_TOKENS * sum(work(asked) for asked in self.tasks)

    @property
    def falling(self) -> frozenset[str]:
        """See `OnEvaluate`."""
        return frozenset(asked.task.name for asked in self.tasks if asked.task.kind == "perplexity")

    def __call__(self, model: Any, renderer: Renderer, hardware: Hardware) -> list[dict[str, Any]]:
        """See `OnEvaluate`; `model` is transformers'."""
        answering = ModelAnswering(model, renderer, hardware, as_it_is)
        system = System("tuned", "tuned", "", lambda: nullcontext(answering))
        sitting = Sitting([system], self.tasks, Answers(None))
        sitting.ask()
        results, _rows = sitting.results()
        return [_told(result) for result in results]


def while_training(recipe: Recipe, folder: Path) -> WhileTraining | None:
    """Who asks the recipe's tasks while it trains; None where it asks none. Raises DataError."""
    names = recipe.training.evaluate
    if not names:
        return None
    _readings, asked = questions(recipe, folder, Wanted(tasks=names, limit=recipe.training.evaluate_samples))
    return WhileTraining(asked)


def _told(result: dict[str, Any]) -> dict[str, Any]:
    figures = result["systems"]["tuned"]
    facts = {key: result[key] for key in ("measure", "samples")}
    return {"task": result["name"], **facts, **{key: figures[key] for key in TOLD}}
