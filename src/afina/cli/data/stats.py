"""`afina data stats SOURCE [KEY=VALUE ...]`."""

from pathlib import Path
from typing import Annotated

import typer

from afina.cli.options import Changes, Debug, Json, Source
from afina.language import _

Plot = Annotated[
    Path | None, typer.Option("--plot", help=_("Draw the lengths of samples and answers into this .svg or .png file."))
]


def command(
    source: Source, changes: Changes = None, plot: Plot = None, json: Json = False, debug: Debug = False
) -> None:
    """Figures and advice."""
    from afina import dataset

    dataset.stats(source, changes or [], plot)
