"""`afina export RUN --format q8_0`."""

from enum import StrEnum
from typing import Annotated

import typer

from afina.cli.options import Debug, Json, Run
from afina.language import _


class Format(StrEnum):
    """What export.formats of a recipe may hold."""

    merged = "merged"
    f32 = "f32"
    f16 = "f16"
    q8_0 = "q8_0"


Formats = Annotated[
    list[Format] | None,
    typer.Option("--format", "-f", help=_("Repeat for several; the recipe's export.formats if not given.")),
]


def command(run: Run, formats: Formats = None, json: Json = False, debug: Debug = False) -> None:
    """Files that others run."""
    from afina import pipeline

    pipeline.export(run, [str(kind) for kind in formats or []])
