"""`afina data show SOURCE [KEY=VALUE ...] --first 1 --count 3`."""

from pathlib import Path
from typing import Annotated

import typer

from afina.cli.options import Changes, Debug, Json, Source
from afina.language import _

First = Annotated[int, typer.Option("--first", min=1, help=_("The number of the first sample to show."))]
Count = Annotated[int, typer.Option("--count", "-n", min=1, help=_("How many samples to show."))]
Html = Annotated[Path | None, typer.Option("--html", help=_("Write one HTML page instead of printing."))]


def command(
    source: Source,
    changes: Changes = None,
    first: First = 1,
    count: Count = 1,
    html: Html = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """A sample, token by token."""
    from afina import dataset

    dataset.show(source, changes or [], first, count, html)
