"""Options and arguments that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

from afina.console import console
from afina.language import _


def _set_json(wanted: bool) -> None:
    console.json = console.json or wanted


def _set_debug(wanted: bool) -> None:
    console.debug = console.debug or wanted


Json = Annotated[
    bool,
    typer.Option("--json", callback=_set_json, expose_value=False, help=_("Print JSON lines for machines.")),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", callback=_set_debug, expose_value=False, help=_("Show tracebacks.")),
]
Recipe = Annotated[Path, typer.Argument(help=_("A recipe file."), show_default=False)]
Run = Annotated[Path, typer.Argument(help=_("A run folder."), show_default=False)]
Source = Annotated[
    str,
    typer.Argument(help=_("A recipe file, or data: a file, a folder, a pattern or a bundled set."), show_default=False),
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        help=_("Changes to the recipe, or to its defaults, such as model.base=Qwen/Qwen3-0.6B."), show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help=_("Changes to the recipe, such as training.epochs=1."), show_default=False),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help=_("The run folder to make; runs/NAME if not given."))]
