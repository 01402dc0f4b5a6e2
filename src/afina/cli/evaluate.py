"""`afina eval SOURCE ... [--recipe RECIPE]`."""

from pathlib import Path
from typing import Annotated

import typer

from afina.cli.options import Debug, Json
from afina.console import console
from afina.language import _

Sources = Annotated[
    list[str],
    typer.Argument(
        help=_(
            "A run folder, and whom to ask beside it: model folders, hub names, GGUF files, other runs, "
            "OpenAI-compatible endpoints as URL#model."
        ),
        show_default=False,
    ),
]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", "-r", help=_("Ask this recipe's tasks; the run's own if not given."))
]
Place = Annotated[
    Path | None, typer.Option("--out", "-o", help=_("Where the figures go; the run folder if there is one."))
]
Tasks = Annotated[list[str] | None, typer.Option("--task", "-t", help=_("Only this task; may be repeated."))]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help=_("At most so many samples of each task."))]
Minutes = Annotated[
    float | None, typer.Option("--minutes", min=0.01, help=_("Stop after so long, and compare what all have answered."))
]


def command(
    sources: Sources,
    recipe: RecipeOption = None,
    out: Place = None,
    task: Tasks = None,
    limit: Limit = None,
    minutes: Minutes = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Everyone beside the base."""
    from afina import pipeline

    made = pipeline.evaluate(
        sources[0], *sources[1:], recipe=recipe, out=out, tasks=task or [], limit=limit, minutes=minutes
    )
    console.line(_("Report    {path}").format(path=made.parent / "report.html"))
