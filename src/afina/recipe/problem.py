"""A mistake in a recipe: where it stands and what it is. All of them become one RecipeError.

Knows nothing of YAML or of the schema.
"""

from collections.abc import Sequence
from typing import NamedTuple

from afina.errors import RecipeError
from afina.language import _

SHOWN = 50
"""Mistakes listed in one error; the rest are counted."""

LONGEST = 400
"""Characters of one message: a key or a label may be a whole book."""

Path = tuple[str | int, ...]
"""Keys and list positions from the top of the recipe: `("tasks", 0, "labels")`."""


class Place(NamedTuple):
    """Line and column, both from 1, in the file; or, where `override` is not empty, in that override's value."""

    line: int
    column: int
    override: str = ""


class Problem(NamedTuple):
    """One mistake, as a sentence for the user."""

    place: Place
    message: str


def dotted(path: Path) -> str:
    """`tasks.0.labels`, as an override would write it."""
    return ".".join(str(part) for part in path)


def failure(problems: Sequence[Problem], file: str) -> RecipeError:
    """The one error that names every problem, in the order of the file; overrides come last."""
    overrides = [problem for problem in problems if problem.place.override]
    ordered = sorted({*problems} - {*overrides}, key=lambda problem: problem.place) + list(dict.fromkeys(overrides))
    first = ordered[0].place
    message = _sentence(ordered[0])
    if len(ordered) > 1:
        lines = [_line(problem, file) for problem in ordered[:SHOWN]]
        if len(ordered) > SHOWN:
            lines.append(_("and {count} more").format(count=len(ordered) - SHOWN))
        message = "\n".join([_("The recipe has {count} mistakes:").format(count=len(ordered)), *lines])
    if first.override:
        return RecipeError(message)
    return RecipeError(message, file=file, line=first.line, column=first.column)


def _line(problem: Problem, file: str) -> str:
    line, column, override = problem.place
    return _sentence(problem) if override else f"{file}:{line}:{column}: {_sentence(problem)}"


def _sentence(problem: Problem) -> str:
    """The message, with its override if it has one, on one line and safe for a terminal."""
    message = _visible(problem.message)
    if not problem.place.override:
        return message
    return _("In the override {override}: {message}").format(override=_visible(problem.place.override), message=message)


def _visible(text: str) -> str:
    short = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in short)
