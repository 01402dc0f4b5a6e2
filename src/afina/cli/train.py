"""`afina train RECIPE [KEY=VALUE ...]`."""

from afina.cli.options import Debug, Json, Out, Overrides, Recipe


def command(
    recipe: Recipe, overrides: Overrides = None, out: Out = None, json: Json = False, debug: Debug = False
) -> None:
    """Fine-tune as a recipe says."""
    from afina import pipeline

    pipeline.train(recipe, out, overrides or [])
