"""`afina export RUN --to gguf:q4_k_m,ollama`."""

from typing import Annotated

import typer

from afina.cli.options import Debug, Json, Run
from afina.language import _

Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--to",
        "--format",
        "-f",
        help=_(
            "Comma-separated, or repeated; the recipe's export.formats if not given. A GGUF may be said gguf:q4_k_m."
        ),
    ),
]


def command(run: Run, formats: Formats = None, json: Json = False, debug: Debug = False) -> None:
    """Files that others run."""
    from afina import pipeline

    pipeline.export(run, _names(formats or []))


def _names(given: list[str]) -> list[str]:
    """The formats of all options, each known."""
    from afina.export.mixes import EXPORTS

    names = [name.strip().removeprefix("gguf:") for text in given for name in text.split(",") if name.strip()]
    for name in names:
        if name not in EXPORTS:
            raise typer.BadParameter(
                _("{name} is not one of {names}.").format(name=repr(name), names=", ".join(EXPORTS)),
                param_hint="--to",
            )
    return names
