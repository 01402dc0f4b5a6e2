"""The verbs of `afina data`, as prose: what each reads, does and leaves. Python API and command line both call these.

Each takes a recipe file, or a data source alone, with the same changes as `afina train` (`load_or_default`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina import durable
from afina.artifact import parent, seal, sha256
from afina.console import console
from afina.data.audit.finding import Finding, Report
from afina.data.read import read
from afina.data.split import Part, deal, parts_of, written
from afina.errors import DataError, ModelError, OutputError
from afina.language import _
from afina.recipe.load import load_or_default
from afina.recipe.place import model_source
from afina.recipe.schema import Recipe


def check(
    source: str | Path,
    changes: Sequence[str] = (),
    *,
    html: str | Path | None = None,
    fix: str | Path | None = None,
    strict: bool = False,
    near: bool = False,
) -> Report:
    """Look at every row of a data source, or of all that a recipe names, and tell what is wrong.

    Of a recipe the labels are looked at too, as its model's tokenizer and chat template make them. html: a page to
    write; fix: a new folder for a repaired copy; near: look for rows that are nearly the same too. Raises DataError
    when rows cannot be used, with `strict` also when one has a warning.
    """
    from afina.data.audit.fix import Mend
    from afina.data.audit.kinds import Severity
    from afina.data.audit.run import Audit, of_recipe
    from afina.data.audit.tell import say, say_changes

    recipe, folder = load_or_default(str(source), changes)
    data, held_out = of_recipe(recipe)
    labelled = str(source).endswith((".yaml", ".yml")) or any(change.startswith("model.") for change in changes)
    mend = Mend()

    def tell(found: Finding) -> None:
        console.event("finding", **found.facts())
        if fix is not None:
            mend.note(found)

    labels, about = _labels(recipe, folder) if labelled else (None, [])
    report = Audit(data, folder, held_out, labels, tell, near).run(console)
    for kind, detail in about:
        report.add(Finding(kind, Path(source), 0, 0, 0, detail))
    say(report, console, folder)
    if html is not None:
        from afina.data.audit.page import page

        durable.write_text(Path(html), page(report, str(source)))
        console.line(_("Page      {path}").format(path=html))
    if fix is not None:
        say_changes(mend.write(Path(fix), report, data), mend, Path(fix), console)
    worst = report.worst()
    if worst is Severity.ERROR or (strict and worst is Severity.WARNING):
        raise DataError(
            _("{count} of {rows} rows cannot be used.").format(count=report.rejected, rows=report.rows)
            if report.rejected
            else _("There are findings that should be looked at."),
            hint=_("Mend them, or write a repaired copy with --fix FOLDER."),
        )
    return report


def _labels(recipe: Recipe, folder: Path) -> tuple[Any, list[tuple[str, str]]]:
    """What judges labels as this recipe's model will see them, and what is odd about its tokenizer."""
    from afina.data.audit.labels import Labels, of_tokenizer
    from afina.data.template import Renderer
    from afina.data.tokenizer import load_tokenizer
    from afina.export.gguf_vocab import read_vocabulary

    model = recipe.model
    source = model_source(model.base, folder)
    tokenizer = load_tokenizer(source, template=model.chat_template, folder=folder, revision=model.revision)
    about = of_tokenizer(tokenizer)
    if Path(source).is_dir() and set(recipe.export.formats) - {"merged"}:
        try:
            read_vocabulary(Path(source))
        except ModelError as error:
            about.append(("unknown-splitter", error.message))
    return Labels(Renderer(tokenizer, recipe.data.learn), model.max_length), about


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
