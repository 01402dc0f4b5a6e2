"""What a run leaves on the disk, and what it takes for a while: checkpoints, the adapter, exported files."""

from pathlib import Path

from afina.errors import ModelError
from afina.export.merge import needed_on_disk
from afina.forecast.weigh import Given, Need
from afina.model.hub import words_of
from afina.recipe.schema import Full


def on_disk(given: Given, need: Need) -> dict[str, int | None]:
    """Bytes: `checkpoints`, at the most while it trains; `kept`, what was trained; `exports`, and the merged model they
    come of. None: not to be told before the base's weights are here."""
    recipe = given.recipe
    learnt = need.learnt * 4
    moments = need.parts["moments"]
    copies = recipe.training.keep_checkpoints + 1  # the newest is whole before the oldest goes
    best = learnt if recipe.training.keep == "best" else 0
    return {
        "checkpoints": copies * (learnt + moments) + best,
        "kept": need.parameters * 4 if isinstance(recipe.method, Full) else learnt,
        "exports": _exports(given, need),
    }


def _exports(given: Given, need: Need) -> int | None:
    formats = given.recipe.export.formats
    if not formats:
        return 0
    base = words_of(given.source, given.recipe.model.revision)
    if base is None:
        return None
    try:
        return needed_on_disk(Path(base), need.parameters, formats, given.recipe)
    except (ModelError, OSError):
        return None
