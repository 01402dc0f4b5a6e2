"""`afina rate RUN`: 1 to 5 or A/B, blind, in the terminal or on a local page."""

from pathlib import Path
from typing import Annotated

import typer

from afina.cli.options import Debug, Json, Run
from afina.language import _


def command(
    run: Run,
    pairs: Annotated[bool, typer.Option("--pairs", help=_("Which of two answers is better; else 1 to 5."))] = False,
    systems: Annotated[str, typer.Option("--systems", help=_("Whose answers, separated by commas."))] = "base,tuned",
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help=_("Answers of this task; may be repeated. Else of all that were written.")),
    ] = None,
    rater: Annotated[str | None, typer.Option("--rater", help=_("Your name; the system's if not given."))] = None,
    page: Annotated[bool, typer.Option("--page", help=_("On a page of this machine instead of the terminal."))] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help=_("Of the page; 0 takes a free one."))] = 0,
    export: Annotated[
        Path | None,
        typer.Option("--export", help=_("Write the ratings to a .csv file, or as preferences to a .jsonl file.")),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """People's judgement."""
    from afina import pipeline

    if export is not None:
        pipeline.export_ratings(run, export)
        return
    names = [name.strip() for name in systems.split(",") if name.strip()]
    pipeline.rate(
        run, mode="pair" if pairs else "score", systems=names, rater=rater, page=page, port=port, tasks=task or []
    )
