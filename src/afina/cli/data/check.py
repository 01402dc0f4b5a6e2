"""`afina data check SOURCE [KEY=VALUE ...]`."""

from pathlib import Path
from typing import Annotated

import typer

from afina.cli.options import Changes, Debug, Json, Source
from afina.language import _

Page = Annotated[Path | None, typer.Option("--html", help=_("Write the findings as a page, with plots."))]
Fix = Annotated[
    Path | None,
    typer.Option("--fix", help=_("Write a repaired copy into this new folder and show each change.")),
]
Strict = Annotated[bool, typer.Option("--strict", help=_("Fail on warnings too, not on errors alone."))]
Nearly = Annotated[bool, typer.Option("--near", help=_("Look for rows that are nearly the same too; slower."))]


def command(
    source: Source,
    changes: Changes = None,
    html: Page = None,
    fix: Fix = None,
    strict: Strict = False,
    near: Nearly = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Every fault of every row."""
    from afina import dataset

    dataset.check(source, changes or [], html=html, fix=fix, strict=strict, near=near)
