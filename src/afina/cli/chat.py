"""`afina chat SOURCE`."""

from typing import Annotated, Literal

import typer

from afina.cli.options import Debug, Json
from afina.language import _

Source = Annotated[
    str, typer.Argument(help=_("A run folder, a model folder, a hub name or a GGUF file."), show_default=False)
]


def command(
    source: Source,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help=_("Ask this once and leave."))] = None,
    beside_base: Annotated[bool, typer.Option("--beside-base", help=_("Show the base's answers too."))] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help=_("A personality on this base: a run or an adapter; may be repeated.")
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help=_("The system message."))] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help=_("0 always takes the likeliest token."))] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.01, max=1, help=_("Share of likely tokens sampled from."))
    ] = None,
    effort: Annotated[
        Literal["low", "medium", "high"] | None, typer.Option(help=_("How long a model that reasons thinks."))
    ] = None,
    seed: Annotated[int, typer.Option(help=_("Makes sampling repeatable."))] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Several turns, streamed."""
    from afina import pipeline

    settings = {"system": system, "temperature": temperature, "top_p": top_p, "effort": effort}
    given = {key: value for key, value in settings.items() if value is not None}
    pipeline.chat(source, prompt=prompt, beside_base=beside_base, adapters=adapter or (), seed=seed, **given)
