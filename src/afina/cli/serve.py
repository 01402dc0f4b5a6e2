"""`afina serve SOURCE`."""

from typing import Annotated

import typer

from afina.cli.chat import Source
from afina.cli.options import Debug, Json
from afina.language import _


def command(
    source: Source,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help=_("A personality on this base: a run or an adapter; may be repeated.")
        ),
    ] = None,
    host: Annotated[str, typer.Option(help=_("The address to listen on; 0.0.0.0 is all of this machine's."))] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help=_("The port; 0 takes a free one."))] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="AFINA_API_KEY", show_envvar=True, help=_("Answer only those who send this key.")),
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, max=1024, help=_("Answers written together."))] = 32,
    waiting: Annotated[int, typer.Option(min=0, max=4096, help=_("Answers that may wait beyond these."))] = 128,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Until Ctrl-C."""
    from afina import pipeline

    where = {"host": host, "port": port, "key": api_key or None}
    pipeline.serve(source, adapter or (), at_once=at_once, waiting=waiting, **where)
