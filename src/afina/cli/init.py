"""`afina init USE_CASE FOLDER`."""

from pathlib import Path
from typing import Annotated

import typer

from afina.cli.options import Debug, Json
from afina.console import console
from afina.language import _

UseCase = Annotated[
    str | None,
    typer.Argument(help=_("What the model is for; `afina init` alone lists the use cases."), show_default=False),
]
Folder = Annotated[Path | None, typer.Argument(help=_("The new folder; named after the use case if not given."))]


Base = Annotated[
    str | None,
    typer.Option("--for", help=_("The model to tune: the recipe gets the method that fits it here."), metavar="MODEL"),
]


def command(
    use_case: UseCase = None, folder: Folder = None, base: Base = None, json: Json = False, debug: Debug = False
) -> None:
    """A project folder."""
    from afina import pipeline

    if use_case is None:
        _list()
    else:
        pipeline.init(use_case, folder, base)


def _list() -> None:
    from afina.recipe.starter import USE_CASES, summary

    console.line(_("afina init USE_CASE [FOLDER], where USE_CASE is one of:"))
    width = max(map(len, USE_CASES))
    for name in USE_CASES:
        console.line(f"  {name:{width}}  {summary(name)}")
    console.event("use_cases", names=list(USE_CASES))
