"""The verb `afina plan`, as prose: a recipe read, everything weighed, and told. Leaves nothing but rendered samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina.artifact import RUNS
from afina.console import console
from afina.forecast.gpus import find, named
from afina.language import _
from afina.recipe.load import load, places_told


def plan(
    recipe: str | Path, overrides: Sequence[str] = (), *, gpu: str | None = None, memory: float | None = None
) -> dict[str, Any]:
    """Say whether a recipe will fit, how long it takes, and what else it could be; returns all of it as plain values.

    `gpu` names a card that is not here, `memory` its GiB. Loads no weights and trains nothing. Raises AfinaError for
    what would end a training before its first step, but for memory, which `fits` tells.
    """
    wanted, folder = load(Path(recipe), overrides), Path(recipe).resolve().parent
    card = named(gpu) if gpu is not None and memory is None else find(gpu or "", memory) or find(gpu or "")

    from afina.model.load import spare_imports

    spare_imports()
    from afina.data.cache import FOLDER
    from afina.export.beforehand import why_no_gguf
    from afina.forecast.foresee import foresee
    from afina.forecast.said import facts_of, say

    if (error := why_no_gguf(wanted, folder)) is not None:
        raise error
    console.heading(_("Planning {name}").format(name=wanted.name))
    with places_told(Path(recipe), overrides):
        found = foresee(
            wanted,
            folder,
            lambda change: load(Path(recipe), [*overrides, *change]),
            RUNS / FOLDER,
            card,
            memory,
            console,
        )
    say(found, console)
    facts = facts_of(found)
    console.event("plan", **facts)
    return facts
