"""The examples of a recipe: read, split, rendered and audited; or taken from the last run on the same data."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.apart import Apart
from afina.artifact import parent, sha256
from afina.console import Console
from afina.data.audit.labels import audit
from afina.data.cache import WORTH_S, keep, kept, key_of
from afina.data.conversation import Sample
from afina.data.files import find, sources
from afina.data.load_tokenizer import load_tokenizer
from afina.data.read import read
from afina.data.split import split
from afina.data.targets import check_targets, read_schema
from afina.data.template import Rendered, Renderer
from afina.errors import DataError
from afina.garbage import uncollected
from afina.language import _, chosen
from afina.recipe.place import model_source, schema_file
from afina.recipe.schema import Data, Recipe

SHOWN_PROBLEMS = 20
"""Samples with problems printed one by one; the rest is counted, and the manifest has them all."""


@dataclass
class Examples:
    """The samples of a recipe, rendered and audited. `origin`: where those of `train` come from; `files`: by hash.

    `read`: rows that were read, fewer than `rows` where a template's answers are learnt one by one.
    """

    train: list[Rendered]
    origin: list[Sample]
    validation: list[Rendered]
    rejected: list[tuple[Sample, str]]
    rows: int
    read: int
    files: list[dict[str, str]]
    dialects: list[str]
    encodings: dict[str, int]

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the training samples."""
        return sum(row.ids.size for row in self.train)


def prepare(recipe: Recipe, folder: Path, renderer: Renderer, console: Console) -> Examples:
    """Read, split, render and audit the examples. Raises DataError before anything is loaded or trained."""
    data = recipe.data
    reading = read(data.train, data, folder)
    count = len(reading.samples)
    if isinstance(data.validation, float | int):
        kept, held_out = split(reading.samples, data.validation, recipe.seed)
    else:
        other = read(data.validation, data, folder)
        kept, held_out, count = reading.samples, other.samples, count + len(other.samples)
        reading.files += other.files
    if data.schema_file is not None:
        check_targets([*kept, *held_out], read_schema(schema_file(data.schema_file, folder), "data.schema_file"))
    kept, held_out = renderer.apart(kept), renderer.apart(held_out)
    rows = len(kept) + len(held_out)
    _say_apart(count, rows, console)
    rejected: list[tuple[Sample, str]] = []
    rendered: list[list[Rendered]] = []
    for samples in (kept, held_out):
        good, bad = _render(samples, renderer, recipe)
        rendered.append(good)
        rejected += bad
    if not rendered[0]:
        raise DataError(
            _("No sample is left to learn from:") + "\n" + "\n".join(_listed(rejected)),
            hint=_("Raise model.max_length, or shorten the samples."),
        )
    aside = {id(sample) for sample, _reason in rejected}
    encodings = {encoding: len(files) for encoding, files in reading.encodings.items()}
    _say_encodings(encodings, data, console)
    return Examples(
        train=rendered[0],
        origin=[sample for sample in kept if id(sample) not in aside],
        validation=rendered[1],
        rejected=rejected,
        rows=rows,
        read=count,
        files=[parent(file, sha256(file), "data") for file in reading.files],
        dialects=sorted(reading.dialects),
        encodings=encodings,
    )


def renderer_of(recipe: Recipe, folder: Path, source: str | None = None) -> Renderer:
    """What renders the examples of a recipe, with the tokenizer of `source` if not its base's. Raises ModelError."""
    tokenizer = load_tokenizer(
        source or model_source(recipe.model.base, folder),
        template=recipe.model.chat_template,
        folder=folder,
        revision=recipe.model.revision,
        turn_tokens=recipe.model.turn_tokens,
    )
    return Renderer(tokenizer, recipe.data.learn)


def prepare_once(
    recipe: Recipe, folder: Path, renderer: Renderer, console: Console, cache: Path, ahead: Apart | None = None
) -> Examples:
    """As `prepare`, from the entry that an earlier run on the same data left in `cache`, or leaving one there.

    `ahead`: a process that leaves one there meanwhile, if it can (ahead.py).
    """
    key = entry_of(recipe, folder, renderer)
    anew = ahead is not None and ahead.done()
    if ahead is not None:
        ahead.close()  # it holds all that was read
    found = kept(cache, key)
    if found is None:
        began = time.perf_counter()
        with uncollected():
            made = prepare(recipe, folder, renderer, console)
        if time.perf_counter() - began >= WORTH_S:
            keep_examples(made, cache, key)
        return made
    if not anew:
        console.line(_("Data      as it was rendered before: taken from {place}").format(place=cache / key))
    made = _examples_of(*found)
    _say_apart(made.read, made.rows, console)
    _say_encodings(made.encodings, recipe.data, console)
    return made


def entry_of(recipe: Recipe, folder: Path, renderer: Renderer) -> str:
    """The name in the cache of what a recipe's data are rendered to. Raises DataError where there are none."""
    data = recipe.data
    files = [file for source in sources(data) for file in find(source, folder)]
    if data.schema_file is not None:
        files.append(schema_file(data.schema_file, folder))
    parts = {
        "data": data.model_dump(mode="json"),
        "seed": recipe.seed,
        "max_length": recipe.model.max_length,
        "language": chosen(),  # of the reasons why samples were set aside
    }
    return key_of(files, renderer.tokenizer, parts)


