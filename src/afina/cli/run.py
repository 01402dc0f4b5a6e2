"""`afina run RECIPE [KEY=VALUE ...]`."""

from afina.cli.options import Debug, Json, Out, Overrides, Recipe


def command(
    recipe: Recipe, overrides: Overrides = None, out: Out = None, json: Json = False, debug: Debug = False
) -> None:
    """All of it."""
    from afina import pipeline

    pipeline.run(recipe, out, overrides or [])
