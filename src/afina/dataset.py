"""The verbs of `afina data`, as prose: what each reads, does and leaves. Python API and command line both call these.

Each takes a recipe file, or a data source alone, with the same changes as `afina train` (`load_or_default`).
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from afina import durable
from afina.artifact import parent, seal, sha256
from afina.console import console
from afina.data.audit.finding import Finding, Report
from afina.data.files import find, sources
from afina.data.read import read
from afina.data.split import Part, deal, parts_of, written
from afina.data.stats import Figures, advice, figures, spread, warnings
from afina.errors import DataError, OutputError
from afina.language import _
from afina.recipe.load import load_or_default
from afina.recipe.place import schema_file
from afina.recipe.schema import Recipe
from afina.train.examples import renderer_of

CLASSES = 20
"""Classes printed; the event for machines has all of them."""


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
    from afina.data.audit.kind import Severity
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
    targets = _targets(recipe, folder) if data.schema_file is not None else None
    report = Audit(data, folder, held_out, labels, targets, tell, near).run(console)
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


def _targets(recipe: Recipe, folder: Path) -> Any:
    """What holds the answers of this recipe's data to its schema."""
    from afina.data.targets import Targets, read_schema

    schema = read_schema(schema_file(recipe.data.schema_file or "", folder), "data.schema_file")
    return Targets(schema, [file for source in sources(recipe.data) for file in find(source, folder)])


def _labels(recipe: Recipe, folder: Path) -> tuple[Any, list[tuple[str, str]]]:
    """What judges labels as this recipe's model will see them, and what is odd about its tokenizer."""
    from afina.data.audit.labels import Labels, of_tokenizer
    from afina.export.beforehand import why_no_gguf

    renderer = renderer_of(recipe, folder)
    about = of_tokenizer(renderer.tokenizer)
    if (error := why_no_gguf(recipe, folder)) is not None:
        about.append(("unknown-splitter", error.message))
    return Labels(renderer, recipe.model.max_length), about


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
    reading = read(recipe.data.train, recipe.data, folder, with_rows=True)
    dealt = deal(reading.samples, parts, recipe.seed)
    lines = {
        id(sample): written(sample, row.value, reading.spoken[sample.file])
        for sample, row in zip(reading.samples, reading.rows, strict=True)
    }
    with durable.new_folder(place) as new:
        for part, samples in dealt.items():
            durable.write_text(new / f"{part.name}.jsonl", "".join(lines[id(sample)] for sample in samples))
        seal(
            new,
            "split",
            parents=[parent(file, sha256(file), "data") for file in reading.files],
            recipe=recipe.resolved(),
            rows={part.name: len(samples) for part, samples in dealt.items()},
        )
    _say(dealt, place)
    return place


def stats(source: str, changes: Sequence[str] = (), plot: str | Path | None = None) -> Figures:
    """Print what `data.train` holds, as the model sees it, and what that says about the recipe. Raises AfinaError."""
    recipe, folder = load_or_default(source, changes)
    reading = read(recipe.data.train, recipe.data, folder)
    rendered = renderer_of(recipe, folder).samples(reading.samples)
    found = figures(reading.samples, rendered, recipe.model.max_length)
    console.line(
        _("{count} samples in {files} file(s): {dialects}; {forms}; {encodings}").format(
            count=len(reading.samples),
            files=len(reading.files),
            dialects=", ".join(sorted(reading.dialects)),
            forms=", ".join(sorted(reading.forms)),
            encodings=", ".join(reading.encodings),
        )
    )
    named = {_("tokens"): found.lengths, _("learnt tokens"): found.learnt, _("messages"): found.turns}
    rows = {name: spread(values) for name, values in named.items()}
    console.table(
        ["", _("smallest"), _("median"), _("mean"), "95%", _("largest"), _("in all")],
        [[name, *(f"{value:,.0f}" for value in rows[name].values()), f"{named[name].sum():,}"] for name in rows],
    )
    console.line(
        _("{share:.0%} of the tokens are learnt. {over} samples exceed model.max_length ({limit}).").format(
            share=found.share, over=found.over, limit=found.context
        )
    )
    if found.languages:
        told = [f"{name} {count:,}" for name, count in found.languages.most_common()]
        console.line(_("Answers by language: {languages}").format(languages=", ".join(told)))
    if found.classes is not None:
        shown = found.classes.most_common(CLASSES)
        console.table([_("class"), _("samples"), _("share")], _shares(shown, len(reading.samples)))
    suggested = advice(found, recipe)
    for one in suggested:
        said = _("{key}: {now:g} in the recipe, {better:g} suits: {reason}.")
        if one.now == one.better:
            said = _("{key}: {now:g} suits: {reason}.")
        console.line(said.format(**asdict(one)))
    for text in warnings(found, recipe):
        console.warn(text)
    console.event(
        "stats",
        samples=len(reading.samples),
        files=[str(file) for file in reading.files],
        dialects=sorted(reading.dialects),
        tokens=spread(found.lengths),
        learnt_tokens=spread(found.learnt),
        messages=spread(found.turns),
        total_tokens=found.tokens,
        learnt_share=found.share,
        over=found.over,
        losing=found.losing,
        classes=dict(found.classes or {}),
        languages=dict(found.languages),
        advice=[asdict(one) for one in suggested],
    )
    if plot is not None:
        _draw(found, Path(plot))
    return found


