"""`afina eval RUN`."""

from afina.cli.options import Debug, Json, Run


def command(run: Run, json: Json = False, debug: Debug = False) -> None:
    """Base beside tuned."""
    from afina import pipeline

    pipeline.evaluate(run)
