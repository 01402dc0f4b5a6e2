"""`afina push RUN OWNER/NAME`."""

from typing import Annotated

import typer

from afina.cli.options import Debug, Json, Run
from afina.language import _

KINDS = ("adapter", "merged", "gguf")


def command(
    run: Run,
    repository: Annotated[str, typer.Argument(help=_("OWNER/NAME on the hub."), show_default=False)],
    what: Annotated[str, typer.Option(help=_("What goes: adapter, merged, gguf; several with commas."))] = "adapter",
    public: Annotated[bool, typer.Option("--public", help=_("A repository that is made can be seen by all."))] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=_("Only say what would go."))] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The card, the certificate and the files, in one commit."""
    from afina import pipeline

    kinds = [name.strip() for name in what.split(",") if name.strip()]
    for name in kinds:
        if name not in KINDS:
            raise typer.BadParameter(
                _("{name} is not one of {names}.").format(name=repr(name), names=", ".join(KINDS)), param_hint="--what"
            )
    pipeline.push(run, repository, kinds, private=not public, dry_run=dry_run)
