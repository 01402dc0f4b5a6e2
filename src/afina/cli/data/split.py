"""`afina data split SOURCE [KEY=VALUE ...] --into train,validation=0.1,test=200`."""

from pathlib import Path
from typing import Annotated

import typer

from afina.cli.options import Changes, Debug, Json, Source
from afina.language import _

Into = Annotated[
    str,
    typer.Option(
        "--into",
        help=_("The files to make: a name takes what is left, NAME=0.1 a share of the rows, NAME=200 so many rows."),
    ),
]
Folder = Annotated[Path, typer.Option("--out", "-o", help=_("The new folder for the files."))]


def command(
    source: Source,
    changes: Changes = None,
    into: Into = "train,validation=0.1",
    out: Folder = Path("split"),
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Training, validation and test files."""
    from afina import dataset

    dataset.split(source, into, out, changes or [])