def show(
    source: str, changes: Sequence[str] = (), first: int = 1, count: int = 1, html: str | Path | None = None
) -> None:
    """Print samples of `data.train` as the model sees them, or write them as one HTML page. Raises AfinaError."""
    from afina.data.preview import STYLES, page, runs, tokens

    recipe, folder = load_or_default(source, changes)
    reading = read(recipe.data.train, recipe.data, folder)
    chosen = reading.samples[first - 1 : first - 1 + count]
    if not chosen:
        raise DataError(
            _("There is no sample {number}: there are {count}.").format(number=first, count=len(reading.samples)),
            hint=_("Ask for an earlier one with --first."),
        )
    renderer = renderer_of(recipe, folder)
    rows = renderer.samples(chosen)
    shown = [(sample, tokens(row, renderer.tokenizer)) for sample, row in zip(chosen, rows, strict=True)]
    if html is not None:
        durable.write_text(
            Path(html), page(shown, _("{name} as {base} sees it").format(name=source, base=recipe.model.base))
        )
        console.line(_("Written: {path}").format(path=html))
        return
    for sample, found in shown:
        console.heading(sample.where)
        console.spans([(text, STYLES[kind], kind.startswith("learnt")) for text, kind in runs(found)])
        console.spans([(f"{token.id} ", STYLES[token.kind], False) for token in found])
        console.line(
            _("{count} tokens, {learnt} learnt").format(count=len(found), learnt=sum(token.learnt for token in found))
        )
        console.event(
            "sample",
            where=sample.where,
            ids=[token.id for token in found],
            learnt=[token.learnt for token in found],
            texts=[token.text for token in found],
        )


def _shares(counts: Sequence[tuple[str, int]], total: int) -> list[list[object]]:
    return [[name, count, f"{count / total:.1%}"] for name, count in counts]


def _draw(found: Figures, place: Path) -> None:
    from afina.evaluate.spread import lengths

    if place.suffix not in (".svg", ".png"):
        raise OutputError(
            _("{path} is neither .svg nor .png.").format(path=place),
            hint=_("Name the plot lengths.svg or lengths.png."),
        )
    drawn = lengths(found.lengths, found.learnt, found.context, fmt="svg" if place.suffix == ".svg" else "png")
    durable.write_bytes(place, drawn)
    console.line(_("Written: {path}").format(path=place))


def _say(dealt: dict[Part, list], place: Path) -> None:
    total = sum(map(len, dealt.values()))
    console.table(
        [_("file"), _("rows"), _("share")],
        [[place / f"{part.name}.jsonl", len(rows), f"{len(rows) / max(total, 1):.1%}"] for part, rows in dealt.items()],
    )
    console.event("split", folder=str(place), rows={part.name: len(rows) for part, rows in dealt.items()})
