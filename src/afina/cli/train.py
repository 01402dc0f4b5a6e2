"""`afina train RECIPE [KEY=VALUE ...]`."""

from typing import Annotated

import typer

from afina.cli.options import Debug, Json, Out, Overrides, Recipe
from afina.language import _

Resume = Annotated[bool, typer.Option("--resume", help=_("Only go on with a run that was stopped; never begin one."))]


def command(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune as a recipe says."""
    from afina import pipeline

    pipeline.train(recipe, out, overrides or [], resume=resume)
