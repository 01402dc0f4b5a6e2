"""Which run an unfinished run folder holds, and whether this is the one to go on with.

`state.json` lies in a run folder from before the first step until the manifest stands: what is trained from what, by
hash. The same recipe, data, base and rendered samples go on; anything else is refused, with the difference.
"""

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina import durable
from afina.artifact import MANIFEST
from afina.errors import OutputError
from afina.language import _
from afina.recipe.schema import Recipe

if TYPE_CHECKING:
    from afina.data.template import Rendered

STATE = "state.json"
CHECKPOINTS = "checkpoints"
PLAN = "plan.json"
"""How the engine runs a micro-batch, see engine/plan.py: what is done again on going on is done the same way."""
WORKING = (STATE, CHECKPOINTS, PLAN, durable.LOCK)
"""What a run folder holds only while it is unfinished."""
FORMAT = 1
FREE = ("checkpoint_minutes", "keep_checkpoints")
"""Keys of `training` that change nothing in the result, so they may change between two sessions."""
SHOWN = 10
STATE_BYTES = 2**26


def is_unfinished(place: Path) -> bool:
    """Whether `place` is a run folder of ours that was begun and not finished, or was only just claimed."""
    if (place / MANIFEST).exists() or place.is_symlink() or not place.is_dir():
        return False
    names = {path.name for path in place.iterdir() if durable.PARTIAL not in path.name}  # state.json half-written
    return STATE in names or names <= {durable.LOCK}


def refuse_other_recipe(place: Path, recipe: Recipe) -> None:
    """Say at once, before anything is loaded, that the folder holds a run of another recipe. Raises OutputError."""
    if (place / STATE).is_file():
        different = _differing(_stated(place)["recipe"], recipe.resolved())
        if different:
            _refuse(place, different)


def begin(place: Path, recipe: Recipe, parents: list[dict[str, str]], samples: Iterable["Rendered"]) -> str:
    """Note what this folder will hold, or make sure that it is what it holds already; returns the run's hash.

    Raises OutputError naming what differs.
    """
    rendered = hashlib.sha256()
    for row in samples:
        weights = b"" if row.weights is None else row.weights.tobytes() + b"\2"
        rendered.update(row.ids.tobytes() + b"\0" + row.learnt.tobytes() + b"\1" + weights)
    wanted = {
        "format": FORMAT,
        "recipe": recipe.resolved(),
        "parents": parents,
        "samples": rendered.hexdigest(),
    }
    if not (place / STATE).is_file():
        durable.write_json(place / STATE, {**wanted, "began": datetime.now(UTC).isoformat(timespec="seconds")})
        return _digest(wanted)
    found = _stated(place)
    if _digest(found) != _digest(wanted):
        different = _differing(found["recipe"], wanted["recipe"]) + _changed(found["parents"], parents)
        _refuse(place, different or [_("the samples look different to the model: its tokenizer or template changed")])
    return _digest(wanted)


def clear(place: Path) -> None:
    """Take away what only an unfinished run needs, once the manifest stands."""
    if (place / MANIFEST).is_file():
        for name in (CHECKPOINTS, PLAN, STATE):
            durable.remove(place / name)


def _stated(place: Path) -> dict[str, Any]:
    file = place / STATE
    try:
        if file.is_symlink() or file.stat().st_size > STATE_BYTES:
            raise ValueError
        found = json.loads(file.read_bytes())
        if found["format"] != FORMAT:
            raise ValueError
        return {key: found[key] for key in ("format", "recipe", "parents", "samples")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(
            _("{file} cannot be read, so this run cannot go on.").format(file=file),
            hint=_("Remove the folder to begin anew, or go on with the version of afina that began it."),
        ) from error


def _digest(stated: dict[str, Any]) -> str:
    """Names of files and the free keys left out: a run may move to another folder or machine."""
    recipe = {**stated["recipe"], "training": {k: v for k, v in stated["recipe"]["training"].items() if k not in FREE}}
    read = sorted((entry["role"], entry["sha256"]) for entry in stated["parents"])
    return hashlib.sha256(json.dumps([recipe, read, stated["samples"]], sort_keys=True).encode()).hexdigest()


def _differing(then: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [key for key in {**then, **now} if path != "training" or key not in FREE]
        places = ((key, f"{path}.{key}" if path else key) for key in keys)
        return [found for key, place in places for found in _differing(then.get(key), now.get(key), place)]
    return [] if then == now else [f"{path}: {json.dumps(then)} → {json.dumps(now)}"]


def _changed(then: list[dict[str, str]], now: list[dict[str, str]]) -> list[str]:
    before = {entry["sha256"] for entry in then}
    changed = [entry["name"] for entry in now if entry["sha256"] not in before]
    gone = len(then) - len(now)
    return [_("{file} has changed").format(file=name) for name in changed] or (
        [_("{count} file(s) fewer").format(count=gone)] if gone > 0 else []
    )


def _refuse(place: Path, different: list[str]) -> None:
    raise OutputError(
        _("{path} holds an unfinished run that differs from this one:").format(path=place)
        + "\n"
        + "\n".join(different[:SHOWN]),
        hint=_(
            "Undo the change to go on with it, give this one another name (name: in the recipe, or --out), or remove "
            "the folder."
        ),
    )
