"""The rows of a run, prepared by a process of its own while this one still imports torch.

It leaves them where the last run on the same data would have left them (data/cache.py), and nothing else: rows that are
wrong are found again, and told, by who trains.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from afina.apart import Apart, cores
from afina.data.files import find, sources
from afina.data.hub import HUB
from afina.errors import AfinaError
from afina.garbage import uncollected
from afina.recipe.schema import Recipe

LEAST_BYTES = 2**20
"""Less is prepared in the second that a process takes to begin."""


@contextmanager
def rows_ahead(recipe: Recipe, folder: Path, place: Path) -> Iterator[Apart | None]:
    """A process that prepares the rows of a recipe for the run in `place`; None where it would not save time."""
    if "torch" in sys.modules or cores() == 1 or not _is_large(recipe, folder):
        yield None
        return
    with Apart(f"{__name__}:prepare_rows") as process:
        yield process.begin(recipe=recipe.resolved(), folder=str(folder), place=str(place))


def prepare_rows(recipe: dict[str, Any], folder: str, place: str) -> bool:
    """What the process does; False where it was done by an earlier run.

    A tokenizer needs nothing of torch, which would take seconds to load.
    """
    sys.modules["torch"] = None  # type: ignore[assignment]
    from afina.console import console
    from afina.data.cache import FOLDER, holds
    from afina.train.examples import entry_of, keep_examples, prepare, renderer_of

    wanted, start, cache = Recipe.model_validate(recipe), Path(folder), Path(place).parent / FOLDER
    with uncollected():
        renderer = renderer_of(wanted, start)
        key = entry_of(wanted, start, renderer)
        if holds(cache, key):
            return False
        keep_examples(prepare(wanted, start, renderer, console), cache, key)
    return True


def _is_large(recipe: Recipe, folder: Path) -> bool:
    """Whether there is much to read on this machine. What is wrong with the sources is told later."""
    with suppress(AfinaError, OSError):
        named = sources(recipe.data)
        if not any(name.startswith(HUB) for name in named):
            return sum(file.stat().st_size for name in named for file in find(name, folder)) >= LEAST_BYTES
    return False
