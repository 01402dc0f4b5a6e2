"""`afina data translate SOURCE --to es --out translated.jsonl`: by an endpoint, or by a model on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from afina.cli.options import Changes, Debug, Json, Source
from afina.language import _

To = Annotated[str, typer.Option("--to", help=_("The language to translate to, such as es."))]
From = Annotated[str, typer.Option("--from", help=_("The language of the data."))]
Out = Annotated[Path, typer.Option("--out", "-o", help=_("The new file; what is done is kept beside it."))]
Url = Annotated[
    str | None,
    typer.Option("--endpoint", help=_("An OpenAI-compatible address, such as http://127.0.0.1:8080/v1.")),
]
Model = Annotated[
    str,
    typer.Option("--model", help=_("The endpoint's name of the model; without --endpoint a translation model here.")),
]
Key = Annotated[str, typer.Option("--key-variable", help=_("The environment variable that holds the endpoint's key."))]
Parallel = Annotated[int, typer.Option("--parallel", min=1, max=64, help=_("Paragraphs asked for at once."))]
Prices = Annotated[
    tuple[float, float],
    typer.Option("--prices", min=0, help=_("What a million tokens cost, read and written, for the estimate.")),
]
Only = Annotated[bool, typer.Option("--estimate", help=_("Say what it would take, and stop."))]


def command(
    source: Source,
    changes: Changes = None,
    to: To = "es",
    source_language: From = "en",
    out: Out = Path("translated.jsonl"),
    endpoint: Url = None,
    model: Model = "",
    key_variable: Key = "",
    parallel: Parallel = 4,
    prices: Prices = (0.0, 0.0),
    estimate: Only = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Conversations in another language; code, formulas, addresses and keys of JSON stay byte for byte."""
    from afina import translation
    from afina.data.translate import Job

    job = Job(source_language, to, f"{endpoint or 'here'} {model}")
    translation.translate(
        source,
        out,
        job,
        (endpoint, model, key_variable),
        changes or [],
        parallel=parallel,
        prices=prices,
        only_estimate=estimate,
    )
