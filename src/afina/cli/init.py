"""`afina init USE_CASE FOLDER`."""

from pathlib import Path
from typing import Annotated

import typer

from afina.cli.options import Debug, Json
from afina.language import _
from afina.recipe.starter import USE_CASES

UseCase = Annotated[
    str, typer.Argument(help=_("One of {names}.").format(names=", ".join(USE_CASES)), show_default=False)
]
Folder = Annotated[Path | None, typer.Argument(help=_("The new folder; named after the use case if not given."))]


def command(use_case: UseCase, folder: Folder = None, json: Json = False, debug: Debug = False) -> None:
    """A project folder."""
    from afina import pipeline

    pipeline.init(use_case, folder)
