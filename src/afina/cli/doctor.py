"""`afina doctor [MODEL] [--rows N]`."""

from typing import Annotated

import typer

from afina.cli.options import Debug, Json
from afina.language import _

Base = Annotated[
    str | None, typer.Argument(help=_("A model to be advised on, such as Qwen/Qwen3-0.6B."), show_default=False)
]
Rows = Annotated[int | None, typer.Option("--rows", min=1, help=_("How many rows there are to learn from."))]


def command(model: Base = None, rows: Rows = None, json: Json = False, debug: Debug = False) -> None:
    """What this machine can train."""
    from afina import pipeline

    pipeline.doctor(model, rows)
