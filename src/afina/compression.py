"""The verbs of `afina compress`, as prose: models made smaller in the same format."""

from collections.abc import Sequence
from pathlib import Path

from afina import durable
from afina.artifact import MANIFEST
from afina.console import console
from afina.errors import OutputError
from afina.garbage import importing
from afina.language import _
from afina.recipe.load import load

FOLDER = "pruned"
"""Where pruned models go: into the folder of the run, else here."""


def prune(
    source: str | Path,
    shares: Sequence[float] = (),
    *,
    method: str = "wanda",
    pattern: str | None = None,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    tasks: bool = True,
) -> list[Path]:
    """Prune a run or a model by each of `shares`, or to a `pattern` N:M; returns the new folders. Raises AfinaError.

    `recipe` says on what data it is calibrated and judged; a run has its own. With `tasks` its tasks are put to the
    model as it was and to each that was made. `limit`: at most so many samples of each, and of those held out.
    """
    given = None if recipe is None else (load(Path(recipe)), Path(recipe).resolve().parent)
    with importing():
        from afina.model.load import spare_imports

        spare_imports()
        from afina.compress.prune import cuts_of
        from afina.compress.prune import prune as cut
        from afina.compress.source import open_source

    cuts = cuts_of(method, shares, pattern)
    opened = open_source(str(source), given)
    place = Path(out) if out else Path(source) / FOLDER if (Path(source) / MANIFEST).is_file() else Path(FOLDER)
    durable.sweep(place)
    for one in cuts:
        if (place / one.name).exists():
            raise OutputError(
                _("{path} exists already.").format(path=place / one.name),
                hint=_("Remove it, or choose another place with --out."),
            )
    console.heading(_("Pruning {source}").format(source=source))
    made = cut(opened, cuts, place, console, limit)
    if tasks and opened.recipe.tasks:
        from afina.evaluate.report import draw
        from afina.evaluate.run import Wanted, evaluate_models

        names = [str(Path(source).resolve()) if Path(source).exists() else str(source), *map(str, made)]
        evaluate_models(opened.recipe, opened.folder, names, place / "evaluation", console, Wanted(limit=limit))
        draw(place)
    for folder in made:
        console.line(_("Model     {path}").format(path=folder))
    return made
