"""`afina compress prune SOURCE --share 0.1,0.3,0.5 [--method METHOD]`."""

from pathlib import Path
from typing import Annotated

import typer

from afina.cli.options import Debug, Json
from afina.language import _

Source = Annotated[
    str, typer.Argument(help=_("A run folder; or a model folder or hub name, with --recipe."), show_default=False)
]
Shares = Annotated[
    str | None, typer.Option("--share", "-s", help=_("The share that goes; several, as 0.1,0.3,0.5, make a table."))
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        help=_(
            "wanda: weights, by size times input; magnitude: by size in each matrix, magnitude-global: over all; "
            "layers: whole ones, those that change least; channels: of the MLPs."
        ),
    ),
]
Pattern = Annotated[
    str | None, typer.Option("--pattern", help=_("N:M instead of a share: of M neighbours N stay, such as 2:4."))
]
RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", "-r", help=_("On whose data it is calibrated and judged; the run's own if not given.")),
]
Place = Annotated[
    Path | None, typer.Option("--out", "-o", help=_("The folder for the new models; pruned/ in the run if not given."))
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help=_("At most so many held-out samples, and of each task."))
]
Tasks = Annotated[bool, typer.Option(" /--no-tasks", help=_("Leave the recipe's tasks unasked."), show_default=False)]


def command(
    source: Source,
    share: Shares = None,
    method: Method = "wanda",
    pattern: Pattern = None,
    recipe: RecipeOption = None,
    out: Place = None,
    limit: Limit = None,
    tasks: Tasks = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Smaller models, and what they cost."""
    from afina import compression

    compression.prune(
        source, _shares(share), method=method, pattern=pattern, recipe=recipe, out=out, limit=limit, tasks=tasks
    )


def _shares(text: str | None) -> list[float]:
    try:
        return [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(
            _("{text} is no list of shares, such as 0.1,0.3.").format(text=repr(text)), param_hint="--share"
        ) from error
