"""The verbs of `afina data`, as prose: what each reads, does and leaves. Python API and command line both call these.

Each takes a recipe file, or a data source alone, with the same changes as `afina train` (`load_or_default`).
"""

from collections.abc import Sequence
from pathlib import Path

from afina import durable
from afina.artifact import parent, seal, sha256
from afina.console import console
from afina.data.read import read
from afina.data.split import Part, deal, parts_of, written
from afina.errors import OutputError
from afina.language import _
from afina.recipe.load import load_or_default


def split(
    source: str, into: str = "train,validation=0.1", out: str | Path = "split", changes: Sequence[str] = ()
) -> Path:
    """Deal the rows of `data.train` out to one JSON Lines file a part; returns the new folder. Raises AfinaError."""
    recipe, folder = load_or_default(source, changes)
    parts, place = parts_of(into), Path(out)
    if place.exists():
        raise OutputError(
            _("{path} exists already.").format(path=place), hint=_("Choose another folder with --out, or remove it.")
        )
    reading = read(recipe.data.train, recipe.data, folder)
    dealt = deal(reading.samples, parts, recipe.seed)
    with durable.new_folder(place) as new:
        for part, samples in dealt.items():
            durable.write_text(new / f"{part.name}.jsonl", "".join(written(sample) for sample in samples))
        seal(
            new,
            "split",
            parents=[parent(file, sha256(file), "data") for file in reading.files],
            recipe=recipe.resolved(),
            rows={part.name: len(samples) for part, samples in dealt.items()},
        )
    _say(dealt, place)
    return place


def _say(dealt: dict[Part, list], place: Path) -> None:
    total = sum(map(len, dealt.values()))
    console.table(
        [_("file"), _("rows"), _("share")],
        [[place / f"{part.name}.jsonl", len(rows), f"{len(rows) / max(total, 1):.1%}"] for part, rows in dealt.items()],
    )
    console.event("split", folder=str(place), rows={part.name: len(rows) for part, rows in dealt.items()})
