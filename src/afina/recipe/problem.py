"""A mistake in a recipe: where it stands and what it is. All of them become one RecipeError.

Knows nothing of YAML or of the schema.
"""

from collections.abc import Sequence
from typing import NamedTuple

from afina.errors import RecipeError
from afina.language import _

SHOWN = 50
"""Mistakes listed in one error; the rest are counted."""

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
    ordered = sorted(dict.fromkeys(problems), key=lambda problem: (problem.place.override != "", problem.place))
    first = ordered[0].place
    lines = [_line(problem, file) for problem in ordered[:SHOWN]]
    if len(ordered) > SHOWN:
        lines.append(_("and {count} more").format(count=len(ordered) - SHOWN))
    if len(ordered) == 1:
        message = _in_override(ordered[0])
    else:
        message = "\n".join([_("The recipe has {count} mistakes:").format(count=len(ordered)), *lines])
    if first.override:
        return RecipeError(message)
    return RecipeError(message, file=file, line=first.line, column=first.column)


def _line(problem: Problem, file: str) -> str:
    if problem.place.override:
        return _in_override(problem)
    return f"{file}:{problem.place.line}:{problem.place.column}: {problem.message}"


def _in_override(problem: Problem) -> str:
    if not problem.place.override:
        return problem.message
    return _("In the override {override}: {message}").format(override=problem.place.override, message=problem.message)