def keep_examples(made: Examples, cache: Path, key: str) -> None:
    """Leave them in the cache."""
    keep(cache, key, {"train": made.train, "validation": made.validation}, _facts(made))


def _facts(made: Examples) -> dict[str, Any]:
    """What an entry of the cache says beside the rendered samples."""
    samples = [*made.origin, *(sample for sample, _reason in made.rejected)]
    named = list(dict.fromkeys(str(sample.file) for sample in samples))
    place = {name: number for number, name in enumerate(named)}
    return {
        "named": named,
        "origin": [[place[str(sample.file)], sample.line] for sample in made.origin],
        "rejected": [[place[str(sample.file)], sample.line, reason] for sample, reason in made.rejected],
        "rows": made.rows,
        "read": made.read,
        "files": made.files,
        "dialects": made.dialects,
        "encodings": made.encodings,
    }


def _examples_of(sets: dict[str, list[Rendered]], facts: dict[str, Any]) -> Examples:
    """The examples that an entry of the cache holds; of where they come from it knows file and line."""
    named = [Path(name) for name in facts.pop("named")]
    origin = [Sample((), named[file], line) for file, line in facts.pop("origin")]
    rejected = [(Sample((), named[file], line), reason) for file, line, reason in facts.pop("rejected")]
    train, validation = sets["train"], sets["validation"]
    return Examples(train=train, validation=validation, origin=origin, rejected=rejected, **facts)


def _say_apart(read: int, samples: int, console: Console) -> None:
    """That a template makes more samples than there are rows."""
    if samples > read:
        console.line(
            _(
                "Template  it writes earlier answers otherwise than the last, so each answer is learnt as a sample of "
                "its own: {rows} rows, {samples} samples (data.learn: last learns the last answers only)"
            ).format(rows=read, samples=samples)
        )


def _say_encodings(encodings: Mapping[str, int], data: Data, console: Console) -> None:
    """That files were read otherwise than as the first encoding of the recipe."""
    for encoding, count in encodings.items():
        if encoding != data.encoding[0]:
            console.warn(_("{count} file(s) read as {encoding}.").format(count=count, encoding=encoding))


def _render(
    samples: list[Sample], renderer: Renderer, recipe: Recipe
) -> tuple[list[Rendered], list[tuple[Sample, str]]]:
    """Rendered samples that pass the audit, and those set aside. Raises DataError where none may be."""
    rendered = renderer.samples(samples)
    limit = recipe.model.max_length
    too_long = {id(sample) for sample, row in zip(samples, rendered, strict=True) if row.ids.size > limit}
    reasons: dict[int, tuple[Sample, str]] = {}
    for sample, reason in audit(samples, rendered, renderer.tokenizer, limit):
        reasons[id(sample)] = (sample, f"{reasons[id(sample)][1]}; {reason}" if id(sample) in reasons else reason)
    aside = too_long if recipe.data.too_long == "reject" else set()
    fatal = [problem for key, problem in reasons.items() if key not in aside]
    if fatal:
        raise DataError(
            _("{count} of {all} samples cannot be learnt as they are:").format(count=len(fatal), all=len(samples))
            + "\n"
            + "\n".join(_listed(fatal)),
            file=fatal[0][0].file,
            line=fatal[0][0].line,
            hint=_(
                "Raise model.max_length, shorten them, or set data.too_long to reject to go on without the long ones."
            )
            if all(id(sample) in too_long for sample, _reason in fatal)
            else _("Mend these samples, or use a chat template that closes the answer (model.chat_template)."),
        )
    good = [row for sample, row in zip(samples, rendered, strict=True) if id(sample) not in aside]
    return good, list(reasons.values())


def say_examples(examples: Examples, console: Console) -> None:
    """Account for every row: what is learnt, what is kept back, and which were set aside and why."""
    console.line(
        _("Data      {rows} rows = {train} to learn + {validation} for validation + {rejected} rejected").format(
            rows=examples.rows,
            train=len(examples.train),
            validation=len(examples.validation),
            rejected=len(examples.rejected),
        )
    )
    for line in _listed(examples.rejected):
        console.line(f"          {line}")
    console.event(
        "data",
        rows=examples.rows,
        train=len(examples.train),
        validation=len(examples.validation),
        rejected=places(examples.rejected),
    )


def places(rejected: Sequence[tuple[Sample, str]]) -> list[dict[str, str | int]]:
    """Rejected samples for the manifest and for machines."""
    return [{"file": str(sample.file), "line": sample.line, "reason": reason} for sample, reason in rejected]


def _listed(problems: Sequence[tuple[Sample, str]]) -> list[str]:
    """The first problems, a line each, and how many more there are."""
    shown = [f"{sample.where}: {reason}" for sample, reason in problems[:SHOWN_PROBLEMS]]
    more = len(problems) - len(shown)
    return [*shown, _("... and {count} more").format(count=more)] if more else shown
